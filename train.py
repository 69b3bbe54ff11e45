"""
Trains ICLIP: `accelerate launch train.py --config iclip-vit-b16`, or `python train.py` on one device.

This is `iclip train`, for launchers that take a script. Scripts of your own use `iclip_hf.training.ICLIPTrainer`.
"""

import sys

from iclip_hf.cli import main


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
