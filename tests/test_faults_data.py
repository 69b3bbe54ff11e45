"""What readers of data and models meet by mistake or in bad faith: an error that names the file."""

import json
import shutil

import fault_inputs as inputs
import numpy as np
import pytest
from fault_inputs import ARCHIVE, MISTAKE, PORT, STRANGER, encoded, index_mask, masks_folder, written

from iclip_hf.backends.loading import load_pretrained
from iclip_hf.data.nouns import NounPrompts
from iclip_hf.data.pairs import load_pairs
from iclip_hf.data.segmentation import load_segmentation
from iclip_hf.evaluation.results import read_results
from iclip_hf.model.images import load_image


# ---- the readers: each is given a world, an empty folder and what it reads ----


def mask(world, folder, content):
    sample = load_segmentation("folder", masks_folder(folder, mask=content))[0]
    return sample.class_ids, sample.mask(1), sample.image


def image_of_mask(world, folder, content):
    return load_segmentation("folder", masks_folder(folder, content, index_mask(np.ones((24, 30), np.uint8))))[0].image


def two_images(world, folder, content):
    masks_folder(folder)
    return load_segmentation("folder", written(folder / "images", content, "image.jpg").parents[1])


def classes(world, folder, content):
    return load_segmentation("folder", masks_folder(folder, classes=content))


CATEGORY, PICTURE = {"id": 3, "name": "dog"}, {"id": 5, "file_name": "image.png", "height": 24, "width": 30}
POLYGON = {"id": 7, "image_id": 5, "category_id": 3, "iscrowd": 0, "segmentation": [[1, 1, 9, 1, 9, 9]]}


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


def nouns(world, folder, content):
    return NounPrompts.from_file(written(folder, content, "nouns.txt"))


def model(world, folder, damage):
    shutil.copytree(world.folder / "model", folder / "model")
    damage(folder / "model")
    return load_pretrained(folder / "model")


def evaluation(world, folder, content):
    return read_results(written(folder, content), "protocol", "results")


def image(world, folder, content):
    return load_image(written(folder, content, "image.png"))


# ---- what they are given ----

GOOD_TAR = (("a.png", inputs.BY_FORMAT["PNG"]), ("a.txt", "a dog"))
HEADER, ROW = b"file_name,caption\n", b"photo.png,a dog\n"


