"""
Each method against the maps that its authors' own code computes on the same weights, `golden.npz`. Images and texts
are those of `golden.py`. The maps are raw, before they are resized and stretched.

| maps | code, commit |
|---|---|
| `naclip` | sinahmr/NACLIP 0cac3a65 |
| `sclip` | wangf3014/SCLIP b56bd301 |
| `clearclip`, `maskclip/variant` | mc-lan/ClearCLIP ad68a404 |
| `maskclip/quick_gelu`, `maskclip/resnet` | chongzhou96/MaskCLIP 245d31f8, with CLIP's activation and epsilon |
| `maskclip/released` | the same as it is, with GELU and 1e-6 |
| `proxyclip` | mc-lan/ProxyCLIP e7b767fb, one image at a time |
| `gem`, `legrad` | WalBouss/GEM 5fa677ca, whose `depth=7` means six blocks, WalBouss/LeGrad a9edb031 |
| `grad_eclip`, `grad_cam/block` | Cyang-Zhao/Grad-Eclip 5c1b5cc1, see below |
| `grad_cam/norm` | jacobgil/pytorch-grad-cam 084273b3 |
| `clip_surgery`, `itsm` | xmed-lab/CLIP_Surgery d4696d47 |
| `sc_clip` | SuleBai/SC-CLIP 0417ba92, one image at a time |
| `resclip` | yvhangyang/ResCLIP 0e085f7f, one image at a time, with PAMR |
| `bi_modal` | hila-chefer/Transformer-MM-Explainability 58eaea85 |
| `second_order` | exclip 1.1, of `benchmarks/second_order.py`, not a method |

The authors' code was changed in these places:

- Position embeddings of images of another shape, `wide`, are interpolated as in Transformers. The authors interpolate
  by a factor of (side + 0.1) / 7, or with antialiasing, which changes maps by 2 to 17 % of their range. ProxyCLIP's
  code swaps height and width, which is undone.
- SC-CLIP's code finds the row of an outlier by the number of rows, here by the number of columns.
- Grad-ECLIP's code has one head in the last block, here all heads as the model (0.1 to 0.3 of the range).
- Its Grad-CAM averages the gradient over all tokens, here over the patches, as pytorch-grad-cam does.
- `clip_surgery/resnet` are the cosines before feature surgery, which weights texts by another score than the model's.
"""

from pathlib import Path
from types import SimpleNamespace

import golden
import numpy as np
import pytest
import torch
from families import raw_maps
from second_order import token_contributions
from transformers import CLIPImageProcessor

from iclip_hf import load
from iclip_hf.explainers import make_explainer
from iclip_hf.explainers.replaced_attention import ReplacedAttention
from iclip_hf.model.batches import for_images, select_texts
from iclip_hf.model.outputs import ICLIPTextFeatures


pytest.importorskip("open_clip", reason="needs open_clip_torch")

SIZES = {"square": (112, 112), "wide": (112, 160), "large": (224, 224)}
SIZES |= {"deep": (128, 128), "deep_wide": (128, 192)}
# Name of the maps, method, options.
CASES = [
    ("naclip/sigma5", "naclip", {}),
    ("naclip/sigma2", "naclip", {"sigma": 2.0}),
    ("naclip/no_window", "naclip", {"sigma": None}),
    ("naclip/residual", "naclip", {"residual": True}),
    ("sclip", "sclip", {}),
    ("clearclip", "clearclip", {}),
    ("clearclip/residual", "clearclip", {"residual": True}),
    ("naclip/no_window", "clearclip", {"tokens": "key"}),  # the same attention
    ("maskclip/quick_gelu", "maskclip", {}),
    ("maskclip/released", "maskclip", {}),
    ("maskclip/variant", "maskclip", {"residual": False}),
    ("maskclip/resnet", "maskclip", {}),
    ("proxyclip/same_grid", "proxyclip", {}),
    ("proxyclip/finer_grid", "proxyclip", {}),
    ("gem", "gem", {}),
    ("gem/depth4", "gem", {"depth": 3}),
    ("gem/iterations2", "gem", {"iterations": 2}),
    ("legrad/blocks1", "legrad", {"depth": 1}),
    ("legrad", "legrad", {}),
    ("legrad/blocks4", "legrad", {"depth": 4}),
    ("grad_eclip", "grad_eclip", {}),
    ("grad_cam/norm", "grad_cam", {}),
    ("grad_cam/block", "grad_cam", {"activations": "block"}),
    ("itsm/vit", "itsm", {}),
    ("itsm/resnet", "itsm", {}),
    ("clip_surgery", "clip_surgery", {}),
    ("clip_surgery/one_text", "clip_surgery", {}),
    ("clip_surgery/resnet", "clip_surgery", {}),
    ("bi_modal", "bi_modal", {}),
    ("bi_modal/from_layer3", "bi_modal", {"layer": 3}),
    ("bi_modal/all_layers", "bi_modal", {"layer": 0}),
    ("sc_clip", "sc_clip", {}),
    ("sc_clip/no_class_token", "sc_clip", {"class_token": 0.0}),
    ("sc_clip/beta_zero", "sc_clip", {"beta": 0.0}),
    ("resclip", "resclip", {}),
    ("resclip/share06", "resclip", {"rcs": 0.6}),
    ("resclip/sfr_voc21", "resclip", {"sfr": (2.2, 0.7, 0.5)}),
    ("resclip/sfr_ade20k", "resclip", {"sfr": (2.1, 0.7, 0.25)}),
]
GOLDEN = dict(np.load(Path(__file__).with_name("golden.npz")))
# Of the range of a map: what is expected from rounding, and from another activation and epsilon.
TOLERANCES = {"maskclip/released": 2e-2}
MODELS = {"square": ("transformers", "vit"), "wide": ("transformers",), "large": ("resnet",)}
MODELS |= dict.fromkeys(("deep", "deep_wide"), ("deep",))


