"""Files appear whole or not at all, and inputs stay."""

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from iclip_hf.data.pairs import load_pairs
from iclip_hf.plots.report import ReportFolder
from iclip_hf.training.features import FeatureStore
from iclip_hf.utils.cache import build_once
from iclip_hf.utils.errors import writing_errors
from iclip_hf.utils.files import (
    append_line,
    atomic_folder,
    atomic_write,
    check_outputs,
    free_name,
    write_image,
    write_new,
)


def killed(script: str, *arguments) -> None:
    """Runs a script that ends with kill -9."""
    script = f"import os, signal, sys\nfrom pathlib import Path\nfrom iclip_hf.utils.cache import *\n{script}"
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path) -> Path:
    """An input by several names, and a second file."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "photo.png").write_text("input")
    (tmp_path / "other.png").write_text("other")
    (tmp_path / "link.png").symlink_to("photo.png")
    (tmp_path / "chain.png").symlink_to("link.png")
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "twin.png").hardlink_to(tmp_path / "photo.png")  # as PHOTO.png is on some disks
    return tmp_path


# ---- which files are written ----


@pytest.mark.parametrize("output", ["photo.png", "sub/../photo.png", "chain.png", "folder/photo.png", "twin.png"])
@pytest.mark.parametrize("read", ["photo.png", "link.png"])
def test_an_input_is_no_output_by_any_name(folder, output, read):
    with pytest.raises(FileExistsError, match=Path(output).name):
        check_outputs([folder / output], [None, "org/model", folder / read])


def test_a_named_file_may_exist_and_a_chosen_one_gets_a_number(folder):
    check_outputs([folder / "photo.png"], [folder / "other.png"])
    (folder / "dangling.png").symlink_to("nowhere.png")
    for name in ("photo", "link", "dangling", "sub"):
        assert free_name(folder / f"{name}.png").name == (f"{name}.png" if name == "sub" else f"{name}-2.png")
    (folder / "photo-2.png").touch()
    assert free_name(folder / "photo.png").name == "photo-3.png" and free_name("a.b.png") == Path("a.b.png")


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)  # root may write everywhere
    (tmp_path / "link.json").symlink_to(tmp_path / "new" / "a.json")
    for output in (tmp_path / "a.json", tmp_path / "new" / "a.json", tmp_path / "link.json"):
        with pytest.raises(PermissionError, match="is not a folder that can be written"):
            check_outputs([output])


# ---- whole files ----


def test_a_link_stays_one(folder):
    with atomic_write(folder / "chain.png") as temporary:
        temporary.write_text("new")
        assert (folder / "chain.png").read_text() == "input"
    assert os.readlink(folder / "chain.png") == "link.png" and (folder / "photo.png").read_text() == "new"


def test_an_error_leaves_the_file_that_was_there(folder):
    before = names(folder)
    with pytest.raises(KeyError), atomic_write(folder / "photo.png") as temporary:
        temporary.write_text("half")
        raise KeyError
    with pytest.raises(OSError, match=r"photo\.png: .*No space left"), atomic_write(folder / "photo.png"):
        raise OSError(errno.ENOSPC, "No space left")
    with pytest.raises(OSError, match=r"a\.png: "), atomic_write(folder / "photo.png" / "a.png"):
        pass
    assert names(folder) == before and (folder / "photo.png").read_text() == "input"


@contextmanager
def file_size_limited(size: int):
    """Of a file that grows beyond `size` bytes, the last write takes only a part, as on a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", ["JPEG", "PNG"])
def test_a_picture_that_is_written_in_part_is_an_error(tmp_path, name):
    write_image(noise((60, 40)), tmp_path / "whole", format=name)
    size = (tmp_path / "whole").stat().st_size
    with file_size_limited(size - 10), pytest.raises(OSError):
        write_image(noise((60, 40)), tmp_path / "part", format=name)


