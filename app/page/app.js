// The page: takes pictures, has them looked at on the server or on this device, and shows what was seen.

import * as device from "./device.js";

const $ = (id) => document.getElementById(id);
const SHOWN = 5;
const AT_ONCE = 2;
const PATIENCE = 5; // times that a picture is sent to a service that is busy

const standalone = matchMedia("(display-mode: standalone)").matches || navigator.standalone === true;
const place = () => document.querySelector("[name=place]:checked").value;
const secret = () => sessionStorage.getItem("key");
const authorization = () => (secret() ? { Authorization: `Bearer ${secret()}` } : {});
const percent = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 1 });

const jobs = []; // pictures that wait: {file, card, tries}
let busy = 0;
let done = []; // what was found since the last announcement

// --- what is asked -------------------------------------------------------------------------------------------------

class Refusal extends Error {
  constructor(status, detail, wait) {
    super(detail);
    Object.assign(this, { status, wait });
  }
}

/** What the service says of a picture: {classes: [{class, probability}], sure: true, false or null, heat}. */
async function askServer(file) {
  const body = new FormData();
  body.append("files", file, file.name);
  const response = await fetch(`predict?top=${SHOWN}&heat=true`, { method: "POST", body, headers: authorization() });
  const answer = await response.json();
  if (!response.ok) throw new Refusal(response.status, answer.detail, Number(response.headers.get("Retry-After")));
  return answer.predictions[0];
}

/** The same from the model on this device. */
async function askDevice(file) {
  const { about, probabilities, heat } = await device.classify(file);
  const classes = about.card.classes
    .map((name, code) => ({ class: name, probability: probabilities[code] }))
    .sort((one, other) => other.probability - one.probability)
    .slice(0, SHOWN);
  const from = about.card.sure_from;
  return { classes, sure: from === null ? null : classes[0].probability >= from, heat };
}

// --- pictures ------------------------------------------------------------------------------------------------------

function add(files) {
  const cards = Array.from(files, (file) => {
    const card = $("card").content.firstElementChild.cloneNode(true);
    const [picture, title] = [card.querySelector("img"), card.querySelector("h3")];
    picture.src = URL.createObjectURL(file);
    picture.onerror = () => (picture.parentElement.hidden = true);
    title.textContent = file.name;
    card.querySelector(".remove").setAttribute("aria-label", `Remove ${file.name}`);
    const job = { file, card, tries: 0 };
    card.querySelector(".remove").onclick = () => remove(job);
    card.querySelector(".again").onclick = () => queue(Object.assign(job, { tries: 0 }));
    queue(job);
    return card;
  });
  $("cards").prepend(...cards);
  $("results").hidden = !$("cards").children.length;
}

function queue(job) {
  job.card.classList.remove("failed");
  job.card.querySelector(".again").hidden = true;
  say(job, "Waiting …");
  jobs.push(job);
  work();
}

function remove(job) {
  const at = jobs.indexOf(job);
  if (at >= 0) jobs.splice(at, 1);
  URL.revokeObjectURL(job.card.querySelector("img").src);
  const next = (job.card.nextElementSibling ?? job.card.previousElementSibling)?.querySelector(".remove");
  job.card.remove();
  (next ?? $("files")).focus();
  $("results").hidden = !$("cards").children.length;
}

function work() {
  while (jobs.length && $("key").hidden && busy < (place() === "server" ? AT_ONCE : 1)) {
    const job = jobs.shift();
    busy += 1;
    look(job).finally(() => {
      busy -= 1;
      if (!busy && !jobs.length) announce();
      work();
    });
  }
}

