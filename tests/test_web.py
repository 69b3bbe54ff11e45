"""The page that runs a model in the browser, driven in Chromium beside the same graphs in Python."""

import base64
import gzip
import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import QuietHandler, noise, opened, served, tiny_model
from huggingface_hub import ModelCard, RepoCard
from PIL import Image, ImageOps

from iclip_hf import explain
from iclip_hf.backends.loading import load_iclip
from iclip_hf.backends.onnx import ONNXModel
from iclip_hf.demo import content, web, web_server
from iclip_hf.model.label_maps import segments
from iclip_hf.model.presence import CONSTANTS, MIN_PRESENCE, PRESENT, presence, presence_word
from iclip_hf.model.refinement import refine_maps
from iclip_hf.model.similarity import resize_and_normalize, resize_maps
from iclip_hf.plots.colors import color_table


NO_NPM = "needs npm, which downloads ONNX Runtime for the page"
READY = "#go:not([disabled])"
NEEDS_NPM = pytest.mark.skipif(shutil.which("npm") is None, reason=NO_NPM)


@contextmanager
def page_served(folder, handler=web_server._Handler, port=0):
    """Serves a folder as `iclip demo --web` does, or by another handler."""
    with served(partial(handler, directory=folder), port) as server:
        yield f"http://127.0.0.1:{server.server_port}/"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_processor):
    """The page of a tiny model like the embedded one, the model of its graphs, and its processor."""
    if shutil.which("npm") is None:
        pytest.skip(NO_NPM)
    folder = tmp_path_factory.mktemp("web")
    options = {"max_over": "similarity", "center_tokens": True, "map_attention": "additive", "map_affinity": 10.0}
    model = tiny_model("dinov2", attention_norm="quantile", **options)
    model.name_or_path = "org/tiny"
    page = web.export_web(model, tiny_processor, folder / "page", vendor=True)
    return page, unpacked(page, model, tiny_processor, folder / "onnx"), tiny_processor


@pytest.fixture(scope="module")
def url(exported):
    with page_served(exported[0]) as address:
        yield address


@pytest.fixture
def page(browser, url):
    with opened(browser, url, READY) as page:
        yield page


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    noise((61, 40)).save(folder / "noise.png")
    Image.linear_gradient("L").resize((1300, 650)).convert("RGB").save(folder / "large.jpg", quality=95)
    Image.linear_gradient("L").resize((6000, 3000)).convert("RGB").save(folder / "huge.jpg")
    drawing = "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><script>1</script></svg>"
    for name in ("photo.heic", "drawing.svg"):
        (folder / name).write_text(drawing)
    return folder


def ask(page, photo=None, texts=None):
    """Chooses a file and texts, and waits for the end of the answer or for a sentence."""
    page.evaluate("document.getElementById('status').textContent = 'asking'")
    if texts is not None:
        page.fill("#texts", texts)
    if photo is not None:
        page.set_input_files("#file", photo)
    else:
        page.click("#go")
    page.locator("#status", has_text=re.compile("^$")).wait_for(state="attached")


def scores(page):
    rows = page.locator("tbody tr").all_inner_texts()
    cells = [row.split("\t") for row in (" ".join(row.split("\n")) for row in rows)]
    return {text.strip(): (float(cosine), float(share.strip(" %")) / 100) for text, cosine, share, *_ in cells}


def canvas(page, index):
    """The pixels that are drawn over the photograph in a figure, RGBA."""
    picture = page.locator("figure canvas:nth-of-type(2)").nth(index).evaluate("canvas => canvas.toDataURL()")
    return decoded(picture)


def decoded(picture):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).convert("RGBA"))


def drawn(page, index):
    """The map of a text as the page has drawn it, with values in [0, 1], found by its colours, which a canvas rounds."""
    table = color_table("heat").astype(np.int16)
    colors, where = np.unique(canvas(page, index).reshape(-1, 4), axis=0, return_inverse=True)
    distances = np.abs(colors[:, None].astype(np.int16) - table).max(-1)
    assert distances.min(1).max() <= 2
    height, width = canvas(page, index).shape[:2]
    return distances.argmin(1)[where].reshape(height, width) / 255


def explain_by(exported, image, texts, **options):
    """The explanation by the same graphs in Python."""
    _, model, processor = exported
    return explain((model, processor), [image], texts, **options)[0]


def unpacked(page, model, processor, folder):
    """The graphs of a page, with the rest of an ONNX folder."""
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name in ("vision_model.onnx", "text_model.onnx"):
        (folder / name).write_bytes(gzip.decompress((page / f"{name}.gz").read_bytes()))
    return ONNXModel(folder)


