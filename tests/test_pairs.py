"""data/pairs.py: every form of image-text pairs, split and shuffled exactly, with bad pairs among them."""

import csv
import hashlib
import io
import json
import os
import pickle
import tarfile
import tracemalloc
from decimal import Decimal
from itertools import chain, combinations, groupby, islice

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_inputs import encoded, tar
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info

from iclip_hf.cli.train.arguments import resolve_arguments
from iclip_hf.cli.train.data import open_data, warn_of_unknown_labels
from iclip_hf.data import BadPairError, PairDataset, PairStream, class_names, columns, formats, load_pairs
from iclip_hf.data import pairs as pairs_module
from iclip_hf.data.files import expand_braces
from iclip_hf.data.formats import shards
from iclip_hf.data.nouns import NounPrompts
from iclip_hf.data.streams import _image_bytes
from iclip_hf.training import PairCollator, StreamedPairs


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ICLIP_CACHE", str(folder))
    return folder


def jpeg(number: int) -> bytes:
    """An image that tells its number: its brightness."""
    return encoded(Image.new("RGB", (12, 8), (number % 256,) * 3), "JPEG")


def write_tar(path, members):
    path.write_bytes(tar(*members))
    return path


def write_members(path, numbers, **by_suffix):
    """Pairs "k00", "k01", ... of these numbers; each suffix has a function of the number, None for no member."""
    found = [(f"k{i:02}.{suffix}", content(i)) for i in numbers for suffix, content in by_suffix.items()]
    return write_tar(path, [member for member in found if member[1] is not None])


def write_shards(folder, count, shards=3):
    """`count` pairs over some shards; pair i has brightness i and caption "caption i"."""
    folder.mkdir(exist_ok=True)
    for shard, numbers in enumerate(np.array_split(np.arange(count), shards)):
        write_members(folder / f"{shard:05}.tar", numbers, jpg=jpeg, txt=lambda i: f"caption {i}")
    return folder


def write_images(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(number))


def write_table(path, images, captions=None):
    captions = [f"caption {number}" for number in range(len(images))] if captions is None else captions
    path.write_text("\n".join(["image,caption", *map("{},{}".format, images, captions)]))
    return path


def write_rows(folder, form, rows):
    """Rows of one kind in a file of a format, lists and objects as JSON where it has only text."""
    path = folder / f"rows.{form}"
    if form == "csv":
        with open(path, "w", newline="") as file:
            cells = [[cell if isinstance(cell, str) else json.dumps(cell) for cell in row.values()] for row in rows]
            csv.writer(file).writerows([rows[0], *cells])
    elif form == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif form == "tar":
        write_members(path, range(len(rows)), jpg=jpeg, json=lambda number: json.dumps(rows[number]))
    else:
        stored = datasets.Dataset.from_list(rows)
        stored.to_parquet(path) if form == "parquet" else stored.save_to_disk(path)
    return path


def all_captions(pairs):
    return [pairs.captions(row) for row in range(len(pairs))]


def keys(items):
    return [item["key"] for item in items]


def flat(lists):
    return list(chain.from_iterable(lists))


# ---- sources ----


def test_shard_members(tmp_path):
    deep = "/".join(["folder" * 5] * 3)  # over 100 characters with its file: extension headers
    link = tarfile.TarInfo("k1.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    members = [
        ("k0.json", json.dumps({"captions": ["b", " c ", ""], "caption": "d"})),  # the list goes first
        ("k0.txt", "a"),
        ("k0.JPG", jpeg(0)),
        ("._k1.jpg", b"resource fork"),
        ("k1.jpg", jpeg(1)),
        link,
        ("k1.json", json.dumps({"caption": "d", "url": "x", "captions": []})),
        ("k1.txt", " a\n"),  # then the text
        (f"{deep}/{'n' * 60}.jpeg", jpeg(2)),
        (f"{deep}/{'n' * 60}.cls", "7"),
        (f"{deep}/{'n' * 60}.json", json.dumps({"caption": "d"})),  # then the JSON's one
        ("other/k1.png", jpeg(3)),
        ("other/k1.txt", "e"),
    ]
    dataset = load_pairs(write_tar(tmp_path / "a.tar", members))
    assert all_captions(dataset) == [["b", "c"], ["a"], ["d"], ["e"]]
    assert keys(dataset) == ["k0", "k1", f"{deep}/{'n' * 60}", "other/k1"]
    assert [np.asarray(item["image"]).mean().round() for item in dataset] == [0, 1, 2, 3]


