import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import explain, save, save_towers, tiny_config, tiny_model
from PIL import Image
from torch.nn import functional as F
from transformers import AutoProcessor, CLIPImageProcessor

from iclip_hf import ICLIPModel, ICLIPProcessor
from iclip_hf.model.engine import Engine
from iclip_hf.model.explanation import Explanation
from iclip_hf.model.projections import average_prompts


def photo(width=48, height=32, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def decoded(processor, batch):
    ids = batch["input_ids"].flatten(0, -2)
    return [processor.tokenizer.decode(row, skip_special_tokens=True) for row in ids]


def test_labels_go_into_the_template_and_texts_do_not(tiny_processor):
    assert decoded(tiny_processor, tiny_processor(labels=["dog", "red ball"])) == [
        "a photo of the dog",
        "a photo of the red ball",
    ]
    assert decoded(tiny_processor, tiny_processor(text="a dog")) == ["a dog"]


def test_the_prompts_of_a_label_are_averaged():
    """Two labels in two templates: (1, 0) and (0, 1), and (1, 0) and (-0.8, 0.6), whose mean is (0.1, 0.3)."""
    prompts = torch.tensor([[1.0, 0], [0, 1], [1, 0], [-0.8, 0.6]])
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [1 / 10**0.5, 3 / 10**0.5]])
    torch.testing.assert_close(average_prompts(prompts, 2), expected)
    assert average_prompts(prompts, 1) is prompts


def test_each_image_has_its_own_texts_filled_up_with_the_last(tiny_processor):
    labels = [["dog", "ball"], ["cat", "car", "sky"]]
    batch = tiny_processor([photo(), photo()], labels=labels, templates=["a {}", "the {}"])
    assert batch["input_ids"].shape[:2] == (2, 6)
    filled = ["dog", "ball", "ball", *labels[1]]
    assert decoded(tiny_processor, batch) == [f"{article} {label}" for label in filled for article in ("a", "the")]
    with torch.no_grad():
        assert tiny_model()(**batch).logits_per_image.shape == (2, 3)


def test_proportions_are_kept_in_multiples_of_the_patch(tiny_processor):
    batch = tiny_processor(photo(300, 100), size={"shortest_edge": 30})
    assert batch["pixel_values"].shape == (1, 3, 32, 88)  # 30x90, rounded to multiples of 8
    assert tiny_processor(photo(), size={"height": 16, "width": 40})["pixel_values"].shape == (1, 3, 16, 40)


@pytest.mark.parametrize("inputs", [{"text": photo()}, {"text": 5}, {"labels": 5}, {"images": [], "text": "dog"}])
def test_what_is_no_text_and_no_image_is_named(tiny_processor, inputs):
    with pytest.raises(ValueError, match="Texts are a string or a list|There is no image"):
        tiny_processor(**inputs)


def test_a_size_of_nothing_is_refused(tiny_processor):
    """Not taken for the usual one."""
    for size in (0, {}, {"height": 0, "width": 8}, "32", 32.0, (32, 32), {"shortest_edge": "32"}):
        with pytest.raises(ValueError, match="size is a number"):
            tiny_processor(photo(), size=size)
        with pytest.raises(ValueError, match="size is a number"):
            Engine(tiny_model(), tiny_processor, image_size=size)


