"""Faults at the door of functions: one image or text, a configuration, a model folder. See faults.py."""

import json

import fault_inputs as inputs
import numpy as np
import torch
from faults import (
    BAD_EVALUATIONS,
    WORKS,
    Cases,
    as_file,
    at_place,
    damaged_model,
    evaluation,
    test_of_cases,
    test_of_random_damage,
    written,
)
from PIL import Image

from iclip_hf import ICLIPConfig
from iclip_hf.evaluation.measures.deletion_insertion import deletion_insertion
from iclip_hf.evaluation.results import class_thresholds
from iclip_hf.explainers import WordExplainer, make_explainer
from iclip_hf.explainers.collection import explain_collection, open_images
from iclip_hf.explainers.localizer import Localizer, explain
from iclip_hf.images import load_image
from iclip_hf.label_maps import label_map
from iclip_hf.modeling_iclip import ICLIPOutput
from iclip_hf.models.loading import load, load_pretrained
from iclip_hf.processing_iclip import check_thresholds


CASES = Cases()


def in_collection(world, folder, content):
    (folder / "images").mkdir()
    (folder / "images" / "image.png").write_bytes(content)
    localizer = Localizer((world.model, world.processor), ["dog"])
    report = explain_collection(localizer, open_images([folder / "images"]), folder / "maps", progress=False)
    if report.broken:
        raise ValueError(*report.broken)


CASES.add_images("load_image", as_file(lambda world, folder, path: load_image(path)), every=True)
CASES.add_images("image of a collection", in_collection)
CASES.add("load_image", inputs.PLACES, at_place(lambda world, folder, place: load_image(place)))


image, maps = torch.zeros(3, 8, 8), torch.zeros(2, 4, 4)
FAITHFULNESS = {
    "a batch": ((image[None], maps), {}),
    "no pixels": ((image[:, :0], maps), {}),
    "one map": ((image, maps[0]), {}),
    "no maps": ((image, maps[:0]), {}),
    "maps of NaN": ((image, maps * torch.nan), {}),
    "no steps": ((image, maps), {"steps": 0}),
    "batches of nothing": ((image, maps), {"batch_size": -1}),
}
CASES.add(
    "deletion and insertion",
    FAITHFULNESS,
    lambda world, folder, value: deletion_insertion(lambda images: images.mean((1, 2, 3)), *value[0], **value[1]),
)


ARRAYS = {
    "NaN": np.full((3, 32, 32), np.nan),
    "one NaN": torch.ones(3, 32, 32).index_fill(2, torch.tensor(5), torch.nan),
    "infinity": np.full((32, 32, 3), np.inf, np.float32),
    "no colours": np.zeros((32, 32), np.uint8),
    "two colours": np.zeros((32, 32, 2), np.uint8),
    "five dimensions": np.zeros((1, 1, 3, 32, 32)),
    "a number": np.float64(1),
    "no height": np.zeros((3, 0, 32)),
    "no images": np.zeros((0, 3, 32, 32)),
    "objects": np.full((3, 3, 3), "a", object),
    "strings": np.full((3, 3, 3), "a"),
    "negative": np.full((3, 32, 32), -1.0),
    "huge": np.full((3, 32, 32), 3e38, np.float32),
    "floats up to 255": np.full((3, 32, 32), 255.0),
    "wide integers": np.zeros((3, 32, 32), np.int64),
    "complex numbers": np.zeros((3, 32, 32), complex),
    "none": [None],
    "empty list": [],
    "mapping": {},
    "integers": [1, 2],
    "path": "photo.png",
    "bytes": inputs.BY_FORMAT["PNG"],
    "one is missing": [inputs.PHOTO, None],
    "empty image": Image.new("RGB", (0, 3)),
    "floating-point image": Image.new("F", (3, 3)),
}
CASES.add("processor", ARRAYS, lambda world, folder, images: world.processor(images=images))
CASES.add(
    "processor and model",
    {
        "booleans": np.ones((3, 32, 32), bool),
        "16 bits": np.full((32, 32, 3), 65535, np.uint16),
        "half precision": torch.ones(3, 32, 32, dtype=torch.float16),
        "one pixel": np.ones((1, 1, 3), np.uint8),
        "one row": np.ones((3, 1, 5000), np.uint8),
    },
    lambda world, folder, images: world.model(
        **world.processor(images=images, text="dog"), output_similarity_maps=True
    ),
    WORKS,
)
IDS = torch.ones(2, 3, dtype=torch.long)
CASES.add(
    "model",
    {
        "no batch": {"pixel_values": torch.zeros(3, 32, 32)},
        "no height": {"pixel_values": torch.zeros(1, 3, 0, 32)},
        "no images": {"pixel_values": torch.zeros(0, 3, 32, 32)},
        "one colour": {"pixel_values": torch.zeros(1, 1, 32, 32)},
        "a patch and a half": {"pixel_values": torch.zeros(1, 3, 12, 32)},
        "a number": {"pixel_values": torch.tensor(1.0)},
        "nothing": {"pixel_values": None},
        "no texts": {"input_ids": IDS[:0]},
        "no tokens": {"input_ids": IDS[:, :0]},
        "one dimension": {"input_ids": IDS[0]},
        "four dimensions": {"input_ids": IDS[None, None]},
        "neither ids nor features": {"input_ids": None},
        "templates that do not divide": {"num_templates": 3},
        "no templates": {"num_templates": 0},
    },
    lambda world, folder, changes: world.model(
        **{"pixel_values": torch.zeros(1, 3, 32, 32), "input_ids": IDS} | changes
    ),
)
CASES.add(
    "model",
    {"a loss of unequal numbers": IDS},
    lambda world, folder, ids: world.model(pixel_values=torch.zeros(1, 3, 32, 32), input_ids=ids, return_loss=True),
    shows="(2,)",
)
CASES.add(
    "model",
    {"a list of texts for no image": IDS.expand(3, 2, 3)},
    lambda world, folder, ids: world.model(pixel_values=torch.zeros(2, 3, 32, 32), input_ids=ids),
    shows="got 3 lists for 2 images",
)


