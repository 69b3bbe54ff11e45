"""What the tests of training share: runs on the towers and pairs of the fixture `hub`, and what they leave."""

import csv
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from accelerate.state import AcceleratorState
from conftest import WORDS, tiny_inputs, tiny_model
from PIL import Image
from safetensors.torch import load_file

from iclip_hf import ICLIPModel
from iclip_hf.cli.train import check_output_dir
from iclip_hf.cli.train.arguments import parse_arguments
from iclip_hf.cli.train.training import train
from iclip_hf.model.loss_terms import LOSS_TERMS
from iclip_hf.training import ICLIPTrainer


def run(hub: Path, output_dir: Path, *arguments) -> ICLIPTrainer:
    """Runs `iclip train` in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    command = ["--config", hub / "train.yaml", "--output_dir", output_dir, *arguments]
    arguments = parse_arguments([str(argument) for argument in command])
    check_output_dir(arguments)
    return train(arguments)


def evaluations(trainer: ICLIPTrainer) -> dict[int, dict[str, float]]:
    """The metrics of each evaluation of a run, by step."""
    speed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    rows = (row for row in trainer.state.log_history if any(name.startswith("eval_") for name in row))
    return {
        row["step"]: {name[5:]: value for name, value in row.items() if name.startswith("eval_") and name not in speed}
        for row in rows
    }


def write_table(folder: Path, count: int, captions=None, seed: int = 0) -> Path:
    """A table of pairs of noise images with random captions, if none are given."""
    draws = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    with open(folder / "pairs.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for number in range(count):
            Image.fromarray(draws.integers(0, 256, (40, 36, 3), np.uint8)).save(folder / f"{number}.png")
            caption = captions[number] if captions else " ".join(WORDS[word] for word in draws.integers(0, 12, 5))
            table.writerow([f"{number}.png", caption])
    return folder / "pairs.csv"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(first: Path, second: Path, **tolerance) -> None:
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **(tolerance or {"rtol": 0, "atol": 0}))


def outputs_of(model: ICLIPModel, batch: dict, **options) -> dict[str, torch.Tensor]:
    """The losses of a model with these options."""
    for name, value in options.items():
        setattr(model.config, name, value)
    outputs = model.eval()(**batch, return_loss=True)
    return {**outputs, "branch_losses": torch.stack(outputs.branch_losses)}


def gradients(model: ICLIPModel, batch: dict, **options) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)  # dropout
    loss = model(**batch, return_loss=True, **options).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def terms(model: ICLIPModel, batch: dict, **options) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Loss and gradients with each listed term as the only one of its branch."""
    found = {}
    for branch, of_branch in [*LOSS_TERMS.items()]:
        for name, term in of_branch.items():
            with patch.dict(LOSS_TERMS, {branch: {name: term._replace(weight=lambda batch: 1)}}):
                found[f"{branch}: {name}"] = gradients(model, batch, **options)
    return found


def eight_pairs(part: slice) -> tuple[ICLIPModel, dict]:
    """
    A model of which both towers learn, and a part of eight pairs with two noun prompts each, out of five nouns, and
    with probabilities of four classes. Captions 0, 1 and 6 are equal.
    """
    options = {"max_over": "similarity", "map_affinity": 2.0, "logit_bias_init_value": -2, "known_competition": 0.5}
    model = tiny_model(lock_vision=False, map_attention="signed", **options).eval()
    torch.nn.init.constant_(model.attention_direction, 0.1)
    generator, inputs = torch.Generator().manual_seed(0), tiny_inputs(8, 28)
    noun_ids = torch.randint(5, (16,), generator=generator)
    noun_labels = torch.randint(-1, 2, (8, 5), generator=generator)
    prompts = slice(2 * part.start, 2 * part.stop)
    batch = {"pixel_values": inputs.pop("pixel_values")[part]}
    for value in inputs.values():
        value[[1, 6]] = value[0].clone()
    batch |= {name: torch.cat([value[:8][part], value[8:24][prompts], value[24:]]) for name, value in inputs.items()}
    nouns = {
        "noun_ids": noun_ids[prompts],
        "is_background": noun_ids[prompts] > 3,
        "place": (noun_ids[prompts] % 3 - 1).to(torch.int8),
        "noun_labels": noun_labels[part].to(torch.int8),
        "class_ids": torch.tensor([4, 0, 2, 1]),
        "class_probabilities": torch.rand(8, 4, generator=generator)[part],
    }
    return model, {**batch, "nouns": nouns}
