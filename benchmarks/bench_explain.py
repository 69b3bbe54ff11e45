"""What an explanation costs beside what it cannot do without: the bare towers' forward. Prints a Markdown table.

One image of 480x640 pixels, seen at 224, with 1, 20 and 80 texts: from pixel values and token ids to maps in [0, 1] at the
image's size. Both sides run in turn, so that a drifting machine slows both; quoted is the median of the pairs' ratios.
"""

import statistics
import subprocess
import sys
import time

import torch
from transformers import BertConfig, Dinov2Config

from iclip_hf import ICLIPConfig, ICLIPModel
from iclip_hf.processing_iclip import ICLIPProcessor


PAIRS = 10
SIZE = (480, 640)


def embedded_size() -> ICLIPModel:
    """The embedded model's shape, DINOv2 ViT-S/14 and MiniLM-L6, with random weights."""
    vision = Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=14, image_size=518)
    text = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    config = ICLIPConfig(vision_config=vision, text_config=text, text_pooling="mean", map_affinity=4)
    return ICLIPModel(config).eval()


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def paired(ours, theirs) -> tuple[float, float, float]:
    """Medians of both in seconds, and of the ratio ours / theirs pair by pair."""
    ours(), theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(PAIRS)]
    a, b = zip(*times)
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in times)


@torch.inference_mode()
def explaining(model: ICLIPModel, texts: int) -> tuple[float, float, float]:
    pixel_values = torch.randn(1, 3, 224, 224)
    input_ids = torch.randint(1000, 20000, (texts, 8))
    mask = torch.ones_like(input_ids)

    def bare():
        model.vision_model(pixel_values)
        model.text_model(input_ids, mask)

    def explain():
        outputs = model(input_ids, pixel_values, mask, output_similarity_maps=True)
        ICLIPProcessor.post_process_similarity_maps(None, outputs.similarity_maps, [SIZE])

    return paired(explain, bare)


def importing() -> tuple[float, float, float]:
    def run(code):
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    return paired(run("import torch, transformers, iclip_hf"), run("import torch, transformers"))


def main():
    model = embedded_size()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {PAIRS} pairs\n")
    print("| what | ours, ms | bare, ms | ratio |\n|---|---|---|---|")
    for texts in (1, 20, 80):
        ours, bare, ratio = explaining(model, texts)
        print(f"| one image, {texts} texts, against the towers | {1e3 * ours:.1f} | {1e3 * bare:.1f} | {ratio:.3f} |")
    ours, bare, ratio = importing()
    print(f"| import, against torch and transformers | {1e3 * ours:.0f} | {1e3 * bare:.0f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
