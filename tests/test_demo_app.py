import base64
import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import gradio
import gradio_client
import httpx
import numpy as np
import pytest
import torch
from conftest import iclip, noise, opened, tiny_model
from gradio_client.exceptions import AppError
from PIL import Image

from iclip_hf import ICLIPModel, explain, load
from iclip_hf.backends import explainable
from iclip_hf.demo import app, questions
from iclip_hf.explainers import make_explainer
from iclip_hf.model.engine import Engine
from iclip_hf.model.explanation import Explanation
from iclip_hf.model.similarity import resize_and_normalize
from iclip_hf.web import viewer


TEXTS = ["dog", "red ball", "sky"]
PATIENT = {"timeout": 60}  # on busy machines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two photographs and a file that is none."""
    folder = tmp_path_factory.mktemp("demo")
    noise((60, 40)).save(folder / "small.png")
    Image.linear_gradient("L").resize((1300, 650)).save(folder / "large.png")
    (folder / "notes.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def explained(tiny_processor):
    image = Image.linear_gradient("L").resize((1300, 650)).convert("RGB")
    engine = Engine(tiny_model(logit_bias_init_value=0.0), tiny_processor)
    seen = questions.encode_photo(engine, image, image.size)
    (explanation,) = engine.run([seen.prepared], TEXTS)
    return image, seen, explanation


def raw_values(sent: dict) -> np.ndarray:
    levels = np.frombuffer(base64.b64decode(sent["levels"]), "<u2").astype(np.float32)
    return sent["low"] + levels * (sent["high"] - sent["low"]) / 65535


def drawn_maps(value: dict) -> np.ndarray:
    """
    The maps `(T, H, W)` in [0, 1] that the browser draws: numerics.js computes the same as Python, as
    tests/test_web.py shows.
    """
    raw_maps = torch.tensor(np.stack([raw_values(row["map"]) for row in value["texts"]])).unflatten(-1, value["grid"])
    return resize_and_normalize(raw_maps, value["size"][::-1]).numpy()


@pytest.fixture(scope="module")
def server(world, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        running = app.launch(str(world.folder / "model"), "127.0.0.1", prevent_thread_lock=True, quiet=True)
        yield running.local_url
        running.close()


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("downloads")
    return gradio_client.Client(server, verbose=False, download_files=folder, httpx_kwargs=PATIENT)


def test_texts_are_typed_between_commas_or_one_a_line():
    assert questions.asked_texts("dog, red ball ,,dog") == ["dog", "red ball"]
    assert questions.asked_texts("a dog, asleep\n\nred ball\n") == ["a dog, asleep", "red ball"]
    for typed in (" , ", ",".join(map(str, range(13))), "dog\n" + "a" * 1001):
        with pytest.raises(ValueError, match="1 to 12 texts|at most 1000 characters"):
            questions.asked_texts(typed)
    assert questions.asked_texts("a dog, asleep", words=True)[:3] == ["a dog, asleep", "dog, asleep", "a , asleep"]
    with pytest.raises(ValueError, match="at most 24 words"):
        questions.asked_texts("dog " * 25, words=True)


def test_the_maps_are_those_of_explain_at_the_size_of_the_view(tiny_processor, explained):
    image, seen, explanation = explained
    model = load((tiny_model(logit_bias_init_value=0.0), tiny_processor))
    # Of the same encoded image.
    (other,) = Engine(model, tiny_processor, make_explainer(model, "grad_cam")).run([seen.prepared], TEXTS)
    for method, found in (("itsm", explanation), ("grad_cam", other)):
        expected = explain(model, image, TEXTS, method, refine=False, target_sizes=[(320, 640)])
        torch.testing.assert_close(found.maps, expected.maps)
        torch.testing.assert_close(found.scores, expected.scores)
        torch.testing.assert_close(found.presence, expected.presence)


def test_the_browser_gets_the_photograph_and_raw_maps(tiny_processor, explained):
    _, seen, explanation = explained
    value = questions.viewer_value(seen, explanation)
    assert value["size"] == (640, 320) and value["original_size"] == (1300, 650)
    photo = Image.open(io.BytesIO(base64.b64decode(value["image"].partition(",")[2])))
    assert photo.size == (640, 320)
    assert [row["text"] for row in value["texts"]] == TEXTS
    assert [row["word"] for row in value["texts"]] == explanation.presence_words
    np.testing.assert_allclose(drawn_maps(value), explanation.maps, atol=1e-4)  # of 65,536 levels
    without = questions.viewer_value(seen, replace(explanation, presence=None))
    assert {(row["presence"], row["word"]) for row in without["texts"]} == {(None, None)}


def test_the_archive_holds_scores_and_maps(explained):
    *_, explanation = explained
    archive = np.load(io.BytesIO(questions.to_npz(explanation)))
    assert archive["texts"].tolist() == TEXTS
    np.testing.assert_array_equal(archive["scores"], explanation.scores)
    np.testing.assert_array_equal(archive["presence"], explanation.presence)
    np.testing.assert_array_equal(archive["raw_maps"], explanation.raw_maps)
    np.testing.assert_allclose(archive["maps"], explanation.maps, atol=5e-4)
    without = np.load(io.BytesIO(questions.to_npz(replace(explanation, presence=None))))
    assert np.isnan(without["presence"]).all() and len(without["presence"]) == len(TEXTS)


def test_maps_are_refined_or_at_two_scales_on_request(client, folder, world):
    photo = gradio_client.handle_file(folder / "small.png")
    for refine, multi_scale in ((True, False), (False, True), (False, False)):  # also of a photograph seen before
        value, npz = client.predict(photo, "dog, red ball", "itsm", refine, multi_scale, api_name="/explain")
        image, options = Image.open(folder / "small.png"), {"refine": refine, "multi_scale": multi_scale}
        expected = explain((world.model, world.processor), image, ["dog", "red ball"], **options)
        assert value["grid"] == list(expected.raw_maps.shape[1:])
        np.testing.assert_allclose(drawn_maps(value), expected.maps, atol=1e-3)
        unrefined = [row["unrefined"] for row in value["texts"]]
        if refine:
            unrefined = np.stack([*map(raw_values, unrefined)])
            np.testing.assert_allclose(unrefined, expected.unrefined_maps.flatten(1), atol=1e-3)
            assert value["unrefined_grid"] == list(expected.unrefined_maps.shape[1:])
        else:
            assert unrefined == [None, None]
        assert [row["text"] for row in value["texts"]] == ["dog", "red ball"] and value["size"] == [60, 40]
        assert Path(npz).name == "explanation.npz"
        np.testing.assert_allclose(np.load(npz)["maps"], expected.maps, atol=1e-3)


def test_the_words_of_a_sentence_are_explained_on_request(client, folder, world):
    photo = gradio_client.handle_file(folder / "small.png")
    value, _ = client.predict(photo, "dog, red ball", "itsm", False, False, True, api_name="/explain")
    model, image = (world.model, world.processor), Image.open(folder / "small.png")
    expected = explain(model, image, "dog, red ball", words=True, refine=False)
    assert value["are_words"] and [row["text"] for row in value["texts"]] == ["dog", ",", "red", "ball"]
    np.testing.assert_allclose([row["score"] for row in value["texts"]], expected.scores, atol=1e-4)
    np.testing.assert_allclose(drawn_maps(value), expected.maps, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "question", "sentence"),
    [
        ("notes.png", ["dog", "itsm"], "notes.png: expected a readable image"),
        ("small.png", ["dog", "magic"], "There is no method"),
    ],
)
def test_bad_input_is_answered_with_a_sentence(client, folder, name, question, sentence):
    with pytest.raises(AppError, match=sentence) as error:
        client.predict(gradio_client.handle_file(folder / name), *question, api_name="/explain")
    assert str(folder) not in str(error.value)


def test_a_method_that_cannot_be_loaded_tells_no_place_of_the_machine(client, folder, monkeypatch):
    def load_tower(*arguments, **options):
        raise OSError(f"{folder}: this folder holds other files")

    monkeypatch.setattr(app, "Engine", load_tower)
    with pytest.raises(AppError, match="cannot load what this method needs") as error:
        client.predict(gradio_client.handle_file(folder / "small.png"), "dog", "itsm", api_name="/explain")
    assert str(folder) not in str(error.value)


def test_no_file_that_was_not_uploaded_is_opened(server, folder, recorded):
    def ask(path):
        photo = {"path": path, "orig_name": "photo.png", "meta": {"_type": "gradio.FileData"}}
        content = {"data": [photo, "dog", "itsm", False, False, False]}
        asked = httpx.post(f"{server}gradio_api/call/explain", json=content, **PATIENT)
        answer = httpx.get(f"{asked.url}/{asked.json()['event_id']}", **PATIENT)
        return answer.text.splitlines()[0].removeprefix("event: ")

    read, files = recorded(app, "read_photo"), {"files": ("photo.png", (folder / "small.png").read_bytes())}
    own = httpx.post(f"{server}gradio_api/upload", files=files).json()[0]
    for path in (str(folder / "small.png"), "small.png", f"{Path(own).parent}/../../small.png"):
        assert ask(path) == "error"
    assert read == []
    assert ask(own) == "complete"


def test_another_question_prepares_neither_the_image_nor_the_model_anew(client, folder, recorded):
    def ask(name, texts, method):
        return client.predict(gradio_client.handle_file(folder / name), texts, method, api_name="/explain")[0]

    noise((50, 40), seed=3).save(folder / "other.png")
    first = ask("other.png", "sky, a red ball", "gem")
    images = recorded(ICLIPModel, "encode_image")
    texts = recorded(ICLIPModel, "encode_text", lambda model, input_ids, *_, **options: len(input_ids))
    copied = recorded(explainable, "private_copy")
    again = ask("other.png", "sky, dog", "gem")  # which runs the image tower itself, with the same background
    assert (len(images), texts, copied) == (1, [2], [])
    images.clear()
    np.testing.assert_allclose(drawn_maps(again)[0], drawn_maps(first)[0], atol=1e-2)
    for name, encoded in (("other.png", 0), ("large.png", 1)):
        ask(name, "sky", "itsm")
        assert len(images) == encoded


def test_the_command_prints_the_address_alone(world, monkeypatch, capsys):
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda demo: demo.close(verbose=False))
    assert iclip("demo", "--model", world.folder / "model") == 0
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\n", capsys.readouterr().out)


