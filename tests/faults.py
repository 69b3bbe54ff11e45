"""
What tests/test_faults_*.py share, one file a door: inputs that users bring by mistake or in bad faith, of which each either
works or is refused in one clear sentence.

A case is a door and an input. It is run in an empty folder, and leaves nothing there; it does not take long, nor much memory.
"""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fault_inputs as inputs
import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from iclip_hf.cli.common import printable


REFUSALS = (ValueError, TypeError, OSError, StrictDataclassError)
WORKS, REFUSED, EITHER = "works", "is refused", "works or is refused"

# ------------------------------------------------------------------------------------------------------------- the cases


class Case(NamedTuple):
    """`run(world, folder, value)` with a fresh folder; what becomes of it; and what the error must show, one of several."""

    door: str
    name: str
    run: Callable
    value: Any
    fate: str
    shows: tuple[str, ...]


class Cases(list[Case]):
    """The cases of a door's file."""

    def add(
        self, door: str, values: dict, run: Callable, fate: str = REFUSED, *, shows: str = "", file: str = ""
    ) -> None:
        """A case for each value by its name; its error shows the value, `shows` or the name of the file that holds it."""
        for name, value in values.items():
            what = (shows or file,) if shows or file else tuple(forms(value))
            self.append(Case(door, name, run, value, fate, what))

    def add_images(self, door: str, run: Callable, every: bool = False) -> None:
        """Files of images, for a door that is given the content: every one for `load_image`, few for the doors that read with it."""
        unusual, unreadable = inputs.UNUSUAL_IMAGES, inputs.UNREADABLE_IMAGES
        self.add(door, unusual if every else few(unusual, inputs.FEW_IMAGES), run, WORKS)
        self.add(door, unreadable if every else few(unreadable, inputs.FEW_IMAGES), run, file="image")
        if every:
            self.add(door, inputs.DAMAGED_IMAGES, run, EITHER, file="image")

    def add_texts(self, door: str, run: Callable, every: bool = False) -> None:
        """Texts: every one for the processor, few for the doors that encode with it."""
        self.add(door, inputs.GOOD_TEXTS if every else few(inputs.GOOD_TEXTS, inputs.FEW_TEXTS), run, WORKS)
        self.add(door, inputs.BAD_TEXTS if every else few(inputs.BAD_TEXTS, inputs.FEW_TEXTS), run)

    def add_templates(self, door: str, run: Callable) -> None:
        self.add(door, inputs.BAD_TEMPLATES, run)
        self.add(door, {"a brace": "{} {", "a field": "{} {0.__class__}", "percent": "%s {}"}, run, WORKS)


def few(values: dict, names: Iterable[str]) -> dict:
    return {name: values[name] for name in names if name in values}


def forms(value) -> Iterator[str]:
    """How an error may show a value: as it is written, by its size or type, or by one of its parts."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield str(name)
            yield from forms(part)
    elif isinstance(value, (list, tuple)):
        yield f" {len(value)} "
        for part in value:
            yield from forms(part)
    elif isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        numbers = np.asarray(value)
        yield from (str(numbers.shape), str(numbers.dtype), str(value.dtype))
        if not numbers.size:
            yield "none"
        elif numbers.dtype.kind in "iuf":
            yield f"{numbers.min()} to {numbers.max()}" if np.isfinite(numbers).all() else "NaN"
    elif isinstance(value, Image.Image):
        yield from (f"mode {value.mode!r}", f"mode={value.mode} size={value.width}x{value.height}")
    elif isinstance(value, str):
        yield from (value, repr(value)[1:-1], printable(value)) if value.strip() else (repr(value), "none", "got 0")
    elif value is None:
        yield from ("None", "none", "got object")  # as numpy calls it
    elif not callable(value):
        yield f"{value!r:.100}"
    if isinstance(value, (list, dict)) and not value:
        yield from (repr(value), "none", "empty")
    yield from (f"got {type(value).__name__}", f"of type {type(value).__name__}")


def test_of_cases(cases: Cases) -> Callable:
    """A test of each case, in the folders of its sandbox."""

    @pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.door}: {case.name}") for case in cases])
    @pytest.mark.filterwarnings("ignore")
    def test(case, world, sandbox):
        before, memory, began = files(world.folder), peak(), time.process_time()
        try:
            case.run(world, sandbox / "case", case.value)
        except REFUSALS as error:
            assert case.fate != WORKS, repr(error)
            assert_clear(str(error), case)
            assert not list((sandbox / "here").iterdir())
        else:
            assert case.fate != REFUSED
        assert time.process_time() - began < 5
        assert peak() - memory < 500_000
        assert not {"unpickled", "executed", "escaped"} & set(os.listdir("."))
        assert not files(sandbox / "elsewhere") and files(world.folder) == before
        assert not [path for path in sandbox.rglob("*") if path.suffix == ".partial"]

    return test


# Argparse says in its own words what it takes and what came.
ARGPARSE = "invalid choice|invalid int value|are required|unrecognized arguments|expected (at least )?one argument"
EXPECTED = re.compile(rf"\bexpected\b|\bapplies to\b|{ARGPARSE}", re.IGNORECASE)
GOT = re.compile(rf"\bgot\b|\bbut\b|{ARGPARSE}")


VERBS = """
    add change check choose clip complete convert correct create decompress delete download evaluate fix get give leave load make
    mark move name normalise open pass prepare push put remove rename replace rerun resize save scale see set shorten use wait
