"""What commands cost beside the model's forward passes: `iclip explain` of many files, `iclip evaluate`, and their
start.

    python benchmarks/bench_commands.py --data DATA

The embedded model, images seen at 504 pixels; `DATA/coco100` has images with masks. Prints Markdown tables.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from bench_explain import SIZE, photograph, without_gradients
from measuring import command_line, machine, medians, ratio, table, take_turns
from PIL import Image

from iclip_hf.backends.loading import load_iclip
from iclip_hf.backends.towers import embedded_feature_tower, embedded_towers
from iclip_hf.cli import main as iclip
from iclip_hf.model.images import load_image


def end_to_end(files: int, rounds: int) -> str:
    """Returns a table of `iclip explain` of JPEG files in this process, against decoding and the forward alone."""
    model, processor = load_iclip("embedded")
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder, f"{number}.jpg")) for number in range(files)]
        for seed, path in enumerate(paths):
            photograph(seed).save(path, quality=90)
        texts = ["dog", "ball", "grass"]
        pixel_values = processor(images=[load_image(path) for path in paths[:8]])["pixel_values"]
        ids = processor(labels=texts)

        def explain(paths: list[str]) -> None:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                code = iclip(["explain", *paths, "--text", ",".join(texts), "--output", f"{folder}/out", "--json"])
            assert code == 0

        def forwards():
            for start in range(0, files, 8):
                model(pixel_values=pixel_values[: files - start], **ids)

        contenders = {
            "all": lambda: explain(paths),
            "two": lambda: explain(paths[:2]),
            "decode": lambda: [load_image(path) for path in paths],
            "forward": without_gradients(forwards),
        }
        taken = take_turns(contenders, rounds)
    seconds = medians(taken)
    further_image = (seconds["all"] - seconds["two"]) / (files - 2)
    bound = (seconds["decode"] + seconds["forward"]) / files
    headings = [
        f"`iclip explain` of {files} files, without imports, seconds",
        "of 2",
        "decoding alone",
        "forward alone",
    ]
    headings += ["a further image", "against decoding and forward"]
    return table(headings, [[*seconds.values(), further_image, f"{further_image / bound:.2f}"]])


def evaluating(data: Path, images: int) -> str:
    """Returns a table of `iclip evaluate` on real images and masks with all metrics, against the time in the model."""
    command = ["-m", "iclip_hf.cli", "evaluate", "--dataset", "coco2017", "--data-root", data / "coco100"]
    command += ["--split", "train2017", "--limit", str(images), "--output"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "evaluation.json")
        for processes, launcher in ((1, []), (2, ["-m", "torch.distributed.run", "--nproc-per-node", "2"])):
            environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
            launched = [sys.executable, *launcher, *command, output]
            subprocess.run(launched, check=True, capture_output=True, env=environment)
            timing = json.loads(output.read_text())["timing"]
            seconds, forward = timing["seconds"], timing["seconds_in_model"]
            rows.append([processes, seconds, forward, f"{seconds / forward:.3f}"])
    headings = [
        "processes",
        f"`iclip evaluate` of {images} images, 80 classes, seconds",
        "in the first's model",
        "ratio",
    ]
    return table(headings, rows)


def starting(rounds: int) -> str:
    """
    Returns a table of what a new process takes: imports, help, and the first map, beside loading and running the
    towers with transformers alone.
    """

    def run(*command: str, fails: bool = False) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *command], check=not fails, capture_output=True)

    vision, text, features = map(str, (*embedded_towers(), embedded_feature_tower()))
    bare = f"""
import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
from PIL import Image
image = AutoImageProcessor.from_pretrained({vision!r})(Image.new("RGB", (640, 480)), return_tensors="pt")
text = AutoTokenizer.from_pretrained({text!r})(["a photo of a dog"], return_tensors="pt")
with torch.no_grad():
    for images in ({vision!r}, {features!r}):
        AutoModel.from_pretrained(images)(**image)
    AutoModel.from_pretrained({text!r})(**text)
"""
    with tempfile.TemporaryDirectory() as folder:
        photo = str(Path(folder, "photo.png"))
        Image.new("RGB", SIZE[::-1]).save(photo)
        module = ("-m", "iclip_hf.cli")
        explain_nouns = (*module, "explain", photo, "--output", str(Path(folder, "map.png")))
        explain_text = (*explain_nouns, "--text", "dog")
        contenders = {
            "`import torch, transformers`": run("-c", "import torch, transformers"),
            "`import iclip_hf`": run("-c", "import iclip_hf"),
            "`iclip --help`": run(*module, "--help"),
            "explanation of a missing file": run(*module, "explain", "missing.jpg", "--text", "dog", fails=True),
            "towers loaded and run by transformers": run("-c", bare),
            "first map: `iclip explain` of one photograph": run(*explain_text),
            "the same without texts, which shows the nouns that are present": run(*explain_nouns),
        }
        taken = take_turns(contenders, rounds)
    first, towers = (name for name in taken if "transformers" in name)
    rows = [
        [name, time, *(f"{ratio(taken, name, to):.2f}" for to in (first, towers))]
        for name, time in medians(taken).items()
    ]
    return table(["a new process", "seconds", "times the imports", "times the towers"], rows)


def main():
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--images", type=int, default=40, help="images to explain and to evaluate (default: 40)")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ICLIP_DATA", "data")))
    args = parser.parse_args()
    print(f"{machine()}; medians of {args.rounds} rounds, one evaluation of each kind\n", flush=True)
    for part in (
        lambda: end_to_end(args.images, args.rounds),
        lambda: evaluating(args.data, args.images),
        lambda: starting(args.rounds),
    ):
        print(part(), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
