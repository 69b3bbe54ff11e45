"""What readers of data and models meet by mistake or in bad faith: an error that names the file, or they bear it."""

import contextlib
import io
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import fault_inputs as inputs
import numpy as np
import pytest
from conftest import iclip
from fault_inputs import encoded, index_mask, masks_folder, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iclip_hf.data.pairs import load_pairs
from iclip_hf.data.segmentation import load_segmentation
from iclip_hf.evaluation.results import class_thresholds
from iclip_hf.images import load_image
from iclip_hf.models.loading import load_pretrained
from iclip_hf.training.nouns import NounPrompts


# ---- the readers: each is given a world, an empty folder and what it reads ----


def mask(world, folder, content):
    sample = load_segmentation("folder", masks_folder(folder, mask=content))[0]
    return sample.labels, sample.mask(1), sample.image


def image_of_mask(world, folder, content):
    return load_segmentation("folder", masks_folder(folder, content, index_mask(np.ones((24, 30), np.uint8))))[0].image


def classes(world, folder, content):
    return load_segmentation("folder", masks_folder(folder, classes=content))


def voc(world, folder, names):
    root = folder / "VOCdevkit" / "VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / part).mkdir(parents=True)
    (root / "JPEGImages" / "a.jpg").write_bytes(inputs.BY_FORMAT["JPEG"])
    (root / "SegmentationClass" / "a.png").write_bytes(index_mask(np.ones((24, 30), np.uint8)))
    written(root / "ImageSets" / "Segmentation", names, "val.txt")
    return len(load_segmentation("voc2012", folder))


CATEGORY, PICTURE = {"id": 3, "name": "dog"}, {"id": 5, "file_name": "image.png", "height": 24, "width": 30}
POLYGON = {"id": 7, "image_id": 5, "category_id": 3, "iscrowd": 0, "segmentation": [[1, 1, 9, 1, 9, 9]]}
CROWD = {"id": 8, "iscrowd": 1, "segmentation": {"size": [24, 30], "counts": [700, 20]}}


def coco(world, folder, content):
    if isinstance(content, dict):
        content = json.dumps({"categories": [CATEGORY], "images": [PICTURE], "annotations": [POLYGON]} | content)
    (folder / "annotations").mkdir()
    (folder / "val2017").mkdir()
    shutil.copy(world.photo, folder / "val2017" / "image.png")
    written(folder / "annotations", content, "instances_val2017.json")
    sample = load_segmentation("coco2017", folder)[0]
    return sample.image, sample.mask(1)


def annotation(**changes) -> dict:
    return {"annotations": [{**POLYGON, **changes}]}


def runs(counts, size=(24, 30)) -> dict:
    return annotation(segmentation={"size": list(size), "counts": counts}, iscrowd=1)


def overrides(name: str):
    def run(world, folder, content):
        content = json.dumps(content) if isinstance(content, dict) else content
        return load_segmentation("folder", masks_folder(folder), overrides=written(folder, content, name))

    return run


def pairs(name: str):
    def run(world, folder, content):
        shutil.copy(world.photo, folder / "photo.png")
        loaded = load_pairs(written(folder, content, name))
        return [loaded.read(index) for index in range(len(loaded))]

    return run


def shard(caption: str | bytes, suffix: str = "json") -> bytes:
    return inputs.tar(("a.png", inputs.BY_FORMAT["PNG"]), (f"a.{suffix}", caption))


def nouns(world, folder, content):
    return NounPrompts.from_file(written(folder, content, "nouns.txt"))


def train_yaml(world, folder, content):
    """`iclip train` without a look at the files, and without training."""
    err, config = io.StringIO(), written(folder, content, "train.yaml")
    unread, untrained = patch("iclip_hf.training.checks.check_run"), patch("iclip_hf.training.run.train")
    with unread, untrained, contextlib.redirect_stderr(err):
        code = iclip("train", "--config", config)
    assert code in (0, 2)
    if code == 2:
        raise ValueError(err.getvalue())


def model(world, folder, damage):
    shutil.copytree(world.folder / "model", folder / "model")
    damage(folder / "model")
    return load_pretrained(folder / "model")


