// Keeps the page, so that it opens without network. A new version takes the place of the old one only when it is whole.

const FILES = [
  "./", "app.js", "device.js", "worker.js", "style.css", "manifest.webmanifest", "icon.svg", "icon-192.png", "icon-512.png",
].map((name) => new URL(name, self.registration.scope).href);
const RUNTIME = new URL("ort/", self.registration.scope).href;
const CURRENT = new URL("current", self.registration.scope).href; // holds the name of the cache that is whole

self.addEventListener("install", (event) => event.waitUntil(refresh().then(() => self.skipWaiting())));
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("message", (event) => event.waitUntil(refresh().catch(() => {}))); // without network: later

self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  const plain = new URL(url);
  plain.search = "";
  if (method !== "GET") return;
  if (url.startsWith(RUNTIME)) event.respondWith(fromRuntime(url));
  else if (FILES.includes(plain.href)) event.respondWith(fromPage(plain.href, event.request));
});

async function fromPage(name, request) {
  const current = await (await caches.open("pages")).match(CURRENT);
  const found = current && (await (await caches.open(await current.text())).match(name));
  return found ?? fetch(request);
}

/** The runtime's files have its version in their address, so what is kept is never old. */
async function fromRuntime(url) {
  const cache = await caches.open("runtime");
  const found = await cache.match(url);
  if (found) return found;
  const response = await fetch(url);
  if (response.ok) {
    const version = new URL(url).search;
    for (const other of await cache.keys()) if (new URL(other.url).search !== version) await cache.delete(other);
    await cache.put(url, response.clone());
  }
  return response;
}

async function refresh() {
  const answers = await Promise.all(FILES.map((name) => fetch(name, { cache: "no-cache" })));
  if (!answers.every((answer) => answer.ok)) throw new Error("the page is not whole");
  const contents = await Promise.all(answers.map((answer) => answer.clone().arrayBuffer()));
  const digest = await crypto.subtle.digest("SHA-256", await new Blob(contents).arrayBuffer());
  const name = `page-${Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
  const pages = await caches.open("pages");
  if ((await (await pages.match(CURRENT))?.text()) === name) return;
  const cache = await caches.open(name);
  await Promise.all(FILES.map((file, number) => cache.put(file, answers[number])));
  await pages.put(CURRENT, new Response(name));
  for (const other of await caches.keys()) if (other.startsWith("page-") && other !== name) await caches.delete(other);
}
