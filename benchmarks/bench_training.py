"""Training from the feature cache against training without it, and against open_clip's locked-image training.

    python benchmarks/bench_training.py --data ../shared/data/flickr8k/dev-00000.tar

Prints a Markdown table: seconds of an epoch over the same pairs in the same batches, on the embedded towers (DINOv2 ViT-S/14 and
MiniLM-L6); the contenders take turns. open_clip trains random towers of these sizes, with its own loss and tokenizer.
"""

import argparse
import itertools
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import open_clip
import torch
from accelerate import Accelerator
from open_clip.loss import ClipLoss
from torch.utils.data import DataLoader

from iclip_hf import ICLIPModel, ICLIPProcessor
from iclip_hf.data.pairs import load_pairs
from iclip_hf.demo.towers import embedded_towers
from iclip_hf.feature_cache import CachedPairs, branch_poolings, cache_images, cache_texts
from iclip_hf.training import BatchLoader, PairModel, TrainingPairs, WholeImage, parameter_groups


def first_pairs(shard: Path, count: int, target: Path) -> Path:
    """A shard of the first pairs of another."""
    with tarfile.open(shard) as whole, tarfile.open(target, "w") as part:
        keys = {}
        for member in whole:
            keys.setdefault(member.name.split(".")[0])
            if len(keys) > count:
                break
            part.addfile(member, whole.extractfile(member))
    return target


class Ours:
    """Epochs of an ICLIP model over a data set of any form."""

    def __init__(self, dataset, lock_text: bool, options: argparse.Namespace):
        torch.manual_seed(0)
        vision, text = map(str, embedded_towers())
        model = ICLIPModel.from_vision_text_pretrained(vision, text)
        self.pair_model = PairModel(model, options.batch_size, lock_text)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.pair_model, 0.05), lr=1e-4)
        workers = 0 if isinstance(dataset, CachedPairs) else options.num_workers
        self.loader = BatchLoader(dataset, Accelerator(cpu=True), options.batch_size, num_workers=workers)

    def epoch(self, number: int) -> float:
        """Trains one epoch; the share of its time that it waited for data."""
        start = ended = time.perf_counter()
        waited = 0.0
        for batch in self.loader.epoch(number):
            waited += time.perf_counter() - ended
            batch.pop("skipped")
            self.pair_model(**batch)["loss"].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            ended = time.perf_counter()
        return waited / (time.perf_counter() - start)


class OpenClip:
    """The same in open_clip: its model of the same sizes with a locked image tower, its tokenizer, its loss."""

    def __init__(self, pairs, processor: ICLIPProcessor, options: argparse.Namespace):
        torch.manual_seed(0)
        vision = {"image_size": 224, "patch_size": 14, "width": 384, "layers": 12, "head_width": 64}
        text = {"context_length": 77, "vocab_size": 49408, "width": 384, "heads": 12, "layers": 6}
        self.model = open_clip.CLIP(512, vision, text)
        self.model.lock_image_tower()
        self.optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=1e-4)
        tokenizer, prepare = open_clip.SimpleTokenizer(), WholeImage(processor)

        class Prepared(torch.utils.data.Dataset):
            def __len__(self):
                return len(pairs)

            def __getitem__(self, index):
                pair = pairs[index]
                return prepare(pair["image"]), tokenizer([pair["caption"]])[0]

        self.loader = DataLoader(
            Prepared(), options.batch_size, shuffle=True, drop_last=True, num_workers=options.num_workers
        )

    def epoch(self, number: int) -> float:
        start = ended = time.perf_counter()
        waited = 0.0
        for images, texts in self.loader:
            waited += time.perf_counter() - ended
            ClipLoss()(*self.model(images, texts)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            ended = time.perf_counter()
        return waited / (time.perf_counter() - start)


def main() -> None:
    data = Path(os.environ.get("ICLIP_DATA", "../shared/data"), "flickr8k/dev-00000.tar")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        pairs = load_pairs(first_pairs(options.data, options.pairs, Path(scratch, "pairs.tar")))
        vision, text = map(str, embedded_towers())
        processor = ICLIPProcessor.from_vision_text_pretrained(vision, text)
        model, accelerator = ICLIPModel.from_vision_text_pretrained(vision, text), Accelerator(cpu=True)
        views = cache_images(Path(scratch), pairs, model, [WholeImage(processor)], accelerator)
        texts = cache_texts(
            Path(scratch, "texts"), itertools.chain(*views[0].captions()), model, processor, accelerator
        )
        poolings = branch_poolings(model.config)
        plain = TrainingPairs(pairs, WholeImage(processor), processor)
        contenders = {
            "projections, from the cache": Ours(CachedPairs(views, poolings, processor, texts=texts), True, options),
            "projections, without": Ours(plain, True, options),
            "projections and text tower, from the cache": Ours(
                CachedPairs(views, poolings, processor), False, options
            ),
            "projections and text tower, without": Ours(plain, False, options),
            "open_clip, locked image tower": OpenClip(pairs, processor, options),
        }
        seconds = {name: [] for name in contenders}
        waiting = {name: [] for name in contenders}
        for repeat, (name, contender) in itertools.product(range(options.repeats + 1), contenders.items()):
            start = time.perf_counter()
            share = contender.epoch(repeat)
            if repeat:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
                waiting[name].append(share)

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(s / f for s, f in zip(seconds[slow], seconds[fast]))

    print(f"\n{options.pairs} pairs in batches of {options.batch_size}, {torch.get_num_threads()} threads, ", end="")
    print(f"{options.num_workers} loading process, median of {options.repeats} epochs\n")
    print("| an epoch of | seconds | pairs a second | waiting for data |\n|---|---|---|---|")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"| {name} | {median:.3f} | {options.pairs / median:.1f} | {statistics.median(waiting[name]):.0%} |")
    locked, learning = ratio(*list(contenders)[1::-1]), ratio(*list(contenders)[3:1:-1])
    print(
        f"\nThe cache makes an epoch {locked:.0f} times faster, {learning:.1f} times with the text tower learning; ",
        end="",
    )
    print(f"open_clip takes {ratio(*list(contenders)[4:2:-1]):.2f} times as long as train.py without a cache.")


if __name__ == "__main__":
    main()