def thresholds(world, folder, content):
    return class_thresholds(written(folder, content), ["dog"])


def image(world, folder, content):
    return load_image(written(folder, content, "image.png"))


# ---- what they are given ----

GOOD_TAR = (("a.png", inputs.BY_FORMAT["PNG"]), ("a.txt", "a dog"))
HEADER, ROW = b"file_name,caption\n", b"photo.png,a dog\n"
LINE = '{"file_name": "photo.png", "caption": "a dog"}\n'
SETTINGS = {"vision": "v", "text": "t", "data": "[d]"}


def setting(name: str, value) -> str:
    return "\n".join(f"{other}: {its}" for other, its in {**SETTINGS, name: value}.items())


# By the reader, and what the error names: one of the words.
REFUSED = {
    "mask": (
        mask,
        "image.png",
        {
            **{name: inputs.UNREADABLE_IMAGES[name] for name in inputs.FEW_UNREADABLE},
            "a class that is not listed": index_mask(np.full((24, 30), 7, np.uint8)),
            "colours": inputs.BY_FORMAT["PNG"],
            "16 bits": index_mask(np.full((24, 30), 1, np.uint16)),
            "with alpha": encoded(inputs.PHOTO.convert("LA"), "PNG"),
        },
    ),
    "image of a mask": (image_of_mask, "image.png", {"another size": encoded(inputs.PHOTO.resize((31, 24)), "PNG")}),
    "classes": (
        classes,
        "classes.txt",
        {
            "empty": "",
            "blank": "\n \n",
            "UTF-16": "dog".encode("utf-16"),
            "no text": bytes(range(128, 200)),
            "a blank line": "dog\n\ncat",
            "one twice": "dog\ncat\ndog",
            "background": "background\ndog",
            "300": "\n".join(map(str, range(300))),
        },
    ),
    "VOC": (
        voc,
        "/case",
        {
            "empty": "",
            "blank": "\n \n\t",
            "an absent image": "a\nb",
            "a path out of the folder": "../../../../photo",
            "no text": bytes(range(128, 200)),
            "null bytes": bytes(1000),
        },
    ),
    "COCO": (
        coco,
        "instances_val2017.json image.png absent.png",
        {
            **inputs.BAD_JSON,
            "no images": {"images": []},
            "category whose name is a number": {"categories": [{"id": 3, "name": 3}]},
            "category twice": {"categories": [CATEGORY, {"id": 3, "name": "cat"}]},
            "category name twice": {"categories": [CATEGORY, {"id": 4, "name": "dog"}]},
            "image of another size": {"images": [PICTURE | {"height": 23}]},
            "image by a number": {"images": [PICTURE | {"file_name": 3}]},
            "image twice": {"images": [PICTURE, PICTURE | {"file_name": "other.png"}]},
            "image out of the folder": {"images": [PICTURE | {"file_name": "../annotations/instances_val2017.json"}]},
            "absent image": {"images": [PICTURE | {"file_name": "absent.png"}]},
            "unlisted category": annotation(category_id=4),
            "unlisted image": annotation(image_id=6),
            "no segmentation": annotation(segmentation=None),
            "segmentation without text": annotation(segmentation=""),
            "polygon of two points": annotation(segmentation=[[1, 1, 2, 2]]),
            "polygon far outside": annotation(segmentation=[[0, 0, 10**9, 0, 0, 10**9]]),
            "polygon with NaN": annotation(segmentation=[[0, 0, float("nan"), 0, 0, 9]]),
            "runs of another size": runs([720], (30, 24)),
            "runs that are too short": runs([700]),
            "negative runs": runs([-5, 725]),
            "runs of text": runs("no runs"),
            "endless runs": runs("o" * 10**6),
            "runs of one digit": runs("1"),
            "no runs": annotation(segmentation={"size": [24, 30]}),
        },
    ),
    "overrides": (
        overrides("names.json"),
        "names.json",
        {
            **{name: content for name, content in inputs.BAD_JSON.items() if name != "empty object"},
            "unknown name": {"names": {"no class": "dog"}},
            "names of no text": {"names": {"dog": False}},
            "name twice": {"names": {"dog": "cat"}},
            "blank name": {"names": {"dog": " "}},
            "no templates": {"templates": []},
            "template without a place": {"templates": ["a photo"]},
        },
    ),
    "overrides in YAML": (
        overrides("names.yaml"),
        "names.yaml",
        {
            "an object of Python": "!!python/object/apply:os.mkdir [executed]",
            "bomb of aliases": f"a: {inputs.BOMB_OF_ALIASES}",
            "bomb as a name": f"names: {{dog: {inputs.BOMB_OF_ALIASES}}}",
            "bomb as a template": f"templates: {inputs.BOMB_OF_ALIASES}",
            "bomb as a key": f"? [{inputs.BOMB_OF_ALIASES}]\n: 1",
            "two documents": "names: {}\n---\nnames: {}",
        },
    ),
    "shard": (
        pairs("a.tar"),
        "a.tar",
        {
            "empty": b"",
            "text": "no tar",
            "compressed": inputs.tar(*GOOD_TAR, mode="w:gz"),
            "truncated": inputs.tar(*GOOD_TAR)[:700],
            "damaged header": inputs.damaged(inputs.tar(*GOOD_TAR)[:512], 3) + inputs.tar(*GOOD_TAR)[512:],
            "damaged header of a later pair": inputs.tar(*GOOD_TAR, ("b.png", b""), ("b.txt", "")).replace(
                b"b.png", b"\xff" * 5
            ),
            "a member beyond all bounds": inputs.huge_member(2**80),
            "attributes beyond all bounds": inputs.huge_member(2**80, b"x"),
            "a thousand long names": inputs.tar(*[("././@LongLink", "a.png\0")] * 1000, type=b"L"),
            "attributes that are none": inputs.tar(("a", "9 size=b\n"), ("a.png", ""), type=b"x"),
            "links": inputs.tar(*GOOD_TAR, type=b"2", linkname="/etc/passwd"),
            "blank caption": shard(" \n", "txt"),
            "caption in UTF-16": shard("a dog".encode("utf-16"), "txt"),
            **{f"JSON that is {name}": shard(content) for name, content in inputs.BAD_JSON.items()},
            "caption of a lone surrogate": shard('{"caption": "\\ud800"}'),
        },
    ),
    "table": (
        pairs("a.csv"),
        "/case/ /dev/zero",
        {
            "empty": b"",
            "blank": b"\n\n",
            "header alone": HEADER,
            "no header": ROW,
            "other columns": b"a,b\n" + ROW,
            "a column twice": b"file_name,caption,caption\n" + ROW.replace(b"\n", b",a cat\n"),
            "a field too many": HEADER + b"photo.png,a dog,x\n",
            "a field too few": HEADER + b"photo.png\n",
            "no caption": HEADER + b"photo.png,\n",
            "no image": HEADER + b",a dog\n",
            "absent image": HEADER + b"absent.png,a dog\n",
            "device as image": HEADER + b"/dev/zero,a dog\n",
            "URL": HEADER + b"https://127.0.0.1:9/a.png,a dog\n",
            "UTF-16": (HEADER + ROW).decode().encode("utf-16"),
            "no text": HEADER + bytes(range(128, 200)) + b",dog\n",
            "null bytes": bytes(1000),
            "pickle": inputs.UNREADABLE_IMAGES["pickle"],
            "open quote": HEADER + b'photo.png,"a dog\n',
            "a field of a million": HEADER + b"photo.png," + b"d" * 10**6 + b"\n",
        },
    ),
    "lines of JSON": (
        pairs("a.jsonl"),
        "a.jsonl /case",
        {
            **{f"{name} first": content for name, content in inputs.BAD_JSON.items()},
            **{
                f"{name} later": LINE + text
                for name, text in inputs.BAD_JSON.items()
                if isinstance(text, str) and text.strip()
            },
            "captions as an object": '{"file_name": "photo.png", "captions": {"a": 1}}',
            "image as a number": '{"file_name": 3, "caption": "a dog"}',
            "image as a list": '{"file_name": ["photo.png"], "caption": "a dog"}',
            "null character in the name": '{"file_name": "a\\u0000b.png", "caption": "a dog"}',
            "lone surrogate in the name": '{"file_name": "\\ud800.png", "caption": "a dog"}',
        },
    ),
    "nouns": (nouns, "nouns.txt noun", {"empty": "", "blank": "\n \n", "UTF-16": "dog".encode("utf-16")}),
    "settings": (
        train_yaml,
        "train.yaml",
        {
            **{name: content for name, content in inputs.BAD_JSON.items() if name != "empty object"},
            "a list": "- vision\n- text",
            "an object of Python": "!!python/object/apply:os.mkdir [executed]",
            "bomb of aliases": f"a: {inputs.BOMB_OF_ALIASES}",
            "bomb as data": f"data: {inputs.BOMB_OF_ALIASES}",
            "tabs": "\tvision: x",
            "two documents": "vision: v\n---\ntext: t",
            "an open quote": 'vision: "v',
            "an unknown alias": "data: *data",
        },
    ),
    "model": (
        model,
        "model",
        inputs.MODEL_FOLDERS | inputs.MODEL_JSON,
    ),
    "thresholds": (thresholds, "written.json", inputs.BAD_EVALUATIONS),
    "image": (image, "image.png", inputs.UNREADABLE_IMAGES),
}
for name, *values in (
    ("config", "other.yaml"),
    ("learning_rates", 1),
    ("epochs", "many", 1.5, "[1, 2]", "{a: 1}", 0),
    ("batch_size", "1e3", -1),
    ("learning_rate", ".nan", "-.inf", ".inf", 0),
    ("warmup_epochs", ".inf", -1),
    ("mixed_precision", "fp8"),
    ("eval_dataset", "imagenet"),
    ("crop_scale", ".nan", -1, 1.1),
    ("validation_share", 1.1),
    ("data", "[]", "{a: b}", "[[a]]"),
    ("model", "m"),
    ("vision", "''"),
    ("lock_text", "maybe"),
    ("model_options", "[pooling]", "['pooling=[a']"),
    ("noun_branches", "[map]"),
    ("best_metric", "mAP"),
):
    contents = {f"{name}: {value}": setting(name, value) for value in values}
    REFUSED[f"setting {name}"] = (train_yaml, name, contents)

