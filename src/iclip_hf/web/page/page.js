// The page takes an image and texts, asks the worker, and shows its maps and messages.

import { presenceWord } from "./numerics.js";
import { createViewer } from "./viewer.js";

const find = (id) => document.getElementById(id);
const megabytes = (bytes) => (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0);
const NARROW = "(max-width: 720px)"; // as in page.css
const say = (sentence) => (find("status").textContent = sentence);

say("");
const settings = await fetch("settings.json").then((response) => response.json()).catch(() => null);
if (!settings) throw fail("This page misses its settings.json. Serve the whole folder by a web server.");
settings.cache = `iclip ${new URL(".", location).pathname}`; // other pages of this server have caches of their own
if (!globalThis.WebAssembly || !globalThis.OffscreenCanvas)
  throw fail("This browser cannot run the model: it has no WebAssembly, or it is older than 2023. Try another one.");

navigator.serviceWorker?.register("offline.js").catch(() => null); // without it, the page needs the server again
const viewer = createViewer(find("viewer"), settings.theme);
// Started from a blob, so that the page's content security policy also limits where the worker may connect.
const source = `import ${JSON.stringify(new URL("worker.js", location).href)};`;
const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })), { type: "module" });
let chosen = null; // the chosen image: {blob, id}
let job = 0; // number of the newest question
let pending = null; // texts and caption of this question
let choice = 0; // number of the newest choice of an image

find("size").textContent = ` It downloads the model once (${megabytes(settings.bytes)} MB) and keeps it.`;

// ------------------------------------------------------------------------------------------------ asking

/** The typed texts, each once, split as Python's `split_texts` does. If they are invalid, says why, returns null. */
function typedTexts() {
  const typed = find("texts").value, separator = typed.trim().includes("\n") ? "\n" : /(?<!\\),/;
  const parts = typed.split(separator).map((text) => text.replaceAll("\\,", ",").trim());
  const texts = [...new Set(parts.filter(Boolean))];
  const longest = Math.max(0, ...texts.map(({ length }) => length));
  if (longest > settings.max_characters)
    fail(`Expected texts of at most ${settings.max_characters} characters, got one of ${longest}.`);
  else if (texts.length >= 1 && texts.length <= settings.max_texts) return texts;
  else fail(`Expected 1 to ${settings.max_texts} texts, between commas or one a line, got ${texts.length}.`);
  return null;
}

function explain() {
  find("error").hidden = true;
  const texts = typedTexts();
  if (!texts) return;
  history.replaceState(null, "", `#texts=${encodeURIComponent(texts.join("\n"))}`); // for `readLink`
  if (!chosen) return fail("There is no image yet: choose one, drop it here or paste it.");
  const refine = find("refine").checked;
  pending = { texts, madeBy: `itsm, ${refine ? "refined" : "unrefined"}` };
  setBusy(true);
  worker.postMessage({ job: ++job, settings, blob: chosen.blob, imageId: chosen.id, texts, refine });
}

function setChosen(blob) {
  for (const button of find("examples").children) button.removeAttribute("aria-current");
  chosen = { blob, id: (chosen?.id ?? 0) + 1 };
  const preview = find("preview"), old = preview.src;
  preview.src = URL.createObjectURL(blob);
  preview.hidden = false;
  URL.revokeObjectURL(old);
}

function choose(file) {
  if (!file) return;
  choice++;
  setChosen(file);
  explain();
}

/**
 * Chooses an example, unless it cannot be fetched or another image is chosen meanwhile. Returns whether it was chosen.
 */
async function chooseExample(button, { file, texts }) {
  const ownChoice = ++choice;
  const blob = await fetch(file).then((response) => response.ok && response.blob()).catch(() => null);
  if (ownChoice !== choice) return false;
  if (!blob) {
    fail(`The example ${file} could not be fetched: check the connection.`);
    return false;
  }
  setChosen(blob);
  button.setAttribute("aria-current", "true");
  if (texts) find("texts").value = texts;
  return true;
}

