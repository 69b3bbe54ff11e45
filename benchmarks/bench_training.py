"""Training from the feature cache against training without it, and against open_clip's locked-image training.

    python benchmarks/bench_training.py --data DATA/flickr8k/dev-00000.tar

Prints Markdown tables. The first has the seconds of an epoch over the same pairs in the same batches, with the
embedded towers (DINOv2 ViT-S/14 and MiniLM-L6). open_clip trains random towers of these sizes, with its own loss and
tokenizer. The second compares a step with similarity pooling to a step with Eq. 10's.
"""

import argparse
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from measuring import command_line, cost, has_bfloat16, machine, medians, needed, ratio, table, take_turns
from torch.utils.data import DataLoader, Dataset

from iclip_hf import ICLIPModel, ICLIPProcessor
from iclip_hf.backends.towers import embedded_towers
from iclip_hf.data.pairs import load_pairs


with needed():
    import open_clip
    from open_clip.loss import ClipLoss

    from iclip_hf.model.pooling import POOLINGS
    from iclip_hf.training import CachedPairs, FeatureCache, ICLIPTrainer, ICLIPTrainingArguments, PairCollator


def first_pairs(shard: Path, count: int, target: Path) -> Path:
    """Writes the first pairs of a shard as another shard, and returns its path."""
    with tarfile.open(shard) as whole, tarfile.open(target, "w") as part:
        keys = {}
        for member in whole:
            keys.setdefault(member.name.split(".")[0])
            if len(keys) > count:
                break
            part.addfile(member, whole.extractfile(member))
    return target


