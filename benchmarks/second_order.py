"""
Second-order attribution (Möller et al., "Explaining Caption-Image Interactions in CLIP Models with Second-Order
Attributions", TMLR 2025): what each pair of a token of the text and a token of the image adds to their similarity.
"""

import torch


def token_contributions(encode, layer, inputs, reference, steps=10):
    """
    Computes what each token of an input adds to its embedding: the Jacobian of the embedding with respect to the
    hidden states before a layer, integrated from a reference to the input, times the difference of both (Eq. 9).

    Args:
        encode: function from a batch of inputs `(B, ...)` to embeddings `(B, D)`.
        layer (`torch.nn.Module`): takes hidden states `(B, L, C)` first.
        inputs, reference (`torch.Tensor` of shape `(1, ...)`): the input, and one that has no content.
        steps (`int`): number of points between the reference and the input. With more, the contributions add up to
            the difference of the embeddings of both more exactly.

    Returns:
        `torch.Tensor` of shape `(L, D)`.
    """
    path = []

    def interpolate(_, args):
        states, start = args[0][:1].detach(), args[0][-1:].detach()
        shares = torch.arange(steps, 0, -1, device=states.device)[:, None, None] / steps
        path.extend([(start + shares * (states - start)).requires_grad_(), states - start])
        return torch.cat([path[0], start]), *args[1:]

    handle = layer.register_forward_pre_hook(interpolate)
    try:
        embeddings = encode(torch.cat([inputs.expand(steps, *inputs.shape[1:]), reference]))[:steps].mean(0)
    finally:
        handle.remove()
    states, difference = path
    each = torch.eye(embeddings.shape[-1], device=states.device)
    jacobian = torch.autograd.grad(embeddings, states, each, is_grads_batched=True)[0].sum(1)  # (D, L, C)
    return torch.einsum("dlc,lc->ld", jacobian, difference[0])