# Name of a file beside the images 0.jpg, 1.jpg, ..., its content, names of columns, and the captions of its pairs.
READ = [
    ("p.csv", 'title,other,filepath\n"a ""quoted"" dog, b",,0.jpg\n', {}, [['a "quoted" dog, b']]),
    ("p.csv", 'image,caption\n0.jpg,"one\ntwo"\n1.jpg,null\n2.jpg,NA', {}, [["one\ntwo"], ["null"], ["NA"]]),
    ("p.csv", "\ufeffimage;caption;x\n0.jpg;a, b;\n1.jpg;  狗 🐕 كلب ;\n", {}, [["a, b"], ["狗 🐕 كلب"]]),
    ("p.csv", 'image, caption\n0.jpg, "a dog, a\ncat"\n1.jpg, a bird\n', {}, [["a dog, a\ncat"], ["a bird"]]),
    ("p.csv", 'image,caption\n0.jpg,"[""a dog"", ""a pet""]"\n1.jpg,[1] a\n', {}, [["a dog", "a pet"], ["[1] a"]]),
    ("p.csv", 'image,caption\n0.jpg,"[""a dog"" and a cat]"\n1.jpg,[]\n', {}, [['["a dog" and a cat]'], ["[]"]]),
    ("p.csv", "image,caption\n0.jpg,a\n1.jpg,b\n./0.jpg,c\n0.jpg,a\n", {}, [["a", "c"], ["b"]]),
    ("p.csv", "scan,image,alt\n0.jpg,x.jpg,a dog\n", {"image_column": "scan", "caption_column": "alt"}, [["a dog"]]),
    ("p.tsv", 'title\timage\r\na "quoted" dog\t0.jpg\r\n\r\n"b\t1.jpg', {}, [['a "quoted" dog'], ['"b']]),
    ("p.jsonl", '{"image": "0.jpg", "captions": ["a", ""]}\n\n{"path": "1.jpg", "text": "NA"}', {}, [["a"], ["NA"]]),
    ("p.tar", tar(("0.jpg", jpeg(0)), ("0.txt", "a dog".encode("utf-8-sig"))), {}, [["a dog"]]),
    ("p.tar", tar(("0.jpg", jpeg(0)), ("0.json", '{"alt": "a", "caption": "b"}')), {"caption_column": "alt"}, [["a"]]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "options", "captions"), READ)
def test_the_pairs_of_a_file(tmp_path, name, content, options, captions):
    write_images(tmp_path, [f"{number}.jpg" for number in range(3)])
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    pairs = load_pairs(tmp_path / name, **options)
    assert all_captions(pairs) == captions
    for number, item in enumerate(pairs):
        assert np.asarray(item["image"]).mean() == pytest.approx(number, abs=1)


@pytest.mark.parametrize(
    ("name", "rows", "line"),
    [
        ("p.csv", '0.jpg,"a" dog\n', 2),
        ("p.csv", '0.jpg,"two\nlines"\n1.jpg,"open', 4),
        ("p.csv", "0.jpg,a dog\n1.jpg,a dog, a cat\n", 3),
        ("p.jsonl", '{"image": "0.jpg", "caption": "a"}\n\n[]\n', 3),
    ],
)
def test_a_line_that_is_no_row_is_an_error_with_its_number(tmp_path, name, rows, line):
    (tmp_path / name).write_text(rows if name == "p.jsonl" else f"image,caption\n{rows}")
    with pytest.raises(ValueError, match=f"{name}, line {line}: "):
        load_pairs(tmp_path / name)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "saved"])
def test_rows_of_an_image_are_one_pair(tmp_path, form):
    """In a batch, the captions of other pairs count as wrong."""
    write_images(tmp_path, ["0.jpg", "1.jpg"])
    rows = [
        ("0.jpg", "a dog", ["dog"], ["dog", "cat"]),
        ("1.jpg", "a cat", ["cat"], []),
        ("", "no image", [], []),
        ("0.jpg", "a dog", ["ball"], ["ball"]),
        ("0.jpg", "", [], []),
        ("", "no image", [], []),
        ("0.jpg", "a ball", ["dog"], []),
    ]
    rows = [dict(zip(("image", "caption", "labels", "complete"), row)) for row in rows]
    dataset = load_pairs(write_rows(tmp_path, form, rows))
    assert len(dataset) == 4
    assert dataset.raw(0).texts == (["a dog", "a ball"], ["dog", "ball"], ["dog", "cat", "ball"], {})
    assert dataset.raw(1).texts == (["a cat"], ["cat"], [], {})
    for index, row in ((2, 3), (3, 6)):
        with pytest.raises(BadPairError, match=f"row {row}: "):
            dataset.raw(index)


def test_rows_with_images_of_their_own_and_one_path_are_pairs_of_their_own(tmp_path):
    """Some programs store one path, such as "image.jpg", beside the bytes of each image."""
    (tmp_path / "image.jpg").write_bytes(jpeg(9))
    stored = [{"bytes": content, "path": "image.jpg"} for content in (jpeg(0), None, jpeg(2), b"")]
    pq.write_table(pa.table({"image": stored, "caption": [*"abcd"]}), tmp_path / "a[12]*.parquet")
    dataset = load_pairs(tmp_path / "a[12]*.parquet")  # a name is no pattern
    assert all_captions(dataset) == [["a"], ["b", "d"], ["c"]]
    assert [bytes_of(dataset, row) for row in range(3)] == [jpeg(0), jpeg(9), jpeg(2)]


def test_image_folder(tmp_path):
    write_images(tmp_path, ["0.jpg", "sub/1.jpg"])
    table = tmp_path / "metadata.jsonl"
    table.write_text('{"file_name": "0.jpg"}\n\n{"file_name": "sub/1.jpg", "captions": ["a", "b"]}')
    for source in (tmp_path, table):
        dataset = load_pairs(source)
        assert dataset.captions(1) == ["a", "b"] and dataset.read(1)["key"] == "sub/1.jpg"  # not a class
        with pytest.raises(BadPairError, match="row 1: no caption"):
            dataset.read(0)