async function look(job) {
  say(job, "Looking …");
  const key = secret();
  try {
    const answer = await (place() === "server" ? askServer(job.file) : askDevice(job.file));
    show(job, answer);
    done.push([job.file.name, answer]);
  } catch (error) {
    if (error.status === 401) {
      if (key === secret()) askKey(); // another picture may have asked for it already
      jobs.unshift(job);
    } else if ([429, 503].includes(error.status) && ++job.tries < PATIENCE) {
      say(job, `The service is busy; trying again in ${error.wait || 1} s`);
      setTimeout(queue, 1000 * (error.wait || 1), job);
    } else if (error instanceof TypeError && place() === "server" && (await device.kept())) {
      choose("device"); // the network is gone
      queue(job);
    } else {
      fail(job, error instanceof TypeError ? "The service cannot be reached." : error.message);
      done.push([job.file.name, null]);
    }
  }
}

// --- what is shown -------------------------------------------------------------------------------------------------

function say(job, words) {
  job.card.querySelector(".verdict").textContent = words;
}

function fail(job, words) {
  job.card.classList.add("failed");
  job.card.querySelector(".again").hidden = false;
  say(job, words);
}

function show({ card }, { classes, sure, heat }) {
  card.classList.toggle("unsure", sure === false);
  card.querySelector(".verdict").textContent = sure === false ? "Not sure: nothing that it knows stands out." : "";
  card.querySelector(".bars").replaceChildren(
    ...classes.map(({ class: name, probability }) => {
      const [row, bar, label, share] = ["li", "i", "span", "span"].map((kind) => document.createElement(kind));
      bar.style.setProperty("--share", `${100 * probability}%`);
      label.textContent = name;
      share.textContent = percent.format(probability);
      row.append(bar, label, share);
      return row;
    }),
  );
  if (!heat) return;
  const [canvas, look] = [card.querySelector("canvas"), card.querySelector(".look")];
  draw(canvas, heat);
  look.hidden = false;
  look.onclick = () => {
    canvas.hidden = !canvas.hidden;
    look.setAttribute("aria-pressed", String(!canvas.hidden));
  };
}

/** Lay heat, rows of 0 to 1, over the square that the model sees: dark where it did not look. */
function draw(canvas, heat) {
  canvas.height = heat.length;
  canvas.width = heat[0].length;
  const image = new ImageData(canvas.width, canvas.height);
  heat.flat().forEach((share, number) => image.data.set([10, 12, 20, 215 * (1 - share)], 4 * number));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function announce() {
  const failed = done.filter(([, answer]) => !answer).length;
  const unsure = done.filter(([, answer]) => answer?.sure === false).length;
  const [[name, only]] = done.length ? done : [[]];
  if (done.length === 1 && only) {
    const { class: best, probability } = only.classes[0];
    $("status").textContent = `${name}: ${only.sure === false ? "not sure, perhaps " : ""}${best}, ${percent.format(probability)}`;
  } else if (done.length) {
    const words = [unsure && `${unsure} not sure`, failed && `${failed} failed`].filter(Boolean).join(", ");
    $("status").textContent = `${done.length} pictures looked at${words && `: ${words}`}`;
  }
  done = [];
}

function tell(about) {
  const { card, bytes, sha256 } = about;
  const range = [card.accuracy_low, card.accuracy_high].map((share) => percent.format(share)).join(" to ");
  $("classes").textContent =
    `${card.classes.length} classes: ${card.classes.join(", ")}. Whatever else a picture shows is taken for one of them.`;
  $("accuracy").textContent =
    `It named ${percent.format(card.accuracy)} of ${card.test_images} test pictures rightly; on others of their kind, ` +
    `expect ${range}. ` +
    (card.sure_from === null
      ? "From which confidence on it can be trusted is not known: too few validation pictures."
      : `Below a confidence of ${percent.format(card.sure_from)} it says that it is not sure.`);
  $("model").textContent =
    `Network ${card.network}, ${(bytes / 1e6).toFixed(1)} MB, sees ${card.size} × ${card.size} pixels. File ${sha256}.`;
}

// --- where ---------------------------------------------------------------------------------------------------------

function choose(value) {
  document.querySelector(`[name=place][value=${value}]`).checked = true;
  return settle();
}

/** Make ready what looks at pictures, and say what leaves the device. */
async function settle() {
  if (place() === "server") {
    $("privacy").textContent = "Pictures go to the server, which looks at them and keeps none.";
    work();
    return;
  }
  $("privacy").textContent = "No picture leaves this device.";
  try {
    await controlled();
    tell(await device.start(authorization(), (bytes, of) => {
      $("download").hidden = bytes === of;
      $("progress").value = bytes / of;
      $("downloaded").textContent = `Getting the model: ${(bytes / 1e6).toFixed(1)} of ${(of / 1e6).toFixed(1)} MB`;
    }));
    $("status").textContent = "The model is on this device, and works without network.";
  } catch (error) {
    if (error.status === 401) askKey();
    else $("status").textContent = error.message;
  } finally {
    $("download").hidden = true;
  }
  work();
}

/** Wait until the service worker is in charge: only then what runs the model is kept for later. */
async function controlled() {
  if (!navigator.serviceWorker || navigator.serviceWorker.controller) return;
  const taken = new Promise((resolve) => navigator.serviceWorker.addEventListener("controllerchange", resolve));
  await Promise.race([taken, new Promise((resolve) => setTimeout(resolve, 3000))]); // never, after a forced reload
}

function askKey() {
  sessionStorage.removeItem("key");
  $("key").hidden = false;
  $("secret").focus();
}

$("key").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("secret").value);
  $("secret").value = "";
  $("key").hidden = true;
  settle();
};

