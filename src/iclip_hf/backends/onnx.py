"""ICLIP in ONNX: the export as two graphs, for images and for texts, and the model that runs the graphs."""

from __future__ import annotations

import copy
import importlib
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..model.configuration_iclip import ICLIPConfig, patch_side
from ..model.modeling_iclip import ICLIPModel
from ..model.outputs import ICLIPImageFeatures, ICLIPTextFeatures
from ..model.processing_iclip import ICLIPProcessor
from ..model.projections import ICLIPBranch
from ..utils.errors import loading_errors, require_extra
from ..utils.files import atomic_folder
from ..utils.published import clean_configs
from ..utils.tables import known
from .internals import symbolic_grid, symbolic_padding


logger = logging.getLogger(__name__)

VISION_FILE, TEXT_FILE = "vision_model.onnx", "text_model.onnx"
# Execution providers of ONNX Runtime, in the order of preference. Others, such as TensorRT, are untested.
_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


def export_onnx(model: ICLIPModel, processor: ICLIPProcessor, folder: str | Path, weights: str = "float32") -> Path:
    """
    Writes a model as two ONNX graphs, with its configuration and processor. The sizes B, T, L, H and W, and the
    number of prompts, are dynamic.

    - `vision_model.onnx`: from `pixel_values` `(B, 3, H, W)`, at least two patches high and wide, to the unit vectors
      `image_embeds` `(B, P)` and `patch_embeds` `(B, h, w, P)`, with a `map_cell_size` to `cell_embeds`, and to
      `attention` and `map_attention` in [0, 1], as in [`ICLIPImageFeatures`].
    - `text_model.onnx`: from `input_ids`, `attention_mask` and the tokenizer's other outputs, `(T, prompts, L)` for
      the prompts of each label, to the unit vectors `text_embeds` and `map_text_embeds` `(T, P)`, and with
      `map_attention="signed"` to the `attention_weights` `(T,)`, as in [`ICLIPTextFeatures`].
    - `config.json`: `logit_scale_init_value` and `logit_bias_init_value` are the trained values.

    With a `recognition_share`, `patch_embeds` and `map_text_embeds` have 2 P numbers.

    Args:
        model, processor: an ICLIP model on the CPU, in float32, and its processor.
        folder: new or empty.
        weights (`str`): number format of the stored weights: `"float32"`; `"bfloat16"`, half the size; or `"int8"`, a
            quarter of the size. The graphs compute in float32.

    Returns:
        The folder.
    """
    # Checks come before the export, which takes a minute.
    weights = known(weights, _STORED, "format of weights")
    if (model.dtype, model.device.type) != (torch.float32, "cpu"):
        raise ValueError(f"Expected a model in float32 on the CPU, got {model.dtype} on {model.device}: convert it.")
    with require_extra("onnx"):
        importlib.import_module("onnxscript")
    with atomic_folder(folder) as built:
        logger.info("Exporting the image tower (1 of 2)")
        _write(_vision_program(model), built / VISION_FILE, weights)
        logger.info("Exporting the text tower (2 of 2)")
        _write(_text_program(model, processor), built / TEXT_FILE, weights)
        trained_config(model).save_pretrained(built)
        processor.save_pretrained(built)
        clean_configs(built)
    return Path(folder)


def trained_config(model: ICLIPModel) -> ICLIPConfig:
    """
    Returns the configuration with the trained logit scale and bias of the recognition branch, which presence needs.
    """
    config, branch = copy.deepcopy(model.config), model.recognition
    config.logit_scale_init_value = min(branch.logit_scale.item(), math.log(100))  # the option's largest value
    config.logit_bias_init_value = None if branch.logit_bias is None else branch.logit_bias.item()
    return config