def test_a_folder_for_each_class(tmp_path, caplog, monkeypatch):
    write_images(tmp_path, ["dog/1.jpg", "dog/2.png", "golden_retriever/1.jpg"])
    write_images(tmp_path, ["golden_retriever/.hidden.jpg", "__MACOSX/dog/1.jpg", "dog/.ipynb_checkpoints/1.jpg"])
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    dataset = load_pairs(tmp_path)
    assert [(item["key"], item["caption"]) for item in dataset] == [
        ("dog/1.jpg", "a photo of a dog"),
        ("dog/2.png", "a photo of a dog"),
        ("golden_retriever/1.jpg", "a photo of a golden retriever"),
    ]
    assert dataset.raw(2).image == tmp_path / "golden_retriever" / "1.jpg"
    assert not caplog.text
    (tmp_path / "dog").rename(tmp_path / "wolf")
    write_images(tmp_path, ["wolf/puppies/2.jpg", "root.png"])  # in no folder of a class
    (tmp_path / "cat").symlink_to(tmp_path / "wolf", target_is_directory=True)  # as subsets of ImageNet are made
    monkeypatch.chdir(tmp_path)
    assert keys(load_pairs(".")) == ["cat/1.jpg", "cat/2.png", "golden_retriever/1.jpg", "wolf/1.jpg", "wolf/2.png"]
    assert "3 images in no folder of a class, such as 'cat/puppies/2.jpg'" in caplog.text


def test_splits_with_tables_are_no_classes(tmp_path, caplog):
    write_images(tmp_path, ["train/1.jpg", "validation/2.jpg"])
    (tmp_path / "train.csv").write_text("file_name,text\ntrain/1.jpg,a dog\n")
    load_pairs(tmp_path)
    assert "train.csv: left out; captions are the names of folders, such as 'train'" in caplog.text
    for split, name in (("train", "1.jpg"), ("validation", "2.jpg")):
        (tmp_path / split / "metadata.csv").write_text(f"file_name,text\n{name},a dog\n")
    with pytest.raises(ValueError, match="train/metadata.csv.* name that folder"):
        load_pairs(tmp_path)
    assert load_pairs(tmp_path / "train")[0]["caption"] == "a dog"


@pytest.mark.parametrize("form", ["parquet", "folder", "split"])
def test_saved_datasets(tmp_path, form):
    """Bytes of images as `datasets` and pandas store them, and paths."""
    images = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(3)]
    features = datasets.Features({"picture": datasets.Image(), "report": datasets.Value("string")})
    saved = datasets.Dataset.from_dict({"picture": images, "report": ["a", "b", "c"]}, features=features)
    source = tmp_path / ("pairs.parquet" if form == "parquet" else "saved")
    if form == "parquet":
        saved.to_parquet(source)
    else:
        (datasets.DatasetDict(train=saved) if form == "split" else saved).save_to_disk(source)
    dataset = load_pairs(source, caption_column="report")
    assert all_captions(dataset) == [["a"], ["b"], ["c"]] and keys(dataset) == ["0.jpg", "1.jpg", "2.jpg"]
    assert [dataset[i]["image"].getpixel((0, 0))[0] for i in range(3)] == pytest.approx([0, 1, 2], abs=1)
    with pytest.raises(ValueError, match="the caption .* among 'picture', 'report'; .*caption_column"):
        load_pairs(source)


def test_files_that_are_in_both_sets_are_named(tmp_path, caplog):
    write_images(tmp_path, ["0.jpg", "1.jpg", "2.jpg"])
    table = write_table(tmp_path / "a.csv", ["0.jpg", "1.jpg"])
    for images, expected in ((["1.jpg", "2.jpg"], {"1.jpg"}), (["2.jpg"], set())):
        held_out = write_table(tmp_path / "b.csv", images)
        both = load_pairs(table).files() & load_pairs(held_out).files()
        assert {os.path.basename(file) for file in both} == expected
        named = {"data": [str(table)], "validation_data": [str(held_out)]}
        caplog.clear()
        open_data(resolve_arguments({"model": "m", "output_dir": "new", **named}))
        assert ("in data and validation_data" in caplog.text) == bool(expected)


def test_held_out_pairs_that_cannot_be_read_are_left_out_up_to_a_share(tmp_path):
    """A replaced one would be measured as a duplicate of another pair."""
    names = [f"{number}.jpg" for number in range(8)]
    write_images(tmp_path, names[:3] + names[4:])
    table = write_table(tmp_path / "a.csv", names)
    captions = [pair["captions"] for pair in load_pairs(table, max_bad_share=0.2).readable()]
    assert captions == [[f"caption {number}"] for number in range(8) if number != 3]
    with pytest.raises(ValueError, match="max_bad_share"):
        load_pairs(table, max_bad_share=0.1).readable()


def test_a_part_is_split_off_by_images(tmp_path):
    """Several captions of an image in two tables, after a shard."""
    shards = write_shards(tmp_path / "shards", 9)
    (tmp_path / "more.csv").write_text("image,caption\n7.jpg,a\n./8.jpg,b\n")
    rows = [f"{number % 3 * './'}{number // 3}.jpg,caption {number}" for number in range(30)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *rows, ""]))
    dataset = load_pairs([shards, tmp_path / "pairs.csv", tmp_path / "more.csv"])
    training, part = dataset.split(0.25)
    images = [{os.path.normpath(part.raw(row).key) for row in range(len(part))} for part in (training, part)]
    assert images[0].isdisjoint(images[1]) and len(images[0] | images[1]) == 19 and len(images[1]) == 5
    assert len(training) + len(part) == 21
    again = dataset.split(0.25)[1]
    assert [again.captions(row)[0] for row in range(len(again))] == [part.captions(row)[0] for row in range(len(part))]
    assert pickle.loads(pickle.dumps(part)).image_digests() == part.image_digests()
    with pytest.raises(ValueError, match="19 images in two"):
        dataset.split(1)


