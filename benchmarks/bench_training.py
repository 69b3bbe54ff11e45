"""Training from the feature cache against training without it, and against open_clip's locked-image training.

    python benchmarks/bench_training.py --data ../shared/data/flickr8k/dev-00000.tar

Prints a Markdown table: seconds of an epoch over the same pairs in the same batches, on the embedded towers (DINOv2 ViT-S/14 and
MiniLM-L6); the contenders take turns. open_clip trains random towers of these sizes, with its own loss and tokenizer.
"""

import argparse
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import open_clip
import torch
from accelerate import Accelerator
from measuring import machine, ratio, table, take_turns
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


class Contender:
    """Trains epoch after epoch, and notes which share of each it waited for data."""

    def __init__(self):
        self.waited = []

    def train(self) -> None:
        start = ended = time.perf_counter()
        waited = 0.0
        for batch in self.batches(len(self.waited)):
            waited += time.perf_counter() - ended
            self.loss(batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            ended = time.perf_counter()
        self.waited.append(waited / (time.perf_counter() - start))


class Ours(Contender):
    """An ICLIP model over a data set of any form."""

    def __init__(self, dataset, lock_text: bool, options: argparse.Namespace):
        super().__init__()
        torch.manual_seed(0)
        vision, text = map(str, embedded_towers())
        self.pair_model = PairModel(
            ICLIPModel.from_vision_text_pretrained(vision, text), options.batch_size, lock_text
        )
        self.optimizer = torch.optim.AdamW(parameter_groups(self.pair_model, 0.05), lr=1e-4)
        workers = 0 if isinstance(dataset, CachedPairs) else options.num_workers
        self.batches = BatchLoader(dataset, Accelerator(cpu=True), options.batch_size, num_workers=workers).epoch

    def loss(self, batch: dict) -> torch.Tensor:
        batch.pop("skipped")
        return self.pair_model(**batch)["loss"]


class OpenClip(Contender):
    """The same in open_clip: its model of the same sizes with a locked image tower, its tokenizer, its loss."""

    def __init__(self, pairs, processor: ICLIPProcessor, options: argparse.Namespace):
        super().__init__()
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

    def batches(self, epoch: int):
        return self.loader

    def loss(self, batch: tuple) -> torch.Tensor:
        return ClipLoss()(*self.model(*batch))


def main() -> None:
    data = Path(os.environ.get("ICLIP_DATA", "../shared/data"), "flickr8k/dev-00000.tar")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        pairs = load_pairs(first_pairs(options.data, options.pairs, Path(scratch, "pairs.tar")))
        vision, text = map(str, embedded_towers())
        processor = ICLIPProcessor.from_vision_text_pretrained(vision, text)
        model, accelerator = ICLIPModel.from_vision_text_pretrained(vision, text), Accelerator(cpu=True)
        views = cache_images(Path(scratch), pairs, model, [WholeImage(processor)], accelerator)
        captions = [caption for several in views[0].captions() for caption in several]
        texts = cache_texts(Path(scratch, "texts"), captions, model, processor, accelerator)
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
        taken = take_turns({name: one.train for name, one in contenders.items()}, options.rounds)

    print(f"{machine('open_clip_torch')}; {options.pairs} pairs in batches of {options.batch_size}, ", end="")
    print(f"{options.num_workers} loading process, medians of {options.rounds} epochs\n")
    rows = []
    for name, times in taken.items():
        median, waited = statistics.median(times), statistics.median(contenders[name].waited[1:])
        rows.append([name, median, options.pairs / median, f"{waited:.0%}"])
    print(table(["an epoch of", "seconds", "pairs a second", "waiting for data"], rows))
    locked, uncached, learning, uncached_learning, theirs = taken
    print(
        f"\nThe cache makes an epoch {ratio(taken, uncached, locked):.0f} times faster, "
        f"{ratio(taken, uncached_learning, learning):.1f} times with the text tower learning; open_clip takes "
        f"{ratio(taken, theirs, uncached_learning):.2f} times as long as train.py without a cache."
    )


if __name__ == "__main__":
    main()