def test_a_folder_is_a_static_space(exported):
    folder = exported[0]
    card = ModelCard.load(folder / "README.md").data
    assert card.sdk == "static" and card["custom_headers"]["cross-origin-opener-policy"] == "same-origin"
    assert 'model="org/tiny"' in (folder / "model_card.md").read_text()  # not the page, which pipelines cannot load
    settings = json.loads((folder / "settings.json").read_text())
    files = [*settings["runtime"]["wasm"].values(), *settings["files"].values()]
    assert settings["bytes"] == sum(file["bytes"] for file in files)
    for file in files:  # what the page asks for is there, and its address tells its content
        name, _, digest = file["url"].partition("?")
        packed = (folder / name).read_bytes()
        assert len(packed) == file["bytes"] and hashlib.sha256(packed).hexdigest().startswith(digest)
    assert list(settings["runtime"]) == ["wasm"]
    assert not {path.name for path in folder.iterdir()} & {"config.json", "vision_model.onnx"}


def test_a_visitor_from_the_first_paint_to_offline(browser, exported, url, photos):
    with opened(browser, url, READY) as page:
        # Before a question nothing of the model is asked for, and the size of the download is told.
        assert not [address for address in page.requested if ".gz" in address]
        megabytes = json.loads((exported[0] / "settings.json").read_text())["bytes"] / 1e6
        assert f"({megabytes:.1f} MB)" in page.inner_text("header")
        assert page.evaluate("crossOriginIsolated")

        ask(page, photos / "noise.png", "dog, red ball")
        assert all(address.startswith((url, f"blob:{url}", "data:")) for address in page.requested)
        image = Image.open(photos / "noise.png")
        check(page, explain_by(exported, image, ["dog", "red ball"]))

        # A further text and image need no server.
        asked = len(page.requested)
        page.context.set_offline(True)
        long = " ".join(["dog", "car"] * 50)  # is cut to the tokenizer's length
        ask(page, texts=f"sky, {long}")
        check(page, explain_by(exported, image, ["sky", long]))
        ask(page, photos / "large.jpg")
        size = [(320, 640)]
        large = Image.open(photos / "large.jpg")
        check(page, explain_by(exported, large, ["sky", long], target_sizes=size))
        ask(page, photos / "huge.jpg")  # is reduced before
        assert canvas(page, 0).shape == (320, 640, 4)
        assert [address for address in page.requested[asked:] if not address.startswith("blob:")] == []
        page.context.set_offline(False)

        # The next visit explains without a question, from the browser's cache; the link holds the texts.
        page.requested.clear()
        page.goto(page.url)
        page.reload()
        page.locator("figcaption", has_text="sky").wait_for()
        assert not [address for address in page.requested if ".gz" in address]


def check(page, expected):
    found = scores(page)
    assert list(found) == expected.labels
    words = [presence_word(presence) for presence in expected.presence.tolist()]
    assert page.locator("tbody td:nth-child(4)").all_inner_texts() == words
    assert page.locator("figcaption").evaluate_all("all => all.map((caption) => caption.dataset.word)") == words
    for index, text in enumerate(expected.labels):
        assert found[text][0] == pytest.approx(expected.scores[index].item(), abs=0.001)  # of three decimals
        # In percent, cut and not rounded, so that it agrees with its word.
        assert -0.001 < expected.presence[index].item() - found[text][1] < 0.011
        map_ = drawn(page, index)
        assert map_.shape == tuple(expected.size)
        assert np.abs(map_ - expected.map(index).numpy()).max() < 0.016  # four of the 256 levels have one colour


def test_maps_are_refined_on_request_and_for_segments(page, exported, photos):
    image, texts = Image.open(photos / "noise.png"), ["dog", "red ball"]
    ask(page, photos / "noise.png", ", ".join(texts))
    plain, refined = (explain_by(exported, image, texts, refine=refine) for refine in (False, True))
    assert (plain.maps - refined.maps).abs().max() > 0.1
    shown = page.locator("#refine")
    for click, expected in (("#refine", refined), ("#refine", plain), ("input[name=segments]", refined)):
        page.evaluate("document.getElementById('status').textContent = 'asking'")
        page.click(click)
        page.locator("#status", has_text=re.compile("^$")).wait_for(state="attached")
        assert shown.is_checked() == (expected is refined)
        if click == "input[name=segments]":
            page.click(click)  # removes the panel of segments, and leaves the maps refined
        check(page, expected)
    assert shown.is_checked()


