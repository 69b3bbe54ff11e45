// The service worker of the page. It keeps the page's own files, so that the page also opens without a network.
// `worker.js` keeps the model.

const FILES = $files; // name -> digest, in hexadecimal digits
const BASE = new URL(".", location), CACHE = "iclip page " + BASE.pathname;
const digests = new Map(Object.entries(FILES).map(([file, digest]) => [new URL(file, BASE).href, digest]));

addEventListener("install", (event) => {
  skipWaiting(); // the worker of a newer page takes over at once
  event.waitUntil(Promise.all([...digests.keys()].map(async (address) => {
    const response = await fetch(address, { cache: "no-cache" });
    // After this error, the browser tries again at the next visit.
    if (!await keep(address, response)) throw new Error(`$${address} is not the exported file`);
  })));
});

addEventListener("fetch", (event) => {
  const address = event.request.url.split(/[?#]/)[0];
  if (digests.has(address)) event.respondWith(answer(address, event));
});

/**
 * Answers with the file from the server, so that a newer page is seen at once. Only if the server cannot be reached,
 * answers with the kept file.
 */
async function answer(address, event) {
  try {
    const response = await fetch(event.request, { cache: "no-cache" });
    event.waitUntil(keep(address, response.clone()).catch(() => null)); // a full disk is no error
    return response;
  } catch (error) {
    const kept = await (await caches.open(CACHE)).match(address);
    if (!kept) throw error;
    return kept;
  }
}

/**
 * Keeps a response if it is the exported file, and returns whether it is. Error pages, login pages, empty bodies and
 * files of a newer export are not kept.
 */
async function keep(address, response) {
  const content = await response.clone().arrayBuffer();
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  const right = [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("") === digests.get(address);
  if (right) await (await caches.open(CACHE)).put(address, response);
  return right;
}