def test_without_gradio_a_sentence_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, app.__name__)
    assert iclip("demo") == 2
    assert "[demo]" in capsys.readouterr().err


@pytest.fixture
def page(browser, server):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with opened(browser, server, "figure", **phone) as page:
        yield page


def test_a_visitor_on_a_phone(page, server, folder, monkeypatch):
    words = property(lambda explanation: ["present"] * len(explanation))  # absent texts are faded
    monkeypatch.setattr(Explanation, "presence_words", words)
    # The first image is explained without any input, nothing comes from elsewhere, nothing is wider than the phone.
    first = page.locator("figcaption").all_inner_texts()
    assert first == questions.asked_texts(viewer.examples()[0].texts)
    assert all(url.startswith((server, "data:", "blob:")) for url in page.requested)
    assert page.evaluate("document.documentElement.scrollWidth") == 390

    # Upload and type: the maps are those of the new image and texts.
    page.locator("input[type=file]").first.set_input_files(folder / "small.png")
    page.wait_for_function("document.querySelector('figure canvas').width == 60")
    page.get_by_label("Texts").fill("sky, <b>dog</b>")
    page.get_by_label("Texts").press("Enter")
    page.wait_for_function("document.querySelectorAll('figure').length == 2")
    assert page.locator("figcaption").all_inner_texts() == ["sky", "<b>dog</b>"]
    assert page.locator("tbody tr").count() == 2

    with page.expect_download() as download:
        page.get_by_text("Save scores and maps").click()
    maps = np.load(download.value.path())["maps"]
    assert download.value.suggested_filename == "explanation.npz" and maps.shape == (2, 40, 60)

    # Of the first panel of the saved picture: the photograph alone, and outlined at 0.5.
    pictures = []
    for threshold in ("1", "0.5"):
        page.locator("input[name=opacity]").fill("0")
        page.locator("input[name=threshold]").fill(threshold)
        with page.expect_download() as download:
            page.get_by_text("Save picture").click()
        pictures.append(np.asarray(Image.open(download.value.path()).convert("RGB"), dtype=float)[40:80, 12:72])
    plain, outlined = pictures
    assert abs(plain - np.asarray(Image.open(folder / "small.png"))).mean() < 12  # a JPEG of noise
    inside = np.pad(maps[0] > 0.5, 1, mode="edge")
    beside = (inside[:-2, 1:-1], inside[2:, 1:-1], inside[1:-1, :-2], inside[1:-1, 2:])
    edge = np.any([inside[1:-1, 1:-1] != other for other in beside], axis=0)
    assert ((outlined != plain).any(-1) == edge).mean() > 0.97


def test_a_large_image_is_reduced(tmp_path):
    """Its preparation for the model would take hundreds of megabytes. The page counts pixels of the file."""
    size = (3000, 1500)
    Image.linear_gradient("L").resize(size).save(tmp_path / "large.png")
    image, original_size = questions.read_photo(str(tmp_path / "large.png"))
    assert (image.mode, image.size, original_size) == ("RGB", (2048, 1024), size)