def test_a_reload_needs_no_server_and_sees_a_newer_page(browser, exported, photos, tmp_path):
    page_folder = shutil.copytree(exported[0], tmp_path / "some" / "folder")

    def reload(page):
        page.reload()
        page.wait_for_selector(READY)

    with ExitStack() as stack:
        with page_served(tmp_path, QuietHandler) as url:
            page = stack.enter_context(opened(browser, f"{url}some/folder/?query", READY))
            assert not page.evaluate("crossOriginIsolated")  # without the headers for threads
            ask(page, photos / "noise.png", "dog")
            found = scores(page)
            page.evaluate("navigator.serviceWorker.ready.then(() => null)")
        reload(page)
        ask(page, photos / "noise.png", "dog, car")
        assert scores(page)["dog"] == found["dog"] and scores(page).keys() == {"dog", "car"}
        assert page.locator("#examples img").nth(0).evaluate("image => image.decode().then(() => image.alt)")

        for name, old, new in [("index.html", "<title>", "<title>Newer: "), ("viewer.js", "Opacity of", "Newer:")]:
            text = (page_folder / name).read_text()
            (page_folder / name).write_text(text.replace(old, new))
        with page_served(tmp_path, QuietHandler, int(url.rstrip("/").rpartition(":")[2])):
            reload(page)
            assert page.title().startswith("Newer: ") and "Newer: the maps" in page.inner_text(".controls")


def test_bad_input_is_a_sentence_and_the_page_stays_usable(page, photos):
    for photo, texts, sentence in [
        ("drawing.svg", "dog", "drawing.svg: this browser cannot read it"),
        ("photo.heic", "dog", "of HEIC, only Safari shows the content"),
        (None, ",".join(map(str, range(200))), "Expected 1 to 12 texts, between commas or one a line, got 200."),
        (None, "dog, " + "a" * 1001, "Expected texts of at most 1000 characters, got one of 1001."),
    ]:
        ask(page, photo and photos / photo, texts)
        assert sentence in page.inner_text("#error")
    page.locator("#preview").wait_for(state="hidden")  # not a broken picture
    assert not [address for address in page.requested if ".gz" in address]  # told before the download
    ask(page, photos / "noise.png", "dog")
    assert page.locator("#error").is_hidden() and list(scores(page)) == ["dog"]
    assert page.locator("#preview").is_visible()


def test_an_image_is_drawn_under_its_own_maps_though_the_texts_change_meanwhile(browser, url, photos):
    late = """globalThis.Worker = class extends Worker {
        set onmessage(handler) { super.onmessage = (event) => setTimeout(handler, 1000, event); }
    }"""
    with opened(browser, url, READY) as page:
        page.add_init_script(late)
        page.reload()
        page.locator(READY).wait_for()
        ask(page, photos / "noise.png", "dog")
        page.set_input_files("#file", photos / "large.jpg")
        page.wait_for_timeout(300)  # the worker has seen the image
        ask(page, texts="cat")
        assert page.locator("figcaption").all_inner_texts() == ["cat"]
        assert canvas(page, 0).shape == (320, 640, 4)


def test_an_example_that_comes_late_replaces_no_image(browser, url, photos):
    context = browser.new_context(service_workers="block")
    page, held = context.new_page(), []
    page.route("**/astronaut.jpg", lambda route: held.append(route))  # the first, which the page chooses itself
    page.set_default_timeout(120_000)
    page.goto(url)
    page.locator("#examples button").first.wait_for(state="attached")
    page.set_input_files("#file", photos / "noise.png")
    chosen = page.get_attribute("#preview", "src")
    for route in held:
        route.continue_()
    page.locator(READY).wait_for()
    assert page.get_attribute("#preview", "src") == chosen and page.input_value("#texts") == ""

    context.close()


class Wrong(QuietHandler):
    """Of a server that answers for some files with other bodies, and with status 200."""

    wrong: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        name = self.path.split("?")[0].rpartition("/")[2]
        self.asked.append(name)
        if name not in self.wrong:
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.wrong[name])))
        self.end_headers()
        self.wfile.write(self.wrong[name])


@pytest.fixture
def wrong_server(exported):
    handler = type("Handler", (Wrong,), {"wrong": {}, "asked": []})
    with page_served(exported[0], handler) as url:
        yield url, handler