""".split()
ADVICE = re.compile(rf"[;:.] ({'|'.join(VERBS)})\b|\(see ", re.IGNORECASE)
# The beginning of errors that another package words: `@strict` of huggingface_hub, for a value of another type.
OF_OTHERS = ("Validation error for field",)


def assert_clear(message: str, case: Case) -> None:
    """An error says in a bounded sentence what was expected, what came and what to do."""
    assert EXPECTED.search(message), message
    assert any(form in message for form in case.shows), (message, case.shows)
    assert message.startswith(OF_OTHERS) or (GOT.search(message) and ADVICE.search(message)), message
    assert len(message) < 20_000


def peak() -> int:
    """The most memory that this process had, in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*") if "shards" not in path.parts}


# ------------------------------------------------------------------------------------------------------ the command line


class Refused(ValueError):
    """A command that printed one line and ended with exit code 2."""


def command(program: Callable, name: str, *arguments) -> None:
    """Runs a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = program([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    if code == 0:
        return
    lines = [line for line in err.getvalue().splitlines() if line.startswith(name)]
    assert code == 2 and len(lines) == 1 and not out.getvalue(), (code, out.getvalue(), err.getvalue())
    assert "Traceback" not in err.getvalue()
    raise Refused(lines[0])


# ----------------------------------------------------------------------------------------------------- files and folders


def written(folder: Path, content: str | bytes, name: str = "written.json") -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    return folder / name


def as_file(run: Callable) -> Callable:
    """A door for a path, given the file's content."""

    def write_and_run(world, folder, content):
        path = folder / "image.png"
        path.write_bytes(content)
        return run(world, folder, path)

    return write_and_run


def at_place(run: Callable) -> Callable:
    """A door for a path, given one of PLACES."""

    def make_and_run(world, folder, place):
        inputs.make_places(folder)
        return run(world, folder, place)

    return make_and_run


def damaged_model(run: Callable) -> Callable:
    def copy_damage_and_run(world, folder, damage):
        shutil.copytree(world.folder / "model", folder / "model")
        damage(folder / "model")
        return run(world, folder / "model")

    return copy_damage_and_run


def index_mask(values: np.ndarray) -> bytes:
    return inputs.encoded(Image.fromarray(values), "PNG")


def masks_folder(
    folder: Path, image: bytes | None = None, mask: bytes | None = None, classes: str | bytes = "dog\ncat\n"
):
    """A folder as `load_segmentation` takes it, of one image."""
    for name, content in (("images/image.png", image), ("masks/image.png", mask), ("classes.txt", classes)):
        (folder / name).parent.mkdir(exist_ok=True)
        content = inputs.BY_FORMAT["PNG"] if content is None else content
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def evaluation(**changes) -> str:
    row = {"name": "dog", "AP": 50.0, "MIoU": 20.0, "FMB": 0.1, "threshold": 0.4, **changes}
    return json.dumps({"per_class": {"itsm": [row, {**row, "name": "cat"}]}})


BAD_EVALUATIONS = inputs.BAD_JSON | {
    "no methods": '{"per_class": {}}',
    "methods as a list": '{"per_class": []}',
    "rows as a number": '{"per_class": {"itsm": 3}}',
    "rows of numbers": '{"per_class": {"itsm": [3]}}',
    "name as a list": evaluation(name=["dog"]),
    "scores as text": evaluation(AP="high", threshold="high"),
    "threshold above 1": evaluation(threshold=7, AP="high"),
    "no score at all": evaluation(AP=None, threshold=None),
}

# -------------------------------------------------------------------------------------------------- damage at random


@st.composite
def damaged_bytes(draw, whole: bytes) -> bytes:
    """Some bytes of a good file replaced by any others."""
    start = draw(st.integers(0, len(whole)))
    end = draw(st.integers(start, min(len(whole), start + 20)))
    put = draw(st.binary(max_size=20) | st.text(max_size=20).map(lambda text: text.encode(errors="ignore")))
    return whole[:start] + put + whole[end:]


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)


@st.composite
def damaged_json(draw, whole) -> object:
    """Good JSON in which one value, somewhere, became any other."""
    if isinstance(whole, (dict, list)) and whole and draw(st.integers(0, 5)):
        copy = whole.copy()
        key = draw(st.sampled_from(list(whole) if isinstance(whole, dict) else range(len(whole))))
        copy[key] = draw(damaged_json(whole[key]))
        return copy
    return draw(ANY_JSON)


def test_of_random_damage(readers: dict[str, tuple[Callable, bytes | dict]]) -> Callable:
    """A test of each reader with its good content, bytes or what JSON holds, of which any part is replaced."""

    @pytest.mark.parametrize("name", readers)
    @pytest.mark.filterwarnings("ignore")
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test(name, world, sandbox, data):
        run, whole = readers[name]
        if isinstance(whole, bytes):
            content = data.draw(damaged_bytes(whole) | st.binary(max_size=50))
        else:
            content = json.dumps(data.draw(damaged_json(whole)))
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(*REFUSALS):
            run(world, Path(folder), content)
        assert not list((sandbox / "here").iterdir())

    return test


# Pytest collects what a test file imports and calls test_...; these make tests.
test_of_cases.__test__ = test_of_random_damage.__test__ = False
