"""
Divides webdataset shards: holds out every tenth image, and keeps the others for training.

    python benchmarks/hold_out.py DATA/stuff/nyu.tar DATA/stuff/msrc.tar --train runs/stuff --held-out runs/held_out
"""

import tarfile
from pathlib import Path

from measuring import command_line


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("shards", type=Path, nargs="+", help="tar files, whose names the parts keep")
    parser.add_argument("--train", type=Path, required=True, help="folder of the shards to train on")
    parser.add_argument("--held-out", type=Path, required=True, help="folder of the shards with every tenth image")
    args = parser.parse_args()
    for folder in (args.train, args.held_out):
        folder.mkdir(parents=True, exist_ok=True)
    for shard in args.shards:
        with (
            tarfile.open(shard) as source,
            tarfile.open(args.train / shard.name, "x", format=tarfile.USTAR_FORMAT) as train,
            tarfile.open(args.held_out / shard.name, "x", format=tarfile.USTAR_FORMAT) as held_out,
        ):
            keys: dict[str, int] = {}
            for member in source:
                index = keys.setdefault(member.name.rsplit(".", 1)[0], len(keys))
                (train if index % 10 else held_out).addfile(member, source.extractfile(member))
        print(f"{shard.name}: {len(keys)} images, {(len(keys) + 9) // 10} of them held out")


if __name__ == "__main__":
    main()