def test_a_wrong_download_is_neither_used_nor_kept(browser, exported, wrong_server, photos):
    url, server = wrong_server
    nouns = (exported[0] / "nouns.bin.gz").read_bytes()
    other = gzip.compress(bytes(len(gzip.decompress(nouns))))  # as long, which the digest alone tells
    with opened(browser, url, READY) as page:
        for body in (b"<!doctype html><title>Sign in</title>", b"", nouns[:-9], b"\x1f\x8bno gzip file", other):
            server.wrong["nouns.bin.gz"] = body
            ask(page, photos / "noise.png", "dog")
            assert "something other than the file nouns.bin.gz" in page.inner_text("#error")
            assert scores(page) == {}
        server.asked.clear()
        # Some servers send a .gz file decompressed.
        server.wrong["nouns.bin.gz"] = gzip.decompress(nouns)
        ask(page)
        expected = explain_by(exported, Image.open(photos / "noise.png"), ["dog"])
        check(page, expected)
        assert server.asked == ["nouns.bin.gz"]

        # What is damaged in the browser's cache is fetched again at the next visit, and nothing else is.
        server.wrong.clear()
        damage = """async (body) => {
            const cache = await caches.open("iclip /");
            for (const request of await cache.keys())
                if (request.url.includes("nouns")) await cache.put(request, new Response(body));
        }"""
        page.evaluate(damage, "<!doctype html>")
        server.asked.clear()
        page.reload()
        page.wait_for_selector(READY)
        ask(page, photos / "noise.png", "dog")
        check(page, expected)
        assert [name for name in server.asked if name.endswith(".gz")] == ["nouns.bin.gz"]


def test_a_wrong_file_of_the_page_is_not_kept_for_later(browser, exported, wrong_server):
    url, server = wrong_server
    kept = """async () => {
        const cache = await caches.open("iclip page /");
        return Promise.all((await cache.keys()).map(async ({ url }) => [url, await (await cache.match(url)).text()]));
    }"""
    server.wrong["page.css"] = b"<!doctype html>"
    with opened(browser, url, READY) as page:
        page.wait_for_function(
            "navigator.serviceWorker.getRegistration().then((found) => !found)"
        )  # could not be installed
        assert f"{url}page.css" not in dict(page.evaluate(kept))
        server.wrong.clear()
        page.reload()
        page.evaluate("navigator.serviceWorker.ready.then(() => null)")
        server.wrong["page.css"] = b""
        page.reload()
        page.wait_for_selector(READY)
        assert dict(page.evaluate(kept))[f"{url}page.css"] == (exported[0] / "page.css").read_text()


def test_photographs_stand_upright_as_in_python(browser, exported, url, photos, tmp_path):
    """EXIF turns JPEG, PNG and WebP files; XMP alone turns none."""
    image = Image.linear_gradient("L").resize((61, 40)).convert("RGB")
    image.paste("red", (3, 3, 20, 12))
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    with opened(browser, url, READY) as page:
        for form, options in {"jpeg": {"quality": 95}, "png": {}, "webp": {"lossless": True}}.items():
            for orientation in (
                range(1, 9) if form == "png" else (6,)
            ):  # by one table for PNG and WebP, JPEG by the browser
                exif = Image.Exif()
                exif[0x0112] = orientation
                path = tmp_path / f"{orientation}.{form}"
                image.save(path, exif=exif, **options)
                with Image.open(path) as stored:
                    expected = ImageOps.exif_transpose(stored).convert("RGB")
                ask(page, path, "dog")
                check(page, explain_by(exported, expected, ["dog"]))
        image.save(tmp_path / "xmp.webp", xmp=xmp, lossless=True)
        ask(page, tmp_path / "xmp.webp", "dog")
        check(page, explain_by(exported, image, ["dog"]))


def test_without_https_the_page_starts_without_an_error(browser, url):
    """There, browsers have no caches."""
    with opened(browser, url, READY) as page:
        page.add_init_script("delete globalThis.caches")
        page.reload()
        page.locator("#go:enabled").wait_for()
        page.wait_for_timeout(500)
        assert page.evaluate("!globalThis.caches")


def test_texts_of_a_link_are_texts(browser, url, photos):
    attack = "<img src=x onerror=alert(1)>, $& {} </script>"
    with opened(browser, f"{url}#texts=" + urllib.request.quote(attack + "\nsky"), READY) as page:
        dialogs = []
        page.on("dialog", lambda dialog: dialogs.append(dialog))
        ask(page, photos / "noise.png")
        assert page.locator("figcaption").all_inner_texts() == [attack, "sky"]
        assert set(scores(page)) == {attack, "sky"} and dialogs == []
        # Neither the page nor its worker may send anything elsewhere.
        for connect in (
            "fetch('http://localhost:1/')",
            """new Promise((resolve, reject) => {
                const code = "fetch('http://localhost:1/').then(() => postMessage(1), () => postMessage(0))";
                new Worker(URL.createObjectURL(new Blob([code]))).onmessage = ({data}) => data ? resolve() : reject();
            })""",
        ):
            assert page.evaluate(f"{connect}.then(() => 'sent', () => 'refused')") == "refused"
        assert not [address for address in page.requested if "localhost" in address]


