"""
The page that runs a model in the browser: its functions in Node, and the page in Chromium, beside the same model in
Python.
"""

import base64
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QuietHandler, iclip, noise, opened, save, served, tiny_model
from huggingface_hub import ModelCard
from npm_server import npm_server
from PIL import Image, ImageOps

from iclip_hf import ICLIPProcessor, explain
from iclip_hf.backends.loading import load_iclip
from iclip_hf.backends.onnx import TEXT_FILE, VISION_FILE, ONNXModel, trained_config
from iclip_hf.model.label_maps import label_map
from iclip_hf.model.presence import presence_text, presence_word
from iclip_hf.model.refinement import refine_maps
from iclip_hf.model.similarity import resize_and_normalize, resize_maps
from iclip_hf.plots import example_image
from iclip_hf.plots.colors import color_table
from iclip_hf.web import export as web
from iclip_hf.web import server, viewer


READY = "#go:not([disabled])"
# Keeps what the worker tells the page.
RECORDER = """
globalThis.told = [];
globalThis.Worker = class extends Worker {
    constructor(...options) {
        super(...options);
        this.addEventListener("message", ({ data }) => told.push(data));
    }
};
"""
# As the embedded model.
OPTIONS = {
    "max_over": "similarity",
    "center_tokens": True,
    "map_attention": "signed",
    "map_affinity": 10.0,
    "attention_norm": "quantile",
    "recognition_pooling": "class_and_average",
    "image_hidden_size": 12,
    "text_hidden_size": 20,
    "recognition_share": 0.4,
    "peak_share": 0.3,
    "logit_bias_init_value": -1.5,
    "presence_bias": 0.5,
}


# ---------------------------------------------------------------------------------------------------- the functions


