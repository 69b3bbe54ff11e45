"""What the tests of training share: runs on the towers and pairs of the fixture `hub`, and what they leave."""

import csv
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import WORDS
from PIL import Image
from safetensors.torch import load_file

from iclip_hf.training.pair_model import PairModel
from iclip_hf.training.run import train
from iclip_hf.training.settings import parse_settings


ROOT = Path(__file__).parents[1]


def run(hub: Path, output_dir: Path, *arguments) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    command = ["--config", hub / "train.yaml", "--output_dir", output_dir, *arguments]
    return train(parse_settings([str(argument) for argument in command]))


def write_table(folder: Path, count: int, captions=None, suffix: str = "png", seed: int = 0) -> Path:
    """A table of pairs of noise images with random captions, if none are given."""
    draws = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    with open(folder / "pairs.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for number in range(count):
            Image.fromarray(draws.integers(0, 256, (40, 36, 3), np.uint8)).save(folder / f"{number}.{suffix}")
            caption = captions[number] if captions else " ".join(WORDS[word] for word in draws.integers(0, 12, 5))
            table.writerow([f"{number}.{suffix}", caption])
    return folder / "pairs.csv"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(first: Path, second: Path, **tolerance) -> None:
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **(tolerance or {"rtol": 0, "atol": 0}))


def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


def gradients(pair_model: PairModel, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    pair_model.zero_grad()
    torch.manual_seed(0)  # dropout
    loss = pair_model(**batch)["loss"]
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in pair_model.named_parameters() if p.grad is not None}


def tiny_nouns() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts for each of eight pairs, out of five nouns, and which pair has which."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, (16,), generator=generator), torch.randint(2, (8, 5), generator=generator).byte()