BORNE = [
    (mask, index_mask(np.full((24, 30), 255, np.uint8))),
    (classes, "\ufeffdog\r\ncat\r\n"),
    (voc, "\ufeffa\r\na"),
    (coco, {}),
    (coco, annotation(segmentation=[])),
    (coco, {"annotations": []}),
    (pairs("a.tar"), inputs.tar(("../../a.png", GOOD_TAR[0][1]), ("../../a.txt", "a dog"))),
    (pairs("a.tar"), inputs.tar(("/etc/a.png", GOOD_TAR[0][1]), ("/etc/a.txt", "a dog"))),
    (pairs("a.tar"), inputs.tar(*GOOD_TAR, *GOOD_TAR)),
    (pairs("a.jsonl"), '{"file_name": 3, "file_name": "photo.png", "caption": "a dog"}'),
    (train_yaml, setting("learning_rate", "1e-4")),
    (train_yaml, '{"vision": "v", "text": "t", "data": ["d"]}'),
    (train_yaml, setting("nouns", "")),
    *((image, content) for content in inputs.UNUSUAL_IMAGES.values()),
]


def cases():
    for reader, (read, names, contents) in REFUSED.items():
        for name, content in contents.items():
            yield pytest.param(read, content, names.split(), id=f"{reader}: {name}")