def test_copies_of_an_image_stay_together_and_are_compared_once(tmp_path, recorded):
    """As in data sets with a row for each caption. Otherwise images that are held out are trained on."""
    write_members(tmp_path / "a.tar", range(8), jpg=jpeg, txt=str)
    write_images(tmp_path, [f"{number}.jpg" for number in range(8)])
    table = write_table(tmp_path / "b.csv", [f"{number}.jpg" for number in range(8)])
    compared = recorded(PairDataset, "_image_digest", lambda self, index: index)
    parts = load_pairs([tmp_path / "a.tar", table]).split(0.125)
    images = [[bytes_of(part, row) for row in range(len(part))] for part in parts]
    assert [(len(part), len({*part})) for part in images] == [(14, 7), (2, 1)] and {*images[0]}.isdisjoint(images[1])
    for part, stored in zip(parts, images):
        assert part.image_digests() == [hashlib.sha256(image).digest() for image in stored]
    assert sorted(compared) == [*range(16)]


@pytest.mark.parametrize("large", [2**30, 0])  # with 0, digests are kept
def test_the_images_of_another_column_are_others(tmp_path, monkeypatch, large):
    """The feature cache would give the features of the first column for the second."""
    monkeypatch.setattr(pairs_module, "LARGE", large)
    rows = [{"photo": jpeg(i), "drawing": jpeg(i // 2), "caption": str(i)} for i in range(4)]
    path = write_rows(tmp_path, "parquet", rows)
    for column, distinct in (("photo", 4), ("drawing", 2)):
        for _ in range(2):
            pairs = load_pairs(path, image_column=column)
            expected = [hashlib.sha256(pairs.raw(row).image).digest() for row in range(4)]
            assert pairs.image_digests() == expected and len(set(expected)) == distinct


def test_members_of_one_name_are_pairs_of_their_own(tmp_path):
    members = [("a.jpg", jpeg(1)), ("a.txt", "one"), ("a.jpg", jpeg(2)), ("a.txt", "two")]
    members += [("b.jpg", jpeg(3)), ("b.png", jpeg(4)), ("b.txt", "of which?")]
    dataset = load_pairs(write_tar(tmp_path / "A.TAR", members).parent)  # in capitals
    assert [dataset.captions(index) for index in (0, 1)] == [["one"], ["two"]]
    assert [np.asarray(dataset.image(index)).mean().round() for index in (0, 1)] == [1, 2]
    with pytest.raises(BadPairError, match=r"two images of the key 'b', in 'b\.jpg' and 'b\.png'"):
        dataset.read(2)


def test_patterns_and_lists(tmp_path):
    shards = write_shards(tmp_path / "shards [1]", 12, shards=12)
    other = write_shards(tmp_path / "other", 3, shards=1)
    assert keys(load_pairs(f"{shards}/00000.tar")) == ["k00"]
    assert keys(load_pairs(str(other / "{00000,00000}.tar"))) == ["k00", "k01", "k02"] * 2
    plain = shards.rename(tmp_path / "shards")
    assert keys(load_pairs(f"{plain}/*[02].tar")) == ["k00", "k02", "k10"]
    assert keys(load_pairs([plain, other / "00000.tar"])) == [f"k{i:02}" for i in range(12)] + ["k00", "k01", "k02"]
    assert expand_braces("{a,b}-{9..11}-{08..09}") == [
        f"{letter}-{number}-{padded}" for letter in "ab" for number in (9, 10, 11) for padded in ("08", "09")
    ]


def test_rows_take_little_more_memory_than_their_text(tmp_path):
    """A dictionary for each takes several times as much, and each loading process would come to copy it."""
    names = [f"a photo of number/{number:06}.jpg" for number in range(2000)]
    source = write_table(tmp_path / "a.csv", names, names)
    load_pairs(source)  # which imports
    tracemalloc.start()
    pairs = load_pairs(source)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pairs) == 2000 and taken / 2000 < 200


# ---- index cache ----


def test_index_is_cached_until_the_shard_changes(tmp_path, cache, recorded):
    folder = write_shards(tmp_path / "shards", 6, shards=2)
    first = load_pairs(folder)
    assert len(list((cache / "shards").iterdir())) == 2
    scans = recorded(shards.TarRows, "_ranges", lambda self: self.path.name)
    assert keys(load_pairs(folder)) == keys(first) and not scans
    write_tar(folder / "00001.tar", [("new.jpg", jpeg(1)), ("new.txt", "new")])
    assert keys(load_pairs(folder)) == ["k00", "k01", "k02", "new"] and scans == ["00001.tar"]


# ---- epochs ----


def test_sampled_captions(tmp_path):
    captions = [f"c{i}" for i in range(5)]
    path = write_members(tmp_path / "a.tar", range(40), jpg=jpeg, json=lambda i: json.dumps({"captions": captions}))

    def drawn(seed, epoch):
        dataset = load_pairs(path, seed=seed)
        dataset.set_epoch(epoch)
        return [item["caption"] for item in dataset]

    epochs = [drawn(0, epoch) for epoch in range(30)]
    assert epochs[3] == drawn(0, 3) and epochs[0] not in (epochs[1], drawn(1, 0))
    assert all(170 < flat(epochs).count(caption) < 310 for caption in captions)  # 240 each; 14 is 1 sd
    assert all(len({epoch[i] for epoch in epochs}) == 5 for i in range(40))  # each pair shows all of its captions


# ---- bad pairs ----

BAD = {8: "truncated", 9: "no caption", 23: "no image beside its text", 31: "utf-8"}


@pytest.fixture
def damaged(tmp_path):
    """40 pairs, of which `BAD` are bad in different ways."""
    images, texts = {8: jpeg(8)[:300], 23: None}, {9: " \n", 31: b"\xff\xfe"}
    return write_members(
        tmp_path / "damaged.tar",
        range(40),
        jpg=lambda i: images.get(i, jpeg(i)),
        txt=lambda i: texts.get(i, f"caption {i}"),
    )


def test_bad_pairs_are_named_replaced_and_counted(damaged, caplog):
    dataset = load_pairs(damaged)
    for index, problem in BAD.items():
        with pytest.raises(BadPairError, match=rf"damaged\.tar.*(?i:{problem})"):
            dataset.read(index)

    items = [*load_pairs(damaged, max_bad_share=0.2)]
    assert len(items) == 40  # batches stay full
    for index, item in enumerate(items):
        assert item["caption"] == f"caption {int(item['key'][1:])}"
        assert (item["key"] == f"k{index:02}") == (index not in BAD)
    assert keys(items) == keys(load_pairs(damaged, max_bad_share=0.2))  # by the same pairs
    assert caplog.text.count("Bad pair, number") >= 4 and "k08.jpg" in caplog.text


def test_bad_pairs_are_replaced_from_anywhere(damaged):
    """Anew in each epoch, and each by another pair: always the same one would be learnt by heart."""
    dataset = load_pairs(damaged, max_bad_share=1)
    drawn = []
    for epoch in range(10):
        dataset.set_epoch(epoch)
        drawn.append([dataset[index]["key"] for index in BAD])
    assert all(len({keys[i] for keys in drawn}) > 5 for i in range(4)) and any(len(set(keys)) == 4 for keys in drawn)


def test_too_many_bad_pairs_stop_the_run(damaged):
    dataset = load_pairs(damaged, max_bad_share=0.05)
    assert all(dataset[i] for i in range(39))  # 4 of 39, but too few read to judge
    with pytest.raises(ValueError, match=r"4 of the 40 pairs read so far are bad, .*5\.00%.*utf-8"):
        dataset[39]
    dataset = load_pairs(damaged, max_bad_share=0.1)
    assert len([*dataset, *dataset]) == 80  # exactly at the limit, however often a pair is read


# ---- what a row says ----

NO_NAMES = [{"dog": 1}, [["dog"]], ["dog", 3], "dog", '["dog"']
NO_PROBABILITIES = [{"dog": 2}, {"dog": Decimal("NaN")}, {"dog": "a"}, ["dog"], '{"dog": 0.5']

CAPTIONS = [  # a blank caption does not hide the next
    ({"captions": ["", " "], "txt": " ", "title": "a"}, ["a"]),
    ({"captions": " ", "text": "a"}, ["a"]),
    ({"txt": "", "caption": "", "json": {"captions": [" "], "caption": "a"}}, ["a"]),
    ({"captions": ("a", "b"), "text": "c"}, ["a", "b"]),
    ({"txt": " ", "caption": None, "json": {"caption": ""}}, []),
    *(({"caption": value}, [text]) for value, text in (("1.50", "1.50"), (1984, "1984"), (True, "true"))),
    ({"captions": [1984, "a dog", None], "caption": "b"}, ["1984", "a dog"]),
    ({"captions": float("nan")}, []),
]
LABELS = [
    (np.array(["dog", "cat"], object), ["dog", "cat"]),
    (["dog, cat", "bus,"], ["dog", "cat", "bus"]),
    (' ["dog", "cat "]', ["dog", "cat"]),
    *((numbers, []) for numbers in ([3, 4], 3, "[3]", np.array([3]), float("nan"), "")),  # ids
]
COMPLETE = [("COCO2017", class_names.COCO_THINGS), ('["voc2012", "sky"]', (*class_names.VOC, "sky"))]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        *((row, (captions, [], [], {})) for row, captions in CAPTIONS),
        *(({"captions": "a", "labels": of, "complete": of}, (["a"], names, names, {})) for of, names in LABELS),
        *(({"captions": "a", "labels": [], "complete": of}, (["a"], [], [*names], {})) for of, names in COMPLETE),
        ({"class_probabilities": {"pug": Decimal("0.1")}}, ([], [], [], {"pug": 0.1})),
    ],
)
def test_texts_of_a_row(row, expected):
    for of_row in (row, row if "json" in row else {"json": row}):
        assert columns.USUAL_COLUMNS.texts(of_row) == expected