def test_on_a_phone_with_the_keyboard(browser, url, photos):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with opened(browser, url, READY, **phone, color_scheme="dark") as page:
        page.evaluate("document.getElementById('status').textContent = 'asking'")
        page.set_input_files("#camera", photos / "noise.png")
        page.locator("#status", has_text=re.compile("^$")).wait_for(state="attached")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 27)"

        # The maps are below the question, and come into view when the visitor asks.
        ask(page, texts="a" * 300 + ", dog, sky")
        assert abs(page.locator("#viewer").bounding_box()["y"]) < 100
        assert page.evaluate("document.documentElement.scrollWidth") == 390

        # Other colours are a tap away.
        heat = canvas(page, 0)
        page.get_by_text("Colour-blind safe").tap()
        safe = canvas(page, 0)
        assert (safe[heat[..., 3] == 255][:, 2] != heat[heat[..., 3] == 255][:, 2]).all()
        page.get_by_text("Heat").tap()

        # Every control has a name, and the arrow keys read all maps at one place.
        names = page.evaluate("[...document.querySelectorAll('input, textarea')].map(field => field.labels.length)")
        assert names and all(names)
        page.locator(".stack").nth(0).focus()
        for _ in range(4):
            page.keyboard.press("ArrowLeft")
        x = int((0.5 - 4 / 40) * 61)
        texts = page.input_value("#texts").split(", ")
        shown = [label.split(" at ") for label in page.locator(".value").all_inner_texts()]
        for index, (value, place) in enumerate(shown):
            # Four of the 256 levels have one colour.
            assert place == f"{x}, 20" and float(value) == pytest.approx(drawn(page, index)[20, x], abs=0.016)
        assert page.locator("output.unseen").inner_text() == ", ".join(f"{t} {v}" for t, (v, _) in zip(texts, shown))

        with page.expect_download() as download:  # all maps under their texts
            page.click("#save")
        assert Image.open(download.value.path()).size == (3 * (61 + 12) + 12, 40 + 28 + 2 * 12)


# -------------------------------------------------------------------------------------------------- the functions


@pytest.fixture(scope="module")
def functions(browser, url):
    with opened(browser, url, READY) as page:
        yield page


def compute(page, function, *arguments):
    """Calls a function of numerics.js. Arrays travel as lists."""
    return page.evaluate(
        """async ([name, args]) => {
            const result = (await import("./numerics.js"))[name](...args.map((value) =>
                value?.floats ? Float32Array.from(value.floats) : value?.bytes ? Uint8Array.from(value.bytes) : value));
            if (result.levels) result.levels = [...result.levels];
            return ArrayBuffer.isView(result) ? [...result] : result;
        }""",
        [function, arguments],
    )


def floats(tensor):
    return {"floats": tensor.flatten().tolist()}


@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("size", [(61, 40), (20, 25), (150, 90), (32, 32), (7, 300)])
def test_images_are_resized_as_by_the_processor(functions, tiny_processor, size, kernel):
    image = noise(size, 120)
    image.putpixel((0, 0), (255, 0, 0))
    images = {"resample": kernel, "do_normalize": False, "do_rescale": False}
    expected = tiny_processor(images=image, images_kwargs=images)["pixel_values"][0].permute(1, 2, 0).numpy()
    rgba = {"bytes": np.asarray(image.convert("RGBA")).ravel().tolist()}
    found = compute(functions, "resize", rgba, *size, 32, 32, web._KERNELS[kernel])
    # On processors without AVX2, torchvision resizes bilinearly in float32, and rounds once.
    exact = kernel == 3 or "AVX" in torch.backends.cpu.get_cpu_capability()
    assert np.abs(np.array(found).reshape(32, 32, 3) - expected).max() <= (0 if exact else 1)


def test_pixels_are_normalized_as_by_the_processor(functions, tiny_processor):
    image = noise((32, 32), 120)
    expected = tiny_processor(images=image)["pixel_values"]
    settings = web._image_settings(tiny_processor)
    found = compute(functions, "normalize", {"bytes": np.asarray(image).ravel().tolist()}, settings)
    np.testing.assert_allclose(found, expected.flatten(), atol=1e-5)


