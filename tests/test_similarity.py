import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from iclip_hf.evaluation.argmax import argmax_label_map
from iclip_hf.explainers.competing_itsm import compete
from iclip_hf.model.similarity import cosine_similarity_map, min_max_normalize, resize_and_normalize, resize_maps


@settings(max_examples=30)
@given(st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(1, 60)] * 2), st.integers(0, 99))
def test_resize_equals_the_general_kernel(grid, size, seed):
    maps = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(seed))
    expected = F.interpolate(maps, size=size, mode="bicubic", align_corners=False)
    torch.testing.assert_close(resize_maps(maps, size), expected, atol=2e-5, rtol=0)


def test_the_fused_steps_equal_the_single_ones():
    maps = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))
    maps[2] = 0.3
    before = maps.clone()
    fused = resize_and_normalize(maps, (33, 50))
    assert torch.equal(maps, before)
    torch.testing.assert_close(fused, min_max_normalize(resize_maps(maps, (33, 50))), atol=1e-5, rtol=0)
    assert fused[2].eq(0).all()


def test_maps_stay_precise_under_autocast():
    draws = torch.Generator().manual_seed(0)
    maps, *embeds = (torch.randn(*shape, generator=draws) for shape in ((2, 5, 7), (1, 16, 16, 64), (2, 64)))
    patches, texts = (F.normalize(one, dim=-1) + 0.5 for one in embeds)
    with torch.autocast("cpu", torch.bfloat16):
        found = [resize(maps, (33, 50)) for resize in (resize_maps, resize_and_normalize)]
        confidence = argmax_label_map(maps, (33, 50), [0, 1])[1]
        cosines = cosine_similarity_map(patches, texts)
    torch.testing.assert_close(cosines, cosine_similarity_map(patches, texts), atol=1e-4, rtol=1e-5)
    expected = [resize(maps, (33, 50)) for resize in (resize_maps, resize_and_normalize)]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(confidence, argmax_label_map(maps, (33, 50), [0, 1])[1], atol=1e-5, rtol=0)


def test_patches_and_texts_may_be_on_two_devices():
    """As the towers of a model can be. Fake tensors have a device that this machine may lack."""
    with FakeTensorMode():
        maps = cosine_similarity_map(torch.empty(1, 2, 3, 6), torch.empty(4, 6, device="cuda"))
    assert maps.device.type == "cpu" and maps.shape == (1, 4, 2, 3)


def test_weights_kept_from_inference_serve_a_gradient():
    with torch.inference_mode():
        resize_maps(torch.rand(1, 3, 5), (11, 13))
    maps = torch.rand(1, 3, 5, requires_grad=True)
    resize_maps(maps, (11, 13)).sum().backward()
    assert maps.grad.sum() == pytest.approx(11 * 13, rel=1e-4)  # each pixel is a mean of patches


@pytest.mark.parametrize("scale", [3.0, 100.0])
def test_rivals_lower_a_map_where_they_match(scale):
    draws = torch.Generator().manual_seed(0)
    maps, rivals = (2 * torch.rand(2, number, 3, 4, generator=draws) - 1 for number in (2, 5))
    weights = torch.rand(2, 2, 5, generator=draws)
    weights[:, 1] = 0
    with torch.autocast("cpu", torch.bfloat16):
        competing = compete(maps, rivals, weights, scale)

    exact = maps.double(), rivals.double(), weights.double()
    for image, text, y, x in itertools.product(range(2), range(2), range(3), range(4)):
        own, others, shares = exact[0][image, text, y, x], exact[1][image, :, y, x], exact[2][image, text]
        total = (scale * own).exp() + sum(share * (scale * other).exp() for share, other in zip(shares, others))
        assert competing[image, text, y, x].item() == pytest.approx((own - total.log() / (4 * scale)).item(), abs=1e-5)
    torch.testing.assert_close(competing[:, 1], 0.75 * maps[:, 1])  # without rivals, three quarters of the map


finite = st.floats(-(2.0**59), 2.0**59, width=32)


@given(
    data=st.data(), h=st.integers(1, 5), w=st.integers(1, 5), size=st.tuples(st.integers(1, 40), st.integers(1, 40))
)
def test_any_map_is_stretched_to_0_and_1(data, h, w, size):
    raw = torch.tensor(data.draw(st.lists(finite, min_size=h * w, max_size=h * w))).reshape(1, h, w)
    for stretched in (resize_and_normalize(raw, size), min_max_normalize(raw)):
        span = (stretched.min().item(), stretched.max().item())
        assert span == (0, 1) or not stretched.any()
    assert min_max_normalize(raw).any() == (raw.max() > raw.min())
