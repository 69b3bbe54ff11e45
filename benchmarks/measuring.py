"""Functions that the benchmarks share: what they need, measuring time and memory, remembering the results of locked
towers, and tables.

Contenders take turns, round by round, so that a machine that is slower for a while is slower for all of them. The
ratio of two contenders is the median of their ratios over the rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import io
import json
import os
import platform
import statistics
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm


@contextmanager
def needed(install: str = "-e '.[dev,bench]'") -> Iterator[None]:
    """
    Wraps imports of packages that only benchmarks need. If one of them is missing, ends the script with one sentence,
    which names the command `pip install INSTALL`.
    """
    try:
        yield
    except ImportError as error:
        package = error.name.partition(".")[0]
        sys.exit(f"{package} is not installed: run `pip install {install}`.")


def machine(*packages: str) -> str:
    """
    Returns a line with the processor, the number of cores, the device, and the versions of torch, transformers and
    `packages`.
    """
    names = [line.split(":")[1].strip() for line in _proc("cpuinfo").splitlines() if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", *packages))
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {device}; {versions}"


def has_bfloat16() -> bool:
    """Returns whether this processor has instructions for bfloat16, by a function of torch that is private in 2.13."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def seconds(function: Callable[[], object]) -> float:
    """Returns the seconds that one call takes."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def why_not(function: Callable[[], object]) -> str | None:
    """Calls a function. Returns the first line of its error, or None."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


def take_turns(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each contender in each round, after one round that is not counted."""
    for function in contenders.values():
        function()
    taken = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            taken[name].append(seconds(function))
    return taken


def medians(taken: Mapping[str, list[float]]) -> dict[str, float]:
    """Returns the median seconds of each contender."""
    return {name: statistics.median(times) for name, times in taken.items()}


def ratio(taken: Mapping[str, list[float]], name: str, to: str) -> float:
    """Returns the time of `name` divided by that of `to`, the median over the rounds."""
    return statistics.median(numerator / denominator for numerator, denominator in zip(taken[name], taken[to]))


def cost(function: Callable[[], object]) -> tuple[float, float]:
    """
    Returns the seconds of one call, and the MiB at its peak beyond what the process held before (Linux). Freed memory
    is first given back to the system, so that the call has to take it again.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory()
    taken = seconds(function)
    return taken, memory("VmHWM") - before


def memory(field: str = "VmRSS", process: int | str = "self") -> float:
    """Returns the MiB that a process holds or, with `"VmHWM"`, held at its peak (Linux)."""
    status = _proc(f"{process}/status").splitlines()
    return int(next(line for line in status if line.startswith(field)).split()[1]) / 1024


def _proc(name: str) -> str:
    path = Path("/proc", name)
    return path.read_text() if path.exists() else ""


def remembered(encode: Callable, results: dict) -> Callable:
    """Returns `encode` with a cache, `results`, by the content of its tensors. The tower must be locked."""

    def recall(*args, **kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        key = tuple(hashlib.sha256(tensor.cpu().numpy().tobytes()).digest() for tensor in tensors)
        if key not in results:
            results[key] = encode(*args, **kwargs)
        return results[key]

    return recall


def command_line(description: str) -> argparse.ArgumentParser:
    """Returns a parser whose help shows the docstring of a script as it is written."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)


def mean_and_spread(values: list[float], digits: str) -> str:
    """
    Returns the mean and, of several values, the standard deviation, both formatted as `digits`, for example `.1f`.
    """
    spread = f" ± {statistics.stdev(values):{digits}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{digits}}{spread}"


def shard_items(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields the key of each item of a shard and its parts by their suffixes."""
    items: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as file:
        for member in file:
            key, _, suffix = member.name.rpartition(".")
            items.setdefault(key, {})[suffix] = file.extractfile(member).read()
    yield from items.items()


def write_labelled(folder: Path, output: Path, label: Callable[[dict, bytes], bool]) -> None:
    """
    Writes the shards of a folder to another one with changed labels. `label` gets the JSON content of an item, which
    it changes, and the encoded image. It returns whether it added a label. The number of added labels is printed.
    """
    output.mkdir(parents=True, exist_ok=True)
    for shard in sorted(folder.glob("*.tar")):
        added = 0
        with tarfile.open(output / shard.name, "x", format=tarfile.USTAR_FORMAT) as labelled:
            for key, item in tqdm(shard_items(shard), shard.name):
                content = json.loads(item["json"])
                added += label(content, item["jpg"])
                for suffix, part in {**item, "json": json.dumps(content).encode()}.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(part)
                    labelled.addfile(member, io.BytesIO(part))
        print(f"{shard.name}: {added} labels added")


def table(headings: list[str], rows: list[list[object]]) -> str:
    """Returns a Markdown table. Floats have three significant digits; from 1000 on they are rounded to integers."""

    def shown(cell: object) -> str:
        if not isinstance(cell, float):
            return str(cell)
        return f"{cell:.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"

    cells = [[shown(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [headings, ["---"] * len(headings), *cells])
