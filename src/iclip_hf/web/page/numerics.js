// The steps of the processor and the model before and after the two graphs, as pure functions: preparation of the
// image, similarities, presence, enlarged maps. The tests compare each function with its counterpart in Python.

/**
 * The orientation in the EXIF data of a PNG or WebP file, 1 to 8, and the file without these data, because only some
 * browsers turn such files upright. Other files are returned unchanged with 1: all browsers turn JPEG files upright.
 */
export function withoutOrientation(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const letters = (at) => String.fromCharCode(...bytes.subarray(at, at + 4));
  const png = letters(0) === "\x89PNG", webp = letters(0) === "RIFF" && letters(8) === "WEBP";
  for (let at = png ? 8 : 12; (png || webp) && at + 8 <= bytes.length;) {
    const length = view.getUint32(png ? at : at + 4, webp), name = letters(png ? at + 4 : at);
    const end = Math.min(bytes.length, at + (png ? length + 12 : length + 8 + length % 2));
    if (name === "eXIf" || name === "EXIF") {
      const content = new Uint8Array(bytes.length - (end - at));
      content.set(bytes.subarray(0, at));
      content.set(bytes.subarray(end), at);
      if (webp) {
        new DataView(content.buffer).setUint32(4, content.length - 8, true);
        content[20] &= ~8; // the flag for EXIF data
      }
      return { orientation: tiffOrientation(bytes.subarray(at + 8, at + 8 + length)), content };
    }
    at = end;
  }
  return { orientation: 1, content: bytes };
}

function tiffOrientation(bytes) {
  try {
    const start = bytes[0] === 0x45 ? 6 : 0; // "Exif\0\0", which WebP files may have in front
    const view = new DataView(bytes.buffer, bytes.byteOffset + start, bytes.length - start);
    const little = view.getUint8(0) === 0x49, directory = view.getUint32(4, little);
    for (let i = 0; i < view.getUint16(directory, little); i++) {
      const entry = directory + 2 + 12 * i;
      if (view.getUint16(entry, little) !== 0x0112) continue;
      const value = view.getUint16(entry + 8, little);
      return value >= 1 && value <= 8 ? value : 1;
    }
  } catch { /* damaged: the pixels as stored, as in Python */ }
  return 1;
}

const cubic = (a) => (x) => {
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? a * (((x - 5) * x + 8) * x - 4) : 0;
};
const KERNELS = { // weight at a distance, and the distance from which it is 0
  bilinear: [(x) => Math.max(0, 1 - Math.abs(x)), 1],
  bicubic: [cubic(-0.5), 2],
};

/**
 * For each of `target` pixels along one side: its first source pixel, and the weights of the pixels from there on. The
 * weights are integers with the sum 2 ** bits. As in torch's resizing of 8-bit images, `bits` is as large as possible
 * while the largest weight fits into 15 bits.
 */
function antialiased(source, target, [kernel, support]) {
  const scale = source / target, stretch = Math.max(1, scale);
  const taps = Array.from({ length: target }, (_, index) => {
    const center = (index + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support * stretch + 0.5));
    const end = Math.min(source, Math.trunc(center + support * stretch + 0.5));
    const weights = Array.from({ length: end - first }, (_, i) => kernel((first + i + 0.5 - center) / stretch));
    const sum = weights.reduce((sum, value) => sum + value, 0);
    return { first, weights: weights.map((weight) => weight / sum) };
  });
  const largest = taps.reduce((most, { weights }) => Math.max(most, ...weights), 0);
  let bits = 22;
  while (Math.round(largest * 2 ** bits) >= 2 ** 15) bits--;
  const integer = (weight) => Math.sign(weight) * Math.round(Math.abs(weight) * 2 ** bits);
  return { bits, taps: taps.map(({ first, weights }) => [first, Int32Array.from(weights, integer)]) };
}

/**
 * Resizes with antialiasing exactly as torchvision does for 8 bits: in integers, first the width, then the height.
 *
 * @param rgba pixels of four bytes, row-major.
 * @param kernel "bilinear" or "bicubic".
 * @returns pixels of three bytes, row-major.
 */
