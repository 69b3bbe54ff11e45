"""What an explanation costs beside what it cannot do without: the bare towers' forward.

    python benchmarks/bench_explain.py

The embedded model, images seen at 224 pixels, maps in [0, 1] of 480x640. Prints Markdown tables.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measuring import alone, command_line, cost, machine, medians, ratio, table, take_turns
from PIL import Image
from transformers import AutoModel, pipeline

from iclip_hf import ICLIPModel, load
from iclip_hf.backends.embedded import embedded_towers
from iclip_hf.backends.loading import load_iclip
from iclip_hf.cli.options import keep_memory
from iclip_hf.model.engine import Engine
from iclip_hf.model.images import load_image
from iclip_hf.model.processing_iclip import ICLIPProcessor


SIZE = (480, 640)


def loaded() -> ICLIPModel:
    return load_iclip("embedded")[0]


def photograph(seed: int) -> Image.Image:
    """Smooth noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (15, 20, 3), np.uint8)
    return Image.fromarray(pixels).resize(SIZE[::-1], Image.Resampling.BICUBIC)


def without_gradients(function: Callable[[], object]) -> Callable[[], object]:
    return torch.inference_mode()(function)


def contenders(images: int, texts: int) -> dict[str, Callable[[], object]]:
    """From pixel values and token ids to finished maps; the towers alone; and the towers with all attentions kept."""
    model = loaded()
    towers = [AutoModel.from_pretrained(tower, attn_implementation="eager").eval() for tower in embedded_towers()]
    pixel_values = torch.randn(images, 3, 224, 224)
    input_ids = torch.randint(1000, 20000, (texts, 8))
    mask = torch.ones_like(input_ids)

    def explain():
        outputs = model(input_ids, pixel_values, mask, output_similarity_maps=True)
        for maps in outputs.similarity_maps:  # one image's at a time, as one looks at them
            ICLIPProcessor.post_process_similarity_maps(None, maps[None], [SIZE])

    def map_by_map():
        outputs = model(input_ids, pixel_values, mask, output_similarity_maps=True)
        for maps in outputs.similarity_maps:
            for of_text in maps.split(1):  # as `iclip explain` and `Explanation.map` take them
                ICLIPProcessor.post_process_similarity_maps(None, of_text[None], [SIZE])

    def bare():
        model.vision_model(pixel_values)
        model.text_model(input_ids, mask)

    def with_attentions():
        vision, text = towers
        vision(pixel_values, output_attentions=True)
        text(input_ids, mask)

    functions = (explain, map_by_map, bare, with_attentions)
    return {function.__name__.replace("_", " "): without_gradients(function) for function in functions}


def contender(name: str, images: int, texts: int) -> Callable[[], object]:
    return contenders(images, texts)[name]


def turns(images: int, texts: int, rounds: int, kept: bool) -> dict[str, list[float]]:
    """Runs in a process of its own, which keeps freed memory, as `iclip` does, or gives it back to the system."""
    runs = contenders(images, texts)
    if kept:
        keep_memory()
        del runs["with attentions"]
    return take_turns(runs, rounds)


def explaining(rounds: int, images: int) -> str:
    rows = []
    for number, texts in ((n, t) for n in (1, images) for t in (1, 20, 80)):
        taken, kept = (alone(turns, number, texts, rounds, keeping) for keeping in (False, True))
        slower = [ratio(times, name, "bare") for times in (taken, kept) for name in ("explain", "map by map")]
        slower.append(ratio(taken, "explain", "with attentions"))
        memory = [cost(contender, name, number, texts)[1] for name in ("explain", "map by map", "bare")]
        cells = [*(f"{times:.3f}" for times in slower), *(f"{mebibytes:.0f}" for mebibytes in memory)]
        rows.append([f"{number}, {texts}", 1e3 * medians(taken)["explain"], *cells])
    headings = [
        "images, texts",
        "ms",
        "against the bare towers",
        "map by map",
        "memory kept",
        "memory kept, map by map",
    ]
    headings += ["against eager attentions", "MiB", "map by map, MiB", "bare towers' MiB"]
    return table(headings, rows)


