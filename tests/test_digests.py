"""Digests of files, read again only when they changed, and of weights."""

import os

import pytest
import torch
from conftest import tiny_model

from iclip_hf.backends.identity import weights_digest
from iclip_hf.utils import digests
from iclip_hf.utils.digests import content_digest


@pytest.fixture
def read(tmp_path, monkeypatch, recorded):
    """A cache folder of the test's own, and the files that were read."""
    monkeypatch.setenv("ICLIP_CACHE", str(tmp_path / "cache"))
    return recorded(digests, "file_digest", os.path.basename)


def files(folder, *contents):
    for number, content in enumerate(contents):
        (folder / str(number)).write_bytes(content)
    return [folder / str(number) for number in range(len(contents))]


def test_files_are_read_once_until_one_changes(tmp_path, read):
    both = files(tmp_path, b"a", b"b")
    first = content_digest(both)
    assert content_digest(both) == first and len(first) == 16 and read == ["0", "1"]
    stat = both[1].stat()
    both[1].write_bytes(b"cc")
    os.utime(both[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as unpacking an archive does
    assert content_digest(both) != first and read == ["0", "1"] * 2


@pytest.mark.parametrize("content", [b"", b"\0" * 16, b"12ab", b"\xff"])
def test_a_damaged_digest_in_the_cache_is_computed_again(tmp_path, read, content):
    both = files(tmp_path, b"a", b"b")
    first = content_digest(both)
    (kept,) = (tmp_path / "cache" / "digests").iterdir()
    kept.write_bytes(content)
    assert content_digest(both) == first == kept.read_text()


def test_order_names_and_sizes_count_and_the_place_does_not(tmp_path, read):
    one, two, three = files(tmp_path, b"ab", b"c", b"ab")
    assert len({content_digest(pair) for pair in ([one, two], [two, one], [three, two])}) == 3
    before, within = content_digest([one, two]), content_digest([one, two], tmp_path.parent)
    joined, empty = files(tmp_path, b"abc", b"")
    assert content_digest([joined, empty]) != before != within
    (tmp_path / "moved").mkdir()
    assert content_digest(files(tmp_path / "moved", b"ab", b"c")) == before
    assert content_digest([]) == ""


def test_what_cannot_be_read_is_absent(tmp_path, read):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    names = ("dangling", "nothing", "nul\0", "n" * 300, "\ud800")
    assert len({content_digest([tmp_path / name]) for name in names}) == len(names)


def test_shapes_and_integers_of_weights():
    flat, high = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 3, bias=False)
    for one in (flat, high):
        torch.nn.init.zeros_(one.weight)
    assert weights_digest(flat) != weights_digest(high)
    counted = torch.nn.BatchNorm1d(2)  # `num_batches_tracked` stays an integer
    assert weights_digest(counted, torch.bfloat16) == weights_digest(torch.nn.BatchNorm1d(2).to(torch.bfloat16))


def test_weights():
    model = tiny_model()
    digest = weights_digest(model)
    assert digest == weights_digest(tiny_model()) != weights_digest(tiny_model(seed=1))
    assert weights_digest(model, torch.bfloat16) == weights_digest(tiny_model().to(torch.bfloat16)) != digest
    with torch.no_grad():
        model.recognition.logit_scale += 1e-3
    assert weights_digest(model) != digest
