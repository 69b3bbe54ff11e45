"""Every method on one image with 10 texts, and the alternatives of other packages on the same tower.

    python benchmarks/bench_explainers.py [--texts 10] [--rounds 2]

CLIP ViT-B/16 with random weights, 224 pixels; `proxyclip` with the embedded model's DINOv2 tower. The alternatives are
written with transformers alone, pytorch-grad-cam and captum, and need a forward and a backward pass for each text.
Before the timing, their maps are compared with ours, except captum's, which averages gradients over channels and not
over tokens. A second table has the time from an image to the finished results of 21 texts at 480x640 pixels: maps in
[0, 1], the label map, both of refined maps, and maps at two scales. Prints Markdown tables.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from measuring import command_line, cost, machine, medians, needed, ratio, table, take_turns
from torch.nn import functional as F
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from iclip_hf import load
from iclip_hf.explainers import METHODS, make_explainer
from iclip_hf.model.engine import Engine
from iclip_hf.model.label_maps import label_map
from iclip_hf.model.outputs import ICLIPTextFeatures
from iclip_hf.model.similarity import min_max_normalize, resize_and_normalize


with needed():
    from captum.attr import LayerGradCam
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

SIZE = (480, 640)
CLASSES = 21


class Scores(torch.nn.Module):
    """Returns the cosines of images with fixed texts, (B, T): the classifier that the other packages need."""

    def __init__(self, model: CLIPModel, text_embeds: torch.Tensor):
        super().__init__()
        self.model, self.text_embeds = model, text_embeds

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pooled = self.model.vision_model(pixel_values).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1) @ self.text_embeds.T


def with_transformers(model: CLIPModel, pixel_values: torch.Tensor, text_embeds: torch.Tensor, method: str):
    """Returns the maps of Grad-CAM after the last block's first norm, or of relevance in the last layer."""
    maps, normed = [], []
    handle = model.vision_model.encoder.layers[-1].layer_norm1.register_forward_hook(
        lambda module, args, output: normed.append(output)
    )
    for text in text_embeds:
        outputs = model.vision_model(pixel_values, output_attentions=True)
        logit = (F.normalize(model.visual_projection(outputs.pooler_output), dim=-1) @ text).sum()
        activations = normed.pop()
        if method == "grad_cam":
            (gradient,) = torch.autograd.grad(logit, activations)
            maps.append((activations * gradient[:, 1:].mean(1, keepdim=True)).sum(-1)[:, 1:].relu().detach())
        else:
            (gradient,) = torch.autograd.grad(logit, outputs.attentions[-1])
            maps.append((outputs.attentions[-1] * gradient).relu().mean(1)[:, 0, 1:].detach())
    handle.remove()
    return torch.stack(maps, 1)