@pytest.mark.parametrize("library", ["safetensors", "torch", "tokenizers"])
def test_a_full_disk_is_one_sentence_whatever_library_writes(tmp_path, library):
    """Each has a class of its own for the error, or none."""
    vocabulary = {f"word {number}": number for number in range(9000)}
    write = {
        "safetensors": lambda path: save_file({"weight": torch.zeros(9000)}, path),
        "torch": lambda path: torch.save(torch.zeros(9000), path),
        "tokenizers": lambda path: Tokenizer(WordLevel(vocabulary)).save(str(path)),
    }[library]
    (tmp_path / "full").mkdir()
    for folder in (writing_errors(tmp_path / "full"), atomic_folder(tmp_path / "new")):
        with file_size_limited(10_000), pytest.raises(OSError, match="(full|new): writing failed"), folder:
            write(tmp_path / "full" / "file")
    assert names(tmp_path) == ["full"]


@pytest.mark.parametrize("kind", ["features", "digests"])
def test_an_array_that_is_written_in_part_is_not_kept(tmp_path, monkeypatch, kind):
    """The last block of a file is the one that C's library writes when it closes the file."""
    if kind == "features":
        keys, numbers = [bytes([number]) * 32 for number in range(10)], np.arange(10)

        def write(folder: Path) -> None:
            FeatureStore(folder).add(keys, {"number": numbers})

    else:
        noise((60, 40)).save(tmp_path / "a.png")
        (tmp_path / "pairs.csv").write_text("image,caption\n" + 20 * "a.png,a dog\n")
        monkeypatch.setattr("iclip_hf.data.pairs.LARGE", 0)

        def write(folder: Path) -> None:
            monkeypatch.setenv("ICLIP_CACHE", str(folder))
            load_pairs(tmp_path / "pairs.csv").image_digests()

    write(tmp_path / "whole")
    (file,) = (path for path in (tmp_path / "whole").rglob("*") if path.is_file())
    with file_size_limited(file.stat().st_size - 10), suppress(OSError):
        write(tmp_path / "full")
    assert not [path for path in (tmp_path / "full").rglob("*") if path.is_file()]


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.jsonl"
    append_line(file, "first \udcff")
    with file_size_limited(20), pytest.raises(OSError, match=r"a\.jsonl: writing failed"):
        append_line(file, "second " * 10)
    assert file.read_text() == "first \\udcff\n"


def test_a_report_has_no_picture_that_is_written_in_part(tmp_path):
    report = ReportFolder(tmp_path)
    with file_size_limited(500), pytest.raises(OSError, match=r"0\.jpg: writing failed"):
        report.save_image(0, noise((60, 40)))
    assert names(tmp_path / "images") == []


