"""
Image towers of CLIP with generated weights, images and texts: those of the golden maps in `golden.npz`, which the
authors' own code of each method computed. The stream of `RandomState` does not change between versions of numpy.

The ViT has width 64, 4 heads, 6 layers and patches of 16 pixels, of images of 112 pixels. The deep ViT has 12 layers,
of images of 128 pixels, for methods that read layers by their index. The ResNet has one block in each of 4 stages,
width 16, and 8 heads in its attention pool, of images of 224 pixels.
"""

import math

import numpy as np
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel


EMBED, WIDTH, LAYERS, HEADS, PATCH, SIDE = 32, 64, 6, 4, 16, 112
DEEP = {"layers": 12, "side": 128, "seed": 47}
LOGIT_SCALE = 100.0
RESNET_WIDTH, RESNET_SIDE = 16, 224
PREPROCESSING = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28), "interpolation": "bicubic"}
# What a text tower drew, before the image tower: 2 blocks of width 32, norm, projection, tokens and positions.
_DRAWN_BEFORE = 2 * (4 * 32 + 33 * (96 + 32 + 128) + 129 * 32) + 2 * 32 + 32**2 + 49408 * 32 + 77 * 32


class _Weights(dict):
    """Weights by the names of OpenAI's checkpoints, drawn in a fixed order."""

    def __init__(self, seed=20):
        self.draw = np.random.RandomState(seed).standard_normal
        self.draw(_DRAWN_BEFORE)

    def put(self, name, *shape, mean=0.0, std=None, gain=1.0):
        std = math.prod(shape[1:]) ** -0.5 if std is None else std  # a matrix keeps the variance of its input
        self[name] = (mean + gain * std * self.draw(shape)).astype(np.float32)

    def linear(self, name, rows, columns, gain=1.0):
        self.put(f"{name}weight", rows, columns, gain=gain)
        self.put(f"{name}bias", rows, std=0.2)

    def norm(self, name, width, batch=False):
        self.put(f"{name}weight", width, mean=1.0, std=0.3)
        self.put(f"{name}bias", width, std=0.2)
        if batch:
            self.put(f"{name}running_mean", width, std=0.2)
            self.put(f"{name}running_var", width, std=0.2)
            self[f"{name}running_var"] = np.exp(self[f"{name}running_var"])

    def tensors(self):
        return {name: torch.from_numpy(np.array(value)) for name, value in self.items()}


def _waves(height, width, count):
    """Cosines of the `count` lowest frequencies along each side of a grid, `(h w, count^2)`."""
    rows, columns = (np.cos(np.pi * np.outer((np.arange(n) + 0.5) / n, np.arange(count))) for n in (height, width))
    return np.einsum("iu,jv->ijuv", rows, columns).reshape(height * width, count**2)


def _vit_weights(layers=LAYERS, side=SIDE, seed=20):
    weights, grid = _Weights(seed), side // PATCH
    weights.put("conv1.weight", WIDTH, 3, PATCH, PATCH)
    weights.put("class_embedding", WIDTH, std=0.5)
    class_position = 0.5 * weights.draw((1, WIDTH))
    positions = _waves(grid, grid, 4) @ weights.draw((16, WIDTH)) / 4
    weights["positional_embedding"] = np.concatenate([class_position, positions]).astype(np.float32)
    weights.norm("ln_pre.", WIDTH)
    weights.norm("ln_post.", WIDTH)
    for block in (f"transformer.resblocks.{layer}." for layer in range(layers)):
        weights.norm(f"{block}ln_1.", WIDTH)
        weights.norm(f"{block}ln_2.", WIDTH)
        weights.linear(f"{block}attn.in_proj_", 3 * WIDTH, WIDTH)
        weights[f"{block}attn.in_proj_weight"][: 2 * WIDTH] *= 1.75  # queries and keys: uneven attention
        weights.linear(f"{block}attn.out_proj.", WIDTH, WIDTH)
        weights.linear(f"{block}mlp.c_fc.", 4 * WIDTH, WIDTH)
        weights.linear(f"{block}mlp.c_proj.", WIDTH, 4 * WIDTH)
    weights.put("proj", WIDTH, EMBED, std=WIDTH**-0.5)
    if layers == DEEP["layers"]:  # weaker blocks, so that patches do not all become alike
        for block in (f"transformer.resblocks.{layer}." for layer in range(layers - 1)):
            weights[f"{block}attn.out_proj.weight"] *= np.float32(0.35)
            for name in ("attn.out_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias"):
                weights[block + name] *= np.float32(0.25)
    return weights.tensors()


