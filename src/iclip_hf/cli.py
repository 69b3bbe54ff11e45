"""The `iclip` command: parse, call the package, print. Bad input ends with one line and exit code 2."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import __version__
from .cache import written_whole


# Names, not imports: help must not wait for torch.
_METHODS = ("itsm", "reversed_itsm", "attention", "grad_cam", "bi_modal", "clip_surgery", "gem")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"iclip {options.command}: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"iclip {options.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> _Parser:
    parser = _Parser(prog="iclip", description="Contrastive image-text models that explain themselves.")
    parser.add_argument("--version", action="version", version=f"iclip {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    explain = _command(commands, "explain", _explain, "show which pixels of photographs match which texts")
    explain.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    explain.add_argument(
        "--text", action="append", required=True, dest="texts", help="a text, put into the templates; repeat for more"
    )
    _model_options(explain)
    explain.add_argument("--method", choices=_METHODS, default="itsm", help="how the maps are made (default: itsm)")
    explain.add_argument(
        "--output",
        type=Path,
        help="picture to write (default: explanation.png); a folder for several images (default: explanations)",
    )
    explain.add_argument(
        "--colormap", default="jet", help='of matplotlib, such as "cividis" for colour-blind readers (default: jet)'
    )
    explain.add_argument("--json", action="store_true", help="print the scores as JSON instead of a table")

    evaluate = _command(commands, "evaluate", _evaluate, "measure mAP, mMIoU and mFMB on a segmentation data set")
    evaluate.add_argument("--dataset", required=True, choices=("voc2012", "coco2017", "folder"))
    evaluate.add_argument("--data-root", required=True, type=Path, help="folder of the data set")
    evaluate.add_argument("--split", help="default: val for VOC, val2017 for COCO")
    evaluate.add_argument("--overrides", type=Path, help="JSON or YAML file with other class names and templates")
    _model_options(evaluate)
    evaluate.add_argument("--methods", nargs="+", choices=_METHODS, default=["itsm"], help="default: itsm")
    evaluate.add_argument(
        "--aggregate",
        choices=("image", "pixel"),
        default="image",
        help="mean of the images' ratios, or pixels pooled (default: image)",
    )
    evaluate.add_argument("--limit", type=int, help="evaluate only the first images")
    evaluate.add_argument("--batch-size", type=int, default=8)
    evaluate.add_argument("--output", type=Path, help="JSON file to write, with the scores by class beside it as CSV")
    evaluate.add_argument("--json", action="store_true", help="print the JSON instead of a table")

    _command(
        commands, "install-metrics", _install_metrics, 'make evaluate.load("mmiou") and "mfmb" work in any folder'
    )
    space = _command(commands, "export-metric", _export_metric, "write the files of a metric's Space")
    space.add_argument("metric", choices=("mfmb", "mmiou"))
    space.add_argument("directory", type=Path)
    return parser


def _command(commands, name: str, run: Callable, description: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=description, description=description[0].upper() + description[1:] + ".")
    command.set_defaults(run=run)
    return command


def _model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", metavar="FOLDER_OR_ID", help="ICLIP or CLIP-like model (default: the embedded checkpoint)"
    )
    command.add_argument(
        "--template",
        action="append",
        dest="templates",
        help='prompt with one {}, repeat to average several; "{}" takes texts as they are',
    )
    command.add_argument("--image-size", type=int, help="side in pixels at which the model sees the image")


def _load(name: str | None):
    """Model and processor of a folder or Hub id, on the best device; the embedded checkpoint without a name."""
    import torch
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if name is None:
        from .demo.checkpoint import embedded_model

        name = str(embedded_model())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModel.from_pretrained(name).to(device).eval(), AutoProcessor.from_pretrained(name)


def _explain(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .explainers import Explanation, make_explainer
    from .images import load_image

    several = len(options.images) > 1
    output = options.output or Path("explanations" if several else "explanation.png")
    _check_output(output, folder=several)
    explainer = make_explainer(*_load(options.model), options.method)
    texts = explainer.encode_texts(options.texts, options.templates)
    size = {} if options.image_size is None else {"size": {"height": options.image_size, "width": options.image_size}}

    failed, report, taken = 0, [], set()
    for path in tqdm(options.images, unit="image", disable=not several):
        try:
            image = load_image(path)
        except (OSError, ValueError) as error:  # the others are still explained
            print(f"iclip explain: {_one_line(error)}", file=sys.stderr)
            failed += 1
            continue
        pixel_values = explainer.processor(images=[image], **size)["pixel_values"]
        maps, scores = explainer.raw_maps(pixel_values, texts)
        explanation = Explanation(options.texts, scores[0].cpu(), maps[0].cpu(), (image.height, image.width))
        picture = output / _free_name(Path(path).stem, taken) if several else output
        _draw(image, explanation, options.colormap, picture)
        scores = [{"text": text, "score": round(float(s), 4)} for text, s in zip(options.texts, explanation.scores)]
        report.append({"image": str(path), "picture": str(picture), "texts": scores})

    if options.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        width = max(len(text) for text in options.texts)
        for entry in report:
            print(f"{entry['image']} -> {entry['picture']}")
            for row in sorted(entry["texts"], key=lambda row: -row["score"]):
                print(f"  {row['text']:<{width}}  {row['score']:+.4f}")
    return 2 if failed else 0


def _draw(image, explanation, colormap: str, path: Path) -> None:
    from .plots import explanation_grid

    maps = [explanation.map(index).numpy() for index in range(len(explanation.labels))]
    titles = [f"{label}  {score:+.2f}" for label, score in zip(explanation.labels, explanation.scores)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        explanation_grid(image, maps, titles, colormap=colormap).savefig(partial, format=path.suffix[1:], dpi=120)


def _check_output(output: Path, folder: bool) -> None:
    """Refuses an output that could not be written before the model is loaded."""
    if folder:
        if output.suffix or (output.exists() and not output.is_dir()):
            raise ValueError(f"--output {output}: expected a folder for several images, got a file name.")
    elif output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp"):
        raise ValueError(f"--output {output}: expected a file name that ends in .png, .jpg, .webp, .pdf or .svg.")
    elif output.is_dir():
        raise ValueError(f"--output {output}: expected a file name, got a folder.")


def _free_name(stem: str, taken: set[str]) -> str:
    """A name of its own for each picture: a/dog.jpg and b/dog.jpg must not write the same file."""
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    taken.add(name)
    return f"{name}.png"


def _evaluate(options: argparse.Namespace) -> int:
    from accelerate import PartialState

    from .data.segmentation import load_segmentation
    from .evaluation import evaluate

    if options.output and options.output.suffix != ".json":
        raise ValueError(f"--output {options.output}: expected a file name that ends in .json.")
    dataset = load_segmentation(options.dataset, options.data_root, options.split, options.overrides)
    result = evaluate(
        *_load(options.model),
        dataset,
        options.methods,
        image_size=options.image_size,
        templates=options.templates,
        aggregate=options.aggregate,
        limit=options.limit,
        batch_size=options.batch_size,
    )
    if PartialState().is_main_process:
        if options.output:
            result.save(options.output)
        print(result.to_json() if options.json else result.table())
    return 0


def _install_metrics(options: argparse.Namespace) -> int:
    from .evaluate_modules import install_metrics

    print(f"installed: {', '.join(install_metrics())}")
    return 0


def _export_metric(options: argparse.Namespace) -> int:
    from .evaluate_modules import export_space

    print(export_space(options.metric, options.directory))
    return 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