class Contender:
    """Trains epoch after epoch, and records the fraction of each that it waited for data."""

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
    """An ICLIP model, with the batches and the loss of its trainer, from the cache of a folder or from its pairs."""

    def __init__(self, folder: Path, args: argparse.Namespace, lock_text: bool, cached: bool, bf16: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.bf16 = bf16
        model, prepare = embedded_model(lock_text), processor()
        pairs, collator = load_pairs(folder / "pairs.tar"), PairCollator(prepare)
        if cached:
            cache = FeatureCache(model.eval(), prepare, folder)
            collator.text_features = cache if lock_text else None
            pairs = CachedPairs(pairs, cache, collator)
        training_args = ICLIPTrainingArguments(
            str(folder / "run"),
            per_device_train_batch_size=args.batch_size,
            chunk_size=args.batch_size,
            dataloader_num_workers=0 if cached else args.num_workers,
            use_cpu=True,
            report_to="none",
        )
        self.trainer = ICLIPTrainer(
            model.train(), training_args, collator, train_dataset=pairs, processing_class=prepare
        )
        self.optimizer, self.loader = self.trainer.create_optimizer(), self.trainer.get_train_dataloader()

    def batches(self, epoch: int) -> DataLoader:
        self.trainer.train_dataset.set_epoch(epoch)
        return self.loader

    def loss(self, batch: dict) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.trainer.compute_loss(self.trainer.model, batch)


class OpenClipPairs(Dataset):
    """Pairs as open_clip's model takes them."""

    def __init__(self, folder: Path):
        self.pairs, self.processor = load_pairs(folder / "pairs.tar"), processor()
        self.tokenizer = open_clip.SimpleTokenizer()

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        pair = self.pairs[index]
        return self.processor(pair["image"])["pixel_values"][0], self.tokenizer([pair["caption"]])[0]


class OpenClip(Contender):
    """A model of open_clip of the same sizes with a locked image tower, and open_clip's tokenizer and loss."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        super().__init__()
        torch.manual_seed(0)
        vision = {"image_size": 224, "patch_size": 14, "width": 384, "layers": 12, "head_width": 64}
        text = {"context_length": 77, "vocab_size": 49408, "width": 384, "heads": 12, "layers": 6}
        self.model = open_clip.CLIP(512, vision, text)
        self.model.lock_image_tower()
        self.optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=1e-4)
        self.loader = DataLoader(
            OpenClipPairs(folder), args.batch_size, shuffle=True, drop_last=True, num_workers=args.num_workers
        )

    def batches(self, epoch: int):
        return self.loader

    def loss(self, batch: tuple) -> torch.Tensor:
        return ClipLoss()(*self.model(*batch))


def processor() -> ICLIPProcessor:
    return ICLIPProcessor.from_vision_text_pretrained(*map(str, embedded_towers()))


def embedded_model(lock_text: bool, **options) -> ICLIPModel:
    """A model of the embedded towers, with new projections."""
    model = ICLIPModel.from_vision_text_pretrained(*map(str, embedded_towers()), **options)
    model.text_model.requires_grad_(not lock_text)
    return model


# By name: the class and its further arguments.
CONTENDERS = {
    "projections, from the cache": (Ours, True, True),
    "projections, without": (Ours, True, False),
    "projections, without, bf16": (Ours, True, False, True),
    "projections and text tower, from the cache": (Ours, False, True),
    "projections and text tower, without": (Ours, False, False),
    "projections and text tower, without, bf16": (Ours, False, False, True),
    "open_clip, locked image tower": (OpenClip,),
}


def make(name: str, folder: Path, args: argparse.Namespace) -> Contender:
    contender_class, *arguments = CONTENDERS[name]
    return contender_class(folder, args, *arguments)


PAIRS = 256  # of a step
TOKENS, WIDTH = 16, 384  # patches of an image, and their width


def steps(rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of training steps from cached features for each value of `max_over`."""

    def step(max_over: str):
        model = embedded_model(lock_text=True, max_over=max_over).train()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
        features = {name: torch.randn(PAIRS, WIDTH) for name in POOLINGS}
        features |= {"patches": torch.randn(PAIRS, TOKENS, WIDTH), "attention": torch.rand(PAIRS, TOKENS)}
        images, texts = model.loss_inputs(features), torch.randn(PAIRS, WIDTH)

        def train() -> None:
            model(image_inputs=images, text_inputs=texts, return_loss=True).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return train

    return take_turns({name: step(name) for name in ("channels", "similarity")}, rounds)


def main() -> None:
    data = Path(os.environ.get("ICLIP_DATA", "data"), "flickr8k/dev-00000.tar")
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        first_pairs(args.data, args.pairs, folder / "pairs.tar")
        native = has_bfloat16()  # emulated, an epoch would take minutes
        names = [name for name in CONTENDERS if native or "bf16" not in name]
        contenders = {name: make(name, folder, args) for name in names}
        taken = take_turns({name: contender.train for name, contender in contenders.items()}, args.rounds)
        memory = {name: cost(contender.train)[1] for name, contender in contenders.items()}
        taken_by_steps = steps(10)

    print(f"{machine('open_clip_torch')}; {args.pairs} pairs in batches of {args.batch_size}, ", end="")
    print(f"{args.num_workers} loading process, medians of {args.rounds} epochs\n")
    rows = []
    for name, median in medians(taken).items():
        waited = statistics.median(contenders[name].waited[1:])
        rows.append([name, median, args.pairs / median, f"{waited:.0%}", f"{memory[name]:.0f}"])
    print(table(["an epoch of", "seconds", "pairs per second", "waiting for data", "MiB beyond the model"], rows))
    uncached, learning = "projections, without", "projections and text tower, without"
    print(
        f"\nThe cache makes an epoch {ratio(taken, uncached, 'projections, from the cache'):.0f} times faster, "
        f"{ratio(taken, learning, 'projections and text tower, from the cache'):.1f} times with the text tower "
        f"learning. open_clip takes {ratio(taken, 'open_clip, locked image tower', learning):.2f} times as long as "
        "`iclip train` without a cache."
    )
    if native:
        faster = [f"{ratio(taken, name, f'{name}, bf16'):.2f}" for name in (uncached, learning)]
        print(f"bf16 makes an epoch without the cache {' and '.join(faster)} times faster.")
    headings = [f"a step of {PAIRS} pairs from the cache, ms", f"similarity pooling, {TOKENS} patches", "ratio"]
    row = [1e3 * median for median in medians(taken_by_steps).values()]
    row.append(f"{ratio(taken_by_steps, 'similarity', 'channels'):.2f}")
    print(f"\n{table(headings, [row])}")


if __name__ == "__main__":
    main()
