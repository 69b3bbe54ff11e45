"""
Writes webdataset shards again and says in their JSON what the labels are complete for, the field `complete` that training reads.

    python benchmarks/complete_labels.py DATA/coco2014 runs/coco2014
    python benchmarks/complete_labels.py DATA/coco_captions runs/coco_captions --classes 18 --partial

Labels of COCO's photographs are complete for the first `--classes` of its 80 classes, if they are not marked as `partial`.
"""

import io
import json
import tarfile
from pathlib import Path

from measuring import command_line

from iclip_hf.data.class_names import COCO_THINGS


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("shards", type=Path, help="folder of the shards")
    parser.add_argument("output", type=Path, help="new folder")
    parser.add_argument("--classes", type=int, default=len(COCO_THINGS), help="number of classes (default: all 80)")
    parser.add_argument("--partial", action="store_true", help="also of labels that are marked as partial")
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    marked = 0
    for shard in sorted(args.shards.glob("*.tar")):
        with (
            tarfile.open(shard) as old,
            tarfile.open(args.output / shard.name, "w", format=tarfile.USTAR_FORMAT) as new,
        ):
            for member in old:
                content = old.extractfile(member).read()
                if member.name.endswith(".json"):
                    record = json.loads(content)
                    if "labels" in record and (args.partial or not record.get("partial")):
                        content = json.dumps({**record, "complete": COCO_THINGS[: args.classes]}).encode()
                        marked += 1
                    member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    print(f"{args.output}: {marked} photographs with complete labels")


if __name__ == "__main__":
    main()
