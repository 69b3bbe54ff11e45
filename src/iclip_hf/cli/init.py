"""`iclip init`: a new model folder from a configuration and two towers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .inputs import silence_transformers
from .output import print_folder, printed_steps


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME_OR_FOLDER",
        help="name of a shipped configuration, such as iclip-vit-b16, or a folder with a train.yaml or config.json",
    )
    keywords = {"metavar": "FOLDER_OR_ID"}
    parser.add_argument("--vision", **keywords, help="image tower (default: the configuration's)")
    parser.add_argument("--text", **keywords, help="text tower (default: the configuration's)")
    parser.add_argument(
        "--feature-tower", **keywords, help="second image tower, of timm (default: the configuration's, if it has one)"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new folder to write")


def run(args: argparse.Namespace) -> None:
    from ..hub.configs import config_folder
    from ..utils.files import check_new_folder, check_outside

    # These checks precede the import of torch.
    source = config_folder(args.config)
    towers = args.vision, args.text, args.feature_tower
    for folder in filter(None, (source, *towers)):
        check_outside(args.output, folder)
    check_new_folder(args.output)
    if (source / "train.yaml").is_file():
        from .train.arguments import read_train_yaml  # imports torch

        arguments = read_train_yaml(source / "train.yaml")  # raises for a wrong argument
        for tower in filter(None, map(arguments.get, ("vision", "text", "feature_tower"))):
            check_outside(args.output, tower)
    from ..hub.folders import init_model, is_embedded

    silence_transformers()
    with printed_steps():
        folder = init_model(args.config, args.output, *towers)
    next_command = ["iclip", "train", "pairs.csv", "--model", str(folder)]
    if not is_embedded(args.config, *towers):  # the defaults of a training are for trained models
        next_command += ["--learning_rate", "2e-3", "--keep_presence", "0"]
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        if config.get("logit_bias_init_value") is not None:  # a bias learns from nouns alone
            next_command += ["--nouns", "nouns.txt"]
    print_folder(folder, *next_command)
