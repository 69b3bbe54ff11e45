// Downloads the model and computes scores and maps, so that the page stays responsive. Nothing leaves the machine.

import * as numerics from "./numerics.js";

const BASE = new URL(".", import.meta.url);
// A larger image is reduced first, because canvases of some browsers hold no more pixels.
const MAX_CANVAS_PIXELS = 2 ** 24;
// Number of texts whose vectors are kept.
const MAX_ENCODED = 1000;

/** An error with a sentence for the visitor. */
class Sentence extends Error {}

let settings; // settings.json, from the page's first question
let asked = null; // the newest question; older ones are dropped
let answering = false;
let loading = null; // promise of the model
let image = null; // features of the last image
const encoded = new Map(); // text -> its vectors and its weight of the attention

onmessage = ({ data }) => {
  settings ??= data.settings;
  asked = data;
  if (!answering) answerAll();
};

async function answerAll() {
  answering = true;
  while (asked) {
    const question = asked;
    asked = null;
    const tell = (message, transfer = []) => postMessage({ ...message, job: question.job }, transfer);
    try {
      await answer(question, tell);
    } catch (error) {
      console.warn(error);
      const sentence = error instanceof Sentence ? error.message
        : `The model could not run here (${String(error?.message ?? error).slice(0, 200)}): reload the page, or try ` +
          "another browser.";
      tell({ kind: "error", sentence });
    }
  }
  answering = false;
}

async function answer({ blob, imageId, texts, refine }, tell) {
  if (image?.id !== imageId) image = null;
  const decoded = image ? null : await decode(blob); // before the download, so that a bad image is reported at once
  const model = await (loading ??= load().catch((error) => { loading = null; throw error; }));
  if (asked) return;
  if (decoded) {
    tell({ kind: "status", sentence: "Looking at the image …" });
    image = { ...await encodeImage(model, decoded), id: imageId };
    const { photo, size, originalSize } = decoded;
    // Without a job, so that the page takes it even if there is a newer question: an image is sent once.
    postMessage({ kind: "photo", photo, size, originalSize }, [photo]);
  }
  for (const [index, text] of texts.entries()) {
    await new Promise((turn) => setTimeout(turn)); // a newer question may arrive
    if (asked) return;
    const { embeds, mapEmbeds, weight } = await encodeText(model, text);
    const cosines = numerics.similarities(image.patches, mapEmbeds);
    const cells = image.cells ? numerics.similarities(image.cells, mapEmbeds) : cosines; // finer than patches
    const score = numerics.score(numerics.dot(image.embeds, embeds), cosines, settings.model);
    let raw = numerics.rawMap(cells, image.attention, settings.model, weight), grid = image.grid, unrefined = null;
    if (refine) {
      unrefined = numerics.enlarge(raw, grid, ...image.size).levels;
      image.neighbours ??= numerics.neighbours(image.rgb, image.shape[1], image.shape[0]);
      raw = numerics.refine(raw, grid, image.neighbours);
      grid = image.neighbours.grid;
    }
    const map = numerics.enlarge(raw, grid, ...image.size);
    const presence = numerics.presence(score, settings.presence);
    const transferred = [map.levels, ...(unrefined ? [unrefined] : [])].map(({ buffer }) => buffer);
    tell({ kind: "map", index, score, presence, ...map, unrefined }, transferred);
  }
  tell({ kind: "done" });
}

// ----------------------------------------------------------------------------------------------------- the image

/**
 * The image of a file: `rgb`, three bytes for each pixel that the model sees, of `shape` [height, width]; `photo`, a
 * bitmap to show, of `size` [width, height]; and `originalSize`, the [width, height] of the upright image in the file.
 */
async function decode(blob) {
  const fileName = blob.name ?? "this image";
  let bitmap, orientation;
  try {
    const stored = numerics.withoutOrientation(new Uint8Array(await blob.arrayBuffer()));
    orientation = stored.orientation;
    const content = new Blob([stored.content], { type: blob.type });
    // The colours as they are stored, which Python reads as well.
    bitmap = await createImageBitmap(content, { colorSpaceConversion: "none" });
  } catch {
    throw new Sentence(
      `${fileName}: this browser cannot read it as a photograph. Save it as JPEG, PNG or WebP and try again` +
      (/hei[cf]/i.test(`${blob.type} ${fileName}`) ? " (of HEIC, only Safari shows the content)." : "."));
  }
  const originalSize = orientation > 4 ? [bitmap.height, bitmap.width] : [bitmap.width, bitmap.height];
  const reduced = draw(bitmap, orientation, Math.sqrt(MAX_CANVAS_PIXELS / (bitmap.width * bitmap.height)));
  const shown = draw(bitmap, orientation, settings.shown_side / Math.max(...originalSize));
  bitmap.close();
  const { width, height } = reduced.canvas;
  const [newHeight, newWidth] = numerics.modelSize(settings.image, height, width);
  if (newHeight * newWidth > settings.image.max_pixels)
    throw new Sentence(
      `${fileName}: at ${originalSize.join(" x ")} pixels it is too narrow for the model. Cut out a part of it.`);
  const rgba = reduced.getImageData(0, 0, width, height).data;
  const rgb = numerics.resize(rgba, width, height, newWidth, newHeight, settings.image.kernel);
  return {
    rgb,
    shape: [newHeight, newWidth],
    size: [shown.canvas.width, shown.canvas.height],
    photo: shown.canvas.transferToImageBitmap(),
    originalSize,
  };
}

