"""What an explanation costs beside the forward passes of the bare towers.

    python benchmarks/bench_explain.py

The embedded model, images seen at 504 pixels, maps in [0, 1] of 480x640. Prints Markdown tables.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from measuring import command_line, cost, has_bfloat16, machine, medians, ratio, table, take_turns, why_not
from PIL import Image
from torch.nn import functional as F
from transformers import pipeline

from iclip_hf import ICLIPModel, load
from iclip_hf.backends.loading import load_iclip
from iclip_hf.demo.questions import encode_photo, to_npz, viewer_value
from iclip_hf.model.engine import Engine
from iclip_hf.model.processing_iclip import ICLIPProcessor
from iclip_hf.web.viewer import examples


SIZE = (480, 640)
SIDE = 504  # of an image as the model sees it, in pixels
COMPILED = "`torch.compile`"


def loaded() -> ICLIPModel:
    return load_iclip("embedded")[0]


def photograph(seed: int) -> Image.Image:
    """Returns smooth noise of `SIZE`."""
    pixels = np.random.default_rng(seed).integers(0, 255, (15, 20, 3), np.uint8)
    return Image.fromarray(pixels).resize(SIZE[::-1], Image.Resampling.BICUBIC)


def without_gradients(function: Callable[[], object]) -> Callable[[], object]:
    return torch.inference_mode()(function)


def run_image_towers(model: ICLIPModel, pixel_values: torch.Tensor) -> None:
    """Runs the image towers on what `ICLIPModel.encode_image` gives them, and nothing else."""
    smaller = F.avg_pool2d(pixel_values, model.config.vision_downsampling)
    model.vision_model(smaller)
    for view in (pixel_values, smaller):
        model.feature_map(view)


def contenders(model: ICLIPModel, images: int, texts: int) -> dict[str, Callable[[], object]]:
    """
    Returns functions that compute finished maps from pixel values and token ids, all maps of an image at once or one
    at a time, and a function that runs the towers alone.
    """
    pixel_values = torch.randn(images, 3, SIDE, SIDE)
    input_ids = torch.randint(1000, 20000, (texts, 8))
    mask = torch.ones_like(input_ids)

    def explain():
        outputs = model(input_ids, pixel_values, mask, output_similarity_maps=True)
        for maps in outputs.similarity_maps:
            ICLIPProcessor.post_process_similarity_maps(None, maps[None], [SIZE])

    def map_by_map():
        outputs = model(input_ids, pixel_values, mask, output_similarity_maps=True)
        for maps in outputs.similarity_maps:
            for text_map in maps.split(1):  # as `iclip explain` and `Explanation.map` do
                ICLIPProcessor.post_process_similarity_maps(None, text_map[None], [SIZE])

    def towers():
        run_image_towers(model, pixel_values)
        model.text_model(input_ids, mask)

    return {function.__name__: without_gradients(function) for function in (explain, map_by_map, towers)}


def explaining(images: int, rounds: int, batch_rounds: int) -> str:
    model, rows = loaded(), []
    for count, texts in itertools.product((1, images), (1, 20, 80)):
        runs = contenders(model, count, texts)
        taken = take_turns(runs, rounds if count == 1 else batch_rounds)
        slower = [f"{ratio(taken, name, 'towers'):.3f}" for name in ("explain", "map_by_map")]
        memory = [f"{cost(function)[1]:.0f}" for function in runs.values()]
        rows.append([f"{count}, {texts}", 1e3 * medians(taken)["explain"], *slower, *memory])
    headings = ["images, texts", "ms", "against the bare towers", "map by map"]
    return table([*headings, "MiB", "map by map, MiB", "bare towers' MiB"], rows)


def variants(images: int, rounds: int) -> str:
    """Returns a table of what a user may set, precision and compilation."""
    pixel_values, input_ids = torch.randn(images, 3, SIDE, SIDE), torch.randint(1000, 20000, (20, 8))
    models = {"float32": loaded(), COMPILED: torch.compile(loaded())}
    if has_bfloat16():  # emulated, it takes several times as long
        models["bfloat16"] = loaded().to(torch.bfloat16)

    def forward(model) -> Callable[[], object]:
        pixels = pixel_values.to(next(model.parameters()).dtype)
        return without_gradients(lambda: model(input_ids, pixels, output_similarity_maps=True))

    contenders = {name: forward(model) for name, model in models.items()}
    reason = why_not(contenders[COMPILED])  # it needs a C++ compiler and, with Python 3.11, setuptools
    if reason:
        del contenders[COMPILED]
    taken = take_turns(contenders, rounds)
    rows = [[name, time, f"{ratio(taken, 'float32', name):.2f}"] for name, time in medians(taken).items()]
    shown = table([f"{images} images, 20 texts, raw maps", "seconds", "times faster than float32"], rows)
    return f"{shown}\n\n{COMPILED} is left out: {reason}" if reason else shown


def pipelines(count: int, rounds: int) -> str:
    """Returns a table of `pipeline` over images against the model's forward alone, both in batches of 8."""
    model, processor = load_iclip("embedded")
    pipe = pipeline("image-text-similarity-map", model=model, processor=processor)
    images = [photograph(seed) for seed in range(count)]
    texts = ["dog", "ball", "grass"]
    features = model.get_text_features(**processor(labels=texts))
    pixel_values = processor(images=images)["pixel_values"]

    def forwards():
        for batch in pixel_values.split(8):
            model(pixel_values=batch, text_features=features)

    contenders = {"pipeline": lambda: pipe(images, texts, batch_size=8), "forward": without_gradients(forwards)}
    taken = take_turns(contenders, rounds)
    headings = [f"`pipeline` over {count} images of 480x640, 3 texts, batches of 8, seconds", "forward alone", "ratio"]
    return table(headings, [[*medians(taken).values(), f"{ratio(taken, 'pipeline', 'forward'):.3f}"]])


def asking_again(rounds: int) -> str:
    """
    Returns a table of the time of the demo, from upload to archive, for the first texts on an image and for further
    texts on the same image.
    """
    model = load("embedded")
    engine = Engine(model, model.processor)
    image = photograph(0)
    texts = examples()[0].texts.split(", ")
    encoded = encode_photo(engine, image, image.size)

    def answer(seen=None):
        seen = seen or encode_photo(engine, image, image.size)
        (explanation,) = engine.run([seen.prepared], texts)
        viewer_value(seen, explanation), to_npz(explanation)

    contenders = {"first": answer, "again": lambda: answer(encoded), "texts": lambda: engine.encode(texts)}
    taken = take_turns(contenders, rounds)
    first, again, encoding = medians(taken).values()
    headings = ["demo, first texts on an image, seconds", "other texts on it", "ratio", "of which encoding 3 texts"]
    return table(headings, [[first, again, f"{ratio(taken, 'again', 'first'):.3f}", encoding]])


def main():
    parser = command_line(__doc__)
    parser.add_argument(
        "--rounds", type=int, default=15, help="for one image (default: 15); a third of them for several images"
    )
    parser.add_argument("--images", type=int, default=8, help="images of a batch (default: 8)")
    args = parser.parse_args()
    batch_rounds = max(1, args.rounds // 3)
    print(f"{machine()}; medians of {args.rounds} rounds, of {batch_rounds} for several images\n", flush=True)
    for part in (
        lambda: explaining(args.images, args.rounds, batch_rounds),
        lambda: variants(args.images, batch_rounds),
        lambda: pipelines(2 * args.images, batch_rounds),
        lambda: asking_again(args.rounds),
    ):
        print(part(), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