@pytest.fixture(autouse=True)
def harmless(sandbox, world):
    """Nothing is executed or written elsewhere, and a bomb takes neither time nor memory."""

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB

    before, began = peak(), time.process_time()
    yield
    assert time.process_time() - began < 20 and peak() - before < 500_000
    for folder in ("here", "elsewhere"):
        assert not list((sandbox / folder).iterdir())
    assert sorted(path.name for path in world.folder.iterdir()) == ["model", "photo.png"]


@pytest.mark.parametrize(("read", "content", "names"), list(cases()))
@pytest.mark.filterwarnings("ignore")
def test_the_error_names_the_file(world, sandbox, read, content, names):
    with pytest.raises((ValueError, OSError)) as error:
        read(world, sandbox / "case", content)
    assert any(name in str(error.value) for name in names) and len(str(error.value)) < 20_000


@pytest.mark.parametrize(("read", "content"), BORNE)
@pytest.mark.filterwarnings("ignore")
def test_what_is_unusual_is_read(world, sandbox, read, content):
    read(world, sandbox / "case", content)


@pytest.mark.parametrize(
    "source", ["", "absent.tar", "absent/", ".", "../world.txt", "{3..0}.tar", "{0..3}/{0..3}.tar", "nouns.txt", []]
)
def test_pairs_that_are_not_there(source):
    with pytest.raises((ValueError, OSError), match=r"\S"):
        load_pairs(source)


