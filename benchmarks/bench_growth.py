"""How time and memory of explaining grow with images, texts and pixels, and what pixels add to the image towers' own
growth.

    python benchmarks/bench_growth.py

Prints two Markdown tables. The embedded model, maps of 480x640.
"""

from collections.abc import Callable

import torch
from bench_explain import SIZE, loaded, run_image_towers, without_gradients
from measuring import command_line, cost, machine, medians, ratio, table, take_turns

from iclip_hf import ICLIPModel, ICLIPProcessor
from iclip_hf.model.batches import join_texts
from iclip_hf.model.engine import PROMPT_BATCH


# Sizes of what does not grow.
FIXED = {"images": 1, "texts": 20, "pixels per side": 504}
GROWN = {
    "images": (1, 10, 100),
    "texts": (1, 10, 100, 1000, 10_000),
    "pixels per side": (504, 1008, 2016, 3024),
}


def grown(model: ICLIPModel, images: int, texts: int, pixels: int) -> Callable[[], object]:
    """Returns a function that explains images of `pixels` per side, in batches of 8, and keeps no map."""
    input_ids = torch.randint(1000, 20000, (texts, 8))

    def explain():
        features = join_texts([model.get_text_features(part) for part in input_ids.split(PROMPT_BATCH)])
        for start in range(0, images, 8):
            maps = model.similarity_maps(torch.randn(min(8, images - start), 3, pixels, pixels), features)
            for image_maps in maps:
                for part in image_maps.split(8):
                    ICLIPProcessor.post_process_similarity_maps(None, part[None], [SIZE])

    return without_gradients(explain)


def growth(model: ICLIPModel) -> list[list]:
    """Returns a row for each value in `GROWN`: images, texts, pixels per side, seconds, MiB."""
    settings = [tuple({**FIXED, name: value}.values()) for name, values in GROWN.items() for value in values]
    grown(model, *settings[0])()  # not counted, because the first call of a process takes longer
    costs = {setting: cost(grown(model, *setting)) for setting in dict.fromkeys(settings)}
    return [[*setting, *costs[setting]] for setting in settings]


def bare_towers(model: ICLIPModel, pixels: int) -> Callable[[], object]:
    """Returns a function that runs the image towers alone on one image of `pixels` per side."""
    pixel_values = torch.randn(1, 3, pixels, pixels)
    return without_gradients(lambda: run_image_towers(model, pixel_values))


def large_images(model: ICLIPModel) -> str:
    """Returns a table of explaining one image with one text, against its image towers alone."""
    rows = []
    for pixels in (504, 1008, 2016):
        contenders = {"explain": grown(model, 1, 1, pixels), "towers": bare_towers(model, pixels)}
        taken = take_turns(contenders, 10 if pixels == 504 else 3)
        memory = [cost(function)[1] for function in contenders.values()]
        slower = f"{ratio(taken, 'explain', 'towers'):.3f}"
        rows.append([pixels, *medians(taken).values(), slower, *(f"{mebibytes:.0f}" for mebibytes in memory)])
    return table(["pixels per side", "seconds", "towers alone", "ratio", "MiB", "towers' MiB"], rows)


def main():
    command_line(__doc__).parse_args()
    print(f"{machine()}; each size once, ratios as medians of 3 rounds (10 at 504 pixels)\n", flush=True)
    model = loaded()
    rows = growth(model)
    unique_rows = dict.fromkeys((*row[:4], f"{row[4]:.0f}") for row in rows)  # `FIXED` is in the rows of each size
    print(table([*FIXED, "seconds", "MiB"], [[*row] for row in unique_rows]), end="\n\n", flush=True)
    print(large_images(model))


if __name__ == "__main__":
    main()
