"""Faults at the door of data: segmentation, pairs, nouns, feature cache. See faults.py."""

import io
import json
import shutil
from collections.abc import Callable

import fault_inputs as inputs
import numpy as np
from faults import WORKS, Cases, few, index_mask, masks_folder, test_of_cases, test_of_random_damage, written

from iclip_hf.data.pairs import load_pairs
from iclip_hf.data.segmentation import load_segmentation
from iclip_hf.training.feature_cache import FeatureShards
from iclip_hf.training.nouns import NounPrompts


CASES = Cases()


def mask(world, folder, content):
    sample = load_segmentation("folder", masks_folder(folder, mask=content))[0]
    return sample.labels, sample.mask(1)


CASES.add(
    "mask of a data set",
    {
        **few(inputs.UNREADABLE_IMAGES, inputs.FEW_IMAGES),
        "a class that is not listed": index_mask(np.full((24, 30), 7, np.uint8)),
        "colours": inputs.BY_FORMAT["PNG"],
        "16 bits": index_mask(np.full((24, 30), 1, np.uint16)),
        "with alpha": inputs.encoded(inputs.PHOTO.convert("LA"), "PNG"),
    },
    mask,
    file="image.png",
)
CASES.add("mask of a data set", {"all void": index_mask(np.full((24, 30), 255, np.uint8))}, mask, WORKS)
CASES.add(
    "image of a data set",
    {"of another size than its mask": inputs.encoded(inputs.PHOTO.resize((31, 24)), "PNG")},
    lambda world, folder, image: (
        load_segmentation("folder", masks_folder(folder, image, index_mask(np.ones((24, 30), np.uint8))))[0].image
    ),
    file="image.png",
)


def classes(world, folder, content):
    return load_segmentation("folder", masks_folder(folder, classes=content))


CASES.add(
    "classes.txt",
    {
        "empty": "",
        "blank": "\n \n",
        "UTF-16": "dog".encode("utf-16"),
        "no text": bytes(range(128, 200)),
    },
    classes,
    file="classes.txt",
)
for shows, content in {
    "got '' in line 2;": "dog\n\ncat",
    "got 'dog' in line 3;": "dog\ncat\ndog",
    "got 'background' in line 1;": "background\ndog",
    "got 300 of them;": "\n".join(map(str, range(300))),
}.items():
    CASES.add("classes.txt", {shows: content}, classes, shows=shows)
CASES.add("classes.txt", {"byte order mark, Windows lines": "\ufeffdog\r\ncat\r\n"}, classes, WORKS)


def voc(world, folder, names: str | bytes):
    root = folder / "VOCdevkit" / "VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / part).mkdir(parents=True)
    (root / "JPEGImages" / "a.jpg").write_bytes(inputs.BY_FORMAT["JPEG"])
    (root / "SegmentationClass" / "a.png").write_bytes(index_mask(np.ones((24, 30), np.uint8)))
    (root / "ImageSets" / "Segmentation" / "val.txt").write_bytes(names.encode() if isinstance(names, str) else names)
    return len(load_segmentation("voc2012", folder))


CASES.add(
    "list of VOC",
    {
        "empty": "",
        "blank": "\n \n\t",
        "an absent image": "a\nb",
        "a path out of the folder": "../../../../photo",
        "no text": bytes(range(128, 200)),
        "null bytes": bytes(1000),
    },
    voc,
    file="/case",
)
CASES.add("list of VOC", {"byte order mark, Windows lines, a name twice": "\ufeffa\r\na"}, voc, WORKS)

CATEGORY, PICTURE = {"id": 3, "name": "dog"}, {"id": 5, "file_name": "image.png", "height": 24, "width": 30}
POLYGON = {"id": 7, "image_id": 5, "category_id": 3, "iscrowd": 0, "segmentation": [[1, 1, 9, 1, 9, 9]]}
CROWD = {"id": 8, "iscrowd": 1, "segmentation": {"size": [24, 30], "counts": [700, 20]}}