def clip(count: int) -> tuple[CLIPModel, argparse.Namespace, ICLIPTextFeatures, torch.Tensor]:
    """Returns a model, its processor, `count` texts, and the pixels of an image."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of"]
    text = {"vocab_size": len(words), "bos_token_id": words.index("[CLS]"), "eos_token_id": words.index("[SEP]")}
    config = CLIPConfig(text_config=text, vision_config={"patch_size": 16})
    model = CLIPModel._from_config(config, attn_implementation="eager").eval()
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as vocabulary:
        vocabulary.write("\n".join(words))
        vocabulary.flush()
        tokenizer = BertTokenizer(vocab=vocabulary.name)
    processor = argparse.Namespace(image_processor=CLIPImageProcessor(), tokenizer=tokenizer)
    embeds = F.normalize(torch.randn(count, config.projection_dim), dim=-1)
    texts = ICLIPTextFeatures(text_embeds=embeds, map_text_embeds=embeds)
    return model, processor, texts, torch.randn(1, 3, 224, 224)


def contenders(count: int) -> dict[str, Callable[[], object]]:
    """Returns functions that explain one image with `count` texts, all on the same tower."""
    model, processor, texts, pixel_values = clip(count)
    embeds = texts.text_embeds
    classifier, layer = Scores(model, embeds), model.vision_model.encoder.layers[-1].layer_norm1
    grid = model.config.vision_config.image_size // model.config.vision_config.patch_size

    def pytorch_grad_cam():
        with GradCAM(classifier, [layer], lambda tokens: tokens[:, 1:].mT.unflatten(2, (grid, grid))) as cam:
            return [cam(pixel_values, [ClassifierOutputTarget(text)]) for text in range(len(embeds))]

    def captum():
        cam = LayerGradCam(classifier, layer)
        return [cam.attribute(pixel_values, target=text, attr_dim_summation=False) for text in range(len(embeds))]

    methods = [method for method in METHODS if method != "attention_affinity"]  # it needs an ICLIP model
    explainers = [make_explainer((model, processor), method) for method in methods]
    engines = [Engine(explainer.model, explainer.model.processor, explainer) for explainer in explainers]
    return {
        "the image tower's forward": torch.no_grad()(lambda: model.vision_model(pixel_values)),
        **{f"`{method}`": partial(engine.raw_maps, pixel_values, texts) for method, engine in zip(methods, engines)},
        "Grad-CAM with transformers": lambda: with_transformers(model, pixel_values, embeds, "grad_cam"),
        "Grad-CAM of pytorch-grad-cam": pytorch_grad_cam,
        "Grad-CAM of captum": captum,
        "relevance with transformers": lambda: with_transformers(model, pixel_values, embeds, "bi_modal"),
    }


def uses_of_maps() -> dict[str, Callable[[], object]]:
    """Returns functions that compute finished maps or a label map from the pixels of a photograph."""
    model, processor, texts, pixel_values = clip(CLASSES)
    loaded = load((model, processor))

    def raw_maps(refine: bool, multi_scale: bool = False) -> torch.Tensor:
        engine = Engine(loaded, loaded.processor, refine=refine, multi_scale=multi_scale)
        return engine.raw_maps(twice_as_large if multi_scale else pixel_values, texts)[0][0]

    twice_as_large = torch.randn(1, 3, 448, 448)
    return {
        "explaining": lambda: resize_and_normalize(raw_maps(False), SIZE),
        "segmenting": lambda: label_map(raw_maps(False), SIZE),
        "explaining, refined": lambda: resize_and_normalize(raw_maps(True), SIZE),
        "segmenting, refined": lambda: label_map(raw_maps(True), SIZE),
        "explaining, at two scales": lambda: resize_and_normalize(raw_maps(False, multi_scale=True), SIZE),
    }


def compare(all_contenders: dict[str, Callable[[], object]]) -> None:
    """Raises `AssertionError` unless the alternatives compute the same maps as `iclip_hf`, up to their scale."""
    maps = {name: all_contenders[name]() for name in ("`grad_cam`", "`bi_modal`")}
    (grad_cam, _), (bi_modal, _) = maps.values()
    enlarged = F.interpolate(grad_cam, (224, 224), mode="bilinear")[0].numpy()  # as pytorch-grad-cam does
    for ours, theirs in (
        (grad_cam, all_contenders["Grad-CAM with transformers"]()),
        (bi_modal, all_contenders["relevance with transformers"]()),
    ):
        theirs = theirs.unflatten(-1, ours.shape[2:])
        torch.testing.assert_close(min_max_normalize(ours), min_max_normalize(theirs), atol=1e-3, rtol=0)
    for ours, (theirs,) in zip(enlarged, all_contenders["Grad-CAM of pytorch-grad-cam"]()):
        correlation = np.corrcoef(ours.ravel(), theirs.ravel())[0, 1]
        assert correlation > 0.999, f"Expected equal maps, got a correlation of {correlation:.3f}."


def main():
    parser = command_line(__doc__)
    parser.add_argument("--texts", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()

    all_contenders = contenders(args.texts)
    compare(all_contenders)
    taken = take_turns(all_contenders, args.rounds)
    forward, rows = next(iter(taken)), []
    for name, time in medians(taken).items():
        ours = {"Grad-CAM": "`grad_cam`", "relevance": "`bi_modal`"}.get(name.split()[0])
        against = f"{ratio(taken, name, ours):.1f} times {ours}" if ours else ""
        memory = cost(all_contenders[name])[1]
        rows.append([name, time, f"{ratio(taken, name, forward):.2f}", against, f"{memory:.0f}"])
    print(f"{machine('captum', 'grad-cam')}; one image, {args.texts} texts, medians of {args.rounds} rounds\n")
    print(table(["what", "seconds", "forwards", "against `iclip_hf`", "MiB"], rows))

    taken = take_turns(uses_of_maps(), args.rounds)
    rows = [[name, time, f"{ratio(taken, name, 'explaining'):.2f}"] for name, time in medians(taken).items()]
    print(f"\nOne photograph of {SIZE[1]}x{SIZE[0]} pixels, {CLASSES} texts\n")
    print(table(["what", "seconds", "times explaining"], rows))


if __name__ == "__main__":
    main()
