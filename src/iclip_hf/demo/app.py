"""The live demo, a Gradio app that shows one map for each text, with scores and downloads."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import io
import os
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .. import __version__
from ..explainers import METHODS
from ..explainers.localizer import Localizer, PreparedImage
from ..explanation import Explanation
from ..hub.model_card import front_matter
from ..images import load_image
from ..models.loading import load
from ..presence import presence_word
from ..prompts import split_texts
from ..utils.extras import require_extra
from ..utils.files import write_files
from .content import EXAMPLES, INTRODUCTION, MAX_CHARACTERS, MAX_TEXTS, SPACE, beside, example_files, look, view_size


with require_extra("demo"):
    import gradio as gr
    from gradio.processing_utils import save_bytes_to_cache
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse


MAX_FILE_SIZE = "20mb"  # `load_image` limits the number of pixels
# By default Gradio keeps the last answer, up to two megabytes, of 10,000 visitors. The page does not need them.
MAX_SESSIONS = 64
# Limits for files of visitors: uploads, and an archive of up to six megabytes for each answer.
MAX_CACHE_AGE = 3600  # seconds
MAX_CACHE_SIZE = 2 * 2**30  # bytes
_CACHE_CHECK = 10  # seconds between two checks
# Routes of Gradio that this app does not need. They fetch addresses or store files that are never deleted.
_UNUSED_ROUTES = ("file=http", "proxy=", "process_recording", "component_server", "deep_link", "run-history")
_SPACE_CARD = {"title": "ICLIP", **SPACE, "sdk": "gradio", "sdk_version": gr.__version__, "app_file": "app.py"}
_SPACE_README = """
The live demo of [ICLIP](https://arxiv.org/abs/2209.07046) in `iclip_hf`: drop an image, type texts, see one map a text.
"""
_SPACE_APP = '''"""Live demo: which pixels of an image match a text."""

from iclip_hf.demo.app import launch


launch({model!r})
'''
_CSS = """
.gradio-container { max-width: 1280px !important; margin: auto; }
.html-container { padding: 0 !important; }
.wrap:has(> .error) { display: none; }  /* the sentence in the corner says what is wrong */
#photographs .gallery { display: grid; grid-template-columns: repeat(4, 1fr); }
#photographs :is(button, span, .container) { display: block; width: 100%; max-width: none; max-height: none; }
#photographs img { width: 100%; aspect-ratio: 4 / 3; object-fit: cover; }
@media (max-width: 640px) { .gradio-container main { padding: 12px !important; } }
"""


def asked_texts(typed: str) -> list[str]:
    """Returns the texts that a visitor typed, each once. Raises `ValueError` if they are too many or too long."""
    texts = list(dict.fromkeys(split_texts(typed)))
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise ValueError(f"Type 1 to {MAX_TEXTS} texts, between commas or one a line, not {len(texts)}.")
    longest = max(map(len, texts))
    if longest > MAX_CHARACTERS:
        raise ValueError(f"Texts have at most {MAX_CHARACTERS} characters, but one has {longest}.")
    return texts


class SeenImage(NamedTuple):
    """A visitor's image, kept for further texts."""

    prepared: PreparedImage  # without the image, with its features if the method can use them for other texts
    view: dict  # `image`, a data URL; its `size` and the `original_size`, (width, height)


def look_at(localizer: Localizer, image: Image.Image) -> SeenImage:
    """Prepares an RGB image for any texts with the method of a localizer. Its maps have the size of the view."""
    size, photo = view_size(image), io.BytesIO()
    image.resize(size).save(photo, "JPEG", quality=85)
    url = "data:image/jpeg;base64," + base64.b64encode(photo.getvalue()).decode()
    prepared = localizer.encode(localizer.prepare(image, size=size[::-1]))
    return SeenImage(prepared._replace(image=None), {"image": url, "size": size, "original_size": image.size})


def explain_image(localizer: Localizer, seen: SeenImage, texts: list[str]) -> Explanation:
    """Explains texts with the method of the localizer that prepared the image."""
    localizer = localizer.about(texts)
    (explanation,) = localizer.explain([seen.prepared._replace(rows=list(range(len(texts))))])
    return explanation


def viewer_value(seen: SeenImage, explanation: Explanation) -> dict:
    """Returns the data for `gradio_viewer.js`, with raw maps on a grid of (rows, columns), which the browser enlarges."""
    raw_maps = -explanation.raw_maps if explanation.reversed else explanation.raw_maps
    return {
        **seen.view,
        "grid": list(raw_maps.shape[1:]),
        "texts": [
            {
                "text": text,
                "cosine": round(cosine, 4),
                "presence": present,
                "word": presence_word(present),
                "map": raw_map,
            }
            for text, cosine, present, raw_map in zip(
                explanation.labels,
                explanation.scores.tolist(),
                explanation.presence.tolist(),
                raw_maps.flatten(1).tolist(),
            )
        ],
    }


def to_npz(explanation: Explanation) -> bytes:
    """Returns a NumPy archive: texts, scores and presence `(T,)`, raw maps `(T, h, w)`, and maps `(T, H, W)` in [0, 1], float16."""
    archive = io.BytesIO()
    np.savez(  # compression saves a third, and takes longer than the texts and maps of an image seen before
        archive,
        texts=explanation.labels,
        scores=explanation.scores.numpy(),
        presence=explanation.presence.numpy(),
        raw_maps=explanation.raw_maps.numpy(),
        maps=explanation.maps.half().numpy(),
    )
    return archive.getvalue()


class _App(gr.Blocks):
    """
    An app that opens only files that were uploaded to it and its own examples, in any form of a payload. The path of an upload contains
    a keyed digest of its content, so only the visitor who uploaded the file knows the path.
    """

    examples: frozenset[str] = frozenset()

    async def preprocess_data(self, block_fn, inputs, *arguments, **options):
        """Checks the inputs of a visitor before Gradio opens files or fetches addresses in them."""
        plain = (str, int, type(None))
        inputs = [value if isinstance(value, plain) else self.uploaded(value) for value in inputs]
        return await super().preprocess_data(block_fn, inputs, *arguments, **options)

    def uploaded(self, value) -> dict[str, str]:
        """Returns path and name of an uploaded file, without other fields of `value`."""
        path = value.get("path") if isinstance(value, dict) else None
        if not isinstance(path, str) or not (path in self.upload_file_set or path in self.examples):
            # One message, so that it does not tell whether a path exists.
            message = "Expected a file that was uploaded here, got something else: upload the image again."
            raise gr.Error(message, print_exception=False)
        name = value.get("orig_name")
        name = name if isinstance(name, str) and name else "this file"
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def _refuse_unused_routes(app):
    """ASGI middleware that answers 404 to Gradio's routes that the page does not need."""

    async def answer(scope, receive, send):
        route = scope.get("path", "").partition("/gradio_api/")[2]
        await (PlainTextResponse("Not Found", 404) if route.startswith(_UNUSED_ROUTES) else app)(scope, receive, send)

    return answer


def build_app(model) -> gr.Blocks:
    """
    Builds the app for a model, or anything that [`load`] takes. An explanation runs the model once; the browser computes opacity,
    outline and the value under the pointer.
    """
    model = load(model)
    examples = [[str(path), EXAMPLES[path.name].texts] for path in example_files()]
    first_photo, first_texts = examples[0] if examples else (None, "")
    gr.set_static_paths([path for path, _ in examples])

    @functools.cache
    def localizer(method: str, refine: bool) -> Localizer:  # the texts are set for each image
        return Localizer(model, ["any"], method=method, refine=refine)

    # A visitor often asks about one image several times. Images belong to a session and an upload, oldest first.
    kept: OrderedDict[tuple[str, str, str], SeenImage] = OrderedDict()

    def explain(photo: dict | None, typed: str, method: str, refine: bool, request: gr.Request):
        if photo is None:
            return gr.skip()
        try:
            photo = app.uploaded(photo)  # checked again, because Gradio decides when the first check runs
            texts, asked = asked_texts(typed), (request.session_hash, photo["path"], method)
            seen = kept.get(asked)
            if seen is None:
                seen = look_at(localizer(method, False), load_image(photo["path"], photo["orig_name"]))
            explanation = explain_image(localizer(method, bool(refine)), seen, texts)
            kept[asked] = seen
            kept.move_to_end(asked)
            if len(kept) > MAX_SESSIONS:  # 1.2 megabytes each
                kept.popitem(last=False)
        except (OSError, ValueError, TypeError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        npz = save_bytes_to_cache(to_npz(explanation), "explanation.npz", download.GRADIO_CACHE)
        return viewer_value(seen, explanation), npz

    # Deletes all files of visitors at the end, and old files if the app is not started by `launch`. `delete_files` is faster.
    cache = (600, 2 * MAX_CACHE_AGE)
    with _App(title="ICLIP", analytics_enabled=False, fill_width=True, delete_cache=cache) as app:
        app.examples = frozenset(path for path, _ in examples)
        gr.Markdown(f"# Which pixels match the text?\n{INTRODUCTION}")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                photo = gr.Image(
                    first_photo, label="Image", sources=["upload", "clipboard"], height=260, elem_id="photo"
                )
                typed = gr.Textbox(
                    first_texts,
                    label="Texts",
                    info="Between commas, or one a line (shift + enter).",
                    max_lines=MAX_TEXTS,
                )
                method = gr.Dropdown(
                    [(label, name) for name, (label, _) in METHODS.items()], value="itsm", label="Method"
                )
                refine = gr.Checkbox(
                    False, label="Refine", info="The maps follow the edges of the image.", elem_id="refine"
                )
                button = gr.Button("Explain", variant="primary")
                if examples:
                    thumbnails = gr.Dataset(
                        components=[gr.Image(render=False)],
                        samples=[[path] for path, _ in examples],
                        type="index",
                        label="Photographs to try",
                        elem_id="photographs",
                    )
                    chosen = thumbnails.click(
                        examples.__getitem__,
                        thumbnails,
                        [photo, typed],
                        show_progress="hidden",
                        api_visibility="private",
                    )
            with gr.Column(scale=5, min_width=300):
                viewer = gr.HTML(
                    html_template="",
                    css_template=beside("viewer.css"),
                    # Modules for the page of `web`; Gradio runs a function's body.
                    js_on_load=(beside("web/numerics.js") + beside("viewer.js")).replace("export function", "function")
                    + beside("gradio_viewer.js"),
                    apply_default_css=False,
                    look=look(),
                )
                with gr.Row():
                    picture = gr.Button("Save picture (PNG)")
                    download = gr.DownloadButton("Save scores and maps (NPZ)")
        picture.click(None, js="() => window.dispatchEvent(new Event('iclip-save-picture'))")
        run = {
            "fn": explain,
            "inputs": [photo, typed, method, refine],
            "outputs": [viewer, download],
            "preprocess": False,  # `load_image` reads the uploaded file itself
            "concurrency_id": "model",
            "trigger_mode": "always_last",
        }
        triggers = [app.load, photo.upload, typed.submit, method.change, refine.change, button.click]
        gr.on(triggers, **run, api_name="explain")
        if examples:
            chosen.success(**run, api_visibility="private")
    return app.queue(max_size=32)


def launch(
    model: str = "embedded",
    host: str | None = None,
    port: int | None = None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    **options,
) -> gr.Blocks:
    """
    Serves the app until it is interrupted. Host and port are Gradio's defaults if not given, which are right for a Space. The options
    are those of `gradio.Blocks.launch`; with `prevent_thread_lock=True` the function returns at once.
    """
    app = build_app(load(model, dtype=dtype, device=device))
    app.launch(
        server_name=host,
        server_port=port,
        max_file_size=MAX_FILE_SIZE,
        enable_monitoring=False,  # the monitoring page would show its usage to everybody
        state_session_capacity=MAX_SESSIONS,
        app_kwargs={
            "lifespan": lambda server: _deleting_files(app),
            "middleware": [Middleware(_refuse_unused_routes)],
        },
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
        footer_links=[],
        **options,
    )
    return app


def delete_files(app: gr.Blocks) -> None:
    """
    Deletes files of visitors that are older than `MAX_CACHE_AGE`, then the oldest files until at most `MAX_CACHE_SIZE` bytes are
    left. Gradio's `delete_cache` has no limit of size, leaves an empty folder for each file, and ignores interrupted uploads.
    """
    lasting = {path for component in app.blocks.values() for path in getattr(component, "keep_in_cache", ())}
    files = []
    unfinished = map(str, Path(app.GRADIO_CACHE).glob("tmp*"))
    for path in set().union(unfinished, *map(tuple, app.temp_file_sets)) - lasting:
        with contextlib.suppress(FileNotFoundError):
            stat = os.stat(path)
            files.append((stat.st_ctime, stat.st_size, path))
    young, size = time.time() - MAX_CACHE_AGE, 0
    for created, own_size, path in sorted(files, reverse=True):
        size += own_size
        if created < young or size > MAX_CACHE_SIZE:
            with contextlib.suppress(OSError):  # deleted already, or a folder with several files
                os.remove(path)
                os.rmdir(os.path.dirname(path))
            for paths in app.temp_file_sets:
                paths.discard(path)


def export_space(folder: Path, model: str = "embedded", overwrite: bool = False) -> None:
    """Writes the files of a Space that runs this demo, beside others that the folder holds."""
    files = {
        "README.md": front_matter({**_SPACE_CARD, "license": "apache-2.0"}) + _SPACE_README,
        "app.py": _SPACE_APP.format(model=model),
        "requirements.txt": f"iclip-hf[demo]=={__version__}\n",
    }
    write_files(folder, {name: text.encode() for name, text in files.items()}, overwrite)


@contextlib.asynccontextmanager
async def _deleting_files(app: gr.Blocks) -> AsyncIterator[None]:
    """Runs `delete_files` regularly while the server runs."""

    async def again_and_again() -> None:
        while True:
            await asyncio.sleep(_CACHE_CHECK)
            await asyncio.to_thread(delete_files, app)

    task = asyncio.create_task(again_and_again())
    yield
    task.cancel()
