"""Measures all methods on one model, in one table: maps, dependence on the text, label maps, faithfulness and time.

    python benchmarks/methods.py coco2017:DATA/coco100:train2017 voc2012:DATA/voc_layout
    python benchmarks/insert.py docs/studies/methods.md runs/methods.md

A cell has a value for each data set. The columns that take most time (label maps of all classes, pointing game,
deletion and insertion) are measured on the first --few images. Methods that the model does not support are named below
the table. Prints and writes the table.
"""

import statistics
from functools import partial
from pathlib import Path

from measuring import command_line, machine, ratio, table, take_turns

from iclip_hf.backends.loading import load
from iclip_hf.data.segmentation import load_segmentation
from iclip_hf.evaluation.evaluate import evaluate_model
from iclip_hf.evaluation.tables import cell
from iclip_hf.explainers import METHODS, make_explainer
from iclip_hf.model.engine import Engine
from iclip_hf.utils.files import atomic_write


CONSTANT = "a constant map"
TEXTS = 20  # of one image, for the time
COLUMNS = {
    "mmiou": ("mMIoU %", 1),
    "mfmb": ("mFMB", 3),
    "text_contrast": ("text contrast %", 1),
    "miou": ("mIoU %", 1),
    "pointing_game": ("pointing game %", 1),
    "difference_probability": ("insertion minus deletion, % points", 2),
}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("data", nargs="+", metavar="NAME:FOLDER[:SPLIT]", help="data sets of load_segmentation")
    parser.add_argument("--model", default="embedded", help="folder or Hub id (default: the embedded model)")
    parser.add_argument("--limit", type=int, help="use only the first images (default: all)")
    parser.add_argument("--few", type=int, default=20, help="number of images for the costly columns (default: 20)")
    parser.add_argument("--output", type=Path, default=Path("runs/methods.md"))
    args = parser.parse_args()

    datasets = [load_segmentation(*data.split(":")) for data in args.data]
    model = load(args.model)
    methods, refused = supported(model)
    scores = [measure(model, dataset, methods, args.limit, args.few) for dataset in datasets]
    taken = seconds(model, datasets[0], methods)
    report = make_report(datasets, scores, taken, args, refused)
    print(report)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output) as partial:
        partial.write_text(report + "\n", encoding="utf-8")
    print(f"\n{args.output}")


def supported(model) -> tuple[list[str], dict[str, str]]:
    """Returns the methods that the model supports, and for each other method the reason why not."""
    refused = {}
    for method in METHODS:
        try:
            make_explainer(model, method)
        except ValueError as error:
            refused[method] = str(error)
    return [method for method in METHODS if method not in refused], refused


def measure(model, dataset, methods: list[str], limit: int | None, few: int) -> dict[str, dict[str, float]]:
    """Returns the scores by method on one data set, with mAP and the row of a constant map."""
    few = min(few, limit or few)
    cheap = evaluate_model(model, dataset, methods, ["mAP", "mMIoU", "mFMB", "text_contrast"], limit=limit).results
    few_metrics = ["segmentation", "deletion_insertion", "pointing_game"]
    costly = evaluate_model(model, dataset, methods, few_metrics, limit=few).results
    scores = {}
    for method in methods:
        by_metric = {**cheap[method], **costly[method]}
        scores[method] = {name: value for values in by_metric.values() for name, value in values.items()}
        if scores[method]["difference_probability"] is not None:
            scores[method]["difference_probability"] *= 100
    first = scores[methods[0]]
    scores[CONSTANT] = {
        "map": first["map"],
        "mmiou": cheap[methods[0]]["mMIoU"]["floor"],
        "mfmb": 0.0,
        "text_contrast": 50.0,
        "miou": costly[methods[0]]["segmentation"]["floor"],
        "pointing_game": first["foreground"],
    }
    return scores


def seconds(model, dataset, methods: list[str]) -> dict[str, list[float]]:
    """Returns the seconds of the raw maps of one image with `TEXTS` texts, by method."""
    explainers = {method: make_explainer(model, method) for method in dict.fromkeys(["itsm", *methods])}
    texts = model.encode_texts(dataset.class_names[:TEXTS])
    pixel_values = model.processor(images=[dataset[0].image])["pixel_values"]
    functions = {}
    for method, explainer in explainers.items():
        engine = Engine(explainer.model, explainer.model.processor, explainer)
        functions[method] = partial(engine.raw_maps, pixel_values, texts)
    return take_turns(functions, 3)


def make_report(datasets, scores: list[dict], taken: dict[str, list[float]], args, refused: dict[str, str]) -> str:
    """Returns the tables, with notes on the data, the texts and the machine above them."""
    rows = []
    for method in scores[0]:
        cells = [
            " / ".join(cell(by_method[method].get(name), digits) for by_method in scores)
            for name, (_, digits) in COLUMNS.items()
        ]
        cost = ["-", "-"]
        if method in taken:
            cost = [f"{statistics.median(taken[method]):.3f}", f"{ratio(taken, method, 'itsm'):.1f}"]
        rows.append([f"`{method}`" if method in METHODS else method, *cells, *cost])
    headings = ["method", *(heading for heading, _ in COLUMNS.values()), "seconds per image", "times `itsm`"]
    counts = [min(len(dataset), args.limit or len(dataset)) for dataset in datasets]
    few = [min(count, args.few) for count in counts]
    lines = [
        f"- Each cell: {' / '.join(f'{dataset.name}, {count} images' for dataset, count in zip(datasets, counts))}.",
        f"- mIoU, pointing game and insertion minus deletion: the first {' / '.join(map(str, few))} images.",
        f"- mAP with all methods: {' / '.join(cell(by_method[CONSTANT]['map'], 1) for by_method in scores)} %.",
        f"- Seconds: raw maps of one image, {min(TEXTS, len(datasets[0].class_names))} texts, medians of 3 rounds.",
        f"- Machine: {machine()}.",
        "",
        table(headings, rows),
    ]
    lines += ["", *(f"`{method}` is left out: {reason}" for method, reason in refused.items())] if refused else []
    return "\n".join(lines)


if __name__ == "__main__":
    main()