def variants(rounds: int) -> str:
    """What a user may set: precision, memory format, compilation."""
    pixel_values, input_ids = torch.randn(8, 3, 224, 224), torch.randint(1000, 20000, (20, 8))
    models = {
        "float32": loaded(),
        "bfloat16": loaded().to(torch.bfloat16),
        "channels-last": loaded().to(memory_format=torch.channels_last),
        "`torch.compile`": torch.compile(loaded()),
    }

    def forward(model) -> Callable[[], object]:
        pixels = pixel_values.to(next(model.parameters()).dtype)
        return without_gradients(lambda: model(input_ids, pixels, output_similarity_maps=True))

    taken = take_turns({name: forward(model) for name, model in models.items()}, rounds)
    rows = [[name, time, f"{ratio(taken, 'float32', name):.2f}"] for name, time in medians(taken).items()]
    return table(["8 images, 20 texts, raw maps", "seconds", "times faster than float32"], rows)


def pipelines(rounds: int) -> str:
    """`pipeline` over 100 images against the model's forward alone, both in batches of 8."""
    model, processor = load_iclip("embedded")
    pipe = pipeline("image-text-similarity-map", model=model, processor=processor)
    images = [photograph(seed) for seed in range(100)]
    texts = ["dog", "ball", "grass"]
    features = model.get_text_features(**processor(labels=texts))
    pixel_values = processor(images=images)["pixel_values"]

    def forwards():
        for batch in pixel_values.split(8):
            model(pixel_values=batch, text_features=features)

    contenders = {"pipeline": lambda: pipe(images, texts, batch_size=8), "forward": without_gradients(forwards)}
    taken = take_turns(contenders, rounds)
    headings = ["`pipeline` over 100 images of 480x640, 3 texts, batches of 8", "forward alone", "ratio"]
    return table(headings, [[*medians(taken).values(), f"{ratio(taken, 'pipeline', 'forward'):.3f}"]])


def asking_again(rounds: int) -> str:
    """The demo's answer for the first texts on an image and for other texts on the same one, from upload to archive."""
    # Gradio would take long to import in each of the fresh processes.
    from iclip_hf.demo.app import look_at, to_npz, viewer_value
    from iclip_hf.hub.viewer import EXAMPLES

    model = load("embedded")
    engine = Engine(model, model.processor)
    image = photograph(0)
    texts = next(iter(EXAMPLES.values())).texts.split(", ")
    kept = look_at(engine, image)

    def answer(seen=None):
        seen = seen or look_at(engine, image)
        (explanation,) = engine.run([seen.prepared], texts)
        viewer_value(seen, explanation), to_npz(explanation)

    contenders = {"first": answer, "again": lambda: answer(kept), "texts": lambda: engine.encode(texts)}
    taken = take_turns(contenders, rounds)
    first, again, encoding = medians(taken).values()
    headings = ["demo, first texts on an image", "other texts on it", "ratio", "of which encoding 3 texts"]
    return table(headings, [[first, again, f"{ratio(taken, 'again', 'first'):.3f}", encoding]])