def _resnet_weights():
    weights, half = _Weights(), RESNET_WIDTH // 2
    for number, (rows, columns) in enumerate([(half, 3), (half, half), (2 * half, half)], 1):
        weights.put(f"conv{number}.weight", rows, columns, 3, 3, gain=1.1)
        weights.norm(f"bn{number}.", rows, batch=True)
    inputs = RESNET_WIDTH
    for stage in range(4):
        planes, block = RESNET_WIDTH * 2**stage, f"layer{stage + 1}.0."
        shapes = (planes, inputs, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1)
        for number, shape in enumerate(shapes, 1):
            weights.put(f"{block}conv{number}.weight", *shape, gain=1.1)
            weights.norm(f"{block}bn{number}.", shape[0], batch=True)
        weights.put(f"{block}downsample.0.weight", 4 * planes, inputs, 1, 1, gain=1.1)
        weights.norm(f"{block}downsample.1.", 4 * planes, batch=True)
        inputs = 4 * planes
    weights.put("attnpool.positional_embedding", (RESNET_SIDE // 32) ** 2 + 1, inputs, std=0.5)
    for name, rows in (("q", inputs), ("k", inputs), ("v", inputs), ("c", EMBED)):
        weights.linear(f"attnpool.{name}_proj.", rows, inputs, 1.75 if name in "qk" else 1.0)
    return weights.tensors()


def texts():
    features = np.random.RandomState(21).standard_normal((6, EMBED))
    return torch.from_numpy((features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32))


def images(height, width, seed=22):
    """Two images of smooth shapes and noise, as a processor returns them."""
    draw = np.random.RandomState(seed).standard_normal
    shapes = np.einsum("nf,bcf->bcn", _waves(height, width, 6), draw((2, 3, 36))) / 3
    noise = 0.5 * draw((2, 3, height, width))
    return torch.from_numpy((shapes.reshape(noise.shape) + noise).astype(np.float32))


def transformers_model(layers=LAYERS, side=SIDE, seed=20):
    """The ViT as `CLIPModel`, or the deep one with the sizes `DEEP`."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": HEADS, "patch_size": PATCH, "image_size": side, "hidden_act": "quick_gelu"}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    text |= {"vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 1}
    config = CLIPConfig(vision_config=sizes, text_config=text, projection_dim=EMBED)
    names = {"attn.out_proj": "self_attn.out_proj", "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    names |= {"c_fc": "fc1", "c_proj": "fc2", "ln_": "layer_norm", "transformer.resblocks": "encoder.layers"}
    names |= {"conv1": "embeddings.patch_embedding", "class_embedding": "embeddings.class_embedding"}
    names |= {"positional_embedding": "embeddings.position_embedding.weight"}
    weights = {}
    for name, value in _vit_weights(layers, side, seed).items():
        for old, new in names.items():
            name = name.replace(old, new)
        if name == "proj":
            weights["visual_projection.weight"] = value.T
        elif "in_proj_" in name:
            block, kind = name.split("attn.in_proj_")
            for letter, part in zip("qkv", value.chunk(3)):
                weights[f"vision_model.{block}self_attn.{letter}_proj.{kind}"] = part
        else:
            weights[f"vision_model.{name}"] = value
    return _loaded(CLIPModel(config), weights)


def open_clip_model(tower):
    """The `"vit"` or the `"resnet"` as a model of open_clip."""
    import open_clip

    if tower == "vit":
        weights, sizes = _vit_weights(), {"patch_size": PATCH, "width": WIDTH, "layers": LAYERS}
        vision = {"image_size": SIDE, "head_width": WIDTH // HEADS, **sizes}
    else:
        weights, sizes = _resnet_weights(), {"layers": [1, 1, 1, 1], "width": RESNET_WIDTH, "head_width": 64}
        vision = {"image_size": RESNET_SIDE, **sizes}
    text = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1}
    model = open_clip.CLIP(EMBED, vision, text, quick_gelu=True)
    open_clip.set_model_preprocess_cfg(model, PREPROCESSING)
    return _loaded(model, {f"visual.{name}": value for name, value in weights.items()})


def _loaded(model, weights):
    missing, unexpected = model.load_state_dict(weights, strict=False)
    of_tower = [name for name in missing if name.startswith("vis") and not name.endswith("num_batches_tracked")]
    assert not unexpected and not of_tower, (of_tower, unexpected)
    nn.init.constant_(model.logit_scale, math.log(LOGIT_SCALE))
    return model.eval()


def draw_text_tower(model):
    """Draws the weights of the text tower of a model of open_clip."""
    draw = np.random.RandomState(49).standard_normal
    for name, value in model.state_dict().items():
        if not name.startswith("visual.") and value.ndim:
            value.copy_(torch.from_numpy(draw(tuple(value.shape)) * value.shape[-1] ** -0.5))
    return model