@pytest.fixture(scope="module")
def models(tiny_processor):
    tokenizer = tiny_processor.tokenizer
    processor = SimpleNamespace(image_processor=CLIPImageProcessor(), tokenizer=tokenizer)
    models = {"transformers": load((golden.transformers_model(), processor))}
    models["deep"] = load((golden.transformers_model(**golden.DEEP), processor))
    for tower in ("vit", "resnet"):
        model = golden.open_clip_model(tower)
        models[tower] = load((model, lambda texts: tokenizer(texts, return_tensors="pt")["input_ids"]))
    return models


def features(embeds):
    embeds = torch.as_tensor(embeds)
    return ICLIPTextFeatures(text_embeds=embeds, map_text_embeds=embeds)


@pytest.mark.parametrize(
    ("name", "method", "options", "size"),
    [(*case, size) for case in CASES for size in SIZES if f"{case[0]}/{size}" in GOLDEN],
)
def test_maps_are_those_of_the_authors_code(models, made, name, method, options, size):
    expected = torch.from_numpy(GOLDEN[f"{name}/{size}"])
    if name == "grad_cam/norm":
        expected = expected.relu()  # these are signed
    scale = golden.LOGIT_SCALE if method.startswith("grad_") else 1.0  # of cosines, and of logits here
    made("clip")  # a tiny proxy stands for the embedded one
    for model in MODELS[size]:
        explainer, texts = make_explainer(models[model], method, **options), features(golden.texts())
        pixel_values = golden.images(*SIZES[size], seed=48 if model == "deep" else 22)
        if method == "proxyclip":
            tokens = torch.from_numpy(GOLDEN[f"{name}/tokens/{size}"]).permute(0, 2, 3, 1)
            explainer._proxy_tokens = lambda pixel_values, tokens=tokens: tokens
        if name == "clip_surgery/one_text":
            explainer.empty_text = lambda templates: features(GOLDEN["clip_surgery/one_text/empty"])
            alone = [select_texts(for_images(texts, 2), torch.full((2, 1), text)) for text in range(6)]
            maps = torch.cat([raw_maps(explainer, pixel_values, text)[0] for text in alone], 1)
        elif name == "clip_surgery/resnet":
            maps = ReplacedAttention.forward(explainer, pixel_values, for_images(texts, 2))[0]
        else:
            maps = raw_maps(explainer, pixel_values, texts)[0]
        assert maps.shape == expected.shape
        low, high = expected.flatten(2).aminmax(dim=-1)
        # A map without positive values has no range.
        unit = torch.where(high > low, high - low, 1)[..., None, None]
        torch.testing.assert_close(maps / scale / unit, expected / unit, atol=TOLERANCES.get(name, 1e-5), rtol=1e-5)


def test_every_golden_map_is_compared():
    compared = {f"{name}/{size}" for name, *_ in CASES for size in SIZES}
    others = {"clip_surgery/one_text/empty", "second_order/block2", "second_order/block5"}
    assert {name for name in GOLDEN if "tokens" not in name} - compared == others


@pytest.mark.parametrize("block", [2, 5])
def test_attributions_of_tokens_and_patches_are_those_of_the_authors_code(block):
    model = golden.draw_text_tower(golden.open_clip_model("vit"))
    ids, empty = torch.tensor([[62, 5, 17, 30, 9, 63] + [0] * 6]), torch.tensor([[62, 0, 63] + [0] * 9])
    image = golden.images(*SIZES["square"])[:1]
    of_text = token_contributions(model.encode_text, model.transformer.resblocks[0], ids, empty)
    of_image = token_contributions(
        model.encode_image, model.visual.transformer.resblocks[block], image, torch.zeros_like(image)
    )
    pairs = (of_text @ of_image.T)[:6, 1:].unflatten(1, (7, 7))
    expected = torch.from_numpy(GOLDEN[f"second_order/block{block}"])
    pairs = pairs / model.encode_text(ids).norm() / model.encode_image(image).norm() / expected.abs().max()
    torch.testing.assert_close(pairs, expected / expected.abs().max(), atol=1e-5, rtol=1e-5)


def test_contributions_of_tokens_add_up():
    model, image = golden.transformers_model(), golden.images(*SIZES["square"])[:1]

    def encode(pixel_values):
        return model.get_image_features(pixel_values).pooler_output

    def error(steps):
        added = token_contributions(encode, layer, image, torch.zeros_like(image), steps).sum(0)
        return (added - whole).norm() / whole.norm()

    whole, layer = (encode(image) - encode(torch.zeros_like(image)))[0], model.vision_model.encoder.layers[3]
    assert error(100) < min(error(10) / 5, 0.02)


@pytest.mark.parametrize(
    ("layers", "middle", "early", "levels", "share", "blocks"),
    [
        (24, 17, 7, range(9, 20), 0.1, range(5, 9)),  # of the authors for ViT-L/14
        (6, 4, 2, range(2, 5), 0.3, range(2, 4)),
        (1, 0, 0, range(1), 0.3, range(1)),
    ],
)
def test_layers_by_number_are_stated_or_scaled(tiny_processor, layers, middle, early, levels, share, blocks):
    processor = SimpleNamespace(image_processor=CLIPImageProcessor(), tokenizer=tiny_processor.tokenizer)
    model = load((golden.transformers_model(layers), processor))
    method = make_explainer(model, "sc_clip")
    assert (method.middle, method.early, method.levels, method.class_token) == (middle, early, levels, share)
    assert make_explainer(model, "resclip").blocks == [*blocks]
    assert raw_maps(method, golden.images(112, 112), features(golden.texts()))[0].isfinite().all()