@pytest.mark.parametrize("edge", [24, 32, 100])
def test_sizes_are_the_processors(functions, tiny_processor, edge):
    settings = {"size": {"shortest_edge": edge}, "patch": 8}
    for size in [(60, 40), (40, 60), (33, 33), (300, 20), (24, 28), (22, 22), (55, 22)]:  # the last two are ties
        pixels = tiny_processor(images=Image.new("RGB", size), size={"shortest_edge": edge})["pixel_values"]
        assert compute(functions, "modelSize", settings, size[1], size[0]) == list(pixels.shape[-2:])
    assert compute(functions, "modelSize", {"size": {"height": 32, "width": 48}, "patch": 8}, 5, 9) == [32, 48]


@pytest.mark.parametrize("map_attention", ["similarity", "additive", "signed", "none"])
@pytest.mark.parametrize(
    ("max_over", "pooling"), [("similarity", "masked_max"), ("similarity", "max"), ("channels", "max")]
)
def test_maps_are_the_models(functions, map_attention, max_over, pooling):
    options = {"map_attention": map_attention, "max_over": max_over, "pooling": pooling, "max_sharpness": 7.0}
    model = tiny_model("dinov2", **options)
    generator, weight = torch.Generator().manual_seed(0), None
    if map_attention == "signed":
        torch.nn.init.normal_(model.attention_direction, std=0.1, generator=generator)
    image = model.get_image_features(torch.randn(1, 3, 32, 40, generator=generator))
    text = model.get_text_features(torch.randint(2, 60, (1, 6), generator=generator))
    cosines = compute(functions, "similarities", floats(image.patch_embeds), floats(text.map_text_embeds))
    attention = floats(image.map_attention)
    if map_attention == "signed":
        weight = compute(
            functions, "attentionWeight", floats(image.attention_direction), floats(text.map_text_embeds), options
        )
    raw = compute(functions, "rawMap", {"floats": cosines}, attention, options, weight)
    np.testing.assert_allclose(raw, model.similarity_maps(image, text).detach().flatten(), atol=1e-5)


@pytest.mark.parametrize("max_over", ["similarity", "channels"])
def test_presence_is_that_of_python(functions, max_over):
    model = tiny_model("dinov2", max_over=max_over)
    generator = torch.Generator().manual_seed(0)
    image = model.get_image_features(torch.randn(1, 3, 32, 40, generator=generator))
    texts, nouns = (model.get_text_features(torch.randint(2, 60, (n, 6), generator=generator)) for n in (3, 30))
    vectors = [
        [
            {"embeds": one.tolist(), "mapEmbeds": other.tolist()}
            for one, other in zip(of.text_embeds, of.map_text_embeds)
        ]
        for of in (texts, nouns)
    ]
    found = functions.evaluate(
        """async ([embeds, patches, texts, nouns, settings]) => {
            const { chance, dot, presence, similarities } = await import("./numerics.js");
            const image = { embeds, patches: Float32Array.from(patches) };
            const compared = chance(image, nouns, settings);
            return texts.map((text) => presence(
                text, dot(embeds, text.embeds), similarities(image.patches, text.mapEmbeds), compared, settings));
        }""",
        [
            image.image_embeds[0].tolist(),
            image.patch_embeds.flatten().tolist(),
            *vectors,
            {"matches_patches": model.matches_patches, **CONSTANTS},
        ],
    )
    assert found == pytest.approx(presence(model, image, texts, nouns)[0].tolist(), abs=1e-5)


def test_the_word_of_presence_is_that_of_python(functions):
    settings = {"min_presence": MIN_PRESENCE, "present": PRESENT}
    for value in (0.0, 0.499, 0.5, 0.799, 0.8, 1.0):
        assert compute(functions, "presenceWord", value, settings) == presence_word(value)


@pytest.mark.parametrize(("grid", "size"), [((4, 5), (40, 61)), ((2, 7), (30, 30)), ((5, 5), (3, 4))])
def test_maps_are_enlarged_and_stretched_as_in_python(functions, grid, size):
    map_ = torch.randn(1, *grid, generator=torch.Generator().manual_seed(2))
    expected = (resize_and_normalize(map_, size) * 255).flatten().numpy()
    found = compute(functions, "enlarge", floats(map_), list(grid), size[1], size[0])
    raw = resize_maps(map_, size)
    assert (found["low"], found["high"]) == pytest.approx((raw.min().item(), raw.max().item()), abs=1e-5)
    assert np.abs(np.array(found["levels"]) - expected).max() <= 0.51
    constant = compute(functions, "enlarge", floats(torch.full(grid, 0.3)), list(grid), size[1], size[0])
    assert set(constant["levels"]) == {0}


