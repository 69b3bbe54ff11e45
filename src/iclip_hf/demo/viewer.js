// Draws one overlay a text. The maps come once an explanation; opacity, outline, the value under the pointer and the picture
// to save are made here, without the server. Gradio hands in `element`, `props` and `watch`.

element.innerHTML = `
  <div class="controls">
    <label>Opacity of the maps <output></output>
      <input name="opacity" type="range" min="0" max="1" step="0.01" value="0.5"></label>
    <label>Outline of values above <output></output>
      <input name="threshold" type="range" min="0" max="1" step="0.01" value="1"></label>
  </div>
  <div class="maps"></div>
  <table hidden>
    <thead><tr><th>Text</th><th class="number">Cosine</th><th class="number">Presence</th><th class="bar"></th></tr></thead>
    <tbody></tbody>
  </table>`;

const [opacity, threshold] = element.querySelectorAll("input");
const [opacityOutput, thresholdOutput] = element.querySelectorAll("output");
let panels = []; // one a text: {text, levels, heat, outline, ring, label}

function create(tag, parent, properties = {}) {
  return parent.appendChild(Object.assign(document.createElement(tag), properties));
}

// Base64 of a zlib stream -> the map's values 0..255, row-major.
async function decode(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Fills a canvas by `draw`, which sets pixels in an array of four bytes each, all transparent before.
function paint(canvas, draw) {
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  draw(new Uint32Array(pixels.data.buffer));
  context.putImageData(pixels, 0, 0);
}

const WHITE = 0xffffffff, BLACK = 0xff000000; // alpha, blue, green, red
const colors = props.colors.map(([red, green, blue]) => (0xff << 24 | blue << 16 | green << 8 | red) >>> 0);

function paintHeat({ heat, levels }) {
  paint(heat, (pixels) => levels.forEach((level, index) => (pixels[index] = colors[level])));
}

// A white line inside and a black one outside of the region above the threshold, of about one pixel of the screen.
function paintOutline({ outline, levels }) {
  const { width, height } = outline, limit = threshold.value * 255, reach = Math.ceil(width / outline.clientWidth);
  paint(outline, (pixels) => {
    for (let y = 0; y < height; y++)
      for (let x = 0; x < width; x++) {
        const index = y * width + x, inside = levels[index] > limit;
        if (
          (x >= reach && levels[index - reach] > limit !== inside) ||
          (x < width - reach && levels[index + reach] > limit !== inside) ||
          (y >= reach && levels[index - reach * width] > limit !== inside) ||
          (y < height - reach && levels[index + reach * width] > limit !== inside)
        ) pixels[index] = inside ? WHITE : BLACK;
      }
  });
}

function setOpacity() {
  opacityOutput.value = Number(opacity.value).toFixed(2);
  for (const { heat } of panels) heat.style.opacity = opacity.value;
}

function setThreshold() {
  thresholdOutput.value = threshold.value === "1" ? "off" : Number(threshold.value).toFixed(2);
  panels.forEach(paintOutline);
}

// The value under the pointer, in every map: the same pixel of all of them can be compared.
function probe(event) {
  const stack = event.target.closest(".stack");
  for (const { ring, label } of panels) ring.hidden = label.hidden = !stack;
  if (!stack) return;
  const box = stack.getBoundingClientRect();
  const at = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map((share) =>
    Math.min(Math.max(share, 0), 1 - 1e-9));
  const [x, y] = at.map((share, axis) => Math.floor(share * props.value.size[axis]));
  const pixel = at.map((share, axis) => Math.floor(share * props.value.original_size[axis]));
  for (const { levels, ring, label } of panels) {
    Object.assign(ring.style, { left: `${100 * at[0]}%`, top: `${100 * at[1]}%` });
    label.textContent = `${(levels[y * props.value.size[0] + x] / 255).toFixed(2)} at ${pixel.join(", ")}`;
  }
}

async function show() {
  const value = props.value;
  const levels = await Promise.all(value.texts.map(({ map }) => decode(map)));
  if (value !== props.value) return; // a newer one came meanwhile
  const gallery = element.querySelector(".maps");
  gallery.replaceChildren();
  const [width, height] = value.size;
  panels = value.texts.map(({ text, absent }, index) => {
    const figure = create("figure", gallery, { className: absent ? "absent" : "" });
    const stack = create("div", figure, { className: "stack" });
    const photo = create("img", stack, { src: value.image, alt: `Map of “${text}”`, draggable: false });
    const [heat, outline] = [0, 1].map(() => create("canvas", stack, { width, height }));
    const ring = create("div", stack, { className: "ring", hidden: true });
    const label = create("div", stack, { className: "value", hidden: true });
    create("figcaption", figure, { textContent: text });
    return { text, photo, levels: levels[index], heat, outline, ring, label };
  });
  panels.forEach(paintHeat);
  setOpacity();
  setThreshold();

  element.querySelector("table").hidden = false;
  const body = element.querySelector("tbody");
  body.replaceChildren();
  for (const { text, cosine, presence, absent } of [...value.texts].sort((a, b) => b.cosine - a.cosine)) {
    const row = create("tr", body, { className: absent ? "absent" : "" });
    create("td", row, { textContent: text });
    create("td", row, { className: "number", textContent: cosine.toFixed(3) });
    create("td", row, { className: "number", textContent: `${Math.round(100 * presence)} %` });
    create("div", create("td", row, { className: "bar" })).style.width = `${100 * presence}%`;
  }
}

// All overlays as they are seen, under their texts, in one picture.
function savePicture() {
  if (!panels.length) return;
  const [width, height] = props.value.size, gap = 12, line = 28;
  const columns = Math.min(3, panels.length), rows = Math.ceil(panels.length / columns);
  const sheet = document.createElement("canvas");
  Object.assign(sheet, { width: columns * (width + gap) + gap, height: rows * (height + line + gap) + gap });
  const context = sheet.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, sheet.width, sheet.height);
  Object.assign(context, { fillStyle: "black", font: "600 18px system-ui, sans-serif" });
  panels.forEach(({ text, photo, heat, outline }, index) => {
    const x = gap + (index % columns) * (width + gap);
    const y = gap + Math.floor(index / columns) * (height + line + gap);
    context.fillText(`${text}  ${props.value.texts[index].cosine.toFixed(2)}`, x, y + 18, width);
    context.drawImage(photo, x, y + line, width, height);
    context.globalAlpha = opacity.value;
    context.drawImage(heat, x, y + line);
    context.globalAlpha = 1;
    context.drawImage(outline, x, y + line);
  });
  sheet.toBlob((blob) => {
    const href = URL.createObjectURL(blob);
    Object.assign(document.createElement("a"), { href, download: "explanation.png" }).click();
    URL.revokeObjectURL(href);
  });
}

opacity.addEventListener("input", setOpacity);
threshold.addEventListener("input", setThreshold);
for (const name of ["pointermove", "pointerdown", "pointerleave"]) element.addEventListener(name, probe);
window.addEventListener("iclip-save-picture", savePicture);
watch("value", show);
setOpacity();
setThreshold();