def coco(world, folder, content):
    if isinstance(content, dict):
        parts = {"categories": [CATEGORY], "images": [PICTURE], "annotations": [POLYGON]}
        content = json.dumps(parts | content)
    (folder / "annotations").mkdir()
    (folder / "val2017").mkdir()
    shutil.copy(world.photo, folder / "val2017" / "image.png")
    (folder / "annotations" / "instances_val2017.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    sample = load_segmentation("coco2017", folder)[0]
    return sample.image, sample.mask(1)


def annotation(**changes) -> dict:
    return {"annotations": [{**POLYGON, **changes}]}


def run_lengths_of(counts, size=(24, 30)) -> dict:
    return annotation(segmentation={"size": list(size), "counts": counts}, iscrowd=1)


CASES.add("JSON of COCO", inputs.BAD_JSON, coco, file="instances_val2017.json")
CASES.add(
    "JSON of COCO",
    {
        "no images": {"images": []},
        "category whose name is a number": {"categories": [{"id": 3, "name": 3}]},
        "image of another size": {"images": [PICTURE | {"height": 23}]},
        "image by a number": {"images": [PICTURE | {"file_name": 3}]},
        "image out of the folder": {"images": [PICTURE | {"file_name": "../annotations/instances_val2017.json"}]},
        "absent image": {"images": [PICTURE | {"file_name": "absent.png"}]},
        "no segmentation": annotation(segmentation=None),
        "segmentation without text": annotation(segmentation=""),
        "polygon of two points": annotation(segmentation=[[1, 1, 2, 2]]),
        "polygon far outside": annotation(segmentation=[[0, 0, 10**9, 0, 0, 10**9]]),
        "polygon with NaN": annotation(segmentation=[[0, 0, float("nan"), 0, 0, 9]]),
        "runs of another size": run_lengths_of([720], (30, 24)),
        "runs that are too short": run_lengths_of([700]),
        "negative runs": run_lengths_of([-5, 725]),
        "runs of text": run_lengths_of("no runs"),
        "endless runs": run_lengths_of("o" * 10**6),
        "runs of one digit": run_lengths_of("1"),
        "no runs": annotation(segmentation={"size": [24, 30]}),
    },
    coco,
)
for shows, content in {
    "the category id 3 more than once": {"categories": [CATEGORY, {"id": 3, "name": "cat"}]},
    "the category name 'dog' more than once": {"categories": [CATEGORY, {"id": 4, "name": "dog"}]},
    "the image id 5 more than once": {"images": [PICTURE, PICTURE | {"file_name": "other.png"}]},
    "annotation 7 has the unlisted category 4": annotation(category_id=4),
    "annotation 7 has the unlisted category 3 or image 6": annotation(image_id=6),
}.items():
    CASES.add("JSON of COCO", {shows: content}, coco, shows=shows)
CASES.add(
    "JSON of COCO",
    {
        "as it should be": {},
        "no polygons": annotation(segmentation=[]),
        "no annotations": {"annotations": []},
        "duplicate keys": f'{{"images": 3, "categories": {json.dumps([CATEGORY])}, "annotations": [], '
        f'"images": {json.dumps([PICTURE])}}}',
    },
    coco,
    WORKS,
)


def overrides(name: str) -> Callable:
    return lambda w, f, content: load_segmentation("folder", masks_folder(f), overrides=written(f, content, name))


CASES.add(
    "overrides",
    {name: content for name, content in inputs.BAD_JSON.items() if name != "empty object"},
    overrides("written.json"),
    file="written.json",
)
CASES.add(
    "overrides",
    {
        "unknown name": {"names": {"no class": "dog"}},
        "names of no text": {"names": {"dog": False}},
        "name twice": {"names": {"dog": "cat"}},
        "blank name": {"names": {"dog": " "}},
        "no templates": {"templates": []},
        "template without a place": {"templates": ["a photo"]},
    },
    lambda w, f, overrides: load_segmentation("folder", masks_folder(f), overrides=overrides),
)
CASES.add(
    "overrides in YAML",
    {
        "an object of Python": "!!python/object/apply:os.mkdir [executed]",
        "bomb of aliases": f"a: {inputs.BOMB_OF_ALIASES}",
        "bomb as a name": f"names: {{dog: {inputs.BOMB_OF_ALIASES}}}",
        "bomb as a template": f"templates: {inputs.BOMB_OF_ALIASES}",
        "bomb as a key": f"{{[{inputs.BOMB_OF_ALIASES}]: 1}}",
        "two documents": "names: {}\n---\nnames: {}",
    },
    overrides("overrides.yaml"),
    file="overrides",
)


GOOD_TAR = (("a.png", inputs.BY_FORMAT["PNG"]), ("a.txt", "a dog"))


def pairs(name: str) -> Callable:
    def run(world, folder, content):
        shutil.copy(world.photo, folder / "photo.png")
        source = written(folder, content, name)
        loaded = load_pairs(source)
        return [loaded.read(index) for index in range(len(loaded))]

    return run


def tar_of(caption: str | bytes, suffix: str = "json") -> bytes:
    return inputs.tar(("a.png", inputs.BY_FORMAT["PNG"]), (f"a.{suffix}", caption))


CASES.add(
    "shard",
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
        "blank caption": tar_of(" \n", "txt"),
        "caption in UTF-16": tar_of("a dog".encode("utf-16"), "txt"),
        **{f"JSON that is {name}": tar_of(content) for name, content in inputs.BAD_JSON.items()},
        "caption of a lone surrogate": tar_of('{"caption": "\\ud800"}'),
    },
    pairs("a.tar"),
    file="a.tar",
)
CASES.add(
    "shard",
    {
        "names out of the folder": inputs.tar(("../../a.png", GOOD_TAR[0][1]), ("../../a.txt", "a dog")),
        "absolute names": inputs.tar(("/etc/a.png", GOOD_TAR[0][1]), ("/etc/a.txt", "a dog")),
        "a name twice": inputs.tar(*GOOD_TAR, *GOOD_TAR),
    },
    pairs("a.tar"),
    WORKS,
)
HEADER = b"file_name,caption\n"
ROW = b"photo.png,a dog\n"
CASES.add(
    ".csv table",
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
        "URL": HEADER + b"https://127.0.0.1:9/a.png,a dog\n",
        "UTF-16": (HEADER + ROW).decode().encode("utf-16"),
        "no text": HEADER + bytes(range(128, 200)) + b",dog\n",
        "null bytes": bytes(1000),
        "pickle": inputs.UNREADABLE_IMAGES["pickle"],
        "open quote": HEADER + b'photo.png,"a dog\n',
        "a field of a million": HEADER + b"photo.png," + b"d" * 10**6 + b"\n",
    },
    pairs("a.csv"),
    file="/case/",
)
device = {"device as image": HEADER + b"/dev/zero,a dog\n"}
CASES.add(".csv table", device, pairs("a.csv"), file="/dev/zero")
GOOD_LINE = '{"file_name": "photo.png", "caption": "a dog"}\n'
CASES.add(
    "lines of JSON",
    {f"{name} first": content for name, content in inputs.BAD_JSON.items()},
    pairs("a.jsonl"),
    file="a.jsonl",
)
CASES.add(
    "lines of JSON",
    {
        **{
            f"{name} later": GOOD_LINE + text
            for name, text in inputs.BAD_JSON.items()
            if isinstance(text, str) and text.strip()
        },
        "captions as an object": '{"file_name": "photo.png", "captions": {"a": 1}}',
        "image as a number": '{"file_name": 3, "caption": "a dog"}',
        "image as a list": '{"file_name": ["photo.png"], "caption": "a dog"}',
        "null character in the name": '{"file_name": "a\\u0000b.png", "caption": "a dog"}',
        "lone surrogate in the name": '{"file_name": "\\ud800.png", "caption": "a dog"}',
    },
    pairs("a.jsonl"),
    file="/case",
)
CASES.add(
    "lines of JSON",
    {"duplicate keys": '{"file_name": 3, "file_name": "photo.png", "caption": "a dog"}'},
    pairs("a.jsonl"),
    WORKS,
)
CASES.add(
    "load_pairs",
    {
        "nothing": "",
        "absent file": "absent.tar",
        "absent folder": "absent/",
        "empty folder": ".",
        "file of another kind": "../world.txt",
        "number": 3,
        "none": None,
        "empty range": "{3..0}.tar",
        "empty list": [],
        "share above 1": ("a.tar", {"max_bad_share": 2}),
    },
    lambda world, folder, source: (
        load_pairs(source[0], **source[1]) if isinstance(source, tuple) else load_pairs(source)
    ),
)
CASES.add(
    "load_pairs", {"endless pattern": "{0..3}/{0..3}.tar"}, lambda w, f, pattern: load_pairs(pattern), file="0/0.tar"
)


