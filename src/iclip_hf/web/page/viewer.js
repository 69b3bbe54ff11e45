// Shows a map of 256 levels over the image for each text, in the live demo and in the exported page, with colours,
// opacity, outline, segments, the value under the pointer, and a picture to save.

const WHITE = 0xffffffff, BLACK = 0xff000000; // bytes: alpha, blue, green, red
const SEGMENT_OPACITY = 0.65;
const FADED = 0.35; // opacity of an absent text's panel, as in viewer.css
const NAMES = { heat: "Heat", cividis: "Colour-blind safe", jet: "Jet" };

const packed = ([red, green, blue, alpha = 255]) => (alpha << 24 | blue << 16 | green << 8 | red) >>> 0;
const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

function create(tag, parent, properties = {}) {
  return parent.appendChild(Object.assign(document.createElement(tag), properties));
}

// Fills a canvas by `setPixels`, which gets an array with a number of four bytes for each pixel, transparent at first.
function paint(canvas, setPixels) {
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  setPixels(new Uint32Array(pixels.data.buffer));
  context.putImageData(pixels, 0, 0);
}

/**
 * Fills an element with the controls, the maps and the table of scores.
 *
 * @param theme `colors`: name -> 256 colours, [red, green, blue, alpha] in 0..255; `opacity` of the maps; `segments`:
 *   colours of texts; `limits` of the words of presence.
 * @returns `show({photo, size, originalSize, texts, madeBy})` starts with a photograph that `drawImage` takes, the
 *   texts, and how the maps are made, which the saved picture says;
 *   `add(index, {score, presence, word, levels, low, high, unrefined})` adds the answer for a text: the presence and
 *   its word are null for a model without presence; `levels` is the map in 0..255, row-major, of `size` (width,
 *   height); `low` and `high` are the raw values of 0 and 255; `unrefined` is the map before its refinement, in
 *   0..255, or null;
 *   `savePicture()` downloads all panels as they are seen.
 */
