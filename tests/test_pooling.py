import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from iclip_hf.model.pooling import average_by_affinity, normalize_attention, pool, pool_similarities


ATTENTION = torch.tensor([[0.1, 0.5, 0.2, 0.3, 0.1]])


def test_minmax_by_hand():
    expected = torch.tensor([[0.0, 1.0, 0.25, 0.5, 0.0]])
    torch.testing.assert_close(normalize_attention(ATTENTION, "minmax", 0.9), expected)


@pytest.mark.parametrize("count", [3, 8, 9, 16, 50])
def test_the_quantile_is_that_of_numpy(count):
    attention = torch.randn(1, count, generator=torch.Generator().manual_seed(count)).double().softmax(-1)
    for quantile in (0.26, 0.33, 0.51, 0.77, 0.9, 0.97, 1):
        high, low = np.quantile(attention, quantile, method="nearest"), attention.min()
        expected = ((attention - low) / (high - low)).clamp(max=1).float()
        torch.testing.assert_close(normalize_attention(attention, "quantile", quantile), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["minmax", "quantile"])
def test_constant_attention_is_zero_not_nan(norm):
    assert normalize_attention(torch.full((2, 9), 0.1), norm, 0.9).eq(0).all()
    assert normalize_attention(torch.ones(1, 1), norm, 0.9).eq(0).all()


def test_poolings_by_hand():
    tokens = torch.tensor([[[1.0, -4.0], [3.0, 2.0], [2.0, 6.0]]])
    class_token = torch.tensor([[9.0, 9.0]])
    attention = torch.tensor([[1.0, 0.5, 0.0]])
    expected = {
        "class_token": [9.0, 9.0],
        "average": [2.0, 4 / 3],
        "max": [3.0, 6.0],
        "masked_max": [1.5, 1.0],  # max(1*1, .5*3, 0*2), max(1*-4, .5*2, 0*6)
    }
    for mode, vector in expected.items():
        torch.testing.assert_close(pool(tokens, class_token, attention, mode), torch.tensor([vector]))


def pooled(similarities, attention, sharpness=10.0):
    """Pools given similarities (T, N) of one image: with texts along the axes, patches have them as components."""
    patches = torch.tensor(similarities).T.unsqueeze(0)
    return pool_similarities(patches, torch.eye(patches.shape[-1]), torch.tensor([attention]), sharpness)


def test_pooled_similarities_lie_between_mean_and_maximum_of_the_attended():
    similarities, attention = [[0.1, 0.5, 0.9], [0.3, -0.2, 0.0]], [1.0, 3.0, 0.0]
    weighted = torch.tensor([[0.4, -0.075]])
    torch.testing.assert_close(pooled(similarities, attention, 0.01), weighted, atol=1e-3, rtol=0)
    sharp = pooled(similarities, attention, 1e4)
    torch.testing.assert_close(sharp, torch.tensor([[0.5, 0.3]]), atol=1e-3, rtol=0)  # 0.9 is masked
    ten = pooled(similarities, attention)
    torch.testing.assert_close(ten[0, 0], torch.tensor(0.25 * 2.718282 + 0.75 * 148.413159).log() / 10)


@pytest.mark.parametrize("learning", ["nothing", "patches", "attention"])  # each takes another road
def test_pooled_similarities_stay_precise_under_autocast(learning):
    draws = torch.Generator().manual_seed(0)
    patches, texts = (F.normalize(torch.randn(*shape, 32, generator=draws), dim=-1) for shape in ((2, 9), (3,)))
    inputs = {"patches": patches, "texts": texts, "attention": torch.rand(2, 9, generator=draws)}
    expected = pool_similarities(*inputs.values(), 10.0)
    if learning in inputs:
        inputs[learning].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(pool_similarities(*inputs.values(), 10.0), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sharpness", [10.0, 1000.0])  # exp(1000) is infinite
def test_the_gradient_of_pooled_similarities_is_that_of_the_formula(sharpness):
    """
    300 x 5 x 200 similarities take several parts; one image has a patch without attention, one no attention at all.
    """
    draws = torch.Generator().manual_seed(0)
    attention = torch.rand(300, 5, generator=draws)
    attention[0, 1], attention[1] = 0, 0
    prior = torch.where(attention.sum(1, keepdim=True) > 0, attention / attention.sum(1, keepdim=True), 0.2)
    inputs = [F.normalize(torch.randn(*shape, generator=draws), dim=-1) for shape in ((300, 5, 16), (200, 16))]
    weights = torch.randn(300, 200, generator=draws)
    results = {}
    for name, dtype in (("own", torch.float32), ("formula", torch.float64)):
        patches, texts = (one.to(dtype, copy=True).requires_grad_() for one in inputs)
        if name == "own":
            scores = pool_similarities(patches, texts, attention, sharpness)
        else:
            logits = prior.double().log().unsqueeze(1) + sharpness * torch.einsum("tp,bnp->btn", texts, patches)
            scores = logits.logsumexp(-1) / sharpness
        results[name] = scores, *torch.autograd.grad((scores * weights).sum(), (patches, texts))
    for own, formula in zip(results["own"], results["formula"]):
        torch.testing.assert_close(own.double(), formula, atol=1e-4, rtol=1e-4)
    with torch.no_grad():  # another road, which has no gradient
        torch.testing.assert_close(pool_similarities(*inputs, attention, sharpness), results["own"][0].detach())


@pytest.mark.parametrize("columns", [3, 8, 9])
def test_the_average_by_affinity_equals_its_formula_without_the_matrix_of_all_patches(columns):
    torch.manual_seed(0)
    tokens, values, queries = torch.randn(2, 7, 8), torch.randn(2, 7, columns), torch.randn(2, 4, 8)
    for asked in (tokens, queries):
        units, others = (one / one.norm(dim=-1, keepdim=True) for one in (asked, tokens))
        weights = (4 * units @ others.mT).softmax(-1)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error if only the kernel with the matrix fits
            averaged = average_by_affinity(values, tokens, 4, asked)
        torch.testing.assert_close(averaged, weights @ values, atol=1e-5, rtol=1e-4)


def test_the_average_by_affinity_has_the_precision_of_its_values():
    tokens = torch.eye(3, 4)[None].bfloat16()
    assert average_by_affinity(tokens, tokens, 4, tokens).dtype == torch.bfloat16