def nouns(world, folder, content):
    return NounPrompts.from_file(written(folder, content, "nouns.txt"))


CASES.add("nouns", {"empty": "", "blank": "\n \n"}, nouns)
CASES.add("nouns", {"UTF-16": "dog".encode("utf-16")}, nouns, file="nouns.txt")
CASES.add("nouns", {"no file": "absent.txt"}, lambda w, f, name: NounPrompts.from_file(name), file="absent.txt")


def cached_rows(world, folder, content):
    shards = FeatureShards(folder, 3)
    shards.write(0, np.ones((3, 2), np.float16))
    (folder / "00000.npy").write_bytes(content)
    return FeatureShards(folder, 3)[np.arange(3)]


buffer = io.BytesIO()
np.save(buffer, np.ones((3, 2), np.float16))
CASES.add(
    "feature cache",
    {
        "empty shard": b"",
        "truncated shard": buffer.getvalue()[:-3],
        "shard of text": b"no numbers",
        "pickled shard": inputs.UNREADABLE_IMAGES["pickle"],
    },
    cached_rows,
    file="00000.npy",
)


test_a_fault_is_borne_or_refused_in_one_clear_sentence = test_of_cases(CASES)
test_random_damage_is_borne_or_refused = test_of_random_damage(
    {
        "list of VOC": (voc, b"a\n"),
        "classes.txt": (classes, b"dog\ncat\n"),
        "nouns": (nouns, b"dog\ncat\n"),
        "shard": (pairs("a.tar"), inputs.tar(*GOOD_TAR)),
        ".csv table": (pairs("a.csv"), b'file_name,caption\nphoto.png,"a dog"\n'),
        ".tsv table": (pairs("a.tsv"), b"file_name\tcaption\nphoto.png\ta dog\n"),
        "lines of JSON": (pairs("a.jsonl"), GOOD_LINE.encode()),
        "overrides in YAML": (
            overrides("o.yaml"),
            b"names: {dog: cat, cat: dog}\ntemplates: ['a photo of the {}']\n",
        ),
        "COCO": (
            coco,
            {"categories": [CATEGORY], "images": [PICTURE], "annotations": [POLYGON, {**POLYGON, **CROWD}]},
        ),
        "overrides": (overrides("o.json"), {"names": {"dog": "wolf"}, "templates": ["a photo of the {}"]}),
        "captions": (
            lambda w, f, content: pairs("a.tar")(w, f, tar_of(content)),
            {"captions": ["a dog"], "caption": "a cat"},
        ),
    }
)
