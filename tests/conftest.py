"""Tiny random models of every tower pair, their processor, fixtures of several test files, the folder of real data."""

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch


# Before any library reads it: metric scripts and remote code stay out of the user's cache.
_MODULES = tempfile.TemporaryDirectory(prefix="iclip-modules-")
os.environ["HF_MODULES_CACHE"] = _MODULES.name
# ruff: noqa: E402

import iclip_hf


if not Path(iclip_hf.__file__).resolve().is_relative_to(Path(__file__).resolve().parents[1]):
    pytest.exit(f"{iclip_hf.__file__} is not of this clone: install it by `pip install -e .`.", returncode=4)

from fault_inputs import PHOTO, encoded, tar
from hypothesis import HealthCheck, settings
from PIL import Image
from transformers import BertTokenizer, CLIPImageProcessor

from iclip_hf import ICLIPConfig, ICLIPModel, ICLIPProcessor, ImageTextSimilarityMapPipeline, cli
from iclip_hf.backends import embedded
from iclip_hf.data.segmentation import SegmentationDataset, load_segmentation


# Tests of properties on a machine of any speed.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

# The nouns that random models encode stay out of the user's cache too.
embedded.nouns_folder = lambda: Path(_MODULES.name, "nouns")

explain = partial(iclip_hf.explain, refine=False)  # the maps as the model has them
evaluate_model = partial(iclip_hf.evaluate_model, progress=False)


def noise(size: tuple[int, int], spread: int = 80, seed: int = 0) -> Image.Image:
    """
    A grey photograph of noise, (width, height) pixels, as `Image.effect_noise` draws it, but the same on every run.
    """
    grey = np.random.default_rng(seed).normal(128, spread, size[::-1]).clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def iclip(*arguments) -> int:
    """Runs a command line in this process and returns its exit code."""
    return cli.main([*map(str, arguments)])


VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
VISION = {
    "vit": {"model_type": "vit", "layer_norm_eps": 1e-6, **VIT},
    "dinov2": {"model_type": "dinov2", **VIT},
    "dinov2_with_registers": {"model_type": "dinov2_with_registers", "num_register_tokens": 3, **VIT},
    "dinov3_vit": {"model_type": "dinov3_vit", "num_register_tokens": 4, **VIT},
    "clip_vision_model": {"model_type": "clip_vision_model", **VIT},
}
# Options of a model with a feature tower, which pads as TensorFlow, and has 1 x 2 places in 32 x 48 pixels.
TIMM = {"model_type": "timm_wrapper", "architecture": "test_efficientnet", "model_args": {"pad_type": "same"}}
FEATURES = {"feature_config": TIMM, "feature_dim": 6}
TRANSFORMER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 77,
}
WORDS = "a photo of the dog cat ball red blue car sky grass person . , [PAD] [UNK] [CLS] [SEP] [MASK]".split()
# Classes of the labelled folder.
NAMES = ["dog", "red ball", "car"]
CLIP_TOKENS = {"vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 1}
TEXT = {
    "clip_text_model": {"model_type": "clip_text_model", **TRANSFORMER, **CLIP_TOKENS},
    "siglip_text_model": {"model_type": "siglip_text_model", "projection_size": 40, **TRANSFORMER, **CLIP_TOKENS},
    "bert": {"model_type": "bert", "vocab_size": 64, **TRANSFORMER},
}


def tiny_config(vision: str = "vit", text: str = "bert", **options) -> ICLIPConfig:
    options.setdefault("text_pooling", "mean" if text == "bert" else "eos")
    return ICLIPConfig(vision_config=VISION[vision], text_config=TEXT[text], **{"projection_dim": 16, **options})


@torch.no_grad()
def liven(model: torch.nn.Module) -> torch.nn.Module:
    """Draws larger weights than the usual ones, at which all tokens would be nearly equal. Returns the model."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1)
        elif "bn" in name:
            parameter.fill_(1)  # a ResNet starts with its blocks' last norm at 0
    return model.eval()


def tiny_model(vision: str = "vit", text: str = "bert", seed: int = 0, **options) -> ICLIPModel:
    """A random model with the weights of `liven`."""
    torch.manual_seed(seed)
    return liven(ICLIPModel(tiny_config(vision, text, **options)))


def save(folder: Path, *parts) -> Path:
    """Saves a model and its processor, or other parts, to one folder."""
    for part in parts:
        part.save_pretrained(folder)
    return folder


def save_towers(folder: Path, model: ICLIPModel, processor: ICLIPProcessor) -> tuple[str, str]:
    """Saves the image tower and the text tower of a model, each with its part of the processor, to folders."""
    vision = save(folder / "vision", model.vision_model, processor.image_processor)
    text = save(folder / "text", model.text_model, processor.tokenizer)
    return str(vision), str(text)


def tiny_inputs(batch: int = 2, texts: int = 3, size: tuple[int, int] = (32, 32), seed: int = 0) -> dict:
    """
    Pixels of `batch` images of `size` (height, width), and token ids of `texts` texts, each of which ends with the end
    of sequence, followed by padding.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, 60, (texts, 7), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(texts):
        end = 6 - row % 3
        input_ids[row, end] = 63
        input_ids[row, end + 1 :] = 1
        attention_mask[row, end + 1 :] = 0
    pixel_values = torch.randn(batch, 3, *size, generator=generator)
    return {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}


def bilinear(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """
    Resizes `(..., h, w)` to `size` (height, width) by the weights of the two nearest rows and columns. Beyond the
    edge, the nearest row or column counts.
    """
    for axis, length in ((-2, size[0]), (-1, size[1])):
        old = values.shape[axis]
        place = np.clip((np.arange(length) + 0.5) * old / length - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        high, share = np.minimum(low + 1, old - 1), place - low
        share = share[:, None] if axis == -2 else share
        values = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
    return values


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, *arguments):
        pass


@contextmanager
def served(handler: Callable, port: int = 0) -> Iterator[ThreadingHTTPServer]:
    """
    Runs an HTTP server in a thread, and stops it at the end, also after an error: a closed server whose thread runs
    takes all time of a processor.
    """
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def tiny_tokenizer(folder: Path) -> BertTokenizer:
    """A tokenizer with as many tokens as the text towers have embeddings. The last one ends a text, as in CLIP."""
    tokens = ["[unused]" if word == "[SEP]" else word for word in WORDS]
    tokens += [f"[unused{number}]" for number in range(len(tokens), 63)]
    (folder / "vocab.txt").write_text("\n".join([*tokens, "[SEP]"]))
    return BertTokenizer(vocab=str(folder / "vocab.txt"))


def tiny_image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)


@pytest.fixture(scope="session")
def tiny_processor(tmp_path_factory) -> ICLIPProcessor:
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return ICLIPProcessor(tiny_image_processor(), tokenizer, patch_size=8)


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny_processor) -> SimpleNamespace:
    """A tiny model, its pipeline, and a folder with the model and a photograph. No test may change them."""
    folder = tmp_path_factory.mktemp("world")
    model = tiny_model(logit_bias_init_value=0.0)
    save(folder / "model", model, tiny_processor)
    PHOTO.save(folder / "photo.png")
    return SimpleNamespace(
        folder=folder,
        model=model,
        processor=tiny_processor,
        photo=folder / "photo.png",
        pipe=ImageTextSimilarityMapPipeline(model=model, processor=tiny_processor, device="cpu"),
    )


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: the system's, or Playwright's own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as driver:
        if system is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("needs Chromium: apt-get install chromium, or playwright install chromium")
        browser = driver.chromium.launch(executable_path=system, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, address: str, ready: str, script: str = "", **options) -> Iterator:
    """
    Opens a page in a new context of the browser, with these options, and waits for the selector `ready`. `script` runs
    before the scripts of the page. `page.requested` lists the addresses that it requests. An error in its scripts
    fails the test.
    """
    context = browser.new_context(**options)
    page = context.new_page()
    page.add_init_script(script)
    page.set_default_timeout(120_000)  # for busy machines
    page.requested, page.failures = [], []
    page.on("request", lambda request: page.requested.append(request.url))
    page.on("pageerror", lambda error: page.failures.append(error))
    page.goto(address)
    page.wait_for_selector(ready)
    yield page
    assert page.failures == []
    context.close()


@pytest.fixture
def recorded(monkeypatch) -> Callable:
    """
    A function that records the calls of the function `name` of `owner`, which still runs. It returns the growing list
    of what `note` returns for the arguments of each call.
    """

    def record(owner, name: str, note: Callable = lambda *args, **options: args) -> list:
        notes, function = [], getattr(owner, name)

        def call(*args, **options):
            notes.append(note(*args, **options))
            return function(*args, **options)

        monkeypatch.setattr(owner, name, call)
        return notes

    return record