// ---------------------------------------------------------------------------------------------- answering

let shown = null; // the image that the worker has: {photo, size, originalSize}, as `viewer.show` takes them
let awaitsFirstMap = true; // whether no map of the question has arrived yet

worker.onmessage = ({ data }) => {
  if (data.job !== undefined && data.job !== job) return; // of an older question
  answers[data.kind](data);
};
worker.onerror = (event) => {
  event.preventDefault();
  setBusy(false);
  fail("The worker could not start: reload the page, or try another browser.");
};

const answers = {
  progress({ loaded, total }) {
    Object.assign(find("progress"), { hidden: false, value: loaded, max: total });
    say(`Downloading the model: ${megabytes(loaded)} of ${megabytes(total)} MB`);
  },
  status({ sentence }) {
    find("progress").hidden = true;
    say(sentence);
  },
  photo({ photo, size, originalSize }) {
    shown?.photo.close();
    shown = { photo, size, originalSize };
  },
  map({ index, ...result }) {
    if (awaitsFirstMap) viewer.show({ ...shown, ...pending });
    viewer.add(index, { ...result, word: presenceWord(result.presence, settings.presence) });
    // On a phone, the maps are below the question. The page scrolls to them only for a visitor who did something.
    const active = navigator.userActivation?.hasBeenActive;
    if (awaitsFirstMap && active && matchMedia(NARROW).matches) find("viewer").scrollIntoView();
    awaitsFirstMap = false;
  },
  done() {
    setBusy(false);
    say("");
    find("after").hidden = false;
  },
  error({ sentence }) {
    setBusy(false);
    fail(sentence);
  },
};

function setBusy(busy) {
  awaitsFirstMap = true;
  find("viewer").setAttribute("aria-busy", busy);
  if (busy) say("Working …");
}

/** Shows a sentence as an error, and returns it as an `Error`. */
function fail(sentence) {
  find("progress").hidden = true;
  say("");
  Object.assign(find("error"), { textContent: sentence, hidden: false });
  return new Error(sentence);
}

// --------------------------------------------------------------------------------------------- the link

/** Puts the texts of the link into the field. Returns whether it has any. */
function readLink() {
  const texts = new URLSearchParams(location.hash.slice(1).replaceAll("+", "%2B")).get("texts");
  if (texts) find("texts").value = texts;
  return Boolean(texts);
}

// ------------------------------------------------------------------------------------------- the controls

find("preview").addEventListener("error", ({ target }) => (target.hidden = true));
for (const id of ["file", "camera"])
  find(id).addEventListener("change", ({ target }) => {
    choose(target.files[0]);
    target.value = ""; // the same file can be chosen again
  });
addEventListener("paste", ({ clipboardData }) => choose(clipboardData.files[0]));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file) choose(file);
  else fail("This is not a file: save the image first, then drop the file.");
});
find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  explain();
});
find("texts").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  explain();
});
find("refine").addEventListener("change", () => shown && explain()); // not before the first question
find("save").addEventListener("click", viewer.savePicture);
find("copy").addEventListener("click", async () => {
  const copied = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
  say(copied ? "The link is copied. It holds the texts, not the image." : `The link: ${location.href}`);
});
addEventListener("hashchange", () => readLink() && chosen && explain());

const linked = readLink();
for (const [index, example] of settings.examples.entries()) {
  const button = find("examples").appendChild(document.createElement("button"));
  button.type = "button";
  Object.assign(button.appendChild(new Image()), { src: example.file, alt: example.title });
  button.addEventListener("click", async () => await chooseExample(button, example) && explain());
  if (index === 0) await chooseExample(button, linked ? { file: example.file } : example);
}
find("photographs").hidden = false;
find("go").disabled = false;
// If the browser has the model already, the first question is answered at once.
if (chosen && await globalThis.caches?.has(settings.cache).catch(() => false)) explain();