def test_saving_keeps_every_option(tiny_processor, tmp_path):
    processor = ICLIPProcessor(
        tiny_processor.image_processor,
        tiny_processor.tokenizer,
        templates=["a {}", "the {}"],
        patch_size=8,
        max_text_length=9,
        text_padding="max_length",
    )
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "ICLIPProcessor"
    for loaded in (ICLIPProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is ICLIPProcessor
        batch = loaded(photo(), labels="dog")
        assert batch["input_ids"].shape == (2, 9) and batch["num_templates"] == 2
        assert torch.equal(batch["pixel_values"], processor(photo())["pixel_values"])


def test_processors_of_two_towers_are_joined(tiny_processor, tmp_path):
    """Also where the image tower's configuration stores the patch size as a pair."""
    config = tiny_config()
    config.vision_config.patch_size = (8, 8)
    vision = save(tmp_path / "vision", config.vision_config, tiny_processor.image_processor)
    text = save(tmp_path / "text", config.text_config, tiny_processor.tokenizer)
    processor = ICLIPProcessor.from_vision_text_pretrained(str(vision), str(text), image_size=40)
    assert processor(photo())["pixel_values"].shape == (1, 3, 40, 40)
    assert processor(photo(), size={"shortest_edge": 16})["pixel_values"].shape == (1, 3, 16, 24)
    with pytest.raises(ValueError, match="no multiple of the patch size 8"):
        processor(photo(), size=30)


MAPS = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
SIZES = [(33, 50), (20, 20)]


def test_maps_are_resized_then_stretched_and_reversed_if_asked_for(tiny_processor):
    processed, turned = (tiny_processor.post_process_similarity_maps(MAPS, SIZES, turn) for turn in (False, True))
    for raw, done, reverse, size in zip(MAPS, processed, turned, SIZES):
        assert done.shape == (3, *size) and torch.equal(reverse, 1 - done)
        big = F.interpolate(raw[None], size=size, mode="bicubic", align_corners=False)[0]
        for text in range(3):
            low, high = big[text].min(), big[text].max()
            torch.testing.assert_close(done[text], (big[text] - low) / (high - low), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", [np.array, torch.tensor])
def test_sizes_of_maps_are_numbers_in_any_form(tiny_processor, form):
    outputs = SimpleNamespace(similarity_maps=torch.randn(2, 3, 4, 4))
    sizes, model, images = [(8, 12), (5, 6)], (tiny_model(), tiny_processor), [photo(), photo(seed=1)]
    answers = (
        lambda sizes: tiny_processor.post_process_similarity_maps(outputs.similarity_maps, sizes),
        lambda sizes: tiny_processor.post_process_semantic_segmentation(outputs, sizes),
        lambda sizes: [one.maps for one in explain(model, images, "dog", target_sizes=sizes)],
    )
    for answer in answers:
        expected = answer(sizes)
        assert all(found.equal(one) for found, one in zip(answer(form(sizes)), expected, strict=True))
        assert [one.shape[-2:] for one in expected] == sizes
        for wrong in ((0, 5), (-3, 5), (5.5, 6), (5, 6, 7), 5, "56"):
            with pytest.raises(ValueError, match="size of a map"):
                answer([(8, 12), wrong])


@pytest.mark.parametrize(
    "threshold", [[0.1, 0.2], [0.1] * 4, [0.5], [[0.1, 0.2, 0.3]], [0.1, 0.2, -0.3], "0.5", [None] * 3]
)
def test_there_is_one_threshold_or_one_for_each_text(tiny_processor, threshold):
    outputs = SimpleNamespace(similarity_maps=MAPS)
    with pytest.raises(ValueError, match="a list of 3"):
        tiny_processor.post_process_semantic_segmentation(outputs, threshold=threshold)
    with pytest.raises(ValueError, match="a list of 3"):
        Explanation(["a", "b", "c"], torch.zeros(3), None, MAPS[0], (4, 6), threshold)


@pytest.mark.parametrize("min_presence", [50, -0.1, float("nan")])
def test_a_least_presence_that_is_no_probability_is_refused(tiny_processor, min_presence):
    outputs = SimpleNamespace(similarity_maps=MAPS)
    options = {"presence": torch.zeros(2, 3), "min_presence": min_presence}
    with pytest.raises(ValueError, match="min_presence"):
        tiny_processor.post_process_semantic_segmentation(outputs, **options)
    with pytest.raises(ValueError, match="min_presence"):
        Explanation(["a", "b", "c"], torch.zeros(3), None, MAPS[0], (4, 6), min_presence=min_presence)


def test_keywords_are_the_same_in_a_dictionary_of_their_side(tiny_processor):
    image, labels = photo(), ["dog", "red ball"]
    expected = tiny_processor(images=image, labels=labels, size={"height": 64, "width": 48}, max_length=4)
    found = tiny_processor(
        images=image,
        labels=labels,
        images_kwargs={"size": {"height": 64, "width": 48}, "return_tensors": "pt"},
        text_kwargs={"max_length": 4, "return_tensors": "pt"},
    )
    assert found["pixel_values"].shape == (1, 3, 64, 48) and found["input_ids"].shape == (2, 4)
    torch.testing.assert_close(dict(found), dict(expected))
    padded = tiny_processor(text="dog", text_kwargs={"padding": "max_length", "max_length": 9})
    assert padded["input_ids"].shape == (1, 9)


@pytest.mark.parametrize(
    ("flat", "nested"),
    [
        ({"size": 32}, {"images_kwargs": {"size": 32}}),
        ({"do_rescale": True}, {"images_kwargs": {"do_rescale": True}}),
        ({"padding": True}, {"text_kwargs": {"padding": True}}),
        ({"max_length": 9}, {"text_kwargs": {"max_length": 8}}),
    ],
)
def test_a_keyword_is_given_once(tiny_processor, flat, nested):
    """As in transformers: flat or in the dictionary of its side."""
    for one in (flat, nested):
        tiny_processor(photo(), labels="dog", **one)
    with pytest.raises(ValueError, match=next(iter(flat))):
        tiny_processor(photo(), labels="dog", **flat, **nested)
    tiny_processor(photo(), common_kwargs={"return_tensors": "pt"}, images_kwargs={"return_tensors": "pt"})


@pytest.mark.parametrize("return_tensors", ["np", None])
def test_texts_of_each_image_in_other_forms_than_tensors(tiny_processor, return_tensors):
    images, texts = [photo(), photo(seed=1)], [["dog"], ["red ball", "a cat"]]
    expected = tiny_processor(images=images, text=texts)
    found = tiny_processor(images=images, text=texts, return_tensors=return_tensors)
    for name in ("input_ids", "attention_mask"):
        assert isinstance(found[name], np.ndarray if return_tensors else list)
        assert torch.tensor(np.array(found[name])).equal(expected[name])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_arrays_and_tensors_are_the_photograph(tiny_processor, dtype):
    array = np.array(photo())
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    tensor = tensor if dtype == torch.uint8 else (tensor / 255).to(dtype)
    before = tensor.clone()
    expected, found, of_tensor = (tiny_processor(images=one)["pixel_values"] for one in (photo(), array, tensor))
    assert found.equal(expected) and tensor.equal(before)
    tolerance = 0.02 if dtype == torch.bfloat16 else 0  # a level of 255, normalised
    torch.testing.assert_close(of_tensor, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("do_rescale", [True, False])
def test_one_channel_is_gray_with_any_image_processor(tiny_processor, do_rescale):
    image_processor = CLIPImageProcessor(do_center_crop=False, do_convert_rgb=False, do_rescale=do_rescale)
    processor = ICLIPProcessor(image_processor, tiny_processor.tokenizer, patch_size=8)
    gray = np.array(photo(32, 32, "L"))[..., None]
    expected = processor(images=gray.repeat(3, 2), size=32)["pixel_values"]
    for image in (gray, gray.transpose(2, 0, 1), torch.from_numpy(gray)):
        assert processor(images=image, size=32)["pixel_values"].equal(expected)
        assert processor(images=image, size=32, do_resize=False)["pixel_values"].equal(expected)


def test_images_that_are_rescaled_already_are_left_alone(tiny_processor):
    scaled = (np.array(photo()) / 255).astype(np.float32)
    expected = tiny_processor(images=scaled)["pixel_values"]
    found = tiny_processor(images=scaled, do_rescale=False)["pixel_values"]
    assert (found - expected).abs().mean() < 0.01  # 8 bits cut what bicubic overshoots
    for options in ({"do_rescale": False}, {"images_kwargs": {"do_rescale": False}}):
        assert tiny_processor(images=scaled * 3 - 1, **options)["pixel_values"].max() > 3


@pytest.mark.parametrize(
    "options", [{}, {"size": 64}, {"size": {"height": 32, "width": 24}}, {"do_center_crop": True}]
)
def test_nothing_is_cropped(tiny_processor, options):
    """So that maps cover the whole image."""
    image_processor = CLIPImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 24, "width": 24})
    processor = ICLIPProcessor(image_processor, tiny_processor.tokenizer, patch_size=8)
    options = {"size": 32} | options
    assert processor(photo(), **options)["pixel_values"].equal(tiny_processor(photo(), **options)["pixel_values"])


def test_images_that_are_not_resized_have_the_size_that_is_asked_for(tiny_processor):
    image_processor = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False, do_resize=False)
    processor = ICLIPProcessor(image_processor, tiny_processor.tokenizer, patch_size=8)
    image = Image.new("RGB", (48, 40))
    assert processor(image)["pixel_values"].shape == (1, 3, 40, 48)
    assert processor(image, size={"height": 40, "width": 48})["pixel_values"].shape == (1, 3, 40, 48)
    for other, size in ((image, 32), (image, {"shortest_edge": 64}), (Image.new("RGB", (48, 41)), None)):
        with pytest.raises(ValueError, match="do_resize=True"):
            processor(other, size=size)
    assert processor(image, size=64, do_resize=True)["pixel_values"].shape == (1, 3, 64, 64)


@pytest.mark.parametrize("auto_class", [ICLIPProcessor, AutoProcessor])
def test_code_beside_a_tokenizer_is_refused_without_a_question(tiny_processor, tmp_path, monkeypatch, auto_class):
    save(tmp_path, tiny_config(), tiny_processor)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["other.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "other.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass\n")
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail(f"asked: {question}"))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        auto_class.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def edited(file: Path, **changes) -> None:
    """Sets entries of a JSON file, which may be absent."""
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | changes))


@pytest.mark.parametrize("side", ["vision", "text"])
@pytest.mark.parametrize("joined", [ICLIPProcessor, ICLIPModel])
def test_code_beside_a_tower_is_refused_without_a_question(tiny_processor, tmp_path, monkeypatch, joined, side):
    towers = save_towers(tmp_path, tiny_model(), tiny_processor)
    config = {"model_type": "other", "auto_map": {"AutoConfig": "other.Config"}}
    (tmp_path / side / "config.json").write_text(json.dumps(config))
    (tmp_path / side / "other.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail(f"asked: {question}"))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        joined.from_vision_text_pretrained(*towers)
    assert not (tmp_path / "ran").exists()
