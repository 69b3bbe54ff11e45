"""What the tests of training share: runs on the towers and pairs of the fixture `hub`, and what they leave."""

import csv
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import WORDS, tiny_inputs, tiny_model
from PIL import Image
from safetensors.torch import load_file

from iclip_hf import ICLIPConfig, ICLIPModel
from iclip_hf.training.contrastive import PairModel
from iclip_hf.training.inputs import check_run
from iclip_hf.training.settings import Settings, parse_settings
from iclip_hf.training.train import train


def run(hub: Path, output_dir: Path, *arguments) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    command = ["--config", hub / "train.yaml", "--output_dir", output_dir, *arguments]
    settings = parse_settings([str(argument) for argument in command])
    check_run(settings)
    return train(settings)


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


def pair_model_of(model: ICLIPModel, **settings) -> PairModel:
    """The module of the loss, with these settings and options of the model."""
    for name in [name for name in settings if name in ICLIPConfig.__annotations__]:
        setattr(model.config, name, settings.pop(name))
    return PairModel(model, Settings(model="model", data=["pairs"], **settings))


def gradients(pair_model: PairModel, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    pair_model.zero_grad()
    torch.manual_seed(0)  # dropout
    loss = pair_model(**batch)["loss"]
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in pair_model.named_parameters() if p.grad is not None}


def eight_pairs(part: slice, chunk_size: int = 256) -> tuple[PairModel, dict]:
    """A model of which both towers learn, and a part of eight pairs with two noun prompts each, out of five nouns."""
    options = {"max_over": "similarity", "map_affinity": 2.0, "logit_bias_init_value": -2, "known_competition": 0.5}
    model = tiny_model(lock_vision=False, **options)
    pair_model = pair_model_of(model, chunk_size=chunk_size).eval()
    generator, inputs = torch.Generator().manual_seed(0), tiny_inputs(8, 24)
    noun_ids = torch.randint(5, (16,), generator=generator)
    noun_labels = torch.randint(-1, 2, (8, 5), generator=generator)
    prompts = slice(2 * part.start, 2 * part.stop)
    batch = {"pixel_values": inputs.pop("pixel_values")[part]}
    batch |= {name: torch.cat([value[:8][part], value[8:][prompts]]) for name, value in inputs.items()}
    nouns = {
        "noun_ids": noun_ids[prompts],
        "is_background": (noun_ids[prompts] > 3).byte(),
        "place": (noun_ids[prompts] % 3 - 1).to(torch.int8),
        "noun_labels": noun_labels[part].to(torch.int8),
    }
    return pair_model, {**batch, **nouns}
