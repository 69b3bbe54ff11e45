"""data/segmentation.py: VOC, COCO and folder layouts against masks known by construction."""

import json
import os
import pickle
import zlib

import numpy as np
import pytest
from fault_inputs import encoded, index_mask, masks_folder, png
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

from iclip_hf.data import SegmentationDataset, load_segmentation, segmentation
from iclip_hf.data.class_names import ADE20K, CAMVID, CITYSCAPES, COCO_STUFF, COCO_THINGS, CONTEXT, VOC
from iclip_hf.data.layouts import DATASETS
from iclip_hf.data.mask_formats.coco_instances import Instance, InstancesSample
from iclip_hf.evaluation.metrics.metric import EvaluatedImage
from iclip_hf.model.prompts import IMAGENET_TEMPLATES


# ---- layouts made here ----


def write_image(path, height, width):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "gray").save(path)


def write_index_mask(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(values, np.uint8))
    image.putpalette(bytes(range(256)) * 3)
    image.save(path)


VOC_MASKS = {"2007_000001": [[0, 1, 1], [20, 20, 255]], "2007_000002": [[0, 0], [0, 0], [255, 0]]}


@pytest.fixture
def voc(tmp_path):
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for name, mask in VOC_MASKS.items():
        write_image(folder / "JPEGImages" / f"{name}.jpg", len(mask), len(mask[0]))
        write_index_mask(folder / "SegmentationClass" / f"{name}.png", mask)
    write_image(folder / "JPEGImages" / "2007_000003.jpg", 2, 2)  # in no list
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2007_000002\n2007_000001\n")
    (lists / "train.txt").write_text("2007_000001\n")
    return tmp_path


def plain_runs(mask):
    """COCO's run lengths of a binary mask, in a loop: column by column, beginning with zeros."""
    counts, current = [0], 0
    for value in np.asarray(mask).T.ravel().tolist():
        if value != current:
            counts.append(0)
            current = value
        counts[-1] += 1
    return {"size": list(np.shape(mask)), "counts": counts}


def compressed_runs(mask):
    runs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": runs["size"], "counts": runs["counts"].decode()}


def box(top, left, bottom, right, height=6, width=8):
    mask = np.zeros((height, width), int)
    mask[top:bottom, left:right] = 1
    return mask


CAT, DOG, CROWD = box(0, 0, 3, 3), box(2, 2, 6, 8), box(0, 2, 2, 8)


IMAGE = {"id": 7, "file_name": "000000000007.jpg", "height": 6, "width": 8}
# As in COCO, ids have gaps, and the order in the file does not matter.
CATEGORIES = [(90, "dog", "animal"), (1, "person", "person"), (17, "cat", "animal")]


def write_coco(root, annotations, images=(IMAGE,), categories=CATEGORIES):
    categories = [dict(zip(("id", "name", "supercategory"), category)) for category in categories]
    annotations = [{"id": number, "image_id": 7, **one} for number, one in enumerate(annotations)]
    content = {"categories": categories, "images": images, "annotations": annotations}
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    for image in images:
        write_image(root / "val2017" / image["file_name"], image["height"], image["width"])
    return root


@pytest.fixture
def coco(tmp_path):
    annotations = [
        {"category_id": 17, "segmentation": plain_runs(CAT)},
        {"category_id": 90, "segmentation": [[2, 2, 8, 2, 8, 6, 2, 6]]},
        {"category_id": 90, "segmentation": compressed_runs(box(0, 7, 2, 8))},
        {"category_id": 1, "segmentation": plain_runs(CROWD), "iscrowd": 1},
    ]
    without_things = {"id": 3, "file_name": "000000000003.jpg", "height": 4, "width": 5}
    return write_coco(tmp_path, annotations, [IMAGE, without_things])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "classes.txt").write_text("red kite\nb\xe9b\xe9\n", encoding="utf-8")
    write_image(tmp_path / "images" / "b.jpg", 2, 3)
    write_image(tmp_path / "images" / "a.PNG", 1, 2)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    write_index_mask(tmp_path / "masks" / "b.png", [[0, 1, 1], [2, 0, 255]])
    write_index_mask(tmp_path / "masks" / "a.png", [[0, 0]])
    return tmp_path


