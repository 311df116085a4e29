// The model on this device: kept here with its card, and run in a worker, so that the page stays awake.

const RUNTIME = "1.30.0"; // of onnxruntime-web, as in package.json: what is kept of another version is not used
const STORE = "model";
const ENTRY = new URL("kept-model", import.meta.url).href;

let engine = null; // the model that the worker has, or is getting: {about, worker, ready}

/** The card of the model that is kept here, as /model tells it, or null. */
export async function kept() {
  const found = await (await caches.open(STORE)).match(ENTRY);
  return found ? JSON.parse(decodeURIComponent(found.headers.get("X-About"))) : null;
}

/**
 * Keep the server's model here, if it is another one, and start it; without network, the one that is kept.
 * `progress(bytes, of)` is called while it comes. Gives what /model tells, or throws an Error with a sentence.
 */
export async function start(headers = {}, progress = () => {}) {
  let about = await kept();
  try {
    const current = await json(await fetch("model", { cache: "no-store" }));
    if (current.sha256 !== about?.sha256) about = await keep(current, headers, progress);
  } catch (error) {
    if (!about) throw error.status ? error : new Error("There is no model on this device yet: connect once to get it.");
  }
  if (engine?.about.sha256 === about.sha256) return engine.ready;
  engine?.worker.terminate();
  const begun = { about, worker: new Worker(`worker.js?runtime=${RUNTIME}`, { type: "module" }), waiting: new Map(), number: 0 };
  begun.worker.onmessage = ({ data }) => {
    const { resolve, reject } = begun.waiting.get(data.number);
    begun.waiting.delete(data.number);
    if ("error" in data) reject(new Error(data.error));
    else resolve(data.result);
  };
  begun.worker.onerror = () => {
    for (const { reject } of begun.waiting.values()) reject(new Error("The model cannot run in this browser."));
    begun.waiting.clear();
    if (engine === begun) engine = null;
  };
  const file = await (await (await caches.open(STORE)).match(ENTRY)).arrayBuffer();
  begun.ready = ask(begun, { file }, [file]).then(() => about);
  engine = begun;
  return begun.ready;
}

/**
 * Classify a picture: {about, probabilities: Float32Array, heat: number[][] | null}, the probabilities in the order of
 * about.card.classes. Throws an Error with a sentence where the browser cannot read it.
 */
export async function classify(blob) {
  if (!engine) await start();
  const used = engine;
  await used.ready;
  return { about: used.about, ...(await ask(used, { blob })) };
}

function ask(used, message, moved = []) {
  return new Promise((resolve, reject) => {
    const number = ++used.number;
    used.waiting.set(number, { resolve, reject });
    used.worker.postMessage({ number, ...message }, moved);
  });
}

async function json(response) {
  const found = await response.json();
  if (!response.ok) throw Object.assign(new Error(found.detail), { status: response.status });
  return found;
}

/** Fetch the model file, and keep it and its card as one entry, which is replaced at once or not at all. */
async function keep(about, headers, progress) {
  const response = await fetch("model.onnx", { headers, cache: "no-store" });
  if (!response.ok) await json(response);
  const content = new Uint8Array(about.bytes);
  let length = 0;
  for await (const piece of pieces(response.body)) {
    if (length + piece.length > content.length) break;
    content.set(piece, length);
    progress((length += piece.length), content.length);
  }
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  const sha256 = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (sha256 !== about.sha256) throw new Error("The model was replaced while it came, or is damaged: try again.");
  const card = { "X-About": encodeURIComponent(JSON.stringify(about)) };
  await (await caches.open(STORE)).put(ENTRY, new Response(content, { headers: card }));
  navigator.storage?.persist?.();
  return about;
}

async function* pieces(stream) {
  const reader = stream.getReader(); // Safari cannot iterate over a stream
  for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
}
