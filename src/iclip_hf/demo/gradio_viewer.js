// Gradio runs this code, after numerics.js and viewer.js, when the viewer is in the page. `element`, `props` and `watch`
// are its arguments.

const viewer = createViewer(element, props.theme);
const rawValues = ({ low, high, levels }) => {
  const bytes = Uint8Array.from(atob(levels), (byte) => byte.charCodeAt(0));
  return Float32Array.from(new Uint16Array(bytes.buffer), (level) => low + (level * (high - low)) / 65535);
};

watch("value", async () => {
  const value = props.value, photo = Object.assign(new Image(), { src: value.image });
  await photo.decode();
  if (value !== props.value) return; // a newer value has arrived
  const texts = value.texts.map(({ text }) => text);
  const highest = value.are_words && Math.max(...value.texts.map(({ score }) => Math.abs(score)));
  viewer.show({ photo, size: value.size, originalSize: value.original_size, texts, madeBy: value.made_by });
  value.texts.forEach(({ map, unrefined, ...result }, index) => viewer.add(index, {
    ...result, weight: highest ? result.score / highest : 0, ...enlarge(rawValues(map), value.grid, ...value.size),
    unrefined: unrefined && enlarge(rawValues(unrefined), value.unrefined_grid, ...value.size).levels,
  }));
});
window.addEventListener("iclip-save-picture", viewer.savePicture);