class ONNXModel:
    """
    An exported model in ONNX Runtime, on the GPU if ONNX Runtime was built for CUDA, otherwise on the CPU. It has the
    methods of [`ICLIPModel`] that the explainers call.

    Args:
        folder: written by [`export_onnx`].
    """

    similarity_maps, weigh_maps = ICLIPModel.similarity_maps, ICLIPModel.weigh_maps
    scores = ICLIPModel.scores
    presence = ICLIPModel.presence
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, folder: str | Path):
        with require_extra("onnx"):
            import onnxruntime

        self.folder = Path(folder)
        providers = [name for name in _PROVIDERS if name in onnxruntime.get_available_providers()]
        with loading_errors(folder):
            self.config = ICLIPConfig.from_pretrained(folder)
            # Used for logits only, so its projections have any size. The configuration has the trained scale and bias.
            self.recognition = ICLIPBranch(self.config, image_dim=1, text_dim=1, recognises=True).requires_grad_(False)
            self._vision, self._text = (
                onnxruntime.InferenceSession(Path(folder, name), providers=providers)
                for name in (VISION_FILE, TEXT_FILE)
            )

    def get_image_features(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures:
        """
        Like [`ICLIPModel.get_image_features`], with the fields that the graph returns. `pixel_values` are
        `(B, 3, H, W)`.
        """
        return ICLIPImageFeatures(**_run(self._vision, {"pixel_values": pixel_values.float()}))

    def get_text_features(self, num_templates: int = 1, **inputs: torch.Tensor) -> ICLIPTextFeatures:
        """Like [`ICLIPModel.get_text_features`]. Inputs are `(M, L)` or `(B, M, L)`."""
        label_shape = (*inputs["input_ids"].shape[:-2], -1)  # (T,) or (B, T)
        prompts = {name: value.flatten(0, -2).unflatten(0, (-1, num_templates)) for name, value in inputs.items()}
        outputs = _run(self._text, prompts)
        return ICLIPTextFeatures(**{name: value.unflatten(0, label_shape) for name, value in outputs.items()})


def _run(session, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = [output.name for output in session.get_outputs()]
    outputs = session.run(names, {name: value.numpy(force=True) for name, value in inputs.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, outputs)}


# ------------------------------------------------------------------------------------------------------- the graphs


def _vision_program(model: ICLIPModel):
    """Exports the encoding of images."""
    patch = patch_side(model.config)
    Dim = torch.export.Dim
    inputs = {"pixel_values": torch.zeros(2, model.config.vision_config.num_channels, 2 * patch, 3 * patch)}
    dynamic_sizes = {0: Dim("batch"), 2: patch * Dim("rows", min=2), 3: patch * Dim("columns", min=2)}
    outputs = ICLIPImageFeatures.compared_fields
    if not model.config.map_cell_size:
        outputs = [name for name in outputs if name != "cell_embeds"]
    with symbolic_grid(model.vision_model), symbolic_padding():
        return _program(model, model.get_image_features, inputs, outputs, dynamic_sizes)


def _text_program(model: ICLIPModel, processor: ICLIPProcessor):
    """Exports the encoding of labels in several prompts."""
    inputs = processor(text=["dog", "a dog", "red ball", "a red ball", "car", "a car"])
    prompts = {name: value.unflatten(0, (3, 2)) for name, value in inputs.items()}
    Dim = torch.export.Dim
    # The export needs a smallest size of 2; the graph also takes one prompt.
    length = Dim("length", min=2, max=processor.max_text_length)
    dynamic_sizes = {0: Dim("labels"), 1: Dim("prompts", min=2), 2: length}
    outputs = ICLIPTextFeatures.compared_fields
    if model.config.map_attention != "signed":
        outputs = outputs[:-1]  # without the weights of the attention

    def encode(**prompts: torch.Tensor) -> ICLIPTextFeatures:
        num_templates = prompts["input_ids"].shape[1]
        tokens = {name: value.flatten(0, 1) for name, value in prompts.items()}
        return model.get_text_features(**tokens, num_templates=num_templates)

    return _program(model, encode, prompts, outputs, dynamic_sizes)


@torch.no_grad()
def _program(
    model: ICLIPModel,
    encode: Callable[..., ModelOutput],
    inputs: Mapping[str, torch.Tensor],
    outputs: tuple[str, ...],
    dynamic_sizes: dict,
):
    """Exports the function `encode` of a model. All inputs have the same `dynamic_sizes`, by dimension."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model  # so that the graph has its weights

        def forward(self, *tensors):
            features = encode(**dict(zip(inputs, tensors)))
            return tuple(features[name] for name in outputs)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own warnings
        program = torch.onnx.export(
            Encoder().eval(),
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes={"tensors": (dynamic_sizes,) * len(inputs)},
            custom_translation_table={round: _round},
        )
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(program.model)  # the stack traces of nodes have paths of this machine
    return program


def _round(number, ndigits=None):
    """Translates Python's `round` of a symbolic number, which the quantile of the attention calls."""
    from onnxscript import opset18 as op

    return op.Cast(op.Round(number), to=7)  # int64


# ------------------------------------------------------------------------------------------------------ the weights


def _write(program, path: Path, weights: str) -> None:
    """
    Writes a graph. Nodes of the graph restore smaller weights to float32. ONNX Runtime runs these nodes once, on
    loading.
    """
    logger.info("Writing %s", path.name)
    store = _STORED[weights]
    if store is None:
        program.save(path)
        return
    import onnx

    model = program.model_proto
    tensors, restoring_nodes = [], []
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1:
            stored, nodes = store(tensor.name, torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()))
            tensors += stored
            restoring_nodes += nodes
        else:
            tensors.append(tensor)
    all_nodes = [*restoring_nodes, *model.graph.node]
    for field, values in ((model.graph.initializer, tensors), (model.graph.node, all_nodes)):
        del field[:]
        field.extend(values)
    onnx.save(model, path)


def _bfloat16(name: str, values: torch.Tensor) -> tuple[list, list]:
    """Stores a matrix in bfloat16. Returns its tensors, and the nodes that restore it."""
    from onnx import TensorProto, helper

    raw = values.bfloat16().view(torch.int16).numpy().tobytes()
    stored = helper.make_tensor(f"{name}.bfloat16", TensorProto.BFLOAT16, values.shape, raw, raw=True)
    return [stored], [helper.make_node("Cast", [stored.name], [name], to=TensorProto.FLOAT)]


def _int8(name: str, values: torch.Tensor) -> tuple[list, list]:
    """
    Stores a matrix in 8 bits with a scale for each column, or a kernel with a scale for each output channel. Returns
    its tensors, and the nodes that restore it.
    """
    from onnx import TensorProto, helper, numpy_helper

    is_kernel = values.ndim == 4
    dims = (1, 2, 3) if is_kernel else tuple(range(values.ndim - 1))
    scales = values.abs().amax(dims, keepdim=is_kernel).clamp(min=1e-30) / 127
    stored = numpy_helper.from_array((values / scales).round().to(torch.int8).numpy(), f"{name}.int8")
    stored_scales = numpy_helper.from_array(scales.numpy(), f"{name}.scale")
    cast = helper.make_node("Cast", [stored.name], [f"{name}.cast"], to=TensorProto.FLOAT)
    return [stored, stored_scales], [cast, helper.make_node("Mul", [*cast.output, stored_scales.name], [name])]


# Functions that store a matrix in fewer bits, by the value of `weights`; None stores all weights as they are.
_STORED = {"float32": None, "bfloat16": _bfloat16, "int8": _int8}