@pytest.mark.parametrize("size", [(30, 20), (17, 24)])
def test_maps_are_refined_as_in_python(functions, size):
    image = noise(size, 40)
    image.paste((90, 90, 90), (0, 0, size[0] // 2, size[1]))  # with cells of one colour
    pixels, raw = np.array(image), torch.randn(3, 5, generator=torch.Generator().manual_seed(5))
    expected = refine_maps(raw[None, None], torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1)[0, 0]
    found = functions.evaluate(
        """async ([rgb, [width, height], map, grid]) => {
            const { neighbours, refine } = await import("./numerics.js");
            const near = neighbours(Uint8Array.from(rgb), width, height);
            return [near.grid, [...refine(Float32Array.from(map), grid, near)]];
        }""",
        [pixels.ravel().tolist(), size, raw.flatten().tolist(), [3, 5]],
    )
    assert found[0] == list(expected.shape)
    np.testing.assert_allclose(found[1], expected.flatten(), atol=1e-4)


@pytest.mark.parametrize("outline", [0.4, 1])
def test_segments_are_the_label_map(functions, outline):
    raw_maps = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(4))
    raw_maps[3] += 9  # of an absent text
    size, present, texts = (24, 36), torch.tensor([True, True, True, False]), ["dog", "sky", "car", "cat"]
    expected = segments(raw_maps, size, present, threshold=0.5 if outline == 1 else outline)  # 1 is no outline
    assert set(expected.unique().tolist()) == {-1, 0, 1, 2}
    large = resize_maps(raw_maps, size).flatten(1)
    results = [
        {"low": values.min().item(), "high": values.max().item(), "cosine": 0, "presence": 0}
        | {"word": "unsure" if there else "absent"}
        | {"levels": (resize_and_normalize(raw[None], size) * 255).round().int().flatten().tolist()}
        for values, raw, there in zip(large, raw_maps, present.tolist())
    ]
    picture = functions.evaluate(
        """async ([texts, [height, width], results, look, outline]) => {
            const { createViewer } = await import("./viewer.js");
            const element = document.body.appendChild(document.createElement("div")), size = [width, height];
            const viewer = createViewer(element, look);
            viewer.show({ photo: new OffscreenCanvas(width, height), size, originalSize: size, texts });
            results.forEach((result, index) => viewer.add(index, { ...result, levels: Uint8Array.from(result.levels) }));
            const [, threshold, segments] = element.querySelectorAll("input");
            segments.click();
            threshold.value = outline;
            threshold.dispatchEvent(new Event("input"));
            element.id = "synthetic";
            return element.querySelectorAll("figure canvas")[1].toDataURL();
        }""",
        [texts, size, results, content.look(), outline],
    )
    pixels, found = decoded(picture), np.full(size, -1)
    for index, ink in enumerate([[0xE6, 0x9F, 0], [0x56, 0xB4, 0xE9], [0, 0x9E, 0x73]]):
        found[(pixels[..., :3] == ink).all(-1) & (pixels[..., 3] == 255)] = index
    assert (found == expected.numpy()).mean() > 0.98  # 8 bits decide otherwise on borders
    assert functions.locator("#synthetic").last.locator(".key").all_inner_texts() == texts[:3]


def test_prompts_of_one_label_are_averaged_as_unit_vectors(functions):
    vectors = torch.nn.functional.normalize(torch.randn(3, 5, generator=torch.Generator().manual_seed(3)), dim=-1)
    found = functions.evaluate(
        "async (rows) => [...(await import('./numerics.js')).unitMean(rows.map((row) => Float32Array.from(row)))]",
        vectors.tolist(),
    )
    np.testing.assert_allclose(found, torch.nn.functional.normalize(vectors.mean(0), dim=0), atol=1e-6)


# ---------------------------------------------------------------------------------------------- export and server


@pytest.fixture
def without_graphs(monkeypatch):
    """Exports pages with files of a few bytes instead of graphs."""

    def fake_graphs(model, processor, folder, weights):
        folder.mkdir()
        processor.save_pretrained(folder)
        for name in ("vision_model.onnx", "text_model.onnx"):
            (folder / name).write_bytes(b"graph")
        return folder

    monkeypatch.setattr(web, "export_onnx", fake_graphs)
    monkeypatch.setattr(web, "_nouns", lambda model, processor: b"")
    monkeypatch.setattr(web, "ONNXModel", lambda folder: None)


def test_without_vendor_the_packages_come_from_a_cdn_with_their_digests(tiny_processor, tmp_path, without_graphs):
    web.export_web(tiny_model(), tiny_processor, tmp_path / "page", weights="bfloat16")
    settings = json.loads((tmp_path / "page" / "settings.json").read_text())
    assert list(settings["runtime"]) == ["wasm", "webgpu"]
    policy = re.search('Content-Security-Policy" content="([^"]*)"', (tmp_path / "page" / "index.html").read_text())[1]
    allowed = re.search("connect-src 'self' ([^;]*);", policy)[1].split()
    for file in [*settings["runtime"]["webgpu"].values(), settings["files"]["tokenizers"]]:
        assert re.fullmatch("sha384-[A-Za-z0-9+/]{64}", file["integrity"])
        assert file["url"].startswith(tuple(allowed)) and re.search(r"@\d+\.\d+\.\d+/dist/", file["url"])
    assert not list((tmp_path / "page").glob("*.mjs*"))


def test_what_a_foreign_card_tells_stays_text(tiny_processor, tmp_path, without_graphs):
    licence = "mit\nsdk: docker\nhf_oauth: true"
    parts = {
        "license": licence,
        "training": [{"data": ["/home/alice/photos/pairs.tar"]}],
        "labels": [licence],
        "identity": {},
    }
    (tmp_path / "model_card.json").write_text(json.dumps(parts))
    page = web.export_web(tiny_model(), tiny_processor, tmp_path / 'a: "b" #1', source=tmp_path)
    card, text = RepoCard.load(page / "README.md").data, (page / "model_card.md").read_text()
    assert (card.sdk, card.license, card.title) == ("static", "unknown", 'a: "b" #1')
    assert "hf_oauth" not in card.to_dict() and "pairs.tar" in text and "alice" not in text


@NEEDS_NPM
def test_the_digests_are_those_of_the_npm_packages():
    files = [*web._RUNTIME["wasm"].values(), *web._RUNTIME["webgpu"].values(), web._RUNTIME["tokenizers"]]
    assert web._npm_files(files).keys() == {file["integrity"] for file in files}  # which checks them
    changed = {**web._RUNTIME["tokenizers"], "integrity": "sha384-" + "A" * 64}
    with pytest.raises(OSError, match="dist/tokenizers.min.mjs has the digest sha384-Tl2lM"):
        web._npm_files([changed])


@pytest.mark.parametrize("options", [{"do_center_crop": True}, {"resample": 1}, {"do_resize": False}])
def test_a_processor_that_the_page_cannot_follow_is_refused(tiny_processor, tmp_path, options):
    processor = web.ICLIPProcessor(
        type(tiny_processor.image_processor)(
            **{"size": {"height": 32, "width": 32}, "do_center_crop": False, **options}
        ),
        tiny_processor.tokenizer,
    )
    with pytest.raises(ValueError, match="resample="):
        web.export_web(tiny_model(), processor, tmp_path / "page")
    assert list(tmp_path.iterdir()) == []


def test_the_command_serves_a_page(tmp_path):
    for name in ("settings.json", "worker.js"):
        (tmp_path / name).write_text("x")
    command = [sys.executable, "-m", "iclip_hf.cli", "demo", "--web", str(tmp_path)]
    # A background job of a shell, and what it starts, ignore Ctrl-C.
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "text": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        with urllib.request.urlopen(f"{address}worker.js") as answer:
            assert answer.headers["Content-Type"].startswith("text/javascript")
            assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130 and process.stderr.read() == "iclip demo: interrupted\n"


@pytest.mark.slow
@NEEDS_NPM
def test_the_embedded_model_on_photographs(browser, iclip_data, tmp_path):
    model, processor = load_iclip("embedded", dtype="float32")
    folder = web.export_web(model, processor, tmp_path / "page", vendor=True)
    exported = folder, unpacked(folder, model, processor, tmp_path / "onnx"), processor
    texts = ["person", "wooden table", "Café in 東京 🍰"]
    photos = sorted(Path(iclip_data, "coco100", "train2017").glob("*.jpg"))[:8]
    with page_served(folder) as address, opened(browser, address, READY) as page:
        for photo in photos:
            ask(page, photo, ", ".join(texts))
            image = Image.open(photo).convert("RGB")
            check(page, explain_by(exported, image, texts, target_sizes=[content.view_size(image)[::-1]]))
