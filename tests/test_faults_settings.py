"""Faults at the door of the settings of `iclip train`. See faults.py."""

from functools import partial
from unittest.mock import patch

import fault_inputs as inputs
from faults import WORKS, Cases, command, test_of_cases, test_of_random_damage, written

from iclip_hf import cli


CASES = Cases()


def read(arguments: list[str]) -> int:
    """`iclip train` without a look at the files, and without training."""
    with patch("iclip_hf.training.run.train"), patch("iclip_hf.training.checks.check_run"):
        return cli.main(["train", *arguments])


settings_of = partial(command, read, "iclip")


def in_file(world, folder, content):
    return settings_of("--config", written(folder, content, "train.yaml"))


CASES.add(
    "train.yaml",
    {
        **{name: content for name, content in inputs.BAD_JSON.items() if name != "empty object"},
        "a list": "- vision\n- text",
        "an object of Python": "!!python/object/apply:os.mkdir [executed]",
        "bomb of aliases": f"a: {inputs.BOMB_OF_ALIASES}",
        "bomb as data": f"data: {inputs.BOMB_OF_ALIASES}",
        "tabs": "\tvision: x",
        "two documents": "vision: v\n---\ntext: t",
        "an open quote": 'vision: "v',
        "an unknown alias": "data: *data",
    },
    in_file,
    file="train.yaml",
)
CASES.add("train.yaml", {"empty object": "{}"}, in_file, shows="got none")
CASES.add(
    "train.yaml",
    {
        "as it should be": "vision: v\ntext: t\ndata: [d]",
        "a setting twice": "vision: a\nvision: v\ntext: t\ndata: d",
        "JSON": '{"vision": "v", "text": "t", "data": ["d"]}',
        "a blank": "vision: v\ntext: t\ndata: [d]\nepochs:\nnouns:",
        "an exponent": "vision: v\ntext: t\ndata: [d]\nlearning_rate: 1e-4",
    },
    in_file,
    WORKS,
)

SETTINGS = {"vision": "v", "text": "t", "data": "[d]"}
# A setting, what it is set to, and what of it the error shows.
BAD_SETTINGS = [
    *(("config", "other.yaml", "'config'"), ("learning_rates", 1, "'learning_rates'"), ("epochs", "many", "'many'")),
    *(("epochs", 1.5, "'1.5'"), ("epochs", "[1, 2]", "got list"), ("epochs", "{a: 1}", "dict")),
    *(("batch_size", "1e3", "'1e3'"), ("learning_rate", ".nan", "got nan"), ("learning_rate", "-.inf", "got -inf")),
    *(("mixed_precision", "fp8", "'fp8'"), ("eval_dataset", "imagenet", "'imagenet'"), ("crop_scale", ".nan", "nan")),
    *(("data", "[]", "got none"), ("data", "{a: b}", "dict"), ("data", "[[a]]", "list"), ("model", "m", "model='m'")),
    *(("vision", "''", "vision=''"), ("text", "''", "text=''"), ("lock_text", "maybe", "maybe")),
    *(("model_options", "[pooling]", "'pooling'"), ("image_column", "[a, b]", "got list")),
    *(("noun_branches", "[map]", "'map'"), ("best_metric", "mAP", "best_metric mAP")),
]
# Numbers out of range
OUT_OF_RANGE = {
    0: "epochs learning_rate keep_checkpoints noun_prompts image_size chunk_size map_tokens clip_grad_norm max_bad_steps log_steps "
    "eval_steps checkpoint_steps",
    -1: "batch_size crop_scale num_workers max_steps pairs_per_epoch pictures warmup_epochs weight_decay warmup_learning_rate "
    "min_learning_rate",
    1.1: "noun_weight noun_competition random_erasing max_bad_share validation_share",
}
BAD_SETTINGS += [(name, value, f"got {value}") for value, names in OUT_OF_RANGE.items() for name in names.split()]
for name, value, shows in BAD_SETTINGS:
    content = "\n".join(f"{other}: {its}" for other, its in {**SETTINGS, name: value}.items())
    CASES.add("train.yaml", {f"{name}: {value}": content}, in_file, shows=shows)

for name, arguments, shows in (
    ("an absent config", ["--config", "absent.yaml"], "absent.yaml"),
    ("a folder as config", ["--config", "."], ".: expected"),
    ("an unknown setting", ["--sharpness", "3"], "--sharpness"),
    ("a setting without a value", ["--epochs"], "--epochs"),
    ("a shortened setting", ["--learning_rat", "1"], "--learning_rat"),
):
    CASES.add(
        "iclip train",
        {name: arguments},
        lambda world, folder, arguments: settings_of(
            *("--config", written(folder, "vision: v\ntext: t\ndata: [d]", "train.yaml")), *arguments
        ),
        shows=shows,
    )


test_a_fault_is_borne_or_refused_in_one_clear_sentence = test_of_cases(CASES)
test_random_damage_is_borne_or_refused = test_of_random_damage(
    {
        "train.yaml": (
            lambda w, f, content: settings_of("--config", written(f, content, "train.yaml")),
            b"vision: v\ntext: t\ndata: [d]\nepochs: 3\nmodel_options: [pooling=max]\n",
        ),
    }
)