def test_a_run_that_is_killed_before_the_renaming_leaves_the_file_that_was_there(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("earlier")
    script = "with atomic_write(sys.argv[1]) as temporary:\n    temporary.write_text('new')\n    {}\n"
    killed(script.format("os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)"), file)
    assert file.read_text() == "earlier"
    (left,) = [name for name in names(tmp_path) if name != "a.json"]
    assert left.startswith(".a.json.") and left.endswith(".partial")
    with atomic_write(file) as temporary:
        temporary.write_text("new")
    assert file.read_text() == "new" and len(names(tmp_path)) == 2  # nothing is deleted that this run did not make


def test_a_run_that_is_killed_while_it_takes_a_name_leaves_no_part_of_a_file(tmp_path):
    script = """
from iclip_hf.utils.files import write_new

os.replace = Path.unlink = lambda *paths, **options: os.kill(os.getpid(), signal.SIGKILL)
write_new(Path(sys.argv[1]), lambda temporary: temporary.write_text("whole"))
"""
    killed(script, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_text() == "whole"


def test_a_file_system_without_hard_links_has_chosen_names(tmp_path, monkeypatch):
    def refuse(*paths):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for name in ("a.png", "a-2.png"):
        assert write_new(tmp_path / "a.png", lambda temporary: temporary.write_text("whole")) == tmp_path / name
        assert (tmp_path / name).read_text() == "whole"
    assert names(tmp_path) == ["a-2.png", "a.png"]


def test_writers_that_choose_one_name_at_once_lose_no_file(tmp_path):
    def write(number: int) -> Path:
        return write_new(tmp_path / "a.png", lambda temporary: temporary.write_text(str(number)))

    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(write, range(100)))
    assert [path.read_text() for path in written] == [str(number) for number in range(100)]
    assert len(names(tmp_path)) == 100


@pytest.mark.parametrize("way", ["file", "new folder", "empty folder"])
def test_files_have_the_mode_of_any_new_file(way, tmp_path):
    """Only their owner can read what safetensors writes."""
    if way == "file":
        with atomic_write(tmp_path / "a") as temporary:
            temporary.chmod(0o600)
        written = tmp_path / "a"
    else:
        folder = tmp_path / "model"
        folder.mkdir() if way == "empty folder" else None
        with atomic_folder(folder) as built:
            (built / "sub").mkdir()
            (built / "sub" / "a").touch(0o600)
        written = folder / "sub" / "a"
        assert folder.stat().st_mode == (folder / "sub").stat().st_mode
    (tmp_path / "usual").touch()
    assert written.stat().st_mode == (tmp_path / "usual").stat().st_mode


# ---- whole folders ----


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_appears_whole_or_not_at_all(tmp_path, exists):
    folder = tmp_path / "model"
    folder.mkdir() if exists else None
    before = folder.stat() if exists else None
    with pytest.raises(KeyError), atomic_folder(folder) as built:
        (built / "weights").touch()
        raise KeyError
    assert names(tmp_path) == ["model"] * exists
    with atomic_folder(folder) as built:
        (built / "code").mkdir()
        (built / "code" / "weights").touch()
        assert built.name == "model" and (not exists or names(folder) == [built.parent.name])
    assert names(tmp_path) == ["model"] and names(folder) == ["code"] and names(folder / "code") == ["weights"]
    # It may be a mount point, or the one that a shell is in.
    assert not exists or os.path.samestat(before, folder.stat())
    with pytest.raises(FileExistsError, match="model: this folder holds other files"), atomic_folder(folder):
        pass


def test_no_folder_gets_the_name_of_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="embedded: this is the name"), atomic_folder("embedded"):
        pass
    assert names(tmp_path) == []


def test_a_folder_that_was_filled_meanwhile_stays(tmp_path):
    with pytest.raises(OSError, match="model"), atomic_folder(tmp_path / "model") as built:
        (built / "notes").write_text("of the run")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "notes").write_text("mine")
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "notes").read_text() == "mine"


def test_on_a_full_disk_the_folder_is_named_and_not_a_file_that_was_copied(tmp_path):
    said = "model: writing failed .No space left on device.; check"
    with pytest.raises(OSError, match=said), atomic_folder(tmp_path / "model"):
        raise OSError(errno.ENOSPC, "No space left on device", "photograph.jpg")
    with (
        pytest.raises(FileNotFoundError, match="^.Errno 2. gone: 'photograph.jpg'$"),
        atomic_folder(tmp_path / "model"),
    ):
        raise FileNotFoundError(errno.ENOENT, "gone", "photograph.jpg")
    assert not any(tmp_path.iterdir())


def test_the_configuration_comes_last_into_an_empty_folder(tmp_path, monkeypatch):
    come, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda source, target: (come.append(Path(target).name), replace(source, target))
    )
    with atomic_folder(tmp_path) as built:
        for name in ("config.json", "a", "model.safetensors", "z"):
            (built / name).touch()
    assert come[-1] == "config.json" and len(come) == 4


def test_of_two_runs_that_build_a_model_the_first_wins(tmp_path):
    def whole(folder):
        for name in ("model.safetensors", "config.json"):
            (folder / name).write_text("first")

    def slow(folder):
        build_once(tmp_path / "model", whole)
        (folder / "config.json").write_text("second")

    assert build_once(tmp_path / "model", slow) == tmp_path / "model"
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "config.json").read_text() == "first"
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(FileExistsError):
        build_once(tmp_path / "model", whole)


def test_a_killed_build_is_made_anew(tmp_path):
    killed("build_once(Path(sys.argv[1]), lambda folder: os.kill(os.getpid(), signal.SIGKILL))", tmp_path / "model")
    with atomic_folder(tmp_path / "model") as built:
        (built / "weights").touch()
    assert names(tmp_path / "model") == ["weights"] and len(names(tmp_path)) == 2
