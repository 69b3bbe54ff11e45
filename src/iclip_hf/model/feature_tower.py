"""The feature tower: a convolutional backbone of timm as a second image tower."""

import copy
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import PreTrainedConfig, TimmWrapperModel


class FeatureTower(TimmWrapperModel):
    """A convolutional backbone of timm."""

    _no_split_modules = ["FeatureTower"]

    def __init__(self, config: PreTrainedConfig):
        if ":" in config.architecture:  # a source such as hf-hub:NAME, from which timm would download
            raise ValueError(f"The feature tower {config.architecture!r:.100} is no architecture of timm.")
        if "checkpoint_path" in (config.model_args or {}):  # older versions of timm would run code of this pickle
            raise ValueError("The model_args of the feature tower name a checkpoint_path; remove it.")
        super().__init__(config)

    def conversion_from(self, image_processor) -> tuple[list[float], list[float]]:
        """
        Returns the mean and standard deviation that convert pixel values of an image processor to the pixel values
        that this tower was trained with.
        """
        # The checkpoint's values precede timm's.
        pretrained = {**self.timm_model.pretrained_cfg, **getattr(self.config, "pretrained_cfg", {})}
        means, stds = image_processor.image_mean, image_processor.image_std
        converted = [(wanted - mean) / std for wanted, mean, std in zip(pretrained["mean"], means, stds)]
        return converted, [wanted / std for wanted, std in zip(pretrained["std"], stds)]

    def forward(self, pixel_values: torch.Tensor, **kwargs):
        """Like the base class. In eval mode on a CPU, batch norms are folded into the convolutions before them."""
        weights = [*self.parameters(), *self.buffers()]
        # Offloaded weights are not in memory, and weights made in inference mode have no version.
        foldable = all(weight.device.type == "cpu" and not weight.is_inference() for weight in weights)
        hooked = any(module._forward_pre_hooks or module._forward_hooks for module in self.timm_model.modules())
        hidden_states = kwargs.get("output_hidden_states")  # those of the copy may be mirrored
        if not foldable or hooked or hidden_states or self.training or torch.compiler.is_compiling():
            return super().forward(pixel_values, **kwargs)
        return super(FeatureTower, self._folded(weights)).forward(pixel_values, **kwargs)

    def _folded(self, weights: list[torch.Tensor]) -> "FeatureTower":
        """Returns a copy with folded batch norms. The copy is made again if the weights have changed."""
        versions = [(weight.data_ptr(), weight._version) for weight in weights]
        if self not in _FOLDED or _FOLDED[self][0] != versions:
            kept = [weight.detach() for weight in weights]
            _FOLDED[self] = versions, kept, _fold_batch_norms(copy.deepcopy(self))
        return _FOLDED[self][-1]


# For each tower: the addresses and versions of the weights that its copy was made from; these weights, kept in memory,
# so that no others can have the same addresses; and the copy. It is not an attribute of the tower, which is saved,
# copied and pickled without its copy.
_FOLDED: WeakKeyDictionary[FeatureTower, tuple[list, list[torch.Tensor], FeatureTower]] = WeakKeyDictionary()


@torch.no_grad()
def _fold_batch_norms(tower: nn.Module) -> nn.Module:
    """
    Replaces each batch norm of a tower by its activation, and the convolution before it by a convolution that also
    computes the norm. Returns the tower.
    """
    from timm.layers import BatchNormAct2d, Conv2dSame

    for parent in [*tower.modules()]:
        for (conv_name, conv), (norm_name, norm) in pairwise([*parent.named_children()]):
            # Convolutions of other types can change their weights in each call. The input of a plain `BatchNorm2d` is
            # not always the convolution before it, as in RepViT.
            if type(conv) in (nn.Conv2d, Conv2dSame) and isinstance(norm, BatchNormAct2d):
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, norm.act)
    _mirror(tower.timm_model)
    return tower


@torch.no_grad()
def _mirror(network: nn.Module) -> None:
    """
    Makes an EfficientNet mirror its input, compute with mirrored kernels, and mirror its output. The output stays the
    same, and no map is copied to pad it, which would make an explanation by the embedded model 7 % slower.

    TensorFlow pads an even side by one pixel more at its end than at its start, and `Conv2dSame` copies the map for
    this padding. A mirrored map has the additional pixel at its start. PyTorch's own padding also has it at the end,
    where a stride of 2 does not read it.
    """
    from timm.layers import Conv2dSame
    from timm.models import EfficientNet

    layers = [layer for layer in network.modules() if [*layer.parameters(False), *layer.buffers(False)]]
    strides = {nn.Conv2d: (1, 1), Conv2dSame: (2, 2)}
    all_fit = all(
        type(layer) in strides and layer.stride == strides[type(layer)] and layer.kernel_size[0] % 2
        for layer in layers
    )
    if type(network) is not EfficientNet or not all_fit:
        return
    for layer in layers:
        layer.weight.copy_(layer.weight.flip(2, 3))
        if type(layer) is Conv2dSame:
            layer.__class__, layer.padding = nn.Conv2d, tuple(side // 2 for side in layer.kernel_size)
    network.conv_stem.register_forward_pre_hook(lambda _, inputs: inputs[0].flip(2, 3))
    network.conv_head.register_forward_hook(lambda _, inputs, output: output.flip(2, 3))
