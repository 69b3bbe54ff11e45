// The page's service worker: keeps the page's own files, so that it also opens without a network. `worker.js` keeps the model.

const FILES = $files;
const BASE = new URL(".", location), CACHE = "iclip page " + BASE.pathname;
const addresses = FILES.map((file) => new URL(file, BASE).href);

addEventListener("install", (event) => {
  skipWaiting(); // the worker of a newer page takes over at once
  const requests = addresses.map((address) => new Request(address, { cache: "no-cache" }));
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(requests)));
});

addEventListener("fetch", (event) => {
  const address = event.request.url.split(/[?#]/)[0];
  if (addresses.includes(address)) event.respondWith(answer(address, event.request));
});

/** The file from the server, so that a newer page is seen at once; the kept one only where the server cannot be reached. */
async function answer(address, request) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request, { cache: "no-cache" });
    if (response.ok) await cache.put(address, response.clone()).catch(() => null); // a full disk is no error
    return response;
  } catch (error) {
    const kept = await cache.match(address);
    if (!kept) throw error;
    return kept;
  }
}
