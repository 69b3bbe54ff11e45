"""Files appear whole or not at all, and inputs stay."""

import os
from pathlib import Path

import pytest

from iclip_hf.utils.cache import build_once
from iclip_hf.utils.files import atomic_folder, atomic_write, check_outputs, free_name


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
    assert names(folder) == before and (folder / "photo.png").read_text() == "input"


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
        assert built.name == "model" and folder.exists() == exists
        assert not exists or (names(folder) == [built.parent.name] and built.parent.name.startswith("."))
    assert names(tmp_path) == ["model"] and names(folder) == ["code"] and names(folder / "code") == ["weights"]
    # It may be a mount point, or the one that a shell is in.
    assert not exists or os.path.samestat(before, folder.stat())
    with pytest.raises(FileExistsError, match="model: this folder holds other files"), atomic_folder(folder):
        pass


def test_a_folder_that_was_filled_meanwhile_stays(tmp_path):
    with pytest.raises(OSError, match="model"), atomic_folder(tmp_path / "model") as built:
        (built / "notes").write_text("of the run")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "notes").write_text("mine")
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "notes").read_text() == "mine"


def test_the_configuration_comes_last_into_an_empty_folder(tmp_path, recorded):
    come = recorded(os, "replace", lambda source, target: Path(target).name)
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