@pytest.mark.parametrize(
    ("column", "row"),
    [
        *((column, {"labels": [], column: value}) for column in ("labels", "complete") for value in NO_NAMES),
        *(("class_probabilities", {"class_probabilities": value}) for value in NO_PROBABILITIES),
        *(("labels", {"complete": ["dog"], **labels}) for labels in ({}, {"labels": ""}, {"labels": [3]})),
    ],
)
def test_labels_of_another_kind_are_refused(column, row, tiny_processor):
    image = Image.new("RGB", (9, 9))
    rows = [{"image": image, "caption": "a"}, {"image": image, "caption": "a", **row}]
    with pytest.raises(ValueError, match=f"^Row 2 of the batch: {column}: "):
        PairCollator(tiny_processor)(rows)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "tar"])
def test_labels_in_every_format(tmp_path, form):
    rows = [
        {"labels": ["dog", "cat"], "complete": ["dog", "car"], "class_probabilities": {"pug": 0.5}},
        {"labels": ["dog"], "complete": ["voc2012"], "class_probabilities": {"pug": 0.75, "box": 0.125}},
        {"labels": [], "complete": [], "class_probabilities": None},
        {"labels": None, "complete": ["coco2017"], "class_probabilities": None},
    ]
    expected = [(["dog", "cat"], ["dog", "car"], {"pug": 0.5})]
    expected += [(["dog"], [*class_names.VOC], {"pug": 0.75, "box": 0.125}), ([], [], {})]
    write_images(tmp_path, [f"{number}.jpg" for number in range(4)])
    rows = [{"image": f"{number}.jpg", "caption": "a", **row} for number, row in enumerate(rows)]
    path = write_rows(tmp_path, form, rows)
    pairs = load_pairs(path)
    assert [pairs.raw(row).texts[1:] for row in range(3)] == expected
    items = [columns.USUAL_COLUMNS.texts(pairs.read(row)) for row in range(3)]  # as a collator reads them
    assert [texts[1:] for texts in items] == expected
    with pytest.raises(BadPairError, match=rf"rows\.{form}, row 4: labels: .* is no list of names"):
        pairs.raw(3)  # it would count as an image that shows none of the names
    if form == "tar":
        found = {item["key"]: columns.USUAL_COLUMNS.texts(item)[1:] for item in stream(tmp_path, max_bad_share=1)}
        assert found == {f"k0{row}": expected[row] for row in range(3)}


