// What Gradio runs when the viewer is there, after numerics.js and viewer.js. It hands in `element`, `props` and
// `watch`.

const viewer = createViewer(element, props.theme);

watch("value", async () => {
  const value = props.value, photo = Object.assign(new Image(), { src: value.image });
  await photo.decode();
  if (value !== props.value) return; // a newer one came meanwhile
  const texts = value.texts.map(({ text }) => text);
  viewer.show({ photo, size: value.size, originalSize: value.original_size, texts, madeBy: value.made_by });
  value.texts.forEach(({ map, unrefined, ...result }, index) => viewer.add(index, {
    ...result, ...enlarge(map, value.grid, ...value.size),
    unrefined: unrefined && enlarge(unrefined, value.unrefined_grid, ...value.size).levels,
  }));
});
window.addEventListener("iclip-save-picture", viewer.savePicture);