@pytest.mark.parametrize("damage", inputs.DAMAGED_IMAGES)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_image_is_read_or_named(world, sandbox, damage):
    with contextlib.suppress(ValueError):
        image(world, sandbox / "case", inputs.DAMAGED_IMAGES[damage])


# ---- damage at random ----


@st.composite
def damaged_bytes(draw, whole: bytes) -> bytes:
    """Some bytes of a good file replaced by any others."""
    start = draw(st.integers(0, len(whole)))
    end = draw(st.integers(start, min(len(whole), start + 20)))
    put = draw(st.binary(max_size=20) | st.text(max_size=20).map(lambda text: text.encode(errors="ignore")))
    return whole[:start] + put + whole[end:]


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)


@st.composite
def damaged_json(draw, whole) -> object:
    """Good JSON in which one value, somewhere, became any other."""
    if isinstance(whole, (dict, list)) and whole and draw(st.integers(0, 5)):
        copy = whole.copy()
        key = draw(st.sampled_from(list(whole) if isinstance(whole, dict) else range(len(whole))))
        copy[key] = draw(damaged_json(whole[key]))
        return copy
    return draw(ANY_JSON)


GOOD = {
    "VOC": (voc, b"a\n"),
    "classes": (classes, b"dog\ncat\n"),
    "nouns": (nouns, b"dog\ncat\n"),
    "shard": (pairs("a.tar"), inputs.tar(*GOOD_TAR)),
    "csv": (pairs("a.csv"), b'file_name,caption\nphoto.png,"a dog"\n'),
    "tsv": (pairs("a.tsv"), b"file_name\tcaption\nphoto.png\ta dog\n"),
    "jsonl": (pairs("a.jsonl"), LINE.encode()),
    "settings": (train_yaml, b"vision: v\ntext: t\ndata: [d]\nepochs: 3\nmodel_options: [pooling=max]\n"),
    "image": (image, inputs.BY_FORMAT["PNG"]),
    "COCO": (coco, {"categories": [CATEGORY], "images": [PICTURE], "annotations": [POLYGON, {**POLYGON, **CROWD}]}),
    "overrides": (overrides("names.json"), {"names": {"dog": "wolf"}, "templates": ["a photo of the {}"]}),
    "captions": (
        lambda world, folder, content: pairs("a.tar")(world, folder, shard(content)),
        {"captions": ["a dog"], "caption": "a cat"},
    ),
    "thresholds": (thresholds, json.loads(inputs.evaluation())),
}


@pytest.mark.parametrize("reader", GOOD)
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_is_borne_or_refused(reader, world, sandbox, data):
    read, whole = GOOD[reader]
    if isinstance(whole, bytes):
        content = data.draw(damaged_bytes(whole) | st.binary(max_size=50))
    else:
        content = json.dumps(data.draw(damaged_json(whole)))
    with tempfile.TemporaryDirectory(dir=sandbox) as folder, contextlib.suppress(ValueError, OSError, TypeError):
        read(world, Path(folder), content)