# ---- what they give ----


def test_voc(voc):
    dataset = load_segmentation("voc2012", voc)
    assert (dataset.name, dataset.split, len(dataset)) == ("voc2012", "val", 2)
    assert [sample.name for sample in dataset] == ["2007_000002", "2007_000001"]  # the list's order
    assert dataset.class_names == VOC and dataset.class_ids == tuple(range(1, 21))
    assert dataset.templates == ("a photo of the {}",)
    nothing, sample = dataset
    assert (nothing.class_ids, nothing.size) == ((), (3, 2))
    assert (sample.class_ids, sample.size) == ((1, 20), (2, 3))
    assert sample.image.mode == "RGB" and sample.image.size == (3, 2)
    assert sample.mask(1).tolist() == [[0, 1, 1], [0, 0, 255]] and sample.mask(1).dtype == np.uint8
    assert sample.mask(20).tolist() == [[0, 0, 0], [20, 20, 255]]
    assert len(load_segmentation("voc2012", voc / "VOCdevkit/VOC2012", "train")) == 1  # the root may be any folder


def test_coco(coco):
    dataset = load_segmentation("coco2017", coco)
    assert (dataset.split, dataset.class_names, dataset.class_ids) == ("val2017", ("person", "cat", "dog"), (1, 2, 3))
    assert dataset.supercategories == ("person", "animal", "animal")
    empty, sample = dataset  # by image id
    assert (empty.name, empty.size, empty.class_ids) == ("000000000003", (4, 5), ())
    assert not empty.mask(2).any()
    assert (sample.name, sample.size) == ("000000000007", (6, 8))
    assert sample.class_ids == (1, 2, 3)  # the person too, though only a crowd shows it
    dogs = np.maximum(DOG, box(0, 7, 2, 8))
    for label, instances in ((2, CAT), (3, dogs), (1, np.zeros_like(CAT))):
        # classes overlap each other; crowd regions count nowhere, also where instances lie
        np.testing.assert_array_equal(sample.mask(label), np.where(CROWD, 255, instances * label))
        assert sample.mask(label).flags.c_contiguous


@pytest.mark.parametrize("subfolder", ["trip", "val2017/trip"])
def test_coco_files_of_other_programs(tmp_path, subfolder):
    """They name images in subfolders, or with the folder of the split, and do not say that nothing is a crowd."""
    images = [IMAGE | {"file_name": f"{subfolder}/1.jpg"}]
    write_coco(tmp_path, [{"category_id": 17, "segmentation": plain_runs(CAT)}], images)
    image = tmp_path / "val2017" / "trip" / "1.jpg"
    write_image(image, 6, 8)
    (sample,) = load_segmentation("coco2017", tmp_path)
    assert sample.name == "1" and sample.image_path == image and sample.image.size == (8, 6)
    np.testing.assert_array_equal(sample.mask(2), 2 * CAT)


# Instances of one image: label, whether it is a crowd, whether its run lengths are compressed, and its mask
INSTANCES = st.tuples(st.integers(1, 7), st.integers(1, 7)).flatmap(
    lambda size: st.lists(
        st.tuples(st.integers(1, 3), st.booleans(), st.booleans(), arrays(np.uint8, size, elements=st.integers(0, 1))),
        min_size=1,
        max_size=5,
    )
)