def test_labels_that_teach_nothing_are_counted_in_one_warning(tmp_path, caplog):
    labels = [["dog", "Traffic_Light", "sportsball"], ["sportsball", "kite"], ["dogs", "new_thing"]]
    rows = [{"caption": "a", "labels": names, "complete": ["traffic light", "new thing"]} for names in labels]
    write_members(tmp_path / "a.tar", range(3), jpg=jpeg, json=lambda number: json.dumps(rows[number]))
    named = {"nouns": f"{tmp_path}/nouns.txt", "data": [f"{tmp_path}/a.tar"]}
    arguments = resolve_arguments({"model": "m", "output_dir": "new", **named})
    (tmp_path / "nouns.txt").write_text("dog", encoding="utf-8-sig")
    open_data(arguments)
    warn_of_unknown_labels(stream(tmp_path), NounPrompts(["dog"]))
    for message in caplog.messages:
        assert "2 names" in message and "3 pairs" in message and "'sportsball' (2), 'kite' (1)" in message
    (tmp_path / "nouns.txt").write_text("dog\nsportsball\nkite")
    open_data(arguments)
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(("name", "known"), [("TVmonitor", "tv"), ("sofa", "couch")])
def test_a_class_has_the_names_of_other_data_sets(name, known):
    """VOC's are not those of COCO: an image with a sofa would train that it shows no couch."""
    nouns = NounPrompts([*class_names.COCO_THINGS, "sofa"])
    texts = columns.PairTexts(["a"], [name], class_names.COCO_THINGS)
    shown, absent, *_ = nouns.known_nouns(*texts)
    assert {nouns.nouns[noun] for noun in shown} == {known, name} & {*nouns.nouns}
    assert len(absent) == 79 and not nouns.unknown_labels(texts)
    assert nouns.unknown_labels(texts._replace(complete=["dog"])) == {name} - {*nouns.nouns}


def test_images_of_large_data_are_read_once(tmp_path, cache, monkeypatch, recorded):
    """And known by their content as those of small data, so that the feature cache has them after a move too."""
    write_images(tmp_path / "data", [f"{number}.jpg" for number in range(3)])
    (tmp_path / "data" / "copy.jpg").write_bytes(jpeg(0))
    write_table(tmp_path / "data" / "b.csv", ["0.jpg", "copy.jpg", "1.jpg", "./2.jpg", "absent.jpg"])
    write_shards(tmp_path / "data" / "shards", 3, 1)

    def digests(folder="data"):
        return load_pairs([tmp_path / folder / name for name in ("b.csv", "shards/00000.tar")]).image_digests()

    expected = digests()
    assert not (cache / "digests").exists() and len({*expected}) == 4
    compared = recorded(PairDataset, "_image_digest", lambda self, pair: pair)
    monkeypatch.setattr(pairs_module, "LARGE", 0)
    for _ in range(2):
        assert digests() == expected and [*compared] == [*range(8)]
    (tmp_path / "data" / "1.jpg").write_bytes(b"another")
    assert [one == other for one, other in zip(digests(), expected)] == [row != 2 for row in range(8)]
    assert [*compared] == [*range(8), *range(5)]
    (tmp_path / "data" / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "data").rename(tmp_path / "moved")
    assert [one == other for one, other in zip(digests("moved"), expected)] == [row != 4 for row in range(8)]