CASES.add(
    "arguments of processor",
    {
        "nothing": {},
        "no texts": {"text": []},
        "an empty list": {"text": [["dog"], []]},
        "texts and labels": {"text": "dog", "labels": "dog"},
        "no templates": {"labels": "dog", "templates": []},
        "templates of texts": {"text": "dog", "templates": ["a {}"]},
        "images of two shapes": {
            "images": [inputs.PHOTO, inputs.PHOTO.resize((99, 32))],
            "size": {"shortest_edge": 32},
        },
        "a list too many": {"images": [inputs.PHOTO], "text": [["dog"], ["cat"]]},
    },
    lambda world, folder, arguments: world.processor(**arguments),
    shows="Expected",
)
CASES.add(
    "size of processor",
    {
        "half a patch": {"height": 30, "width": 32},
        "no width": {"height": 64},
        "a width of text": {"height": 64, "width": "64"},
        "a pair": (64, 64),
        "a word": "large",
        "negative": -8,
        "a fraction": 0.5,
        "too large": 8192,
    },
    lambda world, folder, size: world.processor(images=inputs.PHOTO, size=size),
)
CASES.add(
    "size of processor",
    {"of one row": {"shortest_edge": 224}},
    lambda world, folder, size: world.processor(images=Image.new("RGB", (3000, 1)), size=size),
)
CASES.add_texts("text of processor", lambda world, folder, text: world.processor(text=[text]), every=True)
CASES.add_texts(
    "text of Localizer", lambda world, folder, text: Localizer((world.model, world.processor), ["cat", text])
)
CASES.add_templates(
    "templates of processor", lambda world, folder, template: world.processor(labels="dog", templates=[template])
)