@pytest.fixture
def sandbox(monkeypatch):
    """
    A folder with `case`, for the files of a test case, `here`, the empty working directory, and `elsewhere`, for
    temporary files. The cache is in `cache`, and the Hub is offline.
    """
    # Not tmp_path: thousands of its numbered folders take longer than the cases.
    with tempfile.TemporaryDirectory() as name:
        for folder in ("here", "elsewhere", "case"):
            Path(name, folder).mkdir()
        monkeypatch.setenv("ICLIP_CACHE", f"{name}/cache")
        monkeypatch.setenv("TMPDIR", f"{name}/elsewhere")
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.chdir(Path(name, "here"))
        yield Path(name)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_processor) -> Path:
    """A tiny model, three photographs of different shapes and a damaged one."""
    folder = tmp_path_factory.mktemp("cli")
    save(folder / "model", tiny_model(logit_bias_init_value=0.0), tiny_processor)
    for number, size in enumerate([(60, 40), (30, 90), (64, 64)]):
        (folder / str(number)).mkdir()
        noise(size).save(folder / str(number) / "a.jpg")
    (folder / "broken.jpg").write_bytes((folder / "0" / "a.jpg").read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def labelled_folder(tmp_path_factory) -> Path:
    """Seven images with masks: some classes absent, void pixels, one image without a class."""
    values = [[0, 0, 255, 1 + number % 3, 1 + number % 2] for number in range(7)]
    return write_folder(tmp_path_factory.mktemp("folder"), [*values[:4], [0, 0, 255], *values[5:]], 60)


@pytest.fixture
def dataset(labelled_folder) -> SegmentationDataset:
    """The images and masks of `labelled_folder`."""
    return load_segmentation("folder", labelled_folder)


@pytest.fixture(scope="session")
def iclip_data() -> Path:
    """The folder of real pairs and masks: ICLIP_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("ICLIP_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"needs the real data: {folder} does not exist, set ICLIP_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def embedded_folder() -> Path:
    """The folder of the embedded model."""
    try:
        return embedded.embedded_model()
    except OSError as error:
        pytest.skip(f"the embedded towers cannot be had here: {error}")


@pytest.fixture(scope="module")
def made(tiny_processor, tmp_path_factory):
    """
    A function that returns what `build` returns for a family. It builds the model of a family once for all tests of a
    module, so no test may change it. A tiny DINOv2 replaces the embedded one.
    """
    from families import build

    proxy = tmp_path_factory.mktemp("proxy")
    save(proxy, tiny_model("dinov2").vision_model, tiny_image_processor())
    cache = {}

    def get(family):
        if family not in cache:
            cache[family] = build(family, tiny_processor)
        return cache[family]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iclip_hf.explainers.proxyclip.embedded_towers", lambda: (proxy, None))
        yield get


def write_folder(root: Path, values: list[list[int]], largest: int) -> Path:
    """
    Writes an image for each list of values, with sides of 20 to `largest` - 1 pixels, and an index mask with squares
    of 5 x 5 pixels that have these values, for `load_segmentation("folder")`. Returns `root`.
    """
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    (root / "masks").mkdir()
    (root / "classes.txt").write_text("\n".join(NAMES))
    for number, of_image in enumerate(values):
        height, width = rng.integers(20, largest, 2)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        mask = rng.choice(of_image, (height // 5 + 1, width // 5 + 1)).astype(np.uint8)
        Image.fromarray(mask.repeat(5, 0).repeat(5, 1)[:height, :width]).save(root / "masks" / f"{number}.png")
    return root


def write_pairs(path: Path, count: int, broken: tuple[int, ...] = (), seed: int = 0, captions=None, **more) -> None:
    """
    Writes a webdataset shard of `count` noise images with two captions each, or those given, and more fields. Files
    with an index in `broken` are no images.
    """
    draws, members = np.random.default_rng(seed), []
    for i in range(count):
        image = encoded(Image.fromarray(draws.integers(0, 256, (40, 36, 3), dtype=np.uint8)), "JPEG")
        words = [WORDS[j] for j in draws.integers(0, 12, 5)]
        own = captions or [" ".join(words), " ".join(words[::-1]) + f" {i}"]
        members.append((f"{i:05d}.jpg", b"no image" if i in broken else image))
        members.append((f"{i:05d}.json", json.dumps({"captions": own, **more})))
    path.write_bytes(tar(*members))


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tiny_processor) -> Path:
    """A folder as in hub_configs, with tiny towers and pairs: 64 pairs in 4 steps an epoch, 12 steps in all."""
    folder = tmp_path_factory.mktemp("hub")
    model = tiny_model()
    save_towers(folder, model, tiny_processor)
    save(folder, model.config, tiny_processor)
    write_pairs(folder / "pairs.tar", 64)
    write_pairs(folder / "held_out.tar", 17, seed=1)
    (folder / "train.yaml").write_text(
        f"""
        vision: {folder}/vision
        text: {folder}/text
        data: [{folder}/pairs.tar]
        image_size: 32
        per_device_train_batch_size: 16
        num_train_epochs: 3
        warmup_steps: 4
        learning_rate: 7.8125e-4
        warmup_learning_rate: 1.5625e-8
        min_learning_rate: 1.5625e-7
        dataloader_num_workers: 0
        eval_steps: 5
        save_steps: 5
        """
    )
    return folder
