"""Measures the segmentation tables of six papers, such as SCLIP and NACLIP, beside the published numbers.

    python benchmarks/published.py voc21:VOC voc20:VOC context60:VOC context59:VOC coco_object:COCO coco_stuff:COCO \\
        cityscapes:CITYSCAPES ade20k:ADE
    python benchmarks/insert.py docs/results.md runs/published/published.md

A run is `iclip evaluate --task segmentation` with the protocol of a paper on a data set. Runs that --output already
holds are not repeated, so another model needs another folder. If a run fails, the others go on, and it is named at the
end. Further options are those of the command, such as --device cuda. Prints and writes the table after each run.
A file of fewer images, another model or other settings than the protocol's fills no row. A * marks a published number
that is from a table of another paper.
"""

import json
import shlex
import sys
from pathlib import Path

from measuring import command_line, table

from iclip_hf import cli
from iclip_hf.evaluation.protocols import PROTOCOLS, protocol_settings
from iclip_hf.evaluation.results import read_results
from iclip_hf.evaluation.tables import cell
from iclip_hf.utils.files import atomic_write
from iclip_hf.utils.published import public_name


MODEL = "openai/clip-vit-base-patch16"
# Published mIoU of CLIP ViT-B/16 in percent, from the README of the authors' code, but see `OTHER_SOURCES`.
PUBLISHED = {
    "voc21": (
        "VOC21",
        {"sclip": 59.63, "naclip": 64.07, "clearclip": 51.8, "proxyclip": 61.3, "sc_clip": 64.6, "resclip": 61.1},
    ),
    "context60": (
        "Context60",
        {"sclip": 31.74, "naclip": 34.99, "clearclip": 32.6, "proxyclip": 35.3, "sc_clip": 36.8, "resclip": 33.5},
    ),
    "coco_object": (
        "COCO-Object",
        {"sclip": 33.52, "naclip": 36.19, "clearclip": 33.0, "proxyclip": 37.5, "sc_clip": 37.7, "resclip": 35.0},
    ),
    "voc20": (
        "VOC20",
        {"sclip": 81.54, "naclip": 83.03, "clearclip": 80.9, "proxyclip": 80.3, "sc_clip": 84.3, "resclip": 86.0},
    ),
    "context59": (
        "Context59",
        {"sclip": 34.46, "naclip": 38.35, "clearclip": 35.9, "proxyclip": 39.1, "sc_clip": 40.1, "resclip": 36.8},
    ),
    "coco_stuff": (
        "COCO-Stuff",
        {"sclip": 22.77, "naclip": 25.69, "clearclip": 23.9, "proxyclip": 26.5, "sc_clip": 26.6, "resclip": 24.7},
    ),
    "cityscapes": (
        "Cityscapes",
        {"sclip": 32.34, "naclip": 38.27, "clearclip": 30.0, "proxyclip": 38.1, "sc_clip": 41.0, "resclip": 35.9},
    ),
    "ade20k": (
        "ADE20K",
        {"sclip": 16.45, "naclip": 19.05, "clearclip": 16.7, "proxyclip": 20.2, "sc_clip": 20.1, "resclip": 18.0},
    ),
}

# Figures from tables of other papers: those of ClearCLIP with a background, of ProxyCLIP and of SC-CLIP.
OTHER_SOURCES = {(protocol, name) for protocol in ("proxyclip", "sc_clip") for name in PUBLISHED}
OTHER_SOURCES |= {("clearclip", name) for name in ("voc21", "context60", "coco_object")}
# Settings of a metric that must be those of the protocol.
SETTINGS = ("short_side", "window", "stride", "logit_scale", "threshold", "min_area", "pamr_dilations", "padding")


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
            report = results_table(args.output, args.model)
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


def measured(file: Path, protocol: str, dataset: str, model: str) -> tuple[float, str] | None:
    """Returns the mIoU in a file and the digest of the weights; None if the file is no whole run of the protocol."""
    try:
        content = read_results(file, "protocol", "results")
        run, released = content["protocol"], protocol_settings(protocol, dataset)
        metric, data = run["metrics"]["segmentation"], run["dataset"]
        expected = {name: getattr(released, name) for name in SETTINGS} | {"protocol": protocol}
        found = {name: metric[name] for name in expected}
        same = json.dumps([found, run["methods"]]) == json.dumps([expected, released.methods])
        whole = data["name"] == dataset and data["images"] == data["images_in_split"]
        is_model = run["model"] == (public_name(model) or model) and len(run["templates"]) == 80
        miou = content["results"][protocol]["segmentation"]["miou"]
    except (OSError, ValueError, KeyError):
        return None
    return (miou, run["weights"]) if same and whole and is_model else None


def results_table(results: Path | None = None, model: str = MODEL) -> str:
    """Returns the table of the published mIoU, beside the measured mIoU of the runs of a model in a folder."""
    rows = []
    for protocol in PROTOCOLS:
        cells, weights = [], set()
        for dataset, (_, published) in PUBLISHED.items():
            miou = None
            if results and (found := measured(results / f"{protocol}-{dataset}.json", protocol, dataset, model)):
                miou = found[0]
                weights.add(found[1])
            star = "\\*" if (protocol, dataset) in OTHER_SOURCES else ""
            cells.append(f"{published[protocol]}{star} / {cell(miou, 2)}")
        named = f"{public_name(model) or model}, weights {', '.join(sorted(weights))}" if weights else ""
        run = shlex.join(["iclip", *command(protocol, "voc21", "VOC")])
        rows.append([f"`{protocol}`", *cells, named, f"`{run}`"])
    titles = [title for title, _ in PUBLISHED.values()]
    return table(["protocol", *titles, "measured model", "command, here for VOC21"], rows)


if __name__ == "__main__":
    main()