@settings(max_examples=60)
@given(INSTANCES)
def test_coco_union_equals_a_pixel_loop(instances):
    size = instances[0][3].shape
    annotated = [
        Instance(label, crowd, (compressed_runs if pack else plain_runs)(mask))
        for label, crowd, pack, mask in instances
    ]
    sample = InstancesSample("x", None, 3, size, annotated)
    for label in (1, 2, 3):
        expected = np.zeros(size, int)
        for row, column in np.ndindex(size):
            if any(own == label and mask[row, column] for own, _, _, mask in instances):
                expected[row, column] = label
            if any(crowd and mask[row, column] for _, crowd, _, mask in instances):
                expected[row, column] = 255
        assert sample.mask(label).tolist() == expected.tolist()
    assert sample.class_ids == tuple(sorted({label for label, *_ in instances}))


def test_a_split_without_a_file_names_the_others(tmp_path):
    write_coco(tmp_path, [])
    with pytest.raises(FileNotFoundError, match=r"instances_train2017\.json: .* val2017\.$"):
        load_segmentation("coco2017", tmp_path, "train2017")


@pytest.mark.parametrize(("count", "dtype"), [(254, np.uint8), (255, np.uint16)])
def test_many_classes_need_16_bits_and_no_id_is_void(tmp_path, count, dtype):
    void = np.iinfo(dtype).max
    instances = ((count, DOG, 0), (1, CAT, 0), (2, CROWD, 1))
    annotations = [{"category_id": c, "segmentation": plain_runs(m), "iscrowd": i} for c, m, i in instances]
    categories = [(number, f"class {number}") for number in range(1, count + 1)]
    write_coco(tmp_path, annotations, categories=categories)
    dataset = load_segmentation("coco2017", tmp_path)
    (sample,) = dataset
    assert dataset.void == sample.void == void and sample.label_map.dtype == sample.mask(1).dtype == dtype
    np.testing.assert_array_equal(sample.mask(count), np.where(CROWD, void, DOG * count))
    np.testing.assert_array_equal(sample.label_map, np.where(CROWD, void, np.where(CAT, 1, DOG * count)))
    masks = EvaluatedImage(0, sample, None).masks
    assert [sorted({*mask.ravel().tolist()} - {0}) for mask in masks] == [[1, void], [void], [count, void]]


def test_folder(folder):
    dataset = load_segmentation("folder", folder)
    assert (dataset.split, dataset.class_names, dataset.class_ids) == (None, ("red kite", "b\xe9b\xe9"), (1, 2))
    assert [(sample.name, sample.class_ids) for sample in dataset] == [("a", ()), ("b", (1, 2))]
    assert dataset[1].mask(2).tolist() == [[0, 0, 0], [2, 0, 255]]


def test_masks_whose_ids_begin_at_0_are_remarked(tmp_path, caplog):
    mask = index_mask((np.arange(720) % 3).astype(np.uint8).reshape(24, 30))
    for names, is_remarked in (("dog\ncat\nbus", True), ("dog\ncat", False), ("dog\ncat\nbus\nsky", False)):
        load_segmentation("folder", masks_folder(tmp_path, mask=mask, classes=names)).check_classes()
        assert ("'bus': ids are 1 to 3" in caplog.text) == is_remarked
        caplog.clear()


@pytest.mark.parametrize("bits", [2, 8])
def test_class_ids_of_a_grayscale_mask_are_its_stored_values(tmp_path, bits):
    ids = np.arange(2 * 8).reshape(2, 8) % min(2**bits, 9)  # rows of a whole number of bytes
    rows = (ids[..., None] >> np.arange(bits)[::-1] & 1).reshape(2, -1)
    content = b"".join(b"\0" + np.packbits(row.astype(np.uint8)).tobytes() for row in rows)
    mask = png(8, 2, (b"IDAT", zlib.compress(content)), bits=bits, kind=0)
    classes = "\n".join(f"class {number}" for number in range(1, min(2**bits, 9)))
    image = encoded(Image.new("RGB", (8, 2)))
    sample = load_segmentation("folder", masks_folder(tmp_path, image, mask, classes))[0]
    assert sample.label_map.tolist() == ids.tolist() and sample.image.size == (8, 2)