# By the row of the threat model, the reader and what the error names, one of the words.
REFUSED = {
    (MISTAKE, mask, "image.png"): {
        "no image": b"",
        "a class that is not listed": index_mask(np.full((24, 30), 7, np.uint8)),
        "colours": inputs.BY_FORMAT["PNG"],
        "16 bits": index_mask(np.full((24, 30), 1, np.uint16)),
        "1 bit of two classes": index_mask(np.ones((24, 30), bool)),
    },
    (MISTAKE, image_of_mask, "image.png"): {"another size": encoded(inputs.PHOTO.resize((31, 24)), "PNG")},
    (MISTAKE, two_images, "image.jpg image.png"): {"of one mask": inputs.BY_FORMAT["JPEG"]},
    (MISTAKE, classes, "classes.txt"): {
        "empty": "",
        "UTF-16": "dog".encode("utf-16"),
        "a blank line": "dog\n\ncat",
        "one twice": "dog\ncat\ndog",
        "background of labelme": "_background_\ndog",
        "background with its number": "0: background\n1: dog",
        "300": "\n".join(map(str, range(300))),
    },
    (MISTAKE, coco, "instances_val2017.json image.png absent.png"): {
        **inputs.BAD_JSON,
        "image of another size": {"images": [PICTURE | {"height": 23}]},
        "absent image": {"images": [PICTURE | {"file_name": "absent.png"}]},
        "unlisted category": annotation(category_id=4),
        "unlisted image": annotation(image_id=6),
        "boxes without masks": annotation(segmentation=[]),
        "run lengths of another size": annotation(segmentation={"size": [30, 24], "counts": [20, 700]}),
    },
    (MISTAKE, overrides("names.json"), "names.json"): {
        **inputs.BAD_JSON,
        "unknown name": {"names": {"no class": "dog"}},
        "a list of names": {"names": ["dog", "cat"]},
        "names of no text": {"names": {"dog": False}},
        "name twice": {"names": {"dog": "cat"}},
        "blank name": {"names": {"dog": " "}},
    },
    (MISTAKE, overrides("names.json"), "template"): {
        "no template": {"templates": None},
        "a mapping of templates": {"templates": {"a {}": 1}},
    },
    (MISTAKE, overrides("names.yaml"), "names.yaml"): {"two documents": "a: {}\n---\nb: {}"},
    (STRANGER, overrides("names.yaml"), "names.yaml"): {
        "an object of Python": "!!python/object/apply:os.mkdir [executed]"
    },
    (MISTAKE, pairs("a.tar"), "a.tar"): {
        "empty": b"",
        "compressed": inputs.tar(*GOOD_TAR, mode="w:gz"),
        "truncated": inputs.tar(*GOOD_TAR)[:700],
        "caption in UTF-16": inputs.tar(GOOD_TAR[0], ("a.txt", "a dog".encode("utf-16"))),
        "no JSON": inputs.tar(GOOD_TAR[0], ("a.json", "{")),
    },
    (ARCHIVE, pairs("a.tar"), "a.tar"): {"links": inputs.tar(*GOOD_TAR, type=b"2", linkname="/etc/passwd")},
    (MISTAKE, pairs("a.csv"), "a.csv absent.png /dev/zero"): {
        "empty": b"",
        "header alone": HEADER,
        "no header": ROW,
        "no caption": HEADER + b"photo.png,\n",
        "no image": HEADER + b",a dog\n",
        "absent image": HEADER + b"absent.png,a dog\n",
        "device as image": HEADER + b"/dev/zero,a dog\n",
        "URL": HEADER + b"https://127.0.0.1:9/a.png,a dog\n",
        "UTF-16": (HEADER + ROW).decode().encode("utf-16"),
        "a column twice": b"file_name,caption,caption\nphoto.png,a dog,\n",
        "a list of Python": HEADER + b"photo.png,\"['a dog', 'a cat']\"\n",
    },
    (MISTAKE, pairs("a.jsonl"), "a.jsonl"): {
        **inputs.BAD_JSON,
        "captions as an object": '{"file_name": "photo.png", "captions": {"a": 1}}',
    },
    (MISTAKE, nouns, "nouns.txt"): {
        "empty": "\n",
        "UTF-16": "dog".encode("utf-16"),
        "UTF-16 without a mark": "dog".encode("utf-16-le"),
        "Latin-1": "café".encode("latin-1"),
    },
    (MISTAKE, nouns, "3:"): {  # of the line, after two good ones
        name: f"dog\nsky (background) (above)\n{line}\n"
        for name, line in {
            "marks alone": "(above)",
            "two marks in one": "floor (background, below)",
            "comment": "# animals",
            "comment behind a noun": "cat # an animal",
            "unknown mark": "cat (foo)",
            "unclosed mark": "cat (above",
            "above and below": "lamp (above) (below)",
            "several nouns": "cat, mouse",
            "no word": "---",
            "one twice": "Dog (3)",
            "one twice, with other marks": "sky",
        }.items()
    },
    (MISTAKE, model, "model"): inputs.MISTAKEN_FOLDERS,
    (STRANGER, model, "model"): inputs.FOLDERS_OF_STRANGERS,
    (MISTAKE, evaluation, "written.json"): inputs.BAD_JSON | {"results as a list": '{"protocol": {}, "results": []}'},
    (MISTAKE, image, "image.png"): inputs.MISTAKEN_IMAGES,
    (PORT, image, "image.png"): inputs.UPLOADED_IMAGES,
}

BORNE = [
    (mask, index_mask(np.full((24, 30), 255, np.uint8))),
    (classes, "\ufeffdog\r\ncat\r\n"),
    (coco, {"annotations": [POLYGON, {**POLYGON, "id": 8, "segmentation": []}]}),
    (coco, {"annotations": [POLYGON, {**POLYGON, "id": 9, "segmentation": None}]}),
    (pairs("a.csv"), b"file_name,caption,,\nphoto.png,a dog,,\n"),  # of a spreadsheet
    (pairs("a.csv"), b"\xef\xbb\xbffile_name;caption\nphoto.png;a dog, a cat\n"),
    (pairs("a.tar"), inputs.tar(("../../a.png", GOOD_TAR[0][1]), ("../../a.txt", "a dog"))),
]


@pytest.fixture(autouse=True)
def harmless(sandbox, world):
    """Nothing is executed or written elsewhere."""
    yield
    for folder in ("here", "elsewhere"):
        assert not list((sandbox / folder).iterdir())
    assert sorted(path.name for path in world.folder.iterdir()) == ["model", "photo.png"]


@pytest.mark.parametrize(
    ("read", "content", "names"),
    [
        pytest.param(read, content, names.split(), id=f"{names}: {name}")
        for (_, read, names), contents in REFUSED.items()
        for name, content in contents.items()
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_error_names_the_file(world, sandbox, read, content, names):
    with pytest.raises((ValueError, OSError)) as error:
        read(world, sandbox / "case", content)
    assert any(name in str(error.value) for name in names)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("read", "content"), BORNE)
def test_what_is_unusual_is_read(world, sandbox, read, content):
    read(world, sandbox / "case", content)


@pytest.mark.parametrize("source", ["", "absent.tar", ".", "{0..3}/{0..3}.tar", "nouns.txt", []])
def test_pairs_that_are_not_there(sandbox, source):
    with pytest.raises((ValueError, OSError)):
        load_pairs(source)
