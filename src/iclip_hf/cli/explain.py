"""`iclip explain`: photographs and texts to pictures and scores."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .common import (
    METHODS,
    PICTURES,
    add_command,
    add_model_options,
    check_file,
    check_folder,
    load_model,
    one_line,
    save_figure,
)


def register(commands) -> None:
    command = add_command(commands, "explain", run, "show which pixels of photographs match which texts")
    command.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    command.add_argument(
        "--text", action="append", required=True, dest="texts", help="a text, put into the templates; repeat for more"
    )
    add_model_options(command)
    command.add_argument("--method", choices=METHODS, default="itsm", help="how the maps are made (default: itsm)")
    command.add_argument(
        "--output",
        type=Path,
        help="picture to write (default: explanation.png); a folder for several images (default: explanations)",
    )
    command.add_argument(
        "--colormap", default="jet", help='of matplotlib, such as "cividis" for colour-blind readers (default: jet)'
    )
    command.add_argument("--json", action="store_true", help="print the scores as JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..explainers import Explanation, make_explainer
    from ..images import load_image

    several = len(options.images) > 1
    output = options.output or Path("explanations" if several else "explanation.png")
    if several:
        check_folder("--output", output)
    else:
        check_file("--output", output, PICTURES)
    explainer = make_explainer(*load_model(options.model), options.method)
    texts = explainer.encode_texts(options.texts, options.templates)
    size = {} if options.image_size is None else {"size": {"height": options.image_size, "width": options.image_size}}

    failed, report, taken = 0, [], set()
    for path in tqdm(options.images, unit="image", disable=not several):
        try:
            image = load_image(path)
        except (OSError, ValueError) as error:  # the others are still explained
            print(f"iclip explain: {one_line(error)}", file=sys.stderr)
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
    from ..plots import explanation_grid

    maps = [explanation.map(index).numpy() for index in range(len(explanation.labels))]
    titles = [f"{label}  {score:+.2f}" for label, score in zip(explanation.labels, explanation.scores)]
    save_figure(explanation_grid(image, maps, titles, colormap=colormap), path)


def _free_name(stem: str, taken: set[str]) -> str:
    """A name of its own for each picture: a/dog.jpg and b/dog.jpg must not write the same file."""
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    taken.add(name)
    return f"{name}.png"
