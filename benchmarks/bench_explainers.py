"""
Seconds to explain one 224x224 image with 20 texts, CLIP ViT-B/16 (random weights): this package, and what one would write
with transformers alone, a forward and a backward for each text.

    python benchmarks/bench_explainers.py [--texts 20] [--repeats 3] [--device cpu]
"""

import argparse
import tempfile
import time

import torch
from torch.nn import functional as F
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from iclip_hf.explainers import METHODS, make_explainer
from iclip_hf.modeling_iclip import ICLIPTextFeatures


def naive(model, pixel_values, text_embeds, method):
    """One forward and backward a text, on the model's public outputs."""
    maps = []
    for text in text_embeds:
        outputs = model.vision_model(pixel_values, output_attentions=True, output_hidden_states=True)
        logit = (F.normalize(model.visual_projection(outputs.pooler_output), dim=-1) @ text).sum()
        if method == "grad_cam":
            activations = outputs.hidden_states[-2]
            (gradient,) = torch.autograd.grad(logit, activations)
            maps.append((activations * gradient[:, 1:].mean(1, keepdim=True)).sum(-1)[:, 1:].relu().detach())
        else:
            (gradient,) = torch.autograd.grad(logit, outputs.attentions[-1])
            maps.append((outputs.attentions[-1] * gradient).relu().mean(1)[:, 0, 1:].detach())
    return torch.stack(maps, 1)


def seconds(run, repeats, device):
    """The best of some runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = CLIPConfig(vision_config={"patch_size": 16})
    model = CLIPModel._from_config(config, attn_implementation="eager").eval().to(args.device)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as vocabulary:
        vocabulary.write("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of"]))
        vocabulary.flush()
        tokenizer = BertTokenizer(vocab=vocabulary.name)
    processor = argparse.Namespace(image_processor=CLIPImageProcessor(), tokenizer=tokenizer)
    embeds = F.normalize(torch.randn(args.texts, config.projection_dim, device=args.device), dim=-1)
    texts = ICLIPTextFeatures(text_embeds=embeds, map_text_embeds=embeds)
    pixel_values = torch.randn(1, 3, 224, 224, device=args.device)

    def measure(name, run):
        took = seconds(run, args.repeats, args.device)
        print(f"{name:<40} {took:8.3f} s")
        return took

    with torch.no_grad():
        measure("one image forward", lambda: model.vision_model(pixel_values))
    for method in METHODS:
        explainer = make_explainer(model, processor, method)
        took = measure(method, lambda explainer=explainer: explainer.raw_maps(pixel_values, texts))
        if method in ("grad_cam", "bi_modal"):
            slow = measure(
                f"{method}, a forward and backward a text",
                lambda method=method: naive(model, pixel_values, embeds, method),
            )
            print(f"{'':<40} {slow / took:8.1f} times")


if __name__ == "__main__":
    main()