export function createViewer(element, theme) {
  element.innerHTML = `
    <div class="controls">
      <label><input name="opacity" type="range" min="0" max="1" step="0.01" value="${theme.opacity}">
        Opacity of the maps <output></output></label>
      <label><input name="threshold" type="range" min="0" max="1" step="0.01" value="1">
        Outline of values above <output></output></label>
      <label class="check"><input name="segments" type="checkbox">
        Segments: each pixel in the colour of its best text</label>
      <fieldset><legend>Colours</legend>${Object.keys(theme.colors).map((name, index) =>
        `<label class="check"><input name="colors" type="radio" value="${name}" ${index ? "" : "checked"}>
          ${NAMES[name]}</label>`
      ).join("")}</fieldset>
    </div>
    <div class="maps"></div>
    <output class="visually-hidden" aria-live="polite"></output>
    <table hidden>
      <caption class="visually-hidden">Scores of the texts</caption>
      <thead></thead>
      <tbody></tbody>
    </table>`;
  const [opacity, threshold, segments, ...choices] = element.querySelectorAll("input");
  const [opacityOutput, thresholdOutput, spoken] = element.querySelectorAll("output");
  const gallery = element.querySelector(".maps"), table = element.querySelector("table");
  const palettes = Object.fromEntries(
    Object.entries(theme.colors).map(([name, colors]) => [name, colors.map(packed)]));
  let shown = null; // {photo, size, originalSize}
  let panels = []; // one for each text: {text, heat, outline, ring, label, ...}, later with `levels` and scores
  let overview = null; // the panel of segments

  const ready = () => panels.filter(({ levels }) => levels);

  function addPanel(text, description) {
    const [width, height] = shown.size;
    const figure = create("figure", gallery), stack = create("div", figure, { className: "stack", tabIndex: 0 });
    stack.setAttribute("role", "img");
    stack.setAttribute("aria-label", description);
    const layers = create("div", stack, { className: "layers" });
    const [photo, heat, outline] = [0, 1, 2].map(() => create("canvas", layers, { width, height }));
    photo.getContext("2d").drawImage(shown.photo, 0, 0, width, height);
    const ring = create("div", stack, { className: "ring", hidden: true });
    const label = create("div", stack, { className: "value", hidden: true });
    const caption = create("figcaption", figure, { textContent: text });
    return { text, figure, stack, photo, heat, outline, ring, label, caption };
  }

  function show({ texts, ...photo }) {
    shown = photo;
    gallery.replaceChildren();
    table.hidden = true;
    panels = texts.map((text) => addPanel(text, `Map of “${text}”. Arrow keys read its values.`));
    overview = addPanel("", "Each pixel in the colour of its best text");
    setOpacity();
    setSegments();
  }

  function add(index, result) {
    const panel = Object.assign(panels[index], result);
    if (panel.weight) // of a word of a sentence, in [-1, 1]
      panel.caption.style.background = `rgb(${channels(theme.segments[+(panel.weight < 0)]).join(" ")} / ${Math.abs(panel.weight)})`;
    if (panel.word) panel.figure.className = panel.caption.dataset.word = panel.word;
    paintHeat(panel);
    paintOutline(panel);
    paintSegments();
    fillTable();
  }

  function paintHeat({ heat, levels }) {
    const palette = palettes[choices.find(({ checked }) => checked).value];
    paint(heat, (pixels) => levels.forEach((level, pixel) => (pixels[pixel] = palette[level])));
  }

  // A white line inside the region above the threshold, and a black one outside, each about one screen pixel wide.
  function paintOutline({ outline, levels }) {
    const { width, height } = outline, limit = threshold.value * 255;
    const reach = Math.ceil(width / (outline.clientWidth || width));
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

  // Paints each pixel in the colour of its best text, as `Explanation.label_map` finds it. A text takes part if it is
  // not absent and its outline holds the pixel. Without an outline, the threshold is that of `iclip segment`. The best
  // text has the highest value: its map, standardized by its own values and by those of all texts that are not absent,
  // plus a tenth of the logit of its presence.
  function paintSegments() {
    if (!segments.checked || !overview) return;
    const competing = ready().filter(({ word }) => word !== "absent");
    const color = (panel) => theme.segments[panels.indexOf(panel) % theme.segments.length];
    const packedColors = competing.map((panel) => packed(channels(color(panel))));
    const { width, height } = overview.heat;
    const highest = new Float32Array(width * height).fill(-Infinity);
    const limit = (threshold.value === "1" ? 0.5 : threshold.value) * 255;
    const average = (values, term = (value) => value) =>
      values.reduce((sum, value) => sum + term(value), 0) / values.length;
    const moments = competing.map(({ levels, low, high }) => {
      const step = (high - low) / 255, mean = average(levels);
      return { step, mean: low + step * mean, std: step * Math.sqrt(average(levels, (level) => (level - mean) ** 2)) };
    });
    const stdOfAll = Math.sqrt(average(moments, ({ std }) => std ** 2)) || 1;
    paint(overview.heat, (pixels) => competing.forEach(({ levels, low, presence }, index) => {
      const { step, mean, std } = moments[index];
      const probability = Math.min(Math.max(presence ?? 0.5, 1e-4), 1 - 1e-4);
      const offset = 0.1 * Math.log(probability / (1 - probability));
      levels.forEach((level, pixel) => {
        const raw = low + step * level;
        const value = ((raw - mean) / (std || 1) + raw / stdOfAll) / 2 + offset;
        if (level > limit && value > highest[pixel]) [pixels[pixel], highest[pixel]] = [packedColors[index], value];
      });
    }));
    overview.legend = competing.map((panel) => [panel.text, color(panel)]);
    overview.caption.replaceChildren();
    for (const [text, ink] of overview.legend)
      create("i", create("span", overview.caption, { className: "key", textContent: text })).style.background = ink;
    if (!competing.length) overview.caption.textContent = ready().length ? "All texts are absent" : "";
  }

  /** Presence in percent, rounded down if rounding up would give it another word. */
  function percent(presence) {
    const nearest = Number(presence.toFixed(2));
    const crosses = theme.limits.some((limit) => presence < limit && nearest >= limit);
    return Math.round(100 * (crosses ? nearest - 0.01 : nearest));
  }

  function fillTable() {
    const rows = ready(), body = table.tBodies[0];
    const presence = '<th class="number">Presence</th><th></th><th class="bar"></th>';
    const headings = `<th>Text</th><th class="number">Score</th>${rows.some(({ word }) => word) ? presence : ""}`;
    table.hidden = false;
    table.tHead.innerHTML = `<tr>${headings}</tr>`;
    body.replaceChildren();
    for (const { text, score, presence, word } of rows) {
      const row = create("tr", body, { className: word ?? "" });
      create("td", row, { textContent: text });
      create("td", row, { className: "number", textContent: score.toFixed(3) });
      if (!word) continue;
      create("td", row, { className: "number", textContent: `${percent(presence)} %` });
      create("td", row, { textContent: word });
      create("div", create("td", row, { className: "bar" })).style.width = `${100 * presence}%`;
    }
  }

  function setOpacity() {
    opacityOutput.value = Number(opacity.value).toFixed(2);
    for (const { heat } of panels) heat.style.opacity = opacity.value;
    if (overview) overview.heat.style.opacity = SEGMENT_OPACITY;
  }

  function setThreshold() {
    thresholdOutput.value = threshold.value === "1" ? "off" : Number(threshold.value).toFixed(2);
    ready().forEach(paintOutline);
    paintSegments();
  }

  function setSegments() {
    if (segments.checked && overview) gallery.prepend(overview.figure);
    else overview?.figure.remove();
    paintSegments();
  }

  // Shows the value at a point in every map, so that the same pixel of all maps can be compared. `at` is the point in
  // shares of width and height, or falsy to hide the values.
  function probe(at) {
    for (const { ring, label } of [...panels, overview]) ring.hidden = label.hidden = !at;
    if (!at) return;
    const [x, y] = at.map((share, axis) => Math.floor(share * shown.size[axis]));
    const pixel = at.map((share, axis) => Math.floor(share * shown.originalSize[axis])).join(", ");
    const [left, top] = at.map((share) => `${100 * share}%`);
    for (const { ring } of [...panels, overview]) Object.assign(ring.style, { left, top });
    overview.label.textContent = pixel;
    const value = (levels) => (levels[y * shown.size[0] + x] / 255).toFixed(2);
    for (const panel of ready()) {
      panel.value = value(panel.levels);
      panel.label.textContent = `${panel.value} at ${pixel}`;
      if (!panel.unrefined) continue;
      panel.value += `, unrefined ${value(panel.unrefined)}`;
      panel.label.textContent += `\nunrefined ${value(panel.unrefined)}`;
    }
  }

  const clampShare = (share) => Math.min(Math.max(share, 0), 1 - 1e-9);

  function point(event) {
    const stack = event.target.closest?.(".stack");
    if (!shown) return;
    const box = stack?.getBoundingClientRect();
    const shares = stack && [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    probe(shares?.map(clampShare));
  }

  const DIRECTIONS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  let cursor = [0.5, 0.5];

  function move(event) {
    const direction = DIRECTIONS[event.key];
    if (!direction || !event.target.matches(".stack")) return;
    event.preventDefault(); // the page would scroll
    cursor = cursor.map((share, axis) => clampShare(share + direction[axis] / 40));
    probe(cursor);
    spoken.value = ready().map(({ text, value }) => `${text} ${value}`).join(", ");
  }

  // Downloads one picture of all panels as they are seen, under their texts.
  function savePicture() {
    const visible = [...(segments.checked && overview ? [overview] : []), ...ready()];
    if (!visible.length) return;
    const [width, height] = shown.size, gap = 12, line = 28;
    const columns = Math.min(3, visible.length), rows = Math.ceil(visible.length / columns);
    const sheet = document.createElement("canvas");
    Object.assign(sheet, { width: columns * (width + gap) + gap, height: rows * (height + line + gap) + gap + line });
    const context = sheet.getContext("2d");
    context.fillStyle = "white";
    context.fillRect(0, 0, sheet.width, sheet.height);
    visible.forEach(({ text, word, photo, heat, outline, legend }, index) => {
      const x = gap + (index % columns) * (width + gap);
      const y = gap + Math.floor(index / columns) * (height + line + gap);
      const captions = legend ?? [[word ? `${text} · ${word}` : text, "black"]];
      context.font = "600 18px system-ui, sans-serif";
      captions.forEach(([caption, ink], i) => {
        context.fillStyle = ink;
        context.fillText(caption, x + i * width / captions.length, y + 18, width / captions.length - 6);
      });
      context.drawImage(photo, x, y + line);
      context.globalAlpha = heat.style.opacity;
      context.drawImage(heat, x, y + line);
      context.globalAlpha = 1;
      context.drawImage(outline, x, y + line);
      if (word !== "absent") return;
      context.fillStyle = `rgb(255 255 255 / ${1 - FADED})`;
      context.fillRect(x, y + line, width, height);
    });
    context.fillStyle = "black";
    context.font = "14px system-ui, sans-serif";
    context.fillText(shown.madeBy, gap, sheet.height - gap);
    sheet.toBlob((blob) => {
      const href = URL.createObjectURL(blob);
      Object.assign(document.createElement("a"), { href, download: "explanation.png" }).click();
      setTimeout(() => URL.revokeObjectURL(href), 60_000);
    });
  }

  opacity.addEventListener("input", setOpacity);
  threshold.addEventListener("input", setThreshold);
  segments.addEventListener("input", setSegments);
  for (const choice of choices) choice.addEventListener("input", () => ready().forEach(paintHeat));
  for (const name of ["pointermove", "pointerdown", "pointerleave"]) element.addEventListener(name, point);
  element.addEventListener("keydown", move);
  setOpacity();
  setThreshold();
  return { show, add, savePicture };
}