def test_an_orientation_in_exif_turns_a_mask_like_its_image(tmp_path):
    exif, values = Image.Exif(), np.array([[0, 1, 2], [1, 1, 0]], np.uint8)
    exif[0x0112] = 6
    image, mask = (encoded(Image.fromarray(pixels), exif=exif) for pixels in (values * 100, values))
    sample = load_segmentation("folder", masks_folder(tmp_path, image, mask))[0]
    assert sample.label_map.tolist() == np.rot90(values, -1).tolist()
    assert (np.asarray(sample.image)[..., 0] // 100).tolist() == sample.label_map.tolist()


@pytest.mark.parametrize("name", ["voc2012", "coco2017", "folder"])
def test_samples_are_fresh_lazy_and_picklable(name, request):
    root = request.getfixturevalue({"voc2012": "voc", "coco2017": "coco", "folder": "folder"}[name])
    dataset = load_segmentation(name, root)
    sample = dataset[-1]
    assert not sample.__dict__.keys() & {"image", "label_map"}  # nothing is decoded yet
    assert sample.image is sample.image and "image" not in dataset[-1].__dict__  # once, and freed with the sample
    loaded = list(DataLoader(dataset, batch_size=None, num_workers=2))
    for one, other in zip(loaded, dataset, strict=True):
        assert (one.name, one.class_ids, one.size) == (other.name, other.class_ids, other.size)
        for label in one.class_ids:
            np.testing.assert_array_equal(one.mask(label), other.mask(label))
    part = dataset[1:]
    assert [one.name for one in part] == [one.name for one in dataset][1:]
    assert pickle.loads(pickle.dumps(dataset)).fingerprint() == dataset.fingerprint() != part.fingerprint()


def test_fingerprint_is_of_the_content_of_images_and_masks(voc, monkeypatch):
    """Not of their names and sizes alone, except of a large data set."""
    dataset = load_segmentation("voc2012", voc)
    path, before = dataset[1].image_path, dataset.fingerprint()
    content = path.read_bytes()
    for large, changes in ((segmentation.LARGE, True), (0, False)):
        monkeypatch.setattr(segmentation, "LARGE", large)
        found = []
        for written in (content, content[:-9] + bytes(9)):
            path.write_bytes(written)
            os.utime(path, (1, 1))
            found.append(dataset.fingerprint())
        assert (found[0] != found[1]) == changes and (found[0] == before) == changes
    monkeypatch.undo()
    path.write_bytes(content)
    assert dataset.fingerprint() == before
    write_index_mask(dataset[1].mask_path, [[0, 1, 1], [20, 255, 20]])
    assert dataset.fingerprint() != before


def test_an_image_that_a_list_names_twice_counts_once(voc):
    """As lists that were joined do."""
    path = voc / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt"
    path.write_bytes(b"2007_000002\r\n2007_000001\r\n2007_000002 \r\n")
    assert [sample.name for sample in load_segmentation("voc2012", voc)] == ["2007_000002", "2007_000001"]


# ---- the benchmarks of semantic segmentation ----

# Name: files of masks with their values (two images each), the split, and the class ids that are expected of them.
LAYOUTS = {
    "voc21": ("VOCdevkit/VOC2012/SegmentationClass/{}.png", [[0, 1, 20, 255]], "val", [[0, 1, 20, 255]]),
    "voc20": ("VOCdevkit/VOC2012/SegmentationClass/{}.png", [[0, 1, 20, 255]], "val", [[255, 1, 20, 255]]),
    "context60": ("VOCdevkit/VOC2010/SegmentationClassContext/{}.png", [[0, 1, 59, 255]], "val", [[0, 1, 59, 255]]),
    "context59": ("VOCdevkit/VOC2010/SegmentationClassContext/{}.png", [[0, 1, 59, 255]], "val", [[255, 1, 59, 255]]),
    # Category ids are one more than the values: 1 person, 13 stop sign, 90 toothbrush, 92 banner, 182 wood.
    "coco_object": ("stuffthingmaps/val2017/{}.png", [[0, 12, 89, 91, 255]], "val2017", [[1, 12, 80, 0, 0]]),
    "coco_stuff": ("stuffthingmaps/val2017/{}.png", [[0, 12, 89, 91, 181]], "val2017", [[1, 12, 80, 81, 171]]),
    "ade20k": ("ADEChallengeData2016/annotations/validation/{}.png", [[0, 1, 150]], "validation", [[255, 1, 150]]),
    # Label ids: 7 road, 26 car, 33 bicycle; 4 static and 29 caravan are not evaluated.
    "cityscapes": ("gtFine/val/bonn/{}_gtFine_labelIds.png", [[7, 26, 33, 4, 29]], "val", [[1, 14, 19, 255, 255]]),
    "camvid": ("masks/{}.png", [[0, 3, 10, 11]], None, [[1, 4, 11, 255]]),
}
IMAGES = {"SegmentationClass": "JPEGImages", "Context": "", "stuffthingmaps/": "", "annotations": "images"}
IMAGES |= {"masks": "images", "gtFine/": "leftImg8bit/", "_gtFine_labelIds.png": "_leftImg8bit.png"}
# Some classes of each data set by their ids.
KNOWN = {
    "voc2": (VOC, 20, {11: "dining table", 16: "potted plant", 20: "television"}),
    "context": (CONTEXT, 59, {1: "aeroplane", 37: "person", 59: "wood"}),
    "coco_object": (COCO_THINGS, 80, {1: "person", 12: "stop sign", 80: "toothbrush"}),
    "coco_stuff": (COCO_STUFF, 171, {12: "stop sign", 80: "toothbrush", 81: "banner", 171: "wood"}),
    "ade20k": (ADE20K, 150, {1: "wall", 13: "person", 126: "pot", 150: "flag"}),
    "cityscapes": (CITYSCAPES, 19, {1: "road", 14: "car", 19: "bicycle"}),
    "camvid": (CAMVID, 11, {1: "sky", 4: "road", 11: "bicyclist"}),
}


def write_layout(root, name):
    """Writes two images of a benchmark as its archives unpack."""
    pattern, mask, _, _ = LAYOUTS[name]
    for stem in ("b_1", "a_2"):
        path = pattern.format(stem)
        write_index_mask(root / path, mask)
        for old, new in IMAGES.items():
            path = path.replace(old, new)
        write_image(root / (path if name == "cityscapes" else path.replace(".png", ".jpg")), 1, len(mask[0]))
    if "VOCdevkit" in pattern:
        lists = "SegmentationContext" if "Context" in pattern else "Segmentation"
        path = root / pattern.partition("Segm")[0] / "ImageSets" / lists / "val.txt"
        path.parent.mkdir(parents=True)
        path.write_text("a_2\nb_1\n")


@pytest.mark.parametrize("name", LAYOUTS)
def test_benchmarks(name, tmp_path):
    write_layout(tmp_path, name)
    _, _, split, expected = LAYOUTS[name]
    dataset = load_segmentation(name, tmp_path)
    assert (dataset.name, dataset.split, len(dataset)) == (name, split, 2)
    names, number, known = next(of for start, of in KNOWN.items() if name.startswith(start))
    assert dataset.class_names == names and len(names) == len({*names}) == number
    assert {index: names[index - 1] for index in known} == known
    assert dataset.background == (name in ("voc21", "context60", "coco_object"))
    for sample, stem in zip(dataset, ("a_2", "b_1"), strict=True):
        assert sample.name.removesuffix("_leftImg8bit") == stem
        assert sample.label_map.tolist() == expected and sample.image.size == sample.size[::-1]
        assert sample.class_ids == tuple(sorted(set(expected[0]) - {0, 255}))
    with pytest.raises((FileNotFoundError, ValueError), match="no-such-split"):
        load_segmentation(name, tmp_path, "no-such-split")


def test_which_classes_are_stuff(voc):
    for name, count in (("ade20k", 50), ("coco_stuff", 91), ("cityscapes", 11), ("camvid", 6)):  # of the benchmarks
        classes = DATASETS[name].classes
        stuff = {classes[label - 1] for label in SegmentationDataset(name, None, classes, [], []).stuff}
        assert len(stuff) == count and stuff == {*DATASETS[name].stuff}, name
    dataset = load_segmentation("voc21", voc, overrides={"names": {"sofa": "sky"}})  # the kind is not the name's
    assert dataset.stuff == ()
    assert {name for name, layout in DATASETS.items() if layout.stuff is None} == {"folder", "context59", "context60"}


@pytest.mark.parametrize("order", [1, -1])
def test_coco_object_of_instances_has_the_smaller_before_the_larger(tmp_path, order):
    """CAT (9 pixels) and DOG (24) share a pixel; crowds are void."""
    cat, dog, crowd = (
        {"category_id": category, "segmentation": plain_runs(mask), "iscrowd": int(mask is CROWD)}
        for category, mask in ((17, CAT), (90, DOG), (1, CROWD))
    )
    dataset = load_segmentation("coco_object", write_coco(tmp_path, [cat, dog, crowd][::order]))
    assert (CAT * DOG).sum() == 1 and dataset.background
    expected = np.where(CROWD, 255, np.where(CAT, 2, np.where(DOG, 3, 0)))
    np.testing.assert_array_equal(dataset[0].label_map, expected)


# ---- overrides ----

MAPPING = {"names": {"television": "tv", "sofa": ["sofa", "couch"]}, "background": ["sky", "wall"]}
YAML = "names: {television: tv, sofa: [sofa, couch]}\nbackground: [sky, wall]\ntemplates: ['a {}.', '{} in a scene']"
LINES = "\n".join(["sky, wall", *VOC[:17], "sofa, couch", VOC[18], "tv"])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (None, MAPPING),
        ("o.json", json.dumps(MAPPING)),
        ("o.yaml", YAML),
        ("o.txt", LINES),
        ("o.txt", LINES.replace(",", ";") + "\n"),  # as ProxyCLIP's lists
    ],
)
def test_overrides(voc, file, content):
    if file:
        (voc / file).write_text(content)
    dataset = load_segmentation("voc21", voc, overrides=voc / file if file else content)
    assert dataset.synonyms == (*((name,) for name in VOC[:17]), ("sofa", "couch"), (VOC[18],), ("tv",))
    assert dataset.class_names == (*VOC[:19], "tv") and dataset.background_texts == ("sky", "wall")
    # What is not named is kept.
    assert dataset.templates == (("a {}.", "{} in a scene") if content == YAML else IMAGENET_TEMPLATES)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (VOC[1:], "'voc21' has 20 classes.* this file has 19"),
        (["sky", "aeroplane, plane", *VOC[1:19], "screen, plane"], "'plane' names two classes"),
    ],
)
def test_a_file_of_lines_with_other_classes_is_named(voc, lines, problem):
    (voc / "names.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=problem):
        load_segmentation("voc21", voc, overrides=voc / "names.txt")


# ---- bad data ----


def test_what_is_missing_is_named(voc, folder):
    with pytest.raises(ValueError, match="'imagenet'.* voc2012, coco2017, "):
        load_segmentation("imagenet", voc)
    with pytest.raises(ValueError, match="folder has no splits, such as 'val'"):
        load_segmentation("folder", folder, "val")
    masks = voc / "VOCdevkit/VOC2012/SegmentationClass"
    (masks / "2007_000001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"SegmentationClass/2007_000001\.png: .*1 of 2"):
        load_segmentation("voc2012", voc)
    write_image(folder / "masks" / "d.png", 2, 3)
    with pytest.raises(FileNotFoundError, match="images/d: .*1 of"):
        load_segmentation("folder", folder)
