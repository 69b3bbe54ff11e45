"""
Trains ICLIP: `accelerate launch train.py --config iclip-vit-b16`, or `python train.py` on one device.

This is `iclip train`, for launchers that take a script. `iclip_hf.training.ICLIPTrainer` trains.
"""

import sys

from iclip_hf.cli import main


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