export function resize(rgba, width, height, newWidth, newHeight, kernel) {
  const wide = new Uint8ClampedArray(3 * newWidth * height);
  const across = antialiased(width, newWidth, KERNELS[kernel]), down = antialiased(height, newHeight, KERNELS[kernel]);
  across.taps.forEach(([first, weights], x) => {
    for (let y = 0; y < height; y++) {
      let red = 0, green = 0, blue = 0;
      for (let i = 0, at = 4 * (y * width + first); i < weights.length; i++, at += 4) {
        red += weights[i] * rgba[at];
        green += weights[i] * rgba[at + 1];
        blue += weights[i] * rgba[at + 2];
      }
      const to = 3 * (y * newWidth + x);
      wide[to] = rounded(red, across.bits);
      wide[to + 1] = rounded(green, across.bits);
      wide[to + 2] = rounded(blue, across.bits);
    }
  });
  const stride = 3 * newWidth, resized = new Uint8ClampedArray(stride * newHeight), sums = new Int32Array(stride);
  down.taps.forEach(([first, weights], y) => {
    sums.fill(0);
    weights.forEach((weight, i) => {
      for (let at = 0, from = (first + i) * stride; at < stride; at++) sums[at] += weight * wide[from + at];
    });
    resized.set(sums.map((sum) => rounded(sum, down.bits)), y * stride);
  });
  return resized;
}

const rounded = (sum, bits) => (sum + (1 << bits - 1)) >> bits;

/** Height and width in pixels that the model sees, as `ICLIPProcessor` computes them. */
export function modelSize({ size, patch }, height, width) {
  if (!size.shortest_edge) return [size.height, size.width];
  const shortest = Math.min(height, width); // in the order of Python's operations, because ties depend on it
  const patches = (side) => Math.max(1, roundHalfToEven((side * size.shortest_edge) / shortest / patch));
  return [height, width].map((side) => patches(side) * patch);
}

function roundHalfToEven(x) {
  const below = Math.floor(x), odd = below % 2;
  return x - below === 0.5 ? below + odd : Math.round(x);
}

/** The floats of `pixel_values`, channel by channel, from three bytes for each pixel. */
export function normalize(rgb, { factor, mean, std }) {
  const pixels = rgb.length / 3, values = new Float32Array(rgb.length);
  for (let channel = 0; channel < 3; channel++)
    for (let i = 0; i < pixels; i++)
      values[channel * pixels + i] = (rgb[3 * i + channel] * factor - mean[channel]) / std[channel];
  return values;
}

export function dot(one, other) {
  let sum = 0;
  for (let i = 0; i < one.length; i++) sum += one[i] * other[i];
  return sum;
}

/** Cosine of each patch with a text; `patches` are unit vectors in one array. */
export function similarities(patches, text) {
  const dim = text.length;
  return Float32Array.from({ length: patches.length / dim }, (_, i) =>
    dot(patches.subarray(i * dim, (i + 1) * dim), text));
}

function range(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high - low || 1]; // a constant map becomes zeros
}

const BELOW_MEAN = 0.1; // as in modeling_iclip.py

/** The raw map, as `ICLIPModel.similarity_maps` computes it. `weight` is the text's weight of signed attention. */
export function rawMap(cosines, attention, { map_attention, max_sharpness }, weight) {
  const [low, span] = range(attention);
  const mean = cosines.reduce((sum, value) => sum + value, 0) / cosines.length;
  const add = (value, a) => {
    const difference = value - mean;
    const added = a * Math.min(difference, 1 / (2 * max_sharpness));
    return mean + (difference > 0 ? difference + added : BELOW_MEAN * difference);
  };
  const weigh = {
    similarity: (value, a) => value * a,
    additive: (value, a) => add(value, (a - low) / span),
    signed: (value, a) => add(value, (weight * (a - low)) / span),
  }[map_attention];
  return weigh ? cosines.map((value, i) => weigh(value, attention[i])) : cosines;
}

/**
 * The score, as `ICLIPModel.scores` computes it, from the cosine of image and text and the cosines of the patches.
 */
export function score(cosine, cosines, { peak_share }) {
  return peak_share ? (1 - peak_share) * cosine + peak_share * Math.max(...cosines) : cosine;
}

/**
 * The probability that the image shows the text, as `ICLIPModel.presence` computes it; null for a model that was
 * trained with a softmax, which has no settings of presence.
 */
export function presence(score, settings) {
  return settings && 1 / (1 + Math.exp(-(settings.scale * score + settings.bias)));
}

/** The presence as a word, as Python's `presence_word`; null without a presence. */
export function presenceWord(value, settings) {
  if (value === null) return null;
  if (!(value >= settings.min_presence)) return "absent";
  return value >= settings.present ? "present" : "unsure";
}

/** For each of `target` pixels along one side: four source pixels and their weights, without antialiasing. */
function bicubic(source, target) {
  const weight = cubic(-0.75), clamp = (i) => Math.min(Math.max(i, 0), source - 1); // torch's constant and edges
  return Array.from({ length: target }, (_, index) => {
    const center = (index + 0.5) * source / target - 0.5, first = Math.floor(center) - 1;
    return [0, 1, 2, 3].map((i) => [clamp(first + i), weight(center - first - i)]);
  });
}

