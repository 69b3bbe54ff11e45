"""What one run at a time may write, and what a killed one leaves."""

import errno
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iclip_hf.utils.files import atomic_folder, atomic_write, build_once, check_outputs, folder_lock, new_file


def killed(script: str, *arguments) -> None:
    """Runs a script that ends with kill -9."""
    script = f"import os, signal, sys\nfrom pathlib import Path\nfrom iclip_hf.utils.files import *\n{script}"
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_of_one_run_until_it_ends(tmp_path):
    folder = tmp_path / "new" / "runs"
    for _ in range(2):
        with folder_lock(folder):
            refused = pytest.raises(
                BlockingIOError, match="runs: expected no other run here, but one is writing; wait"
            )
            with refused, folder_lock(folder):
                pass
    with pytest.raises(KeyError), folder_lock(folder):
        raise KeyError
    with folder_lock(folder):
        pass


def test_a_killed_run_frees_its_folder_and_its_half_written_files_go(tmp_path):
    killed(
        "with folder_lock(Path(sys.argv[1])), atomic_write(Path(sys.argv[1], 'a.json')) as partial:\n"
        "    partial.touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)",
        tmp_path,
    )
    (tmp_path / "mine.partial").touch()
    assert len(names(tmp_path)) == 3
    with folder_lock(tmp_path), atomic_write(tmp_path / "a.json") as partial:
        partial.touch()
    assert names(tmp_path) == [".iclip-hf.lock", "a.json", "mine.partial"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_workers_of_a_killed_run_do_not_keep_its_folder(tmp_path):
    killed(
        "with folder_lock(Path(sys.argv[1])):\n"
        "    if os.fork() == 0:\n"
        "        os.closerange(0, 3)\n"
        "        import time\n"
        "        time.sleep(10)\n"
        "        os._exit(0)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)",
        tmp_path,
    )
    with folder_lock(tmp_path):
        pass


def test_a_folder_that_cannot_be_claimed_is_an_error_of_writing(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match="file: writing failed .* check free space and permissions"),
        folder_lock(tmp_path / "file"),
    ):
        pass


@pytest.mark.parametrize(
    ("build", "after"), [("atomic_folder(target)", "model"), ("build_once(target, die)", "another")]
)
def test_what_a_killed_run_was_building_goes_with_the_next(build, after, tmp_path):
    target, own = tmp_path / "model", tmp_path / ".model-notes" / "partial"
    own.mkdir(parents=True)
    script = (
        "target = Path(sys.argv[1])\n"
        "def die(folder):\n"
        "    (folder / 'weights').touch()\n"
        "    (folder.parent / 'wheel').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    script += "build_once(target, die)" if "once" in build else "with atomic_folder(target) as folder: die(folder)"
    killed(script, target)
    assert len(names(tmp_path)) == 2
    with atomic_folder(tmp_path / after) as folder:
        (folder / "weights").touch()
    assert names(tmp_path) == [".model-notes", after] and own.is_dir()
    assert names(tmp_path / after) == ["weights"]


def test_a_folder_is_searched_for_left_overs_once(tmp_path, monkeypatch):
    """Else the time of many files would grow with the square of their number."""
    searched, glob = [], Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: searched.append(path) or glob(path, pattern))
    for number in range(3):
        with atomic_write(tmp_path / str(number)) as partial:
            partial.touch()
        with atomic_folder(tmp_path / f"folder{number}"):
            pass
    assert searched == [tmp_path]


@pytest.mark.parametrize(("machine", "hours", "goes"), [("another", 1, False), ("another", 30, True), (None, 1, True)])
def test_what_another_machine_is_building_stays_for_a_day(machine, hours, goes, tmp_path):
    """Locks may not reach it."""
    held = tmp_path / ".a.iclip-hf.partial" / ".iclip-hf.held"
    held.parent.mkdir()
    held.write_text(machine or platform.node())
    os.utime(held, (time.time() - 3600 * hours,) * 2)
    with atomic_write(tmp_path / "b") as partial:
        partial.touch()
    assert held.exists() != goes


def test_what_another_user_is_building_stops_nobody(tmp_path, monkeypatch):
    def refuse(path, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    (tmp_path / ".a.iclip-hf.partial").mkdir()
    monkeypatch.setattr(Path, "read_text", refuse)
    with atomic_write(tmp_path / "b") as partial:
        partial.touch()
    assert names(tmp_path) == [".a.iclip-hf.partial", "b"]


def test_what_a_run_leaves_that_is_killed_when_all_is_built_goes_too(tmp_path):
    killed(
        "with atomic_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'weights').touch()\n"
        "    replace = os.replace\n"
        "    os.replace = lambda *paths: (replace(*paths), os.kill(os.getpid(), signal.SIGKILL))",
        tmp_path / "model",
    )
    assert len(names(tmp_path)) == 2
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "model"):
        pass
    assert names(tmp_path) == ["model"]