def bytes_of(pairs: PairDataset, row: int) -> bytes:
    image = pairs.raw(row, need_captions=False).image
    return image if isinstance(image, bytes) else image.read_bytes()


def test_a_source_named_twice_counts_twice(tmp_path, recorded):
    write_members(tmp_path / "a.tar", range(2), jpg=jpeg, txt=str)
    write_images(tmp_path, ["0.jpg"])
    table = write_table(tmp_path / "b.csv", ["0.jpg"], ["2"])
    opened = recorded(formats, "_open", lambda path, *_: path.name)
    pairs = load_pairs([tmp_path / "a.tar", table, tmp_path / "a.tar"])
    assert opened == ["a.tar", "b.csv"] and flat(all_captions(pairs)) == [*"01201"]
    distinct, rows = pairs.distinct()
    assert flat(all_captions(distinct)) == [*"012"] and rows.tolist() == [0, 1, 2, 0, 1]
    training, held_out = map(flat, map(all_captions, pairs.split(0.5)))
    assert {*training}.isdisjoint(held_out) and len({*held_out}) == len(held_out)  # held-out pairs count once


@pytest.mark.parametrize("empty", [(1,), (0, 1, 3)])
def test_an_empty_shard_shifts_no_pair(tmp_path, empty):
    numbers = [number for number in range(4) if number not in empty]
    for number in range(4):
        write_members(tmp_path / f"{number}.tar", {number} - {*empty}, jpg=jpeg, txt=str)
    pairs = load_pairs(tmp_path)
    assert [pairs.read(row)["captions"] for row in range(len(pairs))] == [[str(number)] for number in numbers]
    expected = [hashlib.sha256(jpeg(number)).digest() for number in numbers]
    assert pairs.image_digests() == expected


# ---- streams ----


def stream(folder, **options):
    files = sorted(str(path) for path in folder.glob("*.tar"))
    rows = datasets.load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True)
    return PairStream(rows, **options)


@pytest.mark.parametrize(
    ("shards", "world_size", "num_workers"),
    [(1, 1, 2), (1, 3, 2), (6, 1, 0), (6, 2, 2)],
)
def test_stream_is_split_without_loss_or_repetition(tmp_path, shards, world_size, num_workers):
    folder = write_shards(tmp_path, 24, shards)
    parts = []
    for rank in range(world_size):
        loader = DataLoader(
            stream(folder, rank=rank, world_size=world_size), batch_size=5, num_workers=num_workers, collate_fn=list
        )
        parts.append([(item["key"], item["caption"]) for batch in loader for item in batch])
    assert all(parts)
    assert sorted(flat(parts)) == [(f"k{i:02}", f"caption {i}") for i in range(24)]


def test_workers_of_a_stream_count_their_own_passes(tmp_path):
    """One with few pairs is ahead of one with many. Both are told of a new epoch while they persist."""
    for shard, numbers in enumerate((range(3), range(3, 43))):
        write_members(tmp_path / f"{shard}.tar", numbers, jpg=jpeg, txt=lambda i: "a")
    pairs = StreamedPairs(stream(tmp_path), 60)

    def numbers(items):
        return get_worker_info().id, [item["draw"][1] for item in items]

    loader = DataLoader(pairs, batch_size=4, num_workers=2, persistent_workers=True, collate_fn=numbers)
    for epoch in (0, 7):
        pairs.set_epoch(epoch)
        batches = [*islice(loader, 16)]
        of_workers = [flat(batch for worker, batch in batches if worker == one) for one in (0, 1)]
        passes = [[len([*of_pass]) for _, of_pass in groupby(seen)] for seen in of_workers]
        assert [seen[0] for seen in of_workers] == [epoch] * 2 and all(seen == sorted(seen) for seen in of_workers)
        # All pairs of a shard, apart from the last pass
        assert [32] in passes and all(count in (3, 40) for counts in passes for count in counts[:-1])


def test_stream_order_and_captions_by_seed_and_epoch(tmp_path):
    captions = json.dumps({"captions": ["a", "b", "c"]})
    write_members(tmp_path / "0.tar", range(20), jpg=jpeg, json=lambda i: captions)

    def one_pass(seed, epoch):
        pairs = stream(tmp_path, seed=seed)
        pairs.set_epoch(epoch)
        return [(item["key"], item["caption"]) for item in pairs]

    passes = [one_pass(*by) for by in ((0, 0), (0, 1), (1, 0))]
    assert passes[0] == one_pass(0, 0)
    for one, other in combinations(passes, 2):
        assert [key for key, _ in one] != [key for key, _ in other] and dict(one) != dict(other)
    assert {caption for _, caption in passes[0]} == {"a", "b", "c"}


