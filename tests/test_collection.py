import copy
import io
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_model
from datasets import load_dataset
from PIL import Image
from processes import COMMAND, run_script

from iclip_hf import explain
from iclip_hf.explainers import collection
from iclip_hf.explainers.collection import explain_collection, open_images
from iclip_hf.explainers.localizer import Localizer


TEXTS = ["dog", "red ball"]
NAMES = [f"{folder}/{number:02}.jpg" for folder in ("a", "b") for number in range(7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_processor):
    """A model, and 14 images of different shapes of which b/02 is broken."""
    folder = tmp_path_factory.mktemp("collection")
    tiny_model().save_pretrained(folder / "model")
    tiny_processor.save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    for index, name in enumerate(NAMES):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (20 + 3 * index, 60 - 2 * index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    broken = folder / "images" / "b" / "02.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    (folder / "images" / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def localizer(tiny_processor):
    return Localizer((tiny_model(), tiny_processor), TEXTS, threshold=[0.4, 0.6], min_presence=0.2)


def run(localizer, images, output, **options):
    options = {"batch_size": 3, "images_per_file": 4, "num_workers": 2, "progress": False, **options}
    return explain_collection(localizer, images, output, **options)


@pytest.fixture(scope="module")
def whole(folder, localizer, tmp_path_factory):
    """An uninterrupted run: its report and folder."""
    output = tmp_path_factory.mktemp("whole")
    return run(localizer, open_images([folder / "images"]), output), output


def contents(output):
    """Of all but the hidden lock."""
    return {path.name: path.read_bytes() for path in output.glob("[!.]*")}


def test_files_and_report(whole):
    report, output = whole
    assert [path.name for path in report.files] == [f"explanations-{i:05}-of-00004.parquet" for i in range(4)]
    assert sorted(output.glob("[!.]*")) == report.files
    assert [pq.read_metadata(path).num_rows for path in report.files] == [4, 4, 3, 2]
    assert report.images == 13
    assert len(report.broken) == 1 and "b/02.jpg" in report.broken[0] and "undamaged copy" in report.broken[0]


def test_rows_are_what_explain_gives(folder, whole, tmp_path):
    dataset = load_dataset("parquet", data_dir=str(whole[1]), split="train", cache_dir=str(tmp_path))
    names = [name for name in NAMES if name != "b/02.jpg"]
    assert dataset["image"][:] == names
    from transformers import AutoModel, AutoProcessor

    model, processor = (auto.from_pretrained(folder / "model") for auto in (AutoModel, AutoProcessor))
    explanations = explain((model, processor), [folder / "images" / name for name in names], TEXTS)
    masks = 0
    for row, explanation in zip(dataset, explanations):
        assert (row["height"], row["width"]) == explanation.size
        for index, (text, threshold) in enumerate(zip(row["texts"], (0.4, 0.6))):
            assert text["text"] == TEXTS[index]
            assert text["score"] == pytest.approx(float(explanation.scores[index]), abs=1e-3)
            raw, expected = torch.tensor(text["raw_map"]), explanation.map(index).numpy()
            torch.testing.assert_close(raw, explanation.raw_maps[index], atol=1e-5, rtol=0)
            mask, sure = np.asarray(text["mask"]), np.abs(expected - threshold) > 1e-3
            expected_mask = (expected > threshold) & (text["presence"] >= 0.2)
            assert mask.dtype == bool and np.array_equal(mask[sure], expected_mask[sure])
            assert bool(text["regions"]) == mask.any()
            masks += mask.any()
    assert 0 < masks < 26  # the gate closed for some


class Killed(BaseException):
    pass


def test_an_interrupted_run_goes_on_and_gives_the_same_files(folder, localizer, whole, tmp_path, monkeypatch):
    calls = []

    def stop_at_the_fourth_batch(images):
        calls.append(len(images))
        if len(calls) == 4:
            raise Killed
        return Localizer._explain(localizer, images)

    images = open_images([folder / "images"])
    monkeypatch.setattr(localizer, "_explain", stop_at_the_fourth_batch)
    with pytest.raises(Killed):
        run(localizer, images, tmp_path)
    monkeypatch.undo()
    (first,) = tmp_path.glob("[!.]*")  # nothing half-written
    finished = first.stat().st_mtime_ns

    assert run(localizer, images, tmp_path).broken == whole[0].broken
    assert first.stat().st_mtime_ns == finished
    assert contents(tmp_path) == contents(whole[1])


def command(folder, output):
    texts = [part for text in TEXTS for part in ("--text", text)]
    options = "--batch-size 3 --images-per-file 4 --threshold 0.4 --min-presence 0.2".split()
    places = ["--model", str(folder / "model"), "--output", str(output)]
    return ["explain", str(folder / "images"), *texts, *options, *places]


def test_hidden_images_are_no_part_of_a_folder(tmp_path):
    """Such as copies of notebooks, what macOS adds, and what a killed run was writing."""
    for name in ("a.png", ".b.png", "c/d.png", "c/.ipynb_checkpoints/d.png", "__MACOSX/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    images = open_images([tmp_path])
    assert [images.image(index)[0] for index in range(len(images))] == ["a.png", "c/d.png"]


@pytest.mark.slow
def test_two_processes_go_on_after_a_kill_in_the_midst_of_writing(folder, tiny_processor, tmp_path):
    """Killed while the second file is half-written, then finished by two processes: as one uninterrupted run."""
    output = tmp_path / "output"
    killed = (
        "import os, signal\n"
        "replace = os.replace\n"
        "def kill(source, target):\n"
        "    if '00001-of' in str(target): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    replace(source, target)\n"
        f"os.replace = kill\n{COMMAND}"
    )
    (done,) = run_script(killed, *command(folder, output))
    assert done.returncode == -signal.SIGKILL
    assert list(contents(output)) == ["explanations-00000-of-00004.parquet"] and list(output.glob(".*.partial"))

    first, second = run_script(COMMAND, *command(folder, output), processes=2)
    assert first.stdout + second.stdout == f"13 images -> 4 Parquet files in {output}, 1 broken images\n"
    assert "b/02.jpg" in first.stderr and first.returncode != 0
    # Of the files left, with 4, 4 and 2 images, the process that shows progress makes the first and the third.
    assert "/6 [" in first.stderr

    alone = tmp_path / "alone"
    model = tiny_model()
    model.config._name_or_path = str(folder / "model")
    localizer = Localizer((model, tiny_processor), TEXTS, threshold=0.4, min_presence=0.2)
    run(localizer, open_images([folder / "images"]), alone)
    assert sorted(contents(output)) == sorted(contents(alone))
    for file in alone.glob("*.parquet"):
        ours, theirs = pq.read_table(file), pq.read_table(output / file.name)
        assert ours.schema.metadata == theirs.schema.metadata
        assert ours["image"] == theirs["image"]
        for one, other in zip(ours["texts"].to_pylist(), theirs["texts"].to_pylist()):
            assert [text["score"] for text in one] == pytest.approx([text["score"] for text in other], abs=2e-4)


def test_shards_without_captions_give_the_same_rows(folder, localizer, whole, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(2):
        with tarfile.open(shards / f"{number:05}.tar", "w") as tar:
            for name in NAMES[7 * number : 7 * number + 7]:
                data = (folder / "images" / name).read_bytes()
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    for sources in ([shards], [f"{shards}/{{00000..00001}}.tar"], sorted(shards.iterdir())):
        assert len(open_images(sources)) == 14
    report = run(localizer, open_images([shards]), tmp_path / "output")
    assert report.images == 13 and len(report.broken) == 1 and "b/02.jpg" in report.broken[0]
    for ours, theirs in zip(report.files, whole[0].files):
        ours, theirs = pq.read_table(ours), pq.read_table(theirs)
        assert ours["image"].to_pylist() == [name.removesuffix(".jpg") for name in theirs["image"].to_pylist()]
        assert ours["texts"] == theirs["texts"]


def test_only_broken_images(localizer, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_bytes(b"no image")
    report = run(localizer, open_images([tmp_path / "images"]), tmp_path / "output")
    assert report.images == 0 and len(report.broken) == 1
    assert pq.read_table(report.files[0]).schema.equals(collection._FEATURES.arrow_schema)


def test_other_settings_do_not_mix(folder, localizer, whole, tiny_processor):
    """Texts, model, processor, images or size of the files: what is there stays, alone. So do the files of others."""
    output, before = whole[1], contents(whole[1])
    brighter = copy.deepcopy(tiny_processor)
    brighter.image_processor.image_mean = [0.1] * 3
    usual, options = (tiny_model(), tiny_processor), {"threshold": [0.4, 0.6], "min_presence": 0.2}
    for name, model, texts, images, size in (
        ("texts", usual, ["cat", "car"], "images", 4),
        ("weights", (tiny_model(seed=1), tiny_processor), TEXTS, "images", 4),
        ("processor", (tiny_model(), brighter), TEXTS, "images", 4),
        ("images", usual, TEXTS, "images/a", 4),
        ("images_per_file", usual, TEXTS, "images", 5),
    ):
        other = Localizer(model, texts, **options)
        with pytest.raises(ValueError, match=f"explanations of other {name};"):
            run(other, open_images([folder / images]), output, images_per_file=size)
    assert contents(output) == before
    (output / collection.STATE_FILE).rename(output / "state.json")
    with pytest.raises(FileExistsError, match=str(output)):
        run(localizer, open_images([folder / "images"]), output)
    (output / "state.json").rename(output / collection.STATE_FILE)
    assert contents(output) == before


def test_images_are_known_by_names_and_content(tmp_path):
    """Another image of the same name, size and time is another collection; the same under another name too."""
    image, seen = tmp_path / "x.png", []
    image.write_bytes(b"one")
    stat = image.stat()

    def overwrite():
        image.write_bytes(b"two")
        os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    (tmp_path / "folder").mkdir()
    for change in (lambda: None, overwrite, lambda: image.rename(tmp_path / "folder" / "x.png")):
        change()
        seen.append(open_images([tmp_path]).fingerprint())
    assert len(set(seen)) == 3


def test_any_name_is_one_broken_image_at_most(localizer, tmp_path):
    """A dangling link is counted and named; names of the greatest length and such that are no UTF-8 are explained."""
    images, good = tmp_path / "images", io.BytesIO()
    images.mkdir()
    Image.new("RGB", (40, 30)).save(good, "PNG")
    for name in (b"x" * 251 + b".png", b"caf\xe9.png", b"b\n.png"):
        Path(os.fsdecode(bytes(images) + b"/" + name)).write_bytes(good.getvalue())
    Path(os.fsdecode(bytes(images) + b"/broken \xe9.png")).write_bytes(b"no image")
    (images / "dangling.png").symlink_to("nowhere.png")
    report = run(localizer, open_images([images]), tmp_path / "output")
    assert report.images == 3 and len(report.broken) == 2
    assert "b\n.png" in (names := pq.read_table(report.files[0])["image"].to_pylist()) and "caf\\udce9.png" in names
    for name in ("broken \\udce9.png", "dangling.png"):
        assert sum(name in reason for reason in report.broken) == 1, (name, report.broken)


def test_a_method_is_known_by_the_content_of_what_it_names(folder, tiny_processor, tmp_path):
    """The image tower of ProxyCLIP is another one: other maps. It lies elsewhere: the same."""

    def explained(seed, place):
        tiny_model("dinov2", seed=seed).vision_model.save_pretrained(tmp_path / place)
        one = Localizer((tiny_model(), tiny_processor), TEXTS, method="proxyclip", proxy=str(tmp_path / place))
        return run(one, open_images([folder / "images"]), tmp_path / "output").images

    assert explained(0, "proxy") == explained(0, "moved")
    with pytest.raises(ValueError, match="of other proxy; choose another"):
        explained(1, "proxy")
