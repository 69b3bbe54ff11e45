"""Trains the studies of the paper's Tables 2 and 3 from one feature cache, and writes their table.

    python benchmarks/studies.py --data-root DATA/coco100 --split train2017

Each run is `iclip train` with other options of the model, once for each seed. Runs that `--output` already holds are
not repeated. A sentence below the table helps to explain it: it says how similar the patch tokens of the image tower
are to its class token, and how far one patch dominates the attention.
"""

import json
from pathlib import Path

import torch
import yaml
from measuring import command_line, mean_and_spread, remembered
from measuring import table as markdown

from iclip_hf.backends.loading import load_iclip
from iclip_hf.cli.train.arguments import parse_arguments
from iclip_hf.cli.train.training import train
from iclip_hf.data.layouts import DATASETS
from iclip_hf.data.segmentation import load_segmentation
from iclip_hf.evaluation.evaluate import evaluate_model
from iclip_hf.model.pooling import normalize_attention


# These values of `map_attention` do not change the training, so each run is measured with all of them.
MAP_ATTENTION = {"none": "cosine map", "similarity": "times attention", "additive": "plus attention"}
METRICS = {"mAP": ".1f", "mMIoU": ".1f", "mFMB": ".3f", "text_contrast": ".1f"}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--config", type=Path, default=Path("hub_configs/iclip-dinov2-s14-minilm"))
    parser.add_argument("--output", type=Path, default=Path("runs/studies"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dataset", default="coco2017", choices=DATASETS)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--split")
    args, train_arguments = parser.parse_known_args()

    studies = yaml.safe_load((args.config / "studies.yaml").read_text())
    dataset = load_segmentation(args.dataset, args.data_root, args.split)
    features = {}  # outputs of the locked image tower, which is the same in all runs
    rows = {}
    for number, (name, changes) in enumerate(studies["runs"].items()):
        scores = []
        for seed in args.seeds:
            folder = args.output / f"{number}-seed{seed}"
            file = folder / "study.json"
            if not file.exists():
                given = {"config": args.config, "output_dir": folder, "seed": seed, **studies["arguments"]}
                command = ["--resume", *(f"--{name}={value}" for name, value in given.items())]
                command += ["--model_options", *studies["model_options"], *changes, *train_arguments]
                train(parse_arguments(command))
                file.write_text(json.dumps(measure(folder, dataset, features), indent=2))
            scores.append(json.loads(file.read_text()))
        rows[name] = scores
        print(table(rows), flush=True)
    report = f"{table(rows)}\n\n{tower_facts(args.output / f'0-seed{args.seeds[0]}', dataset)}\n"
    written = args.output / "studies.md"
    written.write_text(report)
    print(f"{report}\n{written}, beside a folder for each run")


def measure(model_folder: Path, dataset, features: dict) -> dict[str, dict[str, float]]:
    """
    Returns mAP, mMIoU, mFMB and text contrast for each `map_attention`. `features` keeps the image tower's outputs.
    """
    model, processor = load_iclip(model_folder)
    if torch.cuda.is_available():
        model.to("cuda")
    model.encode_image = remembered(model.encode_image, features)
    scores = {}
    for map_attention in MAP_ATTENTION:
        model.config.map_attention = map_attention
        result = evaluate_model((model, processor), dataset, metrics=[*METRICS], progress=False).results["itsm"]
        scores[map_attention] = {metric: result[metric][metric.lower()] for metric in METRICS}
    return scores


@torch.inference_mode()
def tower_facts(model_folder: Path, dataset) -> str:
    """
    Returns a sentence on the image tower that explains the order of the poolings. Its numbers are means over the
    images.
    """
    model, processor = load_iclip(model_folder)
    facts = []
    for sample in dataset:
        image = model.encode_image(processor(images=sample.image)["pixel_values"])
        patches = image.patch_tokens[0]
        quantile = model.config.attention_quantile
        raw = image.raw_attention
        most_channels = []  # the largest share of the channels that one patch wins under masked max
        for norm in ("minmax", "quantile"):
            attention = normalize_attention(raw, norm, quantile)
            winners = (patches * attention[0, :, None]).argmax(0)
            most_channels.append(winners.bincount().max() / len(winners))
        cosine = torch.cosine_similarity(patches, image.class_token).mean()
        brightest = raw.max() / raw.median()
        facts.append([cosine, brightest, *most_channels])
    cosine, ratio, minmax, quantile = torch.tensor(facts).mean(0).tolist()
    return (
        f"Over these images the cosine of patch and class tokens is {cosine:.2f}, the brightest patch has {ratio:.0f} "
        f"times the median's attention, and under masked max one patch wins {minmax:.0%} of the channels "
        f"({quantile:.0%} with the quantile)."
    )


def table(rows: dict[str, list[dict]]) -> str:
    """Returns mean and standard deviation over the seeds as Markdown."""

    def cell(seeds: list[dict], map_attention: str, metrics: list[str]) -> str:
        values = {name: [scores[map_attention][name] for scores in seeds] for name in metrics}
        return " / ".join(mean_and_spread(values[name], METRICS[name]) for name in metrics)

    recognition, *maps = METRICS
    headings = ["run", "mAP %", *(f"{name}: mMIoU % / mFMB / text contrast %" for name in MAP_ATTENTION.values())]
    lines = [
        [name, cell(seeds, "none", [recognition]), *(cell(seeds, attention, maps) for attention in MAP_ATTENTION)]
        for name, seeds in rows.items()
    ]
    return markdown(headings, lines)


if __name__ == "__main__":
    main()
