"""What readers of data and models meet by mistake: an error of one line that names the file."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from fault_inputs import PHOTO, PHOTO_PNG, encoded, index_mask, masks_folder, png, tar, written
from safetensors.torch import load_file, save_file

from iclip_hf.backends.loading import load_pretrained
from iclip_hf.data import load_pairs, load_segmentation
from iclip_hf.data.nouns import NounPrompts
from iclip_hf.evaluation.results import read_results
from iclip_hf.model.images import load_image


ONES = index_mask(np.ones((24, 30), np.uint8))

# ---- the readers: each gets an empty folder and what it reads ----


def mask(folder, content):
    return load_segmentation("folder", masks_folder(folder, mask=content))[0].class_ids


def image_of_mask(folder, content):
    return load_segmentation("folder", masks_folder(folder, content, ONES))[0].image


def two_images(folder, content):
    return load_segmentation("folder", written(masks_folder(folder) / "images", content, "image.jpg").parents[1])


def classes(folder, content):
    return load_segmentation("folder", masks_folder(folder, classes=content))


PICTURE = {"id": 5, "file_name": "image.png", "height": 24, "width": 30}
POLYGON = {"id": 7, "image_id": 5, "category_id": 3, "iscrowd": 0, "segmentation": [[1, 1, 9, 1, 9, 9]]}


def coco(folder, content):
    if isinstance(content, dict):
        usual = {"categories": [{"id": 3, "name": "dog"}], "images": [PICTURE], "annotations": [POLYGON]}
        content = json.dumps(usual | content)
    for name, of_file in (("annotations/instances_val2017.json", content), ("val2017/image.png", PHOTO_PNG)):
        (folder / name).parent.mkdir()
        written(folder, of_file, name)
    sample = load_segmentation("coco2017", folder)[0]
    return sample.image, sample.mask(1)


def overrides(folder, content):
    name = "names.yaml" if isinstance(content, str) and content.startswith("a:") else "names.json"
    content = json.dumps(content) if isinstance(content, dict) else content
    return load_segmentation("folder", masks_folder(folder), overrides=written(folder, content, name))


def pairs(name):
    def read(folder, content):
        written(folder, PHOTO_PNG, "photo.png")
        loaded = load_pairs(written(folder, content, name))
        return [loaded.read(index) for index in range(len(loaded))]

    return read


def nouns(folder, content):
    return NounPrompts.from_file(written(folder, content, "nouns.txt"))


def results(folder, content):
    return read_results(written(folder, content), "protocol", "results")


def image(folder, content):
    return load_image(written(folder, content, "image.png"))


# ---- what they get ----

PAIR = (("a.png", PHOTO_PNG), ("a.txt", "a dog"))
HEADER, ROW = b"file_name,caption\n", b"photo.png,a dog\n"
UTF_16 = "dog".encode("utf-16")
BAD_JSON = ['{"per_class": {"itsm": [{"na', '{"a": {"b": [1, null, "x"]}}']

BAD_NOUNS = ["(above)", "floor (background, below)", "# animals", "cat (foo)", "cat, mouse", "Dog (3)", "sky"]

# By the reader and what the error names, one of the words.
REFUSED = {
    (mask, "image.png"): [
        b"",
        index_mask(np.full((24, 30), 7, np.uint8)),  # a class that is not listed
        PHOTO_PNG,  # colours
        index_mask(np.ones((24, 30), bool)),  # one bit for two classes
    ],
    (image_of_mask, "image.png"): [encoded(PHOTO.resize((31, 24)))],
    (two_images, "image.jpg image.png"): [encoded(PHOTO, "JPEG")],
    (classes, "classes.txt"): [
        "",
        UTF_16,
        "dog\ncat\ndog",
        "_background_\ndog",  # of labelme
        "\n".join(map(str, range(300))),
    ],
    (coco, "instances_val2017.json image.png absent.png"): [
        *BAD_JSON,
        {"images": [PICTURE | {"height": 23}]},
        {"images": [PICTURE | {"file_name": "absent.png"}]},
        {"annotations": [POLYGON | {"category_id": 4}]},
        {"annotations": [POLYGON | {"segmentation": []}]},  # boxes alone
        {"annotations": [POLYGON | {"segmentation": {"size": [30, 24], "counts": [20, 700]}}]},
    ],
    (overrides, "names.json names.yaml"): [
        *BAD_JSON,
        {"names": {"no class": "dog"}},
        {"names": {"dog": "cat"}},
        {"names": {"dog": " "}},
    ],
    (overrides, "template"): [{"templates": {"a {}": 1}}],
    (pairs("a.tar"), "a.tar"): [
        b"",
        tar(*PAIR)[:700],
        tar(PAIR[0], ("a.txt", UTF_16)),
        tar(PAIR[0], ("a.json", "{")),
    ],
    (pairs("a.csv"), "a.csv absent.png"): [
        HEADER,
        ROW,
        HEADER + b"photo.png,\n",
        HEADER + b"absent.png,a dog\n",
        HEADER + b"https://127.0.0.1:9/a.png,a dog\n",
        (HEADER + ROW).decode().encode("utf-16"),
        HEADER + b"photo.png,\"['a dog', 'a cat']\"\n",  # a list of Python
    ],
    (pairs("a.jsonl"), "a.jsonl"): [*BAD_JSON, '{"file_name": "photo.png", "captions": {"a": 1}}'],
    (nouns, "nouns.txt"): ["\n", UTF_16, "café".encode("latin-1")],
    (nouns, "3:"): [f"dog\nsky (background) (above)\n{line}\n" for line in BAD_NOUNS],  # of the third line
    (results, "written.json"): [*BAD_JSON, '{"protocol": {}, "results": []}'],
    (image, "image.png"): [
        b"",
        PHOTO_PNG[: len(PHOTO_PNG) // 2],
        png(60_000, 60_000),
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    ],
}


@pytest.mark.parametrize(
    ("read", "content", "names"),
    [(read, content, names) for (read, names), contents in REFUSED.items() for content in contents],
)
@pytest.mark.filterwarnings("ignore")
def test_the_error_names_the_file(sandbox, read, content, names):
    with pytest.raises((ValueError, OSError)) as error:
        read(sandbox / "case", content)
    assert any(name in str(error.value) for name in names.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("read", "content"),
    [
        (mask, index_mask(np.full((24, 30), 255, np.uint8))),
        (classes, "\ufeffdog\r\ncat\r\n"),
        (coco, {"annotations": [POLYGON, POLYGON | {"id": 8, "segmentation": []}]}),
        (pairs("a.csv"), b"file_name,caption,,\nphoto.png,a dog,,\n"),  # of a spreadsheet
    ],
)
def test_what_is_unusual_is_read(sandbox, read, content):
    read(sandbox / "case", content)


def edited_weights(edit):
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        edit(weights, "recognition.visual_projection.weight")
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return damage


DAMAGES = {
    "missing": shutil.rmtree,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "half a config": lambda folder: os.truncate(folder / "config.json", 100),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half of the weights": lambda folder: os.truncate(folder / "model.safetensors", 9999),
    "weights of another shape": edited_weights(lambda weights, name: weights.update({name: torch.zeros(3, 3)})),
    "weights hold NaN": edited_weights(lambda weights, name: weights[name][0].fill_(torch.nan)),
    "pickled weights": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    "no processor": lambda folder: (folder / "processor_config.json").unlink(),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("*token*")],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_folder_is_named(world, sandbox, damage):
    model = shutil.copytree(world.folder / "model", sandbox / "case" / "model")
    DAMAGES[damage](model)
    with pytest.raises((ValueError, OSError), match="model"):
        load_pretrained(model)
    assert not os.listdir(".")


@pytest.mark.parametrize("source", ["", "absent.tar", ".", "{0..3}.tar", []])
def test_pairs_that_are_not_there(sandbox, source):
    with pytest.raises((ValueError, OSError)):
        load_pairs(source)