def numerics(function: str, *arguments):
    """
    Calls a function of JavaScript with the module numerics.js. Tensors arrive as floats, and arrays as bytes; both
    return as lists.
    """
    if shutil.which("node") is None:
        pytest.skip("needs Node.js")

    def encode(value):
        return {"floats": value.tolist()} if isinstance(value, torch.Tensor) else {"bytes": value.ravel().tolist()}

    address = "data:text/javascript;base64," + base64.b64encode(viewer.read_asset("numerics.js").encode()).decode()
    script = f"""
        const numerics = await import({json.dumps(address)});
        const arguments_ = JSON.parse({json.dumps(json.dumps(arguments, default=encode))}, (key, value) =>
            value?.floats ? Float32Array.from(value.floats) : value?.bytes ? Uint8Array.from(value.bytes) : value);
        const result = ({function})(numerics, ...arguments_);
        console.log(JSON.stringify(result, (key, value) => ArrayBuffer.isView(value) ? [...value] : value));
    """
    done = subprocess.run(["node", "--input-type=module"], input=script, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("size", [(61, 40), (20, 25), (7, 300)])
def test_images_are_resized_as_by_the_processor(tiny_processor, size, kernel):
    image = noise(size, 120)
    image.putpixel((0, 0), (255, 0, 0))
    options = {"resample": kernel, "do_normalize": False, "do_rescale": False}
    expected = tiny_processor(images=image, images_kwargs=options)["pixel_values"][0].permute(1, 2, 0).numpy()
    resize = "(numerics, ...all) => numerics.resize(...all)"
    found = numerics(resize, np.asarray(image.convert("RGBA")), *size, 32, 32, web._KERNELS[kernel])
    # On processors without AVX2, torchvision resizes bilinearly in float32, and rounds once.
    exact = kernel == 3 or "AVX" in torch.backends.cpu.get_cpu_capability()
    assert np.abs(np.array(found).reshape(32, 32, 3) - expected).max() <= (0 if exact else 1)


@pytest.mark.parametrize("edge", [24, 100])
def test_sizes_are_the_processors(tiny_processor, edge):
    sizes = [(60, 40), (40, 60), (33, 33), (300, 20), (24, 28), (22, 22), (55, 22)]  # the last two are ties
    expected = [
        list(tiny_processor(images=Image.new("RGB", size), size={"shortest_edge": edge})["pixel_values"].shape[-2:])
        for size in sizes
    ]
    model_sizes = "({ modelSize }, settings, all) => all.map(([width, height]) => modelSize(settings, height, width))"
    assert numerics(model_sizes, {"size": {"shortest_edge": edge}, "patch": 8}, sizes) == expected
    assert numerics(model_sizes, {"size": {"height": 32, "width": 48}, "patch": 8}, [(9, 5)]) == [[32, 48]]


@torch.no_grad()
@pytest.mark.parametrize(
    ("map_attention", "peak_share"), [("similarity", 0.0), ("additive", 0.3), ("signed", 0.4), ("none", 1.0)]
)
def test_maps_and_scores_are_the_models(map_attention, peak_share):
    options = {**OPTIONS, "map_attention": map_attention, "max_sharpness": 7.0, "peak_share": peak_share}
    model, generator = tiny_model("dinov2", **options), torch.Generator().manual_seed(0)
    if map_attention == "signed":
        model.attention_direction.normal_(std=0.1, generator=generator)
    image = model.get_image_features(torch.randn(1, 3, 32, 40, generator=generator))
    text = model.get_text_features(torch.randint(2, 60, (1, 6), generator=generator))
    features = [part.flatten() for part in (image.patch_embeds, image.map_attention, text.map_text_embeds)]
    weight = None if text.attention_weights is None else text.attention_weights.item()
    raw_map = """({ similarities, rawMap }, [patches, attention, text], options, weight) =>
        rawMap(similarities(patches, text), attention, options, weight)"""
    found = numerics(raw_map, features, options, weight)
    np.testing.assert_allclose(found, model.similarity_maps(image, text).flatten(), atol=1e-5)
    score = """({ dot, score, similarities }, [patches, , text], vectors, options) =>
        score(dot(...vectors), similarities(patches, text), options)"""
    vectors = [part.flatten() for part in (image.image_embeds, text.text_embeds)]
    found = numerics(score, features, vectors, options)
    assert found == pytest.approx(model.scores(image, text).item(), abs=1e-5)


@torch.no_grad()
def test_presence_and_its_word_are_those_of_python():
    model, scores = tiny_model("dinov2", **OPTIONS), torch.linspace(-1, 1, 41)
    speak = """({ presence, presenceWord }, scores, settings) => scores.map((score) => presence(score, settings))
        .map((value) => [value, presenceWord(value, settings)])"""
    values, words = zip(*numerics(speak, scores.tolist(), web._presence_settings(model)))
    assert values == pytest.approx(model.presence(scores).tolist(), abs=1e-6)
    assert list(words) == list(map(presence_word, values)) and len(set(words)) == 3
    assert numerics(speak, [0.3], web._presence_settings(tiny_model("dinov2"))) == [[None, None]]


@pytest.mark.parametrize(("grid", "size"), [((4, 5), (40, 61)), ((2, 7), (30, 30)), ((5, 5), (3, 4))])
def test_maps_are_enlarged_and_stretched_as_in_python(grid, size):
    map_ = torch.randn(1, *grid, generator=torch.Generator().manual_seed(2))
    enlarge = "(numerics, map, grid, [height, width]) => numerics.enlarge(map, grid, width, height)"
    found = numerics(enlarge, map_.flatten(), grid, size)
    raw = resize_maps(map_, size)
    assert (found["low"], found["high"]) == pytest.approx((raw.min().item(), raw.max().item()), abs=1e-5)
    assert np.abs(np.array(found["levels"]) - (resize_and_normalize(map_, size) * 255).flatten().numpy()).max() <= 0.51
    assert set(numerics(enlarge, torch.full(grid, 0.3).flatten(), grid, size)["levels"]) == {0}


@pytest.mark.parametrize("size", [(30, 20), (17, 24)])
def test_maps_are_refined_as_in_python(size):
    image = noise(size, 40)
    image.paste((90, 90, 90), (0, 0, size[0] // 2, size[1]))  # with cells of one colour
    pixels, raw = np.array(image), torch.randn(3, 5, generator=torch.Generator().manual_seed(5))
    expected = refine_maps(raw[None, None], torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1)[0, 0]
    refine = """({ neighbours, refine }, pixels, [width, height], map, grid) => {
        const near = neighbours(pixels, width, height);
        return [near.grid, refine(map, grid, near)];
    }"""
    grid, found = numerics(refine, pixels, size, raw.flatten(), [3, 5])
    assert grid == list(expected.shape)
    np.testing.assert_allclose(found, expected.flatten(), atol=1e-4)


# --------------------------------------------------------------------------------------------------------- the page


@contextmanager
def page_served(folder, handler=server._Handler, port=0):
    """Serves a folder as `iclip demo --web` does, or by another handler."""
    with served(partial(handler, directory=folder), port) as server:
        yield f"http://127.0.0.1:{server.server_port}/"


@pytest.fixture(scope="module")
def model():
    model = tiny_model("dinov2", **OPTIONS, map_cell_size=6)
    model.name_or_path = "org/tiny"
    with torch.no_grad():
        model.attention_direction.copy_(torch.linspace(-1, 1, len(model.attention_direction)))
        model.recognition.logit_scale.fill_(2.0)
    return model


@pytest.fixture(scope="module")
def processor(tiny_processor):
    templates = ["a photo of the {}", "{}"]
    return ICLIPProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, templates=templates, patch_size=8)


@pytest.fixture(scope="module")
def cdn(tmp_path_factory):
    """The address of a server of the npm packages that pages load."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm, which downloads ONNX Runtime for the page")
    with npm_server(tmp_path_factory.mktemp("npm")) as address:
        yield address


@pytest.fixture(scope="module")
def exported(tmp_path_factory, model, processor, cdn):
    """The page of a tiny model, with weights in float32."""
    return web.export_web(model, processor, tmp_path_factory.mktemp("web") / "page", "float32", cdn=cdn)


@pytest.fixture(scope="module")
def url(exported):
    with page_served(exported) as address:
        yield address


@pytest.fixture
def page(browser, url):
    with visited(browser, url) as page:
        yield page


@contextmanager
def visited(browser, url, **options):
    with opened(browser, url, READY, script=RECORDER, **options) as page:
        yield page


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    noise((61, 40)).save(folder / "noise.png")
    Image.linear_gradient("L").resize((1300, 650)).convert("RGB").save(folder / "large.jpg", quality=95)
    Image.linear_gradient("L").resize((6000, 3000)).convert("RGB").save(folder / "huge.jpg")
    (folder / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'></svg>")
    return folder


@contextmanager
def answered(page):
    """Waits for the end of the answer, or for a sentence."""
    page.evaluate("document.getElementById('status').textContent = 'asking'")
    yield
    page.locator("#status", has_text=re.compile("^$")).wait_for(state="attached")


def ask(page, photo=None, texts=None):
    """Chooses a file and texts, and waits for the answer."""
    with answered(page):
        if texts is not None:
            page.fill("#texts", texts)
        if photo is not None:
            page.set_input_files("#file", photo)
        else:
            page.click("#go")


def rows(page):
    """The table of scores: the cells of each text."""
    return page.locator("tbody tr").evaluate_all(
        "all => all.map((row) => [...row.cells].map((cell) => cell.innerText))"
    )


def texts_of(page):
    return [text for text, *_ in rows(page)]


def canvas(page, index):
    """The pixels that are drawn over the photograph in a figure, RGBA."""
    return decoded(page.locator("figure canvas:nth-of-type(2)").nth(index).evaluate("canvas => canvas.toDataURL()"))


def decoded(picture):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).convert("RGBA"))


def check(page, expected, model, atol=1e-5):
    """
    Compares what the worker computed for the last question, and what the page shows of it, with an explanation in
    Python.
    """
    results = page.evaluate(
        """() => {
            const maps = told.filter(({ kind }) => kind === "map"), last = Math.max(...maps.map(({ job }) => job));
            return maps.filter(({ job }) => job === last).map((map) => ({ ...map, levels: [...map.levels] }));
        }"""
    )
    presences = model.presence(expected.scores)
    presences = [None] * len(expected) if presences is None else presences.tolist()
    assert texts_of(page) == page.locator("figcaption").all_inner_texts() == expected.labels
    assert [result["score"] for result in results] == pytest.approx(expected.scores.tolist(), abs=atol)
    # By the logit's scale.
    assert [result["presence"] for result in results] == pytest.approx(presences, abs=25 * atol)
    for index, (result, presence, row) in enumerate(zip(results, presences, rows(page))):
        large = resize_maps(expected.raw_maps[[index]], expected.size)[0]
        assert (result["low"], result["high"]) == pytest.approx((large.min().item(), large.max().item()), abs=2 * atol)
        levels = np.array(result["levels"]).reshape(expected.size)
        span = (large.max() - large.min()).item()
        assert np.abs(levels / 255 - expected.map(index).numpy()).max() < 0.51 / 255 + 4 * atol / span
        assert np.abs(color_table("heat")[levels].astype(int) - canvas(page, index)).max() <= 2
        assert float(row[1]) == pytest.approx(result["score"], abs=6e-4)
        word = presence_word(presence)
        assert page.locator("figcaption").nth(index).get_attribute("data-word") == word
        number = presence_text(result["presence"]).rpartition(" ")[2]  # as commands print it
        assert row[2:4] == ([] if word is None else [f"{round(100 * float(number))} %", word])


def test_a_folder_is_a_static_space(exported):
    card = ModelCard.load(exported / "README.md").data
    assert card.sdk == "static" and card["custom_headers"]["cross-origin-opener-policy"] == "same-origin"
    assert 'model="org/tiny"' in (exported / "model_card.md").read_text()  # not the page, which pipelines cannot load
    settings = json.loads((exported / "settings.json").read_text())
    first = [*settings["runtime"]["wasm"].values(), *settings["files"].values()]
    assert settings["bytes"] == sum(file["bytes"] for file in first)
    for file in first:
        if file["url"].startswith("http"):
            continue
        name, _, digest = file["url"].partition("?")
        packed = (exported / name).read_bytes()
        assert len(packed) == file["bytes"] and hashlib.sha256(packed).hexdigest().startswith(digest)


def test_a_visitor_from_the_first_paint_to_offline(browser, exported, model, processor, url, cdn, photos):
    def downloaded():
        return [address for address in page.requested if ".gz" in address or address.startswith(cdn)]

    explained = partial(explain, (model, processor))
    with visited(browser, url) as page:
        # Before a question nothing of the model is asked for, and the size of the download is told.
        assert not downloaded()
        megabytes = json.loads((exported / "settings.json").read_text())["bytes"] / 1e6
        assert f"({megabytes:.1f} MB)" in page.inner_text("header")
        assert page.evaluate("crossOriginIsolated")

        ask(page, photos / "noise.png", "dog, red ball")
        assert all(address.startswith((url, f"blob:{url}", "data:", cdn)) for address in page.requested)
        assert len(downloaded()) == len(set(downloaded())) == 8
        image = Image.open(photos / "noise.png")
        expected = explained(image, ["dog", "red ball"])
        check(page, expected, model)

        # A further text and image need no server.
        asked = len(page.requested)
        page.context.set_offline(True)
        long = " ".join(["dog", "car"] * 50)  # is cut to the tokenizer's length
        ask(page, texts=f"sky, {long}")
        expected = explained(image, ["sky", long])
        check(page, expected, model)
        ask(page, photos / "large.jpg")
        assert canvas(page, 0).shape == (320, 640, 4)
        ask(page, photos / "huge.jpg")  # is reduced before
        assert canvas(page, 0).shape == (320, 640, 4)
        assert [address for address in page.requested[asked:] if not address.startswith("blob:")] == []
        page.context.set_offline(False)

        # The next visit explains without a question, from the browser's cache; the link holds the texts.
        page.requested.clear()
        page.goto(page.url)
        page.reload()
        page.locator("figcaption", has_text="sky").wait_for()
        assert not downloaded()


def test_maps_are_refined_unless_asked_otherwise(page, model, processor, photos):
    image, texts = Image.open(photos / "noise.png"), ["dog", "red ball"]
    ask(page, photos / "noise.png", ", ".join(texts))
    plain, refined = (explain((model, processor), image, texts, refine=refine) for refine in (False, True))
    assert (plain.maps - refined.maps).abs().max() > 0.1
    check(page, refined, model, atol=1e-4)
    for expected in (plain, refined):
        with answered(page):
            page.click("#refine")
        assert page.locator("#refine").is_checked() == (expected is refined)
        check(page, expected, model, atol=1e-4)


@contextmanager
def changed_presence(browser, exported, tmp_path, change):
    """Visits a copy of the page whose settings of the presence are changed."""
    folder = shutil.copytree(exported, tmp_path / "page")
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**settings, "presence": change(settings["presence"])}))
    with page_served(folder) as address, visited(browser, address) as page:
        yield page


def test_a_model_without_presence_shows_none(browser, exported, photos, tmp_path):
    with changed_presence(browser, exported, tmp_path, lambda settings: None) as page:
        ask(page, photos / "noise.png", "dog, sky")
        assert page.locator("th").all_inner_texts() == ["Text", "Score"]
        assert [len(row) for row in rows(page)] == [2, 2]
        page.click("input[name=segments]")
        assert page.locator(".key").all_inner_texts() == ["dog", "sky"]  # none counts as absent


def test_segments_are_the_label_map(browser, exported, model, processor, photos, tmp_path):
    texts = ["dog", "car", "cat", "sky"]  # of which the last is absent with a lower bias
    expected = explain((model, processor), Image.open(photos / "noise.png"), texts)
    presence = torch.sigmoid(torch.logit(model.presence(expected.scores)) - 1.6)
    labels = label_map(expected.raw_maps, expected.size, presence)
    assert labels.unique().tolist() == [-1, 0, 1, 2]
    with changed_presence(browser, exported, tmp_path, lambda old: {**old, "bias": old["bias"] - 1.6}) as page:
        ask(page, photos / "noise.png", ", ".join(texts))
        page.click("input[name=segments]")
        pixels, found = canvas(page, 0), np.full(expected.size, -1)
        for index, ink in enumerate([[0xE6, 0x9F, 0], [0x56, 0xB4, 0xE9], [0, 0x9E, 0x73]]):
            found[(pixels[..., :3] == ink).all(-1) & (pixels[..., 3] == 255)] = index
        assert (found == labels.numpy()).mean() > 0.98  # 8 bits decide otherwise on borders
        assert page.locator(".key").all_inner_texts() == texts[:3]


def test_a_reload_needs_no_server_and_sees_a_newer_page(browser, exported, photos, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "some" / "folder")
    for file in filter(Path.is_file, folder.rglob("*")):
        os.utime(file, (0, 0))  # a browser takes files that are this old for fresh, unless it is told not to
    with ExitStack() as stack:
        with page_served(tmp_path, QuietHandler) as url:
            page = stack.enter_context(visited(browser, f"{url}some/folder/?query"))
            assert not page.evaluate("crossOriginIsolated")  # without the headers for threads
            ask(page, photos / "noise.png", "dog")
            found = rows(page)
            page.evaluate("navigator.serviceWorker.ready.then(() => null)")
        page.reload()
        page.wait_for_selector(READY)
        ask(page, photos / "noise.png", "dog, car")
        assert rows(page)[0] == found[0] and texts_of(page) == ["dog", "car"]

        # A newer export. What its files name has another version, or the browser would not ask for it.
        version = re.search(r'"page\.js\?(\w+)"', (folder / "index.html").read_text())[1]
        for file in [folder / "index.html", *folder.glob("*.js")]:
            text = file.read_text().replace(version, "newer").replace("Opacity of", "Newer:")
            file.write_text(text.replace("<title>", "<title>Newer: "))
        with page_served(tmp_path, QuietHandler, int(url.rstrip("/").rpartition(":")[2])):
            page.reload()
            page.wait_for_selector(READY)
            assert page.title().startswith("Newer: ") and "Newer: the maps" in page.inner_text(".controls")


def test_bad_input_is_a_sentence_and_the_page_stays_usable(page, photos):
    for photo, texts, sentence in [
        ("drawing.svg", "dog", "drawing.svg: "),
        (None, ",".join(map(str, range(200))), "got 200."),
    ]:
        ask(page, photo and photos / photo, texts)
        assert sentence in page.inner_text("#error")
    assert not [address for address in page.requested if ".gz" in address]  # told before the download
    ask(page, photos / "noise.png", "dog")
    assert page.locator("#error").is_hidden() and texts_of(page) == ["dog"]


def test_a_wrong_download_is_neither_used_nor_kept(browser, exported, photos, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "page")
    file = folder / "tokenizer_config.json.gz"
    right = file.read_bytes()
    other = gzip.compress(b" " * len(gzip.decompress(right)))  # as long, which the digest alone tells
    with page_served(folder) as address, visited(browser, address) as page:
        for body in (b"<!doctype html><title>Sign in</title>", other):
            file.write_bytes(body)
            ask(page, photos / "noise.png", "dog")
            assert file.name in page.inner_text("#error") and rows(page) == []
        file.write_bytes(gzip.decompress(right))  # as some servers send a .gz file
        ask(page)
        assert texts_of(page) == ["dog"]


def test_photographs_stand_upright_as_in_python(page, model, processor, tmp_path):
    """EXIF turns JPEG, PNG and WebP files."""
    image = Image.linear_gradient("L").resize((61, 40)).convert("RGB")
    image.paste("red", (3, 3, 20, 12))
    # By one table for PNG and WebP; the browser turns JPEG itself.
    for name in [*(f"{orientation}.png" for orientation in range(1, 9)), "6.jpeg", "6.webp"]:
        exif = Image.Exif()
        exif[0x0112] = int(name[0])
        image.save(tmp_path / name, exif=exif, quality=95, lossless=True)
        with Image.open(tmp_path / name) as stored:
            upright = ImageOps.exif_transpose(stored).convert("RGB")
        ask(page, tmp_path / name, "dog")
        expected = explain((model, processor), upright, ["dog"])
        check(page, expected, model)


def test_texts_of_a_link_are_texts(browser, url, photos):
    attack = "<img src=x onerror=alert(1)>, $& {} </script>"
    with visited(browser, f"{url}#texts=" + urllib.request.quote(attack + "\nsky")) as page:
        ask(page, photos / "noise.png")
        assert page.locator("figcaption").all_inner_texts() == texts_of(page) == [attack, "sky"]


def test_on_a_phone_with_the_keyboard(browser, url, model, processor, photos):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    texts = ["a" * 300, "dog", "sky"]
    with visited(browser, url, **phone) as page:
        with answered(page):
            page.set_input_files("#camera", photos / "noise.png")
        # The maps are below the question, and come into view when the visitor asks. Nothing is wider than the phone.
        ask(page, texts=", ".join(texts))
        assert abs(page.locator("#viewer").bounding_box()["y"]) < 100
        assert page.evaluate("document.documentElement.scrollWidth") == 390

        # The arrow keys read all maps at one place.
        page.locator(".stack").nth(0).focus()
        for _ in range(4):
            page.keyboard.press("ArrowLeft")
        x = int((0.5 - 4 / 40) * 61)
        shown = [re.split(" at |\n", label) for label in page.locator(".value").all_inner_texts()]
        maps = explain((model, processor), Image.open(photos / "noise.png"), texts).maps
        for (value, place, _), map_ in zip(shown, maps, strict=True):
            assert place == f"{x}, 20" and float(value) == pytest.approx(map_[20, x].item(), abs=0.008)

        with page.expect_download() as download:  # all maps under their texts, and how they are made
            page.click("#save")
        assert Image.open(download.value.path()).size == (3 * (61 + 12) + 12, 40 + 2 * 28 + 2 * 12)


# ---------------------------------------------------------------------------------------------- export and server


def test_packages_come_from_a_cdn_with_their_digests(world, tmp_path, monkeypatch):
    """Or from the server that the command names. With files of a few bytes instead of graphs."""

    def fake_graphs(model, processor, folder, weights):
        save(folder, processor)
        for name in (VISION_FILE, TEXT_FILE):
            (folder / name).write_bytes(b"graph")
        return folder

    monkeypatch.setattr(web, "export_onnx", fake_graphs)
    web.export_web(tiny_model(), world.processor, tmp_path / "page", weights="bfloat16")
    settings = json.loads((tmp_path / "page" / "settings.json").read_text())
    assert list(settings["runtime"]) == ["wasm", "webgpu"]
    index = (tmp_path / "page" / "index.html").read_text()
    assert "Presence" not in index  # of a model that has none
    policy = re.search('Content-Security-Policy" content="([^"]*)"', index)[1]
    allowed = re.search("connect-src 'self' ([^;]*);", policy)[1].split()
    for file in [*settings["runtime"]["webgpu"].values(), settings["files"]["tokenizers"]]:
        assert re.fullmatch("sha384-[A-Za-z0-9+/]{64}", file["integrity"])
        assert file["url"].startswith(tuple(allowed)) and re.search(r"@\d+\.\d+\.\d+/dist/", file["url"])
    command, server = ["export", world.folder / "model", tmp_path / "other"], ["--cdn", "https://npm.example/"]
    assert iclip(*command, "--format", "onnx", *server) == 2
    assert iclip(*command, "--format", "web", *server) == 0
    assert "https://npm.example/onnxruntime-web@" in (tmp_path / "other" / "settings.json").read_text()
    assert "jsdelivr" not in (tmp_path / "other" / "index.html").read_text()


def test_the_digests_are_those_of_the_npm_packages(cdn):
    for file in web.RUNTIME_FILES:
        with urllib.request.urlopen(f"{cdn}/{file['package']}/{file['path']}") as answer:
            digest = base64.b64encode(hashlib.sha384(answer.read()).digest()).decode()
        assert file["integrity"] == f"sha384-{digest}"


@pytest.mark.parametrize("options", [{"do_center_crop": True}, {"resample": 1}])
def test_a_processor_that_the_page_cannot_follow_is_refused(tiny_processor, tmp_path, options):
    images = type(tiny_processor.image_processor)
    images = images(**{"size": {"height": 32, "width": 32}, "do_center_crop": False, **options})
    with pytest.raises(ValueError, match="resample="):
        web.export_web(tiny_model(), ICLIPProcessor(images, tiny_processor.tokenizer), tmp_path / "page")
    assert list(tmp_path.iterdir()) == []


def test_the_command_serves_a_page(tmp_path):
    for name in ("settings.json", "worker.js"):
        (tmp_path / name).write_text("x")
    command = [sys.executable, "-m", "iclip_hf.cli", "demo", "--web", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip()
        with urllib.request.urlopen(f"{address}worker.js") as answer:
            headers = answer.headers
        process.terminate()
    assert headers["Content-Type"].startswith("text/javascript")
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"


@pytest.mark.slow
def test_page_onnx_and_python_agree_on_a_photograph_for_the_embedded_model(browser, cdn, tmp_path):
    model, processor = load_iclip("embedded", dtype="float32")
    folder = web.export_web(model, processor, tmp_path / "page", cdn=cdn)
    assert json.loads((folder / "settings.json").read_text())["bytes"] < 60e6
    graphs = tmp_path / "onnx"
    trained_config(model).save_pretrained(graphs)
    for name in (VISION_FILE, TEXT_FILE):
        (graphs / name).write_bytes(gzip.decompress((folder / f"{name}.gz").read_bytes()))
    onnx, texts = ONNXModel(graphs), ["tower", "tree", "horse", "Café in 東京 🍰", "ΟΔΟΣ"]
    of_graphs, expected = (explain((one, processor), example_image(), texts) for one in (onnx, model))
    with page_served(folder) as address, visited(browser, address) as page:
        ask(page, example_image(), ", ".join(texts))
        check(page, of_graphs, onnx, atol=1e-4)
    # Of weights in 8 bits.
    torch.testing.assert_close(of_graphs.scores, expected.scores, atol=0.02, rtol=0)
    assert (of_graphs.maps - expected.maps).abs().mean() < 0.03
    found, presences = onnx.presence(expected.scores), model.presence(expected.scores)
    assert (found is presences is None) or (found - presences).abs().max() < 1e-5
