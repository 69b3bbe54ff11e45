"""Faults at the door of the pipeline. See faults.py."""

import fault_inputs as inputs
from faults import Cases, as_file, at_place, test_of_cases

from iclip_hf import ZeroShotImageSegmentationPipeline


CASES = Cases()


CASES.add_images("pipeline", as_file(lambda world, folder, path: world.pipe(str(path), "dog")))
CASES.add("pipeline", inputs.PLACES, at_place(lambda world, folder, place: world.pipe(str(place), "dog")))
CASES.add_texts("label of pipeline", lambda world, folder, text: world.pipe(str(world.photo), ["cat", text]))
CASES.add_templates(
    "template of pipeline", lambda world, folder, template: world.pipe(str(world.photo), "dog", template=[template])
)


CASES.add(
    "options of pipeline",
    {
        "a threshold above 1": {"threshold": 2},
        "a threshold that is no number": {"threshold": float("nan")},
        "thresholds of others": {"threshold": [0.1, 0.2, 0.3]},
        "no labels": {"candidate_labels": []},
        "no images": {"images": []},
        "an unknown option": {"min_score": 3},
        "a size of half a patch": {"size": {"height": 36, "width": 32}},
        "labels that are none": {"candidate_labels": None},
        "a number as label": {"candidate_labels": 3},
        "base64 of no image": {"images": "bm8gaW1hZ2U="},
        "data URL of no image": {"images": "data:image/png;base64,bm8gaW1hZ2U="},
    },
    lambda world, folder, options: world.pipe(**{"images": str(world.photo), "candidate_labels": ["dog"], **options}),
)


def segment(world, folder, options):
    pipe = ZeroShotImageSegmentationPipeline(model=world.model, processor=world.processor, device="cpu")
    return pipe(**{"images": str(world.photo), "candidate_labels": ["dog"], **options})


CASES.add(
    "options of segmentation",
    {
        "no labels": {"candidate_labels": []},
        "numbers as background": {"background_labels": [3]},
        "no background": {"background_labels": None},
        "thresholds of others": {"threshold": [0.5, 0.5]},
        "an unknown option": {"treshold": 0.3},
    },
    segment,
)


test_a_fault_is_borne_or_refused_in_one_clear_sentence = test_of_cases(CASES)