CASES.add(
    "explain",
    {
        "no images": ([], ["dog"]),
        "no texts": (["photo.png"], []),
        "one list too few": ([inputs.PHOTO] * 2, [["dog"]]),
        "an empty list": ([inputs.PHOTO], [[]]),
        "lists and texts": ([inputs.PHOTO] * 2, [["dog"], "cat"]),
        "an unknown method": ([inputs.PHOTO], ["dog"], "magic"),
        "an array of another shape": ([np.zeros((3, 3))], ["dog"]),
    },
    lambda world, folder, arguments: explain((world.model, world.processor), *arguments),
)
CASES.add(
    "options of explain",
    {
        "no size": {"target_sizes": [(0, 5)]},
        "sizes of others": {"target_sizes": [(5, 5), (5, 5)]},
        "a size of half a patch": {"size": {"height": 36, "width": 32}},
        "an unknown option": {"sharpness": 3},
        "no batch": {"batch_size": 0},
    },
    lambda world, folder, options: explain((world.model, world.processor), [inputs.PHOTO], ["dog"], **options)[0].maps,
)
CASES.add(
    "make_explainer",
    {"no model": None, "a number": 3, "a module": torch.nn.Linear(2, 2)},
    lambda world, folder, model: make_explainer(model),
)
CASES.add(
    "options of make_explainer",
    {
        "an unknown method": {"method": "gradcam"},
        "an unknown option": {"method": "grad_cam", "layers": 3},
        "a layer too deep": {"method": "grad_cam", "layer": 2},
        "unknown activations": {"method": "grad_cam", "activations": "mlp"},
        "no depth": {"method": "gem", "depth": 0},
        "negative iterations": {"method": "gem", "iterations": -1},
        "unknown tokens": {"method": "clearclip", "tokens": "keys"},
        "no width": {"method": "naclip", "sigma": 0},
    },
    lambda world, folder, options: make_explainer((world.model, world.processor), **options),
)
for name, call, shows in (
    ("labels as one text", lambda w, f: load((w.model, w.processor)).encode_texts("dog"), "'dog'"),
    ("no labels", lambda w, f: load((w.model, w.processor)).encode_texts([]), "[]"),
    ("words of another method", lambda w, f: WordExplainer((w.model, w.processor), ["dog"], method="gem"), "'gem'"),
    ("a model without a processor", lambda w, f: load(w.model), "got ICLIPModel"),
    ("model and processor apart", lambda w, f: explain(w.model, w.processor, [inputs.PHOTO], ["dog"]), "pair"),
    ("the device of a pair", lambda w, f: load((w.model, w.processor), device="cpu"), "got cpu with tuple"),
    ("the dtype of a loaded model", lambda w, f: load(load((w.model, w.processor)), dtype="bfloat16"), "bfloat16"),
    ("an unknown device", lambda w, f: load(w.folder / "model", device="tpu"), "got tpu"),
    ("a folder without images", lambda w, f: open_images([f]), "images or .tar shards"),
    ("an absent shard", lambda w, f: open_images([f / "none.tar"]), "none.tar"),
    ("two folders", lambda w, f: open_images([w.folder, f]), "one folder of images"),
    ("label maps of one map", lambda w, f: label_map(torch.zeros(2, 3)), "(2, 3)"),
    ("label maps of no map", lambda w, f: label_map(torch.zeros(0, 3, 3)), "(0, 3, 3)"),
    ("a class too many", lambda w, f: label_map(torch.zeros(2, 3, 3), classes=[0, 1, 2]), "got 3"),
    ("a scale of nothing", lambda w, f: label_map(torch.zeros(2, 3, 3), logit_scale=0.0), "got 0.0"),
    ("a scale that is no number", lambda w, f: label_map(torch.zeros(2, 3, 3), logit_scale=float("nan")), "got nan"),
):
    CASES.add("functions", {name: call}, lambda world, folder, call: call(world, folder), shows=shows)
CASES.add(
    "check_thresholds",
    {
        "none": None,
        "text": "a",
        "two dimensions": [[0.5]],
        "a list": [],
        "one is none": [0.5, None],
        "above 1": 1.5,
        "no number": np.float64("nan"),
    },
    lambda world, folder, threshold: check_thresholds(threshold),
)
CASES.add(
    "make_explainer",
    {"a tower": "vision_model"},
    lambda world, folder, name: make_explainer((getattr(world.model, name), world.processor)),
    shows="got ViTModel",
)
CASES.add(
    "Localizer",
    {
        "a threshold too few": {"threshold": [0.5, 0.5]},
        "a threshold above 1": {"threshold": 1.1},
        "a threshold that is no number": {"threshold": float("nan")},
        "a negative presence": {"min_presence": -0.1},
        "a presence that is no number": {"min_presence": float("nan")},
        "no texts": {"texts": []},
    },
    lambda world, folder, options: Localizer((world.model, world.processor), **{"texts": ["dog"], **options}),
)


MAPS, MASKS = torch.rand(1, 2, 4, 4), [torch.ones(2, 8, 8, dtype=torch.bool)]


def segmented(**options):
    return lambda p: p.post_process_semantic_segmentation(ICLIPOutput(similarity_maps=MAPS), **options)


