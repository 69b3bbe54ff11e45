"""data/segmentation.py: VOC, COCO and folder layouts against masks known by construction."""

import json
import os
import pickle
import re
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
from iclip_hf.data.class_names import ADE20K, CAMVID, CITYSCAPES, COCO_STUFF, CONTEXT, VOC
from iclip_hf.data.layouts import DATASETS
from iclip_hf.data.mask_formats.coco_instances import Instance, InstancesSample
from iclip_hf.evaluation.metrics.metric import EvaluatedImage
from iclip_hf.model.prompts import IMAGENET_TEMPLATES


# ---- layouts made here ----


def write_image(path, height, width):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "gray").save(path)


def write_index_mask(path, values, palette=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(values, np.uint8))
    if palette:
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


def write_coco(root, annotations, images=None, split="val2017"):
    images = images or [{"id": 7, "file_name": "000000000007.jpg", "height": 6, "width": 8}]
    content = {
        # as in COCO, ids have gaps; and the order in the file does not matter
        "categories": [
            {"id": 90, "name": "dog", "supercategory": "animal"},
            {"id": 1, "name": "person", "supercategory": "person"},
            {"id": 17, "name": "cat", "supercategory": "animal"},
        ],
        "images": images,
        "annotations": [
            {"id": number, "image_id": 7, "iscrowd": 0, **annotation} for number, annotation in enumerate(annotations)
        ],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    for image in images:
        write_image(root / split / image["file_name"], image["height"], image["width"])
    return root


@pytest.fixture
def coco(tmp_path):
    return write_coco(
        tmp_path,
        [
            {"category_id": 17, "segmentation": plain_runs(CAT)},
            {"category_id": 90, "segmentation": [[2, 2, 8, 2, 8, 6, 2, 6]]},
            {"category_id": 90, "segmentation": compressed_runs(box(0, 7, 2, 8))},
            {"category_id": 1, "segmentation": plain_runs(CROWD), "iscrowd": 1},
        ],
        [
            {"id": 7, "file_name": "000000000007.jpg", "height": 6, "width": 8},
            {"id": 3, "file_name": "000000000003.jpg", "height": 4, "width": 5},  # without things
        ],
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "classes.txt").write_text("red kite\nb\xe9b\xe9\n", encoding="utf-8")
    write_image(tmp_path / "images" / "b.jpg", 2, 3)
    write_image(tmp_path / "images" / "a.PNG", 1, 2)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    write_index_mask(tmp_path / "masks" / "b.png", [[0, 1, 1], [2, 0, 255]])
    write_index_mask(tmp_path / "masks" / "a.png", [[0, 0]], palette=False)
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
    assert sample.mask(5).tolist() == [[0, 0, 0], [0, 0, 255]]  # absent
    assert len(load_segmentation("voc2012", voc, "train")) == 1


@pytest.mark.parametrize("inside", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_root_may_be_any_of_its_folders(voc, inside):
    assert len(load_segmentation("voc2012", voc / inside)) == 2


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


@pytest.mark.parametrize("subfolder", ["val2017", "trip", "val2017/trip"])
def test_coco_files_of_other_programs(tmp_path, subfolder):
    """They name images in subfolders, or with the folder of the split, and do not say that nothing is a crowd."""
    write_coco(tmp_path, [{"category_id": 17, "segmentation": plain_runs(CAT)}])
    path = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    del content["annotations"][0]["iscrowd"]
    content["images"][0]["file_name"] = f"{subfolder}/1.jpg"
    path.write_text(json.dumps(content))
    image = tmp_path / "val2017" / subfolder.replace("val2017", "").strip("/") / "1.jpg"
    write_image(image, 6, 8)
    (sample,) = load_segmentation("coco2017", tmp_path)
    assert sample.name == "1" and sample.image_path == image and sample.image.size == (8, 6)
    np.testing.assert_array_equal(sample.mask(2), 2 * CAT)


def test_boxes_among_masks_have_no_pixels(tmp_path):
    annotations = [{"category_id": 1, "segmentation": mask} for mask in (plain_runs(DOG), [])] + [{"category_id": 1}]
    (sample,) = load_segmentation("coco2017", write_coco(tmp_path, annotations))
    assert sample.class_ids == (1,) and ((sample.mask(1) > 0) == (DOG > 0)).all()


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


@pytest.mark.parametrize(("count", "dtype"), [(254, np.uint8), (255, np.uint16), (300, np.uint16)])
def test_many_classes_need_16_bits_and_no_id_is_void(tmp_path, count, dtype):
    void = np.iinfo(dtype).max
    instances = ((count, DOG, 0), (1, CAT, 0), (2, CROWD, 1))
    write_coco(tmp_path, [{"category_id": c, "segmentation": plain_runs(m), "iscrowd": i} for c, m, i in instances])
    path = tmp_path / "annotations" / "instances_val2017.json"
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, count + 1)]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"categories": categories}))
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


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
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
    assert sample.image is sample.image  # once
    assert dataset[-1] is not sample and "image" not in dataset[-1].__dict__  # and freed with the sample
    assert pickle.loads(pickle.dumps(dataset)).fingerprint() == dataset.fingerprint()
    loaded = list(DataLoader(dataset, batch_size=None, num_workers=2))
    for one, other in zip(loaded, dataset, strict=True):
        assert (one.name, one.class_ids, one.size) == (other.name, other.class_ids, other.size)
        assert one.image.size == one.size[::-1]
        for label in one.class_ids:
            np.testing.assert_array_equal(one.mask(label), other.mask(label))
    part = dataset[1:]
    assert [one.name for one in part] == [one.name for one in dataset][1:] and part.class_ids == dataset.class_ids
    assert part.fingerprint() != dataset.fingerprint()
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_fingerprint_is_of_the_content_of_images_and_masks(voc, monkeypatch):
    """Not of their names and sizes alone, except of a large data set."""
    dataset = load_segmentation("voc2012", voc)
    image, before = dataset[1].image_path, dataset.fingerprint()
    content, stat = image.read_bytes(), image.stat()
    assert re.fullmatch("[0-9a-f]{16}", before) and load_segmentation("voc2012", voc, "train").fingerprint() != before

    def changed(large: int) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(segmentation, "LARGE", large)
            image.write_bytes(content)
            os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            fingerprint = dataset.fingerprint()
            image.write_bytes(content[:-9] + bytes(9))
            os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            return dataset.fingerprint() != fingerprint

    assert changed(segmentation.LARGE) and not changed(0)
    image.write_bytes(content)
    assert dataset.fingerprint() == before
    write_index_mask(dataset[1].mask_path, [[0, 1, 1], [20, 255, 20]])
    assert dataset.fingerprint() != before


