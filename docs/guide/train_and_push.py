# /// script
# requires-python = ">=3.10"
# dependencies = ["iclip-hf[train]"]
# ///
"""Trains on a Hub dataset and pushes the model: `train_and_push.py DATASET MODEL [arguments of iclip train]`."""

import sys

from iclip_hf.cli import main


dataset, model, *arguments = sys.argv[1:]
sys.exit(main(["train", dataset, "--output_dir", "run", *arguments]) or main(["push", "run", model, "--private"]))