def end_to_end(files: int) -> str:
    """`iclip explain` of JPEG files against decoding them and the model's forward, each alone."""
    model, processor = load_iclip("embedded")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.jpg") for number in range(files)]
        for seed, path in enumerate(paths):
            photograph(seed).save(path, quality=90)
        texts = ["dog", "ball", "grass"]
        command = [sys.executable, "-m", "iclip_hf.cli", "explain", *paths, "--output", Path(folder, "out"), "--json"]
        command += [word for text in texts for word in ("--text", text)]
        of_two = [word for word in command if word not in paths[2:]]
        pixel_values = processor(images=[load_image(path) for path in paths[:8]])["pixel_values"]
        ids = processor(labels=texts)

        def forwards():
            for start in range(0, files, 8):
                model(pixel_values=pixel_values[: files - start], **ids)

        contenders = {
            "command": lambda: subprocess.run(command, check=True, capture_output=True),
            "of two": lambda: subprocess.run(of_two, check=True, capture_output=True),
            "decode": lambda: [load_image(path) for path in paths],
            "forward": without_gradients(forwards),
        }
        taken = take_turns(contenders, 3)
    seconds = medians(taken)
    an_image = (seconds["command"] - seconds["of two"]) / (files - 2)
    bound = (seconds["decode"] + seconds["forward"]) / files
    headings = [f"`iclip explain` of {files} files", "of 2 (start-up)", "decoding alone", "forward alone"]
    headings += ["an image, start-up apart", "against decoding and forward"]
    return table(headings, [[*seconds.values(), an_image, f"{an_image / bound:.2f}"]])


def evaluating(data: Path) -> str:
    """`iclip evaluate` on real images and masks, with all its metrics: how much of the time is not the model's."""
    command = ["-m", "iclip_hf.cli", "evaluate", "--dataset", "coco2017", "--data-root", data / "coco100"]
    command += ["--split", "train2017", "--output"]
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
    return table(["processes", "evaluating 100 images, 80 classes, seconds", "in the first's model", "ratio"], rows)


def starting(rounds: int) -> str:
    """A fresh process: imports, help, and the first map beside the least that transformers alone needs to load and run."""

    def run(*command: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *command], capture_output=True)

    vision, text = map(str, embedded_towers())
    bare = f"""
import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
from PIL import Image
image = AutoImageProcessor.from_pretrained({vision!r})(Image.new("RGB", (640, 480)), return_tensors="pt")
text = AutoTokenizer.from_pretrained({text!r})(["a photo of a dog"], return_tensors="pt")
with torch.no_grad():
    AutoModel.from_pretrained({vision!r})(**image), AutoModel.from_pretrained({text!r})(**text)
"""
    with tempfile.TemporaryDirectory() as folder:
        photo = str(Path(folder, "photo.png"))
        Image.new("RGB", SIZE[::-1]).save(photo)
        iclip = ("-m", "iclip_hf.cli")
        explain = (*iclip, "explain", photo, "--text", "dog", "--output", str(Path(folder, "map.png")))
        subprocess.run([sys.executable, *explain], check=True, capture_output=True)
        contenders = {
            "`import torch, transformers`": run("-c", "import torch, transformers"),
            "`import iclip_hf`": run("-c", "import iclip_hf"),
            "`iclip --help`": run(*iclip, "--help"),
            "explanation of a missing file": run(*iclip, "explain", "missing.jpg", "--text", "dog"),
            "towers loaded and run by transformers": run("-c", bare),
            "first map: `iclip explain` of one photograph": run(*explain),
        }
        taken = take_turns(contenders, rounds)
    first, *_, towers, first_map = taken
    rows = [[name, time, f"{ratio(taken, name, first):.3f}"] for name, time in medians(taken).items()]
    shown = table(["a fresh process", "seconds", "ratio"], rows)
    return f"{shown}\n\nThe first map takes {ratio(taken, first_map, towers):.2f} times as long as the towers by Transformers."


def main():
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--images", type=int, default=8, help="images of a batch")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ICLIP_DATA", "data")))
    options = parser.parse_args()
    print(f"{machine()}; medians of {options.rounds} rounds, of 3 for 100 images\n", flush=True)
    for part in (
        lambda: explaining(options.rounds, options.images),
        lambda: variants(options.rounds),
        lambda: pipelines(3),
        lambda: asking_again(options.rounds),
        lambda: end_to_end(100),
        lambda: evaluating(options.data),
        lambda: starting(max(3, options.rounds // 2)),
    ):
        print(part(), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