def test_a_file_that_a_killed_run_was_writing_goes_with_the_next(tmp_path):
    file = tmp_path / "a.json"
    killed(
        "with new_file(sys.argv[1]) as partial:\n    partial.touch()\n    os.kill(os.getpid(), signal.SIGKILL)", file
    )
    assert len(names(tmp_path)) == 1 and not file.exists()
    with new_file(tmp_path / "b.json") as other, new_file(file) as partial:
        assert len(names(tmp_path)) == 2  # of the living runs
        for path in (other, partial):
            path.write_text("whole")
    assert names(tmp_path) == ["a.json", "b.json"] and file.read_text() == "whole"


def test_a_file_that_appears_meanwhile_stays(tmp_path):
    with (
        pytest.raises(FileExistsError, match=r"^\S+a.json: expected a new file"),
        new_file(tmp_path / "a.json") as partial,
    ):
        partial.write_text("of the run")
        (tmp_path / "a.json").write_text("mine")
    assert names(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "mine"


def test_an_empty_folder_stays_the_same_folder(tmp_path):
    """It may be a mount point, or the one that a shell is in."""
    folder = tmp_path / "model"
    folder.mkdir()
    killed("with atomic_folder(sys.argv[1]) as built: os.kill(os.getpid(), signal.SIGKILL)", folder)
    before = folder.stat()
    with atomic_folder(folder) as built:
        (built / "code").mkdir()
        (built / "code" / "weights").touch()
    assert os.path.samestat(before, folder.stat())
    assert names(tmp_path) == ["model"] and names(folder) == ["code"] and names(folder / "code") == ["weights"]


def test_what_comes_into_an_empty_folder_meanwhile_stays(tmp_path):
    with pytest.raises(FileExistsError), atomic_folder(tmp_path) as built:
        (built / "notes").write_text("of the run")
        (tmp_path / "notes").write_text("mine")
    assert names(tmp_path) == ["notes"] and (tmp_path / "notes").read_text() == "mine"


def test_what_a_living_run_builds_stays(tmp_path):
    def whole(folder):
        for name in ("model.safetensors", "config.json"):
            (folder / name).touch()

    with (
        pytest.raises(FileExistsError, match="expected a new or empty folder"),
        atomic_folder(tmp_path / "model") as slow,
    ):
        whole(slow)
        build_once(tmp_path / "model", whole)
        assert names(slow) == ["config.json", "model.safetensors"]
    assert names(tmp_path) == ["model"]


def test_a_full_disk_is_told_and_what_is_no_matter_of_writing_stays_as_it_is(tmp_path):
    for raised, told in (
        (OSError(errno.ENOSPC, "No space left"), "model: writing failed .*; check free space"),
        (OSError("no tower"), "^no tower$"),
    ):
        with pytest.raises(OSError, match=told), atomic_folder(tmp_path / "model"):
            raise raised
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)  # root may write everywhere
    (tmp_path / "link.json").symlink_to(tmp_path / "new" / "a.json")
    for output in (tmp_path / "a.json", tmp_path / "new" / "a.json", tmp_path / "link.json"):
        with pytest.raises(PermissionError, match="expected a folder that can be written"):
            check_outputs([output])


def test_a_name_as_long_as_file_systems_allow(tmp_path):
    path = tmp_path / ("é" * 125 + ".json")  # 255 bytes
    with atomic_write(path) as partial:
        partial.write_text("whole")
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == [path.name] and path.read_text() == "whole"


@pytest.mark.parametrize("way", ["file", "named file", "new folder", "empty folder"])
def test_files_have_the_mode_of_any_new_file(way, tmp_path):
    """Only their owner can read what safetensors writes."""
    if way.endswith("file"):
        with (new_file if way == "named file" else atomic_write)(tmp_path / "a") as partial:
            partial.touch(0o600)
        written = tmp_path / "a"
    else:
        folder = tmp_path / "model"
        folder.mkdir() if way == "empty folder" else None
        with atomic_folder(folder) as built:
            (built / "sub").mkdir()
            (built / "sub" / "a").touch(0o600)
        written = folder / "sub" / "a"
    (tmp_path / "usual").touch()
    assert written.stat().st_mode == (tmp_path / "usual").stat().st_mode
