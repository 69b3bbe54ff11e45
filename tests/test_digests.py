"""Digests of files and of weights."""

import os

import pytest
import torch

from iclip_hf.backends.identity import digest
from iclip_hf.utils.cache import content_digest


def files(folder, *contents):
    for number, content in enumerate(contents):
        (folder / str(number)).write_bytes(content)
    return [folder / str(number) for number in range(len(contents))]


@pytest.mark.parametrize("read", [True, False])
def test_what_a_digest_is_of(tmp_path, read):
    """Content, or size and modification time; names in both."""
    both = files(tmp_path, b"a", b"b")
    first, stat = content_digest(both, read=read), both[1].stat()
    assert content_digest(both, read=read) == first and len(first) == 16
    both[1].write_bytes(b"c")
    os.utime(both[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (content_digest(both, read=read) != first) == read
    both[1].write_bytes(b"b")
    os.utime(both[1], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert (content_digest(both, read=read) == first) == read
    both[1].write_bytes(b"bb")
    os.utime(both[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_digest(both, read=read) != first
    both[1].write_bytes(b"b")
    os.utime(both[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    renamed = both[1].rename(tmp_path / "other")
    assert content_digest([both[0], renamed], read=read) != first


def test_order_names_and_sizes_count_and_the_place_does_not(tmp_path):
    one, two, three = files(tmp_path, b"ab", b"c", b"ab")
    assert len({content_digest(pair) for pair in ([one, two], [two, one], [three, two])}) == 3
    before = content_digest([one, two])
    joined, empty = files(tmp_path, b"abc", b"")
    assert content_digest([joined, empty]) != before
    (tmp_path / "moved").mkdir()
    assert content_digest(files(tmp_path / "moved", b"ab", b"c")) == before
    assert content_digest([]) == ""


def test_what_cannot_be_read_is_absent(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert len({content_digest([tmp_path / name]) for name in ("dangling", "nothing", "none")}) == 3


def test_values_and_types_of_tensors_count():
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1)}
    for change in ({"a": torch.arange(6.0).reshape(3, 2)}, {"a": weights["a"] + 1e-3}, {"b": torch.tensor(1.0)}):
        assert digest(weights) != digest(weights | change)
    assert digest(weights) == digest({name: weights[name].clone() for name in "ba"})