/**
 * Resizes a map of `rows` x `columns`, bicubic, after its minimum is subtracted, so that a constant map stays exactly
 * constant. Returns this difference, resized, and the minimum.
 */
function resizeMap(map, [rows, columns], width, height) {
  const across = bicubic(columns, width), wide = new Float32Array(rows * width);
  const [lowest] = range(map);
  for (let y = 0; y < rows; y++)
    across.forEach((taps, x) => {
      for (const [i, weight] of taps) wide[y * width + x] += weight * (map[y * columns + i] - lowest);
    });
  const above = new Float32Array(height * width);
  bicubic(rows, height).forEach((taps, y) => {
    for (const [i, weight] of taps)
      for (let x = 0; x < width; x++) above[y * width + x] += weight * wide[i * width + x];
  });
  return { above, lowest };
}

/**
 * Enlarges a map of `rows` x `columns` and stretches it to the levels 0..255: bicubic, then min-max (Eq. 4).
 *
 * @returns the levels, and the raw values `low` and `high` of 0 and 255.
 */
export function enlarge(map, grid, width, height) {
  const { above, lowest } = resizeMap(map, grid, width, height);
  const [low, span] = range(above);
  const levels = Uint8Array.from(above, (value) => Math.round(255 * (value - low) / span));
  return { levels, low: low + lowest, high: low + lowest + span };
}

// Constants of the refinement, as in refinement.py. A cell has 2 x 2 pixels.
const CELL = 2, DILATIONS = [1, 2, 4], STEPS = 10, SPREAD = 0.3;

/**
 * For each cell of an image its neighbours and their weights, which depend on the colours. For `refine`.
 *
 * @param rgb pixels of three bytes, row-major, as the model sees them.
 * @returns the `grid` of cells, and `near`: for each of 24 directions the neighbour of each cell (`cells`) and its
 *   weight (`weights`).
 */
export function neighbours(rgb, width, height) {
  const rows = Math.floor(height / CELL), columns = Math.floor(width / CELL), count = rows * columns;
  const colors = new Float64Array(3 * count); // channel by channel
  for (let y = 0; y < rows * CELL; y++)
    for (let x = 0; x < columns * CELL; x++)
      for (let channel = 0; channel < 3; channel++)
        colors[channel * count + (y >> 1) * columns + (x >> 1)] += rgb[3 * (y * width + x) + channel];
  const clamp = (i, length) => Math.min(Math.max(i, 0), length - 1); // cells beyond the edge repeat the nearest one
  const near = [];
  for (const dilation of DILATIONS)
    for (const down of [-dilation, 0, dilation])
      for (const across of [-dilation, 0, dilation])
        if (down || across)
          near.push({
            cells: Int32Array.from({ length: count }, (_, cell) =>
              clamp(Math.floor(cell / columns) + down, rows) * columns + clamp(cell % columns + across, columns)),
            weights: new Float32Array(count),
          });
  for (let cell = 0; cell < count; cell++) {
    const logits = new Float32Array(near.length);
    for (let at = 0; at < 3 * count; at += count) {
      const own = colors[at + cell], others = near.map(({ cells }) => colors[at + cells[cell]]);
      const mean = others.reduce((sum, value) => sum + value, own) / (others.length + 1);
      const squares = others.reduce((sum, value) => sum + (value - mean) ** 2, (own - mean) ** 2);
      const spread = SPREAD * Math.sqrt(squares / others.length) || 1;
      others.forEach((value, i) => (logits[i] -= Math.abs(value - own) / spread / 3));
    }
    const powers = Array.from(logits, (logit) => Math.exp(logit));
    const sum = powers.reduce((sum, value) => sum + value, 0);
    near.forEach(({ weights }, i) => (weights[cell] = powers[i] / sum)); // the softmax of the logits
  }
  return { grid: [rows, columns], near };
}

/** A map on the grid of `neighbours`, refined by the colours of the image, as by `refine_maps` in refinement.py. */
export function refine(map, from, { grid, near }) {
  let { above, lowest } = resizeMap(map, from, grid[1], grid[0]);
  for (let step = 0; step < STEPS; step++) {
    const refined = new Float32Array(above.length);
    for (const { cells, weights } of near)
      for (let cell = 0; cell < refined.length; cell++) refined[cell] += weights[cell] * above[cells[cell]];
    above = refined;
  }
  return above.map((value) => value + lowest);
}
