"""Time and memory that many pairs take before the first step of a training, and batches of cached features.

    python benchmarks/bench_pairs.py --pairs 1000000

Prints a Markdown table of what a training does once with its pairs: seconds of CPU time, MiB that are held afterwards,
and MiB at the peak. The pairs are a table with a caption of twelve words for each image. The feature cache has small
features, so that it fits anywhere. Last, batches are read from a cache with features of the usual size.
"""

import csv
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measuring import command_line, cost, machine, memory, needed, table

from iclip_hf.data.nouns import NounPrompts
from iclip_hf.data.pairs import load_pairs


with needed():
    from iclip_hf.training import CachedPairs, PairCollator
    from iclip_hf.training.features import FeatureStore


WORDS = "a the dog cat man woman stands runs on grass with red ball under blue sky near large tree in street".split()
IMAGES, SIZE = 2000, 100_000  # image files, and bytes of each
ROWS, BATCH = 8000, 500
FEATURES = {"class_token": (384,), "average": (384,), "patches": (20, 384), "attention": (20,)}
FEATURES |= {"even_patches": (64, 384)}


def write_table(folder: Path, pairs: int) -> Path:
    generator = np.random.default_rng(0)
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for number in range(pairs):
            caption = " ".join(WORDS[word] for word in generator.integers(0, len(WORDS), 12))
            writer.writerow([f"images/{number // 1000:05}/{number:08}.jpg", caption])
    return folder / "pairs.csv"


class Cache:
    """A feature cache that has all images."""

    def fill_images(self, pairs) -> np.ndarray:
        return np.arange(len(pairs))


def measured(name: str, function: Callable[[], object], pairs: int, part: int | None = None) -> tuple[list, object]:
    """
    Returns a row of the table for `pairs` pairs, and the result of the call. If the call handles only `part` pairs,
    its seconds are multiplied accordingly.
    """
    call_results = {}

    def call() -> None:
        start = time.process_time()
        call_results["value"] = function()
        call_results["seconds"] = time.process_time() - start

    before = memory()
    _, peak = cost(call)
    held = [f"{max(memory() - before, 0):.0f}", f"{peak:.0f}"] if part is None else ["", ""]
    return [name, call_results["seconds"] * pairs / (part or pairs), *held], call_results["value"]


def fill(store: FeatureStore, keys: np.ndarray, features: dict[str, tuple[int, ...]]) -> FeatureStore:
    for start in range(0, len(keys), 4000):
        part = keys[start : start + 4000]
        store.add(part.tolist(), {name: np.ones((len(part), *shape)) for name, shape in features.items()})
    store.reload()
    return store


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    args = parser.parse_args()
    count = args.pairs
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source, nouns = write_table(folder, count), NounPrompts(["dog", "cat", "ball", "tree", "grass (background)"])
        rows = [None] * 6
        rows[0], pairs = measured("open the table", lambda: load_pairs(source), count)
        collator = PairCollator(None, nouns)
        rows[1], _ = measured("read captions and nouns", lambda: CachedPairs(pairs, Cache(), collator), count)

        images = folder / "images" / "00000"
        images.mkdir(parents=True)
        for number in range(IMAGES):
            (images / f"{number:08}.jpg").write_bytes(os.urandom(SIZE))
        few_pairs = load_pairs(write_table(folder, IMAGES))
        rows[2], _ = measured(f"digests of images of {SIZE // 1000} KB, once", few_pairs.image_digests, count, IMAGES)
        (table_source,) = few_pairs.sources
        rows[3], _ = measured("changes of their files, later", lambda: table_source.state, count, IMAGES)

        keys = np.frombuffer(np.random.default_rng(0).bytes(32 * count), "S32")
        fill(FeatureStore(folder / "small"), keys, {"class_token": (1,)})
        rows[4], store = measured("open the cache", lambda: FeatureStore(folder / "small"), count)
        reversed_keys = keys[::-1].tolist()
        rows[5], _ = measured("find all images in it", lambda: store.find(reversed_keys), count)

        store = fill(FeatureStore(folder / "large"), keys[:ROWS], FEATURES)
        generator = np.random.default_rng(0)
        batches = [generator.choice(min(ROWS, count), min(BATCH, count), replace=False) for _ in range(20)]
        start = time.process_time()
        for batch in batches:
            store[batch]
        taken = (time.process_time() - start) / len(batches)

    print(f"{machine()}; a table of {count} pairs, seconds of the processor\n")
    print(table(["what a training does first", "seconds", "MiB held", "MiB at the peak"], rows))
    size = 2 * sum(map(math.prod, FEATURES.values()))
    print(f"\nA batch of {BATCH} features of {size / 1000:.0f} KB, in random order, takes {1e3 * taken:.0f} ms.")


if __name__ == "__main__":
    main()