// --- how pictures come ---------------------------------------------------------------------------------------------

for (const input of [$("files"), $("capture")])
  input.onchange = () => {
    add(input.files);
    input.value = "";
  };

addEventListener("paste", ({ clipboardData }) => add(clipboardData.files));
addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
addEventListener("dragleave", ({ relatedTarget }) => relatedTarget ?? $("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  add(event.dataTransfer.files);
});

$("clear").onclick = () => {
  jobs.length = 0;
  for (const picture of document.querySelectorAll(".card img")) URL.revokeObjectURL(picture.src);
  $("cards").replaceChildren();
  $("results").hidden = true;
  $("status").textContent = "All pictures removed.";
  $("files").focus();
};

let facing = "environment";

async function openCamera() {
  closeCamera();
  try {
    const video = { facingMode: { ideal: facing }, width: { ideal: 1920 } };
    $("video").srcObject = await navigator.mediaDevices.getUserMedia({ video });
  } catch {
    $("capture").click(); // the system's own camera, if there is one
    return;
  }
  const cameras = (await navigator.mediaDevices.enumerateDevices()).filter(({ kind }) => kind === "videoinput");
  $("turn").hidden = cameras.length < 2;
  $("viewfinder").showModal();
  $("video").play();
}

function closeCamera() {
  for (const track of $("video").srcObject?.getTracks() ?? []) track.stop();
  $("video").srcObject = null;
  $("viewfinder").close();
}

$("camera").onclick = openCamera;
$("turn").onclick = () => {
  facing = facing === "user" ? "environment" : "user";
  openCamera();
};
$("close").onclick = closeCamera;
$("viewfinder").oncancel = closeCamera;
$("shoot").onclick = async () => {
  const canvas = new OffscreenCanvas($("video").videoWidth, $("video").videoHeight);
  canvas.getContext("2d").drawImage($("video"), 0, 0);
  const photo = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
  closeCamera();
  add([new File([photo], `Photo, ${new Date().toLocaleTimeString()}`, { type: photo.type })]);
};

// --- the start -----------------------------------------------------------------------------------------------------

for (const radio of document.querySelectorAll("[name=place]")) radio.onchange = settle;
addEventListener("offline", () => choose("device"));
navigator.serviceWorker?.register("service-worker.js").then(({ active }) => active?.postMessage("refresh"));

if (standalone) for (const radio of document.querySelectorAll("[name=place]")) radio.disabled = true;
const alone = standalone || !navigator.onLine || new URLSearchParams(location.search).has("device");
choose(alone ? "device" : "server");
if (!alone)
  fetch("model")
    .then((answer) => answer.json())
    .then(tell)
    .catch(async () => ((await device.kept()) ? choose("device") : null));
