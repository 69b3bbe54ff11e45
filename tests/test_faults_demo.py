"""Faults at the door of the demo. See faults.py."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import fault_inputs as inputs
import gradio as gr
import httpx
import pytest
from faults import REFUSED, WORKS, Cases, as_file, test_of_cases

from iclip_hf.demo import app, content


CASES = Cases()


@pytest.fixture(scope="module")
def world(world):
    """With the function behind the page, for a visitor who uploaded the photo."""
    built = app.build_app((world.model, world.processor))
    built.upload_file_set.add(str(world.photo))
    explain = next(function.fn for function in built.fns.values() if function.api_name == "explain")
    return SimpleNamespace(**vars(world), app=explain, uploads=built.upload_file_set)


def explain(world, path, texts="dog"):
    try:
        photo, visitor = {"path": str(path), "orig_name": "image.png"}, SimpleNamespace(session_hash="visitor")
        return world.app(photo, texts, "itsm", False, visitor)
    except gr.Error as error:  # its own text is the repr
        raise ValueError(error.message) from error


def uploaded(world, folder, path):
    world.uploads.add(str(path))
    return explain(world, path)


CASES.add_images("app", as_file(uploaded))
LONG = {name: text for name, text in inputs.DRAWN_TEXTS.items() if len(text) > content.MAX_CHARACTERS}
SHORT = {name: text for name, text in inputs.DRAWN_TEXTS.items() if name not in LONG}
for texts, fate, shows in ((SHORT, WORKS, ""), (inputs.TYPED_TEXTS, REFUSED, ""), (LONG, REFUSED, "got one of ")):
    CASES.add("text of app", texts, lambda world, folder, one: explain(world, world.photo, one), fate, shows=shows)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def server(world):
    running = app.launch(str(world.folder / "model"), "127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield running.local_url
    running.close()


def test_the_app_serves_only_its_own_files(server, world):
    for path in (
        "/etc/passwd",
        world.photo,
        world.folder / "model" / "config.json",
        "../../etc/passwd",
        ROOT / "train.py",
    ):
        for address in (f"gradio_api/file={path}", f"file={path}", f"static/{path}", f"gradio_api/stream/{path}"):
            answer = httpx.get(server + address)
            assert answer.status_code in (400, 403, 404, 405) and "root:" not in answer.text, address
    traversal = httpx.post(
        f"{server}gradio_api/upload", files={"files": ("../../escaped.png", inputs.BY_FORMAT["PNG"])}
    )
    assert traversal.status_code != 200 or ".." not in traversal.json()[0]


def test_the_app_fetches_nothing_from_elsewhere(server):
    """Whatever address a visitor names as an image, nobody is asked for it."""
    asked = []

    class Neighbour(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(inputs.BY_FORMAT["PNG"])

        def log_message(self, *arguments):
            pass

    neighbour = ThreadingHTTPServer(("127.0.0.1", 0), Neighbour)
    threading.Thread(target=neighbour.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{neighbour.server_port}/secret.png"
    try:
        for photo in (
            {"path": address},
            {"path": address, "url": address},
            {"path": None, "url": address},
            {"path": "photo.png", "url": address},
        ):
            call = f"{server}gradio_api/call/explain"
            body = {
                "data": [{**photo, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}, "dog", "itsm", False]
            }
            answer = httpx.post(call, json=body)
            if answer.status_code == 200:
                event = httpx.get(f"{call}/{answer.json()['event_id']}", timeout=30).text
                assert event.startswith("event: error"), event[:200]
    finally:
        neighbour.shutdown()
    assert not asked


test_a_fault_is_borne_or_refused_in_one_clear_sentence = test_of_cases(CASES)