def test_stream_leaves_bad_pairs_out(tmp_path, caplog):
    image, caption = (lambda i: jpeg(i)[: 300 if i == 8 else None]), (lambda i: "" if i == 9 else "a")
    write_members(tmp_path / "0.tar", range(40), jpg=image, txt=caption)
    items = list(stream(tmp_path, max_bad_share=0.2))
    assert sorted(keys(items)) == [f"k{i:02}" for i in range(40) if i not in (8, 9)]
    assert caplog.text.count("Bad pair, number") == 2 and "k08" in caplog.text and "no caption" in caplog.text


def test_a_stream_opens_only_files_of_its_data_set(monkeypatch):
    opened, data = [], "hf://datasets/org/name@1a2b"
    monkeypatch.setattr(fsspec, "open", lambda path, mode: opened.append(path) or io.BytesIO(jpeg(1)))
    for path in ("/secret.jpg", f"{data}/a.jpg::file:///secret.jpg", f"{data}/../../../other/name/a.jpg"):
        with pytest.raises(ValueError, match="names no file of the data set itself"):
            _image_bytes({"bytes": None, "path": path}, "org/name")
    assert not opened
    own = [f"{data}/train/a b.jpg", f"zip://train/a.jpg::{data}/train.zip"]
    assert [_image_bytes({"bytes": None, "path": path}, "org/name") for path in own] == [jpeg(1)] * 2 and opened == own


def saved_rows(rows, monkeypatch, streaming=False, **kinds):
    """Lets `datasets` load these rows as those of a data set of the Hub."""
    kinds = {"image": datasets.Image(), "text": datasets.Value("string"), **kinds}
    saved = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    opened = saved.to_iterable_dataset() if streaming else saved
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, **options: opened)


def test_images_without_a_name_in_a_stream_have_different_draws(monkeypatch):
    """Parquet files of `push_to_hub` hold bytes without a path. With one draw, all images would be augmented alike."""
    images = [{"bytes": jpeg(number), "path": None} for number in range(3)]
    saved_rows({"image": images, "text": ["a", "b", "c"]}, monkeypatch, streaming=True)
    first, again = ({item["caption"]: item["draw"] for item in load_pairs("org/name")} for _ in range(2))
    assert len({*first.values()}) == 3 and first == again


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_of_the_hub_that_name_local_files_are_bad_pairs(tmp_path, monkeypatch, streaming):
    own = tmp_path / "datasets--org--name" / "snapshots" / "1a2b" / "0.jpg"  # as `datasets` downloads it
    own.parent.mkdir(parents=True)
    for path in (own, tmp_path / "secret.jpg"):
        path.write_bytes(jpeg(9))
    paths = ["a.jpg", str(tmp_path / "secret.jpg"), str(own)]
    images = [{"bytes": None if number else jpeg(1), "path": path} for number, path in enumerate(paths)]
    saved_rows({"image": images, "text": ["a", "b", "c"]}, monkeypatch, streaming)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(own.parents[2]))
    pairs = load_pairs("org/name", streaming=streaming, max_bad_share=1)
    if streaming:
        assert [item["caption"] for item in pairs] == ["a"]
    else:
        assert [pairs.read(row)["captions"] for row in (0, 2)] == [["a"], ["c"]]
        with pytest.raises(BadPairError, match="no image"):
            pairs.read(1)
        assert [*pairs.sources[0].image_names] == [None, None, str(own)]  # nor read for a digest


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("column", ["title", "json"])
def test_no_file_or_url_in_a_column_of_texts_is_opened(monkeypatch, column, streaming):
    kind, value = datasets.Image(), {"bytes": None, "path": "missing.png"}  # an error if it is opened
    if column == "json":
        kind, value = {"title": kind, "width": datasets.Value("int64")}, {"title": value, "width": 1}
    rows = {"image": [{"bytes": jpeg(1), "path": "a.jpg"}], "text": ["a dog"], column: [value]}
    saved_rows(rows, monkeypatch, streaming, **{column: kind})
    pairs = load_pairs("org/name", streaming=streaming)
    (pair,) = pairs if streaming else [pairs.read(0)]
    assert pair["captions"] == ["a dog"]


def test_stream_bears_json_whose_types_change(tmp_path):
    def info(i):  # datasets guesses the types from the first five
        late = {"width": "wide", "error": "late", "exif": {"a": i}} if i > 9 else {"width": 640, "error": None}
        return json.dumps({"caption": f"caption {i}", **late})

    write_members(tmp_path / "0.tar", range(20), jpg=jpeg, json=info)
    assert sorted(item["caption"] for item in stream(tmp_path)) == sorted(f"caption {i}" for i in range(20))


def test_hub_ids_are_streamed(tmp_path, monkeypatch):
    write_shards(tmp_path / "data", 3, shards=1)
    calls, real = [], datasets.load_dataset

    def load_dataset(name, **options):
        calls.append((name, options))
        return real("webdataset", data_dir=str(tmp_path / "data"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    dataset = load_pairs("org/name", split="train", seed=1)
    assert calls == [("org/name", {"split": "train", "streaming": True})] and isinstance(dataset, PairStream)
    assert sorted(item["caption"] for item in dataset) == ["caption 0", "caption 1", "caption 2"]
    (tmp_path / "org").mkdir()
    write_shards(tmp_path / "org" / "name", 4)
    assert len(load_pairs("org/name")) == 4  # a local path goes first
    for mistyped in ("data/other", "other/name.tar"):  # not asked for on the Hub
        with pytest.raises(FileNotFoundError, match=mistyped):
            load_pairs(mistyped)
