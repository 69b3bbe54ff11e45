"""Measures the segmentation tables of SCLIP, NACLIP, ClearCLIP and ProxyCLIP, beside the published numbers.

    python benchmarks/published.py voc21:VOC voc20:VOC context60:VOC context59:VOC coco_object:COCO coco_stuff:COCO \\
        cityscapes:CITYSCAPES ade20k:ADE
    python benchmarks/insert.py docs/results.md runs/published/published.md

A run is `iclip evaluate --task segmentation` with the protocol of a paper on a data set. Runs that --output already
holds are not repeated, so another model needs another folder. If a run fails, the others go on, and it is named at the
end. Further options are those of the command, such as --device cuda. Prints and writes the table after each run.
"""

import json
import shlex
import sys
from pathlib import Path

from measuring import command_line, table

from iclip_hf import cli
from iclip_hf.evaluation.protocols import PROTOCOLS
from iclip_hf.evaluation.tables import cell
from iclip_hf.utils.files import atomic_write


MODEL = "openai/clip-vit-base-patch16"
# Published mIoU of CLIP ViT-B/16 in percent. That of SCLIP and NACLIP is from the README of their code.
PUBLISHED = {
    "voc21": ("VOC21", {"sclip": 59.63, "naclip": 64.07, "clearclip": 51.8, "proxyclip": 61.3}),
    "context60": ("Context60", {"sclip": 31.74, "naclip": 34.99, "clearclip": 32.6, "proxyclip": 35.3}),
    "coco_object": ("COCO-Object", {"sclip": 33.52, "naclip": 36.19, "clearclip": 33.0, "proxyclip": 37.5}),
    "voc20": ("VOC20", {"sclip": 81.54, "naclip": 83.03, "clearclip": 80.9, "proxyclip": 80.3}),
    "context59": ("Context59", {"sclip": 34.46, "naclip": 38.35, "clearclip": 35.9, "proxyclip": 39.1}),
    "coco_stuff": ("COCO-Stuff", {"sclip": 22.77, "naclip": 25.69, "clearclip": 23.9, "proxyclip": 26.5}),
    "cityscapes": ("Cityscapes", {"sclip": 32.34, "naclip": 38.27, "clearclip": 30.0, "proxyclip": 38.1}),
    "ade20k": ("ADE20K", {"sclip": 16.45, "naclip": 19.05, "clearclip": 16.7, "proxyclip": 20.2}),
}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("data", nargs="+", metavar="NAME:FOLDER", help=f"data sets, of {', '.join(PUBLISHED)}")
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=PROTOCOLS, help="papers (default: all)")
    parser.add_argument("--model", default=MODEL, help=f"folder or Hub id (default: {MODEL})")
    parser.add_argument("--output", type=Path, default=Path("runs/published"))
    args, evaluate_options = parser.parse_known_args()
    failed = []
    for data in args.data:
        name, _, folder = data.partition(":")
        for protocol in args.protocols:
            file = args.output / f"{protocol}-{name}.json"
            if not file.exists():
                run = [*command(protocol, name, folder, args.model), "--output", str(file), *evaluate_options]
                print(shlex.join(["iclip", *run]), flush=True)
                args.output.mkdir(parents=True, exist_ok=True)
                if cli.main(run):
                    failed.append(file.stem)
            report = results_table(args.output)
            print(report, flush=True)
            with atomic_write(args.output / "published.md") as partial:
                partial.write_text(report + "\n", encoding="utf-8")
    print(args.output / "published.md")
    if failed:
        sys.exit(f"These runs failed: {', '.join(failed)}.")


def command(protocol: str, dataset: str, folder: str, model: str = MODEL) -> list[str]:
    """Returns the arguments of `iclip` that measure a protocol on a data set."""
    run = ["evaluate", "--task", "segmentation", "--protocol", protocol]
    return [*run, "--dataset", dataset, "--data-root", folder, "--model", model]


def results_table(results: Path | None = None) -> str:
    """Returns the table of the published mIoU, beside the measured mIoU of the runs in a folder."""
    rows = []
    for protocol in PROTOCOLS:
        cells = []
        for dataset, (_, published) in PUBLISHED.items():
            file = results / f"{protocol}-{dataset}.json" if results else None
            measured = None
            if file and file.exists():
                measured = json.loads(file.read_text(encoding="utf-8"))["results"][protocol]["segmentation"]["miou"]
            cells.append(f"{published[protocol]} / {cell(measured, 2)}")
        rows.append([f"`{protocol}`", *cells, f"`{shlex.join(['iclip', *command(protocol, 'voc21', 'VOC')])}`"])
    return table(["protocol", *(title for title, _ in PUBLISHED.values()), "command, here for VOC21"], rows)


if __name__ == "__main__":
    main()