/** A canvas context with the bitmap on white, turned upright, and reduced if `scale` is below 1. */
function draw(bitmap, orientation, scale) {
  const [w, h] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * Math.min(1, scale))));
  const [width, height] = orientation > 4 ? [h, w] : [w, h];
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  Object.assign(context, { fillStyle: "white", imageSmoothingQuality: "high" });
  context.fillRect(0, 0, width, height);
  context.setTransform(...[ // by EXIF's numbers
    [1, 0, 0, 1, 0, 0], [-1, 0, 0, 1, w, 0], [-1, 0, 0, -1, w, h], [1, 0, 0, -1, 0, h],
    [0, 1, 1, 0, 0, 0], [0, 1, -1, 0, h, 0], [0, -1, -1, 0, h, w], [0, -1, 1, 0, 0, w],
  ][orientation - 1]);
  context.drawImage(bitmap, 0, 0, w, h);
  return context;
}

async function encodeImage({ ort, vision }, { rgb, shape, size }) {
  const pixels = numerics.normalize(rgb, settings.image);
  const outputs = await vision.run({ pixel_values: new ort.Tensor("float32", pixels, [1, 3, ...shape]) });
  const names = ["image_embeds", "patch_embeds", "map_attention"];
  const [embeds, patches, attention] = names.map((name) => outputs[name].data);
  const grid = (outputs.cell_embeds ?? outputs.patch_embeds).dims.slice(1, 3);
  return { embeds, patches, cells: outputs.cell_embeds?.data, attention, rgb, shape, size, grid };
}

// ------------------------------------------------------------------------------------------------------ the texts

async function encodeText({ ort, text: graph, tokenizer }, text) {
  if (!encoded.has(text)) {
    if (encoded.size >= MAX_ENCODED) encoded.clear();
    const { templates, max_length, pad_to_max, pad_id } = settings.text;
    const prompts = templates.map((template) => tokenIds(tokenizer, template.replaceAll("{}", () => text)));
    const length = pad_to_max ? max_length : Math.max(...prompts.map((ids) => ids.length));
    const inputValue = { // by input of the graph: its value for a token id, which is undefined for padding
      input_ids: (id) => id ?? pad_id,
      attention_mask: (id) => Number(id !== undefined),
      token_type_ids: () => 0,
    };
    const feeds = graph.inputNames.map((name) => {
      const padded = (ids) => Array.from({ length }, (_, i) => BigInt(inputValue[name](ids[i])));
      return [name, new ort.Tensor("int64", BigInt64Array.from(prompts.flatMap(padded)), [1, prompts.length, length])];
    });
    const outputs = await graph.run(Object.fromEntries(feeds));
    const [embeds, mapEmbeds] = [outputs.text_embeds.data, outputs.map_text_embeds.data];
    encoded.set(text, { embeds, mapEmbeds, weight: outputs.attention_weights?.data[0] }); // only of signed attention
  }
  return encoded.get(text);
}

/** The token ids of a prompt, at most as many as the model reads. */
function tokenIds(tokenizer, prompt) {
  // In lower case, Σ at the end of a word is ς in JavaScript, but σ in Python's tokenizers.
  if (String(tokenizer.encode("Σ").ids) === String(tokenizer.encode("σ").ids)) prompt = prompt.replaceAll("Σ", "σ");
  const { max_length } = settings.text, { ids } = tokenizer.encode(prompt);
  if (ids.length <= max_length) return ids;
  // Keeps the special tokens at the end, as Python's tokenizers do.
  const body = tokenizer.encode(prompt, { add_special_tokens: false }).ids;
  const special = ids.length - 1 - ids.lastIndexOf(body.at(-1));
  return [...ids.slice(0, max_length - special), ...ids.slice(ids.length - special)];
}

// ------------------------------------------------------------------------------------------------------ the model

