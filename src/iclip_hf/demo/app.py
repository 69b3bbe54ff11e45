"""The live demo, a Gradio app that shows a map for each text, with scores and downloads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..backends.explainable import ExplainableModel
from ..backends.loading import load
from ..explainers import METHODS, make_explainer
from ..model.engine import Engine
from ..model.words import explain_words
from ..utils.errors import require_extra
from ..web.viewer import MAX_TEXTS, Example, examples, introduction, read_asset, viewer_theme
from .questions import SeenImage, asked_texts, encode_photo, read_photo, to_npz, viewer_value


with require_extra("demo"):
    import gradio as gr
    from gradio.processing_utils import save_bytes_to_cache, save_file_to_cache
    from gradio.utils import get_upload_folder


MAX_FILE_SIZE = 20 * 2**20  # bytes of an upload
# Number of visitors whose last answer Gradio keeps, up to 8 megabytes each. The default is 10,000. The page does not
# need these answers.
MAX_SESSIONS = 4
# Number of encoded images that are kept, up to 25 megabytes each. An image at one scale and at two scales counts
# twice.
MAX_IMAGES = 2
MAX_CACHE_AGE = 3600  # seconds until files of visitors are deleted
_CSS = """
.gradio-container { max-width: 1280px !important; margin: auto; }
.html-container { padding: 0 !important; }
.wrap:has(> .error) { display: none; }  /* the sentence in the corner says what is wrong */
#photographs .gallery { display: grid; grid-template-columns: repeat(4, 1fr); }
#photographs :is(button, span, .container) { display: block; width: 100%; max-width: none; max-height: none; }
#photographs img { width: 100%; aspect-ratio: 4 / 3; object-fit: cover; }
@media (max-width: 640px) { .gradio-container main { padding: 12px !important; } }
"""


def build_app(model) -> gr.Blocks:
    """Builds the app for a model, or anything that [`load`] takes."""
    model = load(model)
    has_presence = model.presence(torch.zeros(1)) is not None
    # The photographs are copied, because the page shows their paths. Gradio neither copies static files again nor
    # deletes them.
    folder = get_upload_folder()
    photographs = [example._replace(file=Path(save_file_to_cache(example.file, folder))) for example in examples()]
    gr.set_static_paths([str(example.file) for example in photographs])
    settings = {"analytics_enabled": False, "fill_width": True, "delete_cache": (60, MAX_CACHE_AGE)}
    with gr.Blocks(title="ICLIP", **settings) as app:
        gr.Markdown(f"# Which pixels match the text?\n{introduction(has_presence)}")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                question = _add_question(photographs, model.default_method)
            with gr.Column(scale=5, min_width=300):
                viewer, download = _add_answer()
        run = {
            "fn": _explain_function(model, app, photographs, download.GRADIO_CACHE),
            "inputs": [*question[:6]],
            "outputs": [viewer, download],
            "preprocess": False,  # `read_photo` reads the uploaded file itself
            "concurrency_id": "model",
            "trigger_mode": "always_last",
        }
        changes = [setting.change for setting in question[2:6]]
        triggers = [app.load, question.photo.upload, question.typed.submit, *changes, question.button.click]
        gr.on(triggers, **run, api_name="explain")
        question.chosen.success(**run, api_visibility="private")
    app.queue(max_size=32)
    return app


def _explain_function(model: ExplainableModel, app: gr.Blocks, photographs: Sequence[Example], cache: str) -> Callable:
    """Returns the function that answers a question. It writes the arrays of the answer to a file in `cache`."""
    photograph_paths = {str(example.file) for example in photographs}
    explainer = functools.cache(functools.partial(make_explainer, model))

    # Visitors often ask about one image several times.
    @functools.lru_cache(maxsize=MAX_IMAGES)
    def seen_image(path: str, multi_scale: bool) -> SeenImage:
        return encode_photo(Engine(model, model.processor, multi_scale=multi_scale), *read_photo(path))

    def explain(photo: dict | None, typed: str, method: str, refine: bool, multi_scale: bool, words: bool):
        if photo is None:
            raise gr.Error("There is no image: upload one.", print_exception=False)
        # Gradio checks only paths that the request marks as files. The path of an upload has a keyed digest, so only
        # the visitor who uploaded the image knows it.
        if not (photo["path"] in app.upload_file_set or photo["path"] in photograph_paths):
            raise gr.Error("The demo does not have this image any more: upload it again.", print_exception=False)
        try:
            texts = asked_texts(typed, words)
            engine = Engine(model, model.processor, explainer(method), refine=refine, multi_scale=multi_scale)
            seen = seen_image(photo["path"], multi_scale)
            (explanation,) = engine.run([seen.prepared], texts)
            explanation = explain_words(explanation) if words else explanation
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        except OSError as error:  # of a tower that a method loads; the message names places of this machine
            raise gr.Error("The demo cannot load what this method needs: choose another method.") from error
        file = save_bytes_to_cache(to_npz(explanation), "explanation.npz", cache)
        return viewer_value(seen, explanation), file

    return explain


class _Question(NamedTuple):
    photo: gr.Image
    typed: gr.Textbox
    method: gr.Dropdown
    refine: gr.Checkbox
    multi_scale: gr.Checkbox
    words: gr.Checkbox
    button: gr.Button
    chosen: gr.events.Dependency  # a photograph to try was put into `photo`, and its texts into `typed`


def _add_question(photographs: Sequence[Example], default_method: str) -> _Question:
    """Adds the column of the question, which begins with the first photograph."""
    first = photographs[0]
    photo = gr.Image(str(first.file), label="Image", sources=["upload", "clipboard"], height=260, elem_id="photo")
    typed = gr.Textbox(
        first.texts,
        label="Texts",
        info="Between commas, or one a line (shift + enter).",
        max_lines=MAX_TEXTS,
    )
    method = gr.Dropdown([(label, name) for name, (label, _) in METHODS.items()], value=default_method, label="Method")
    refine = gr.Checkbox(True, label="Refine", info="The maps follow the edges of the image.", elem_id="refine")
    multi_scale = gr.Checkbox(
        False, label="Two scales", info="Finer maps and better scores, in ten times the time.", elem_id="multi-scale"
    )
    words = gr.Checkbox(False, label="Words", info="The texts are one sentence, whose words are explained.")
    button = gr.Button("Explain", variant="primary")
    choices = [[str(example.file), example.texts] for example in photographs]  # values of `photo` and `typed`
    thumbnails = gr.Dataset(
        components=[gr.Image(render=False)],
        samples=[[path] for path, _ in choices],
        type="index",
        label="Photographs to try",
        elem_id="photographs",
    )
    settings = {"show_progress": "hidden", "api_visibility": "private"}
    chosen = thumbnails.click(choices.__getitem__, thumbnails, [photo, typed], **settings)
    return _Question(photo, typed, method, refine, multi_scale, words, button, chosen)


def _add_answer() -> tuple[gr.HTML, gr.DownloadButton]:
    """Adds the column of the answer. Returns the viewer of the maps and the button for the file of the arrays."""
    # The exported page loads these files as modules. Gradio runs them as the body of a function, without exports.
    modules = (read_asset("numerics.js") + read_asset("viewer.js")).replace("export function", "function")
    viewer = gr.HTML(
        html_template="",
        css_template=read_asset("viewer.css"),
        js_on_load=modules + Path(__file__).with_name("gradio_viewer.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        theme=viewer_theme(),
    )
    with gr.Row():
        picture = gr.Button("Save picture (PNG)")
        download = gr.DownloadButton("Save scores and maps (NPZ)")
    picture.click(None, js="() => window.dispatchEvent(new Event('iclip-save-picture'))")
    return viewer, download


def launch(
    model: str = "embedded",
    host: str | None = None,
    port: int | None = None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    **kwargs,
) -> gr.Blocks:
    """
    Serves the app until it is interrupted. If host and port are not given, Gradio's defaults are used, which are right
    for a Space. `kwargs` are arguments of `gradio.Blocks.launch`; with `prevent_thread_lock=True` the function returns
    at once.
    """
    app = build_app(load(model, dtype=dtype, device=device))
    app.launch(
        server_name=host,
        server_port=port,
        max_file_size=MAX_FILE_SIZE,
        enable_monitoring=False,  # the monitoring page would show the usage of the demo to everybody
        run_history=False,  # it opens URLs, and buckets of the Hub by this machine's token
        state_session_capacity=MAX_SESSIONS,
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
        footer_links=[],
        **kwargs,
    )
    return app
