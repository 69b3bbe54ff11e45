// What Gradio runs when the viewer is there, after viewer.js. It hands in `element`, `props` and `watch`.

const viewer = createViewer(element, props.colors);

// Base64 of a zlib stream -> the map's values 0..255, row-major.
async function decode(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

watch("value", async () => {
  const value = props.value, photo = Object.assign(new Image(), { src: value.image });
  const [levels] = await Promise.all([Promise.all(value.texts.map(({ map }) => decode(map))), photo.decode()]);
  if (value !== props.value) return; // a newer one came meanwhile
  viewer.show({ photo, size: value.size, originalSize: value.original_size, texts: value.texts.map(({ text }) => text) });
  value.texts.forEach((one, index) => viewer.add(index, { ...one, levels: levels[index] }));
});
window.addEventListener("iclip-save-picture", viewer.savePicture);