for name, call, shows in (
    ("maps without a batch", lambda p: p.post_process_similarity_maps(MAPS[0], [(8, 8)]), "(2, 4, 4)"),
    ("one size too many", lambda p: p.post_process_similarity_maps(MAPS, [(8, 8)] * 2), "and 2"),
    ("a size of nothing", lambda p: p.post_process_similarity_maps(MAPS, [(0, 8)]), "a side of 0"),
    ("a negative size", lambda p: p.post_process_similarity_maps(MAPS, [(-3, 8)]), "a side of -3"),
    ("thresholds of others", lambda p: p.post_process_masks(list(MAPS), [0.1, 0.2, 0.3]), "got 3"),
    ("a threshold that is no number", lambda p: p.post_process_masks(list(MAPS), float("nan")), "got nan"),
    ("no thresholds", lambda p: p.post_process_masks(list(MAPS), []), "got []"),
    (
        "scores without a least one",
        lambda p: p.post_process_masks(list(MAPS), 0.5, scores=torch.ones(1, 2)),
        "got one of them",
    ),
    ("masks of another size", lambda p: p.post_process_boxes(list(MAPS), MASKS), "(8, 8)"),
    ("more maps than masks", lambda p: p.post_process_boxes([*MAPS, *MAPS], MASKS), "(8, 8)"),
    ("outputs without maps", lambda p: p.post_process_semantic_segmentation(ICLIPOutput()), "output_similarity_maps"),
    ("label maps of two sizes", segmented(target_sizes=[(8, 8)] * 2), "1 images, got 2"),
    ("presence without a least one", segmented(presence=torch.ones(1, 2)), "got one of them"),
    ("an absent background", segmented(background=[-1]), "got [-1]"),
    ("a background that is none", segmented(background=[2]), "got [2]"),
    ("a threshold above 1", segmented(threshold=1.5), "got 1.5"),
    ("an area above 1", lambda p: p.post_process_boxes(list(MAPS), [MAPS[0] > 0.5], min_area=2), "got 2"),
    (
        "an area that is no number",
        lambda p: p.post_process_points(list(MAPS), [MAPS[0] > 0.5], float("nan")),
        "got nan",
    ),
):
    CASES.add("post-processing", {name: call}, lambda world, folder, call: call(world.processor), shows=shows)
CASES.add(
    "post-processing",
    {
        "maps that are no numbers": torch.full((1, 2, 4, 4), torch.nan),
        "constant maps": torch.zeros(1, 2, 4, 4),
        "maps of infinity": torch.full((1, 2, 4, 4), torch.inf),
        "maps of one patch": torch.ones(1, 1, 1, 1),
    },
    lambda world, folder, maps: world.processor.post_process_points(
        (processed := world.processor.post_process_similarity_maps(maps, [(9, 7)])),
        world.processor.post_process_masks(processed),
    ),
    WORKS,
)
CASES.add(
    "ICLIPConfig",
    {
        "a misspelt option": {"poolings": "max"},
        "an unknown pooling": {"pooling": "median"},
        "a width of nothing": {"projection_dim": 0},
        "a width of text": {"projection_dim": "many"},
        "a quantile of nothing": {"attention_quantile": 0},
        "a quantile that is no number": {"attention_quantile": float("nan")},
        "a scale above 100": {"logit_scale_init_value": 5},
        "a negative affinity": {"map_affinity": -1},
        "an affinity that is no number": {"map_affinity": float("nan")},
        "a tower that is a number": {"vision_config": 3},
        "an unknown tower": {"text_config": {"model_type": "no such model"}},
    },
    lambda world, folder, options: ICLIPConfig(**options),
)


CASES.add(
    "load_pretrained",
    inputs.MODEL_FOLDERS | inputs.MODEL_JSON,
    damaged_model(lambda world, model: load_pretrained(model)),
    file="model",
)
CASES.add(
    "class_thresholds",
    BAD_EVALUATIONS,
    lambda world, folder, text: class_thresholds(written(folder, text), ["dog"]),
    file="written.json",
)


test_a_fault_is_borne_or_refused_in_one_clear_sentence = test_of_cases(CASES)
test_random_damage_is_borne_or_refused = test_of_random_damage(
    {
        "load_image": (lambda w, f, content: load_image(content), inputs.BY_FORMAT["PNG"]),
        "class_thresholds": (
            lambda w, f, content: class_thresholds(written(f, content), ["dog"]),
            json.loads(evaluation()),
        ),
    }
)