async function load() {
  const gpu = settings.runtime.webgpu && await navigator.gpu?.requestAdapter().catch(() => null);
  const files = { ...settings.runtime[gpu ? "webgpu" : "wasm"], ...settings.files };
  const all = Object.values(files), total = all.reduce((sum, { bytes }) => sum + bytes, 0);
  const loaded = new Map();
  const progress = (file, bytes) => {
    loaded.set(file, Math.min(bytes, file.bytes)); // some servers send the decompressed file
    postMessage({ kind: "progress", loaded: [...loaded.values()].reduce((sum, bytes) => sum + bytes, 0), total });
  };
  const cache = await openCache();
  const settled = await Promise.allSettled(all.map((file) => download(file, cache, progress)));
  for (const { reason } of settled) if (reason) throw reason;
  const content = Object.fromEntries(Object.keys(files).map((name, i) => [name, settled[i].value]));

  postMessage({ kind: "status", sentence: "Starting the model …" });
  const [ort, { Tokenizer }] = await Promise.all([content.ort, content.tokenizers].map(importModule));
  ort.env.logLevel = "error"; // without warnings of where each node runs
  ort.env.wasm.wasmPaths = { mjs: moduleUrl(content.glue) };
  ort.env.wasm.wasmBinary = content.wasm;
  const options = { executionProviders: gpu ? ["webgpu", "wasm"] : ["wasm"] };
  const vision = await ort.InferenceSession.create(content.vision, options);
  const text = await ort.InferenceSession.create(content.text, options);
  const parse = (bytes) => JSON.parse(new TextDecoder().decode(bytes));
  const tokenizer = new Tokenizer(parse(content.tokenizer), parse(content.tokenizer_config));
  await Promise.all((await cache?.keys() ?? []) // deletes the files of earlier exports
    .filter(({ url }) => !all.some((file) => address(file) === url))
    .map((request) => cache.delete(request)));
  return { ort, vision, text, tokenizer };
}

const moduleUrl = (bytes) => URL.createObjectURL(new Blob([bytes], { type: "text/javascript" }));
const importModule = (bytes) => import(moduleUrl(bytes));
const address = ({ url }) => new URL(url, BASE).href;

/** The cache of this page; null where the browser has none, as in private windows and without HTTPS. */
async function openCache() {
  return self.caches?.open(settings.cache).catch(() => null) ?? null;
}

/** The content of a file, from the cache or the server. Anything but the exported file is neither used nor kept. */
async function download(file, cache, progress) {
  const kept = await cache?.match(address(file)).catch(() => null);
  const content = kept && await checked(file, new Uint8Array(await kept.arrayBuffer()));
  if (content) {
    progress(file, file.bytes);
    return content;
  }
  if (kept) await cache.delete(address(file));
  for (const mode of ["default", "reload"]) { // "reload": past the browser's cache, which may hold the wrong file
    const bytes = await fetchBytes(file, progress, mode);
    const content = await checked(file, bytes);
    if (!content) continue;
    progress(file, file.bytes);
    await cache?.put(address(file), new Response(bytes)).catch(() => null); // a full disk is no error
    return content;
  }
  throw new Sentence(`The server sent something other than the file ${name(file)}. Try again later, or report it to ` +
    "the owner of this page.");
}

/** The content of downloaded bytes, decompressed; null if its length or digest is not that of the file. */
async function checked(file, bytes) {
  const content = await decompress(bytes).catch(() => null);
  if (!content || (file.length ?? content.length) !== content.length) return null;
  if (!crypto.subtle) return content; // without HTTPS; gzip has a checksum of its own
  const [algorithm, expected] = file.integrity.split("-");
  const digest = new Uint8Array(await crypto.subtle.digest(algorithm.replace("sha", "SHA-"), content));
  return btoa(String.fromCharCode(...digest)) === expected ? content : null;
}

async function fetchBytes(file, progress, mode) {
  // The browser itself checks the digests of files from elsewhere, also without HTTPS.
  const elsewhere = new URL(address(file)).origin !== BASE.origin;
  try {
    const options = elsewhere ? { integrity: file.integrity, credentials: "omit" } : {};
    const response = await fetch(address(file), { cache: mode, ...options });
    if (!response.ok) throw new Error(response.status);
    const parts = [], reader = response.body.getReader();
    for (let size = 0, part; !(part = await reader.read()).done; progress(file, size += part.value.length))
      parts.push(part.value);
    return new Uint8Array(await new Blob(parts).arrayBuffer());
  } catch {
    if (elsewhere)
      throw new Sentence(`${address(file)} could not be fetched: check the connection and try again.`);
    throw new Sentence(`The download ended early at ${name(file)}. Check the connection and try again; what has ` +
      "arrived is kept.");
  }
}

const name = ({ url }) => url.split("/").at(-1).split("?")[0];

/** The content of a gzip file; the bytes themselves if the server has decompressed it already. */
async function decompress(bytes) {
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return bytes;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