def test_an_image_that_a_list_names_twice_counts_once(voc):
    """As lists that were joined do."""
    path = voc / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt"
    once = load_segmentation("voc2012", voc)
    path.write_bytes(b"2007_000002\r\n2007_000001\r\n2007_000002 \r\n")
    twice = load_segmentation("voc2012", voc)
    assert [sample.name for sample in twice] == [sample.name for sample in once]
    assert twice.fingerprint() == once.fingerprint()


# ---- the benchmarks of semantic segmentation ----

# Name: files of masks with their values (two images each), the split, and the class ids that are expected of them.
LAYOUTS = {
    "voc21": ("VOCdevkit/VOC2012/SegmentationClass/{}.png", [[0, 1, 20, 255]], "val", [[0, 1, 20, 255]]),
    "voc20": ("VOCdevkit/VOC2012/SegmentationClass/{}.png", [[0, 1, 20, 255]], "val", [[255, 1, 20, 255]]),
    "context60": ("VOCdevkit/VOC2010/SegmentationClassContext/{}.png", [[0, 1, 59, 255]], "val", [[0, 1, 59, 255]]),
    "context59": ("VOCdevkit/VOC2010/SegmentationClassContext/{}.png", [[0, 1, 59, 255]], "val", [[255, 1, 59, 255]]),
    # Category ids are one more than the values: 1 person, 13 stop sign, 90 toothbrush, 92 banner, 182 wood.
    "coco_object": ("stuffthingmaps/val2017/{}.png", [[0, 12, 89, 91, 255]], "val2017", [[1, 12, 80, 0, 0]]),
    "coco_stuff": (
        "stuffthingmaps/val2017/{}.png",
        [[0, 12, 89, 91, 181, 255]],
        "val2017",
        [[1, 12, 80, 81, 171, 255]],
    ),
    "ade20k": ("ADEChallengeData2016/annotations/validation/{}.png", [[0, 1, 150]], "validation", [[255, 1, 150]]),
    # Label ids: 7 road, 26 car, 33 bicycle; 4 static and 29 caravan are not evaluated.
    "cityscapes": ("gtFine/val/bonn/{}_gtFine_labelIds.png", [[7, 26, 33, 4, 29]], "val", [[1, 14, 19, 255, 255]]),
    "camvid": ("masks/{}.png", [[0, 3, 10, 11]], None, [[1, 4, 11, 255]]),
}
IMAGES = {
    "SegmentationClass": "JPEGImages",
    "Context": "",
    "stuffthingmaps/": "",
    "annotations": "images",
    "masks": "images",
    "gtFine/": "leftImg8bit/",
    "_gtFine_labelIds.png": "_leftImg8bit.png",
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
    numbers = {"voc": 20, "coco_object": 80, "coco_stuff": 171, "ade20k": 150, "context": 59}
    numbers |= {"cityscapes": 19, "camvid": 11}
    assert len(dataset.class_names) == next(number for start, number in numbers.items() if name.startswith(start))
    assert dataset.background == (name in ("voc21", "context60", "coco_object"))
    for sample, stem in zip(dataset, ("a_2", "b_1"), strict=True):
        assert sample.name.removesuffix("_leftImg8bit") == stem
        assert sample.label_map.tolist() == expected and sample.image.size == sample.size[::-1]
        assert sample.class_ids == tuple(sorted(set(expected[0]) - {0, 255}))
        for label in sample.class_ids:
            assert sample.mask(label).tolist() == [[value if value in (label, 255) else 0 for value in expected[0]]]
    with pytest.raises((FileNotFoundError, ValueError), match="no-such-split"):
        load_segmentation(name, tmp_path, "no-such-split")


def test_names_of_classes_are_where_the_benchmarks_have_them():
    for names, known in (
        (COCO_STUFF, {1: "person", 12: "stop sign", 80: "toothbrush", 81: "banner", 171: "wood"}),
        (ADE20K, {1: "wall", 13: "person", 126: "pot", 150: "flag"}),
        (CITYSCAPES, {1: "road", 14: "car", 19: "bicycle"}),
        (CONTEXT, {1: "aeroplane", 37: "person", 59: "wood"}),
        (CAMVID, {1: "sky", 4: "road", 11: "bicyclist"}),
        (VOC, {11: "dining table", 16: "potted plant", 20: "television"}),
    ):
        assert {index: names[index - 1] for index in known} == known and len({*names}) == len(names)


def test_which_classes_are_stuff(voc):
    """The numbers of the benchmarks: 50 of ADE20K, 91 of COCO-Stuff, 11 of Cityscapes."""
    for name, classes, count in (
        ("ade20k", ADE20K, 50), ("coco_stuff", COCO_STUFF, 91), ("cityscapes", CITYSCAPES, 11), ("camvid", CAMVID, 6)
    ):  # fmt: skip
        stuff = {classes[label - 1] for label in SegmentationDataset(name, None, classes, [], []).stuff}
        assert len(stuff) == count and stuff == {*DATASETS[name].stuff}, name
        assert stuff & {"sky", "sky-other"} and not stuff & {"person", "pedestrian", "car", "bicycle"}
    dataset = load_segmentation("voc21", voc, overrides={"names": {"sofa": "sky"}})  # the kind is not the name's
    assert dataset.stuff == () and load_segmentation("voc2012", voc).stuff == ()
    unknown = {name for name, layout in DATASETS.items() if layout.stuff is None}
    assert unknown == {"folder", "context59", "context60"}


@pytest.mark.parametrize("order", [1, -1])
def test_coco_object_of_instances_has_the_smaller_before_the_larger(tmp_path, order):
    """CAT (9 pixels) and DOG (24) share a pixel; crowds are void."""
    cat, dog, crowd = (
        {"category_id": category, "segmentation": plain_runs(mask), "iscrowd": int(mask is CROWD)}
        for category, mask in ((17, CAT), (90, DOG), (1, CROWD))
    )
    dataset = load_segmentation("coco_object", write_coco(tmp_path, [cat, dog, crowd][::order]))
    assert (CAT * DOG).sum() == 1 and dataset.background and dataset.name == "coco_object"
    assert dataset.templates == SegmentationDataset("coco_object", None, ["cat"], [], []).templates  # by its own name
    expected = np.where(CROWD, 255, np.where(CAT, 2, np.where(DOG, 3, 0)))
    np.testing.assert_array_equal(dataset[0].label_map, expected)


# ---- overrides ----


def test_synonyms_of_a_file_of_lines_or_a_mapping(voc):
    lines = [*VOC[:17], "sofa, couch ,settee", *VOC[18:]]
    with_semicolons = "\n".join(["sky; wall; sofa", *lines]).replace(",", ";")  # as ProxyCLIP's lists
    mapping = {"names": {"sofa": ["sofa", "couch", "settee"]}, "background": ["sky", "wall"]}
    expected = tuple(("sofa", "couch", "settee") if name == "sofa" else (name,) for name in VOC)
    for name, overrides, background in (
        ("voc21", "\n".join(["sky, wall", *lines]) + "\n", ("sky", "wall")),
        ("voc21", mapping, ("sky", "wall")),
        ("voc21", with_semicolons, ("sky", "wall", "sofa")),
        ("voc20", "\n".join(lines), ()),
    ):
        if isinstance(overrides, str):
            (voc / "names.txt").write_text(overrides)
            overrides = voc / "names.txt"
        dataset = load_segmentation(name, voc, overrides=overrides)
        assert (dataset.synonyms, dataset.background_texts) == (expected, background)
        assert dataset.class_names == VOC and dataset.templates == IMAGENET_TEMPLATES  # not named, so kept


@pytest.mark.parametrize(
    ("name", "lines", "problem"),
    [
        ("voc21", ["a"] * 19, "'voc21' has 20 classes.* this file has 19"),
        ("voc20", ["sky", *VOC], "'voc20' has 20 classes.* this file has 21"),
        ("voc21", ["aeroplane, plane", *VOC[1:19], "screen, plane"], "'plane' names two classes"),
        ("voc21", ["plane, plane", *VOC[1:]], "'plane' names two classes, or one class twice"),
        ("voc21", ["plane, ", *VOC[1:]], ", ''. is neither text"),
    ],
)
def test_a_file_of_lines_with_other_classes_is_named(voc, name, lines, problem):
    (voc / "names.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=problem) as error:
        load_segmentation(name, voc, overrides=voc / "names.txt")
    assert str(voc / "names.txt") in str(error.value)


@pytest.mark.parametrize("form", ["mapping", "json", "yaml"])
def test_overrides(voc, form):
    overrides = {"names": {"television": "tv", "aeroplane": "plane"}, "templates": ["a {}.", "{} in a scene"]}
    if form == "json":
        (voc / "o.json").write_text(json.dumps(overrides))
    if form == "yaml":
        (voc / "o.yaml").write_text("names: {television: tv, aeroplane: plane}\ntemplates: ['a {}.', '{} in a scene']")
    dataset = load_segmentation("voc2012", voc, overrides=overrides if form == "mapping" else voc / f"o.{form}")
    assert (dataset.class_names[0], dataset.class_names[1], dataset.class_names[19]) == ("plane", "bicycle", "tv")
    assert dataset.templates == ("a {}.", "{} in a scene")


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
    for alone, missing in (("images/c.png", r"masks/c\.png"), ("masks/d.png", r"images/d: .*1 of")):
        write_image(folder / alone, 2, 3)
        with pytest.raises(FileNotFoundError, match=missing):
            load_segmentation("folder", folder)
        (folder / alone).unlink()
