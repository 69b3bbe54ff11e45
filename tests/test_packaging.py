"""What is installed: the files of wheel and sdist, and what is said where an optional package is missing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

import pytest

from iclip_hf import __version__


ROOT = Path(__file__).parents[1]
# Where the wheel has what the repository keeps outside src/.
PLACES = {
    "src/iclip_hf": "iclip_hf",
    "evaluate_metrics": "iclip_hf/evaluate_metrics",
    "hub_configs": "iclip_hf/hub_configs",
}


def repository_files() -> list[str]:
    """All files of the repository, committed or about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs the git repository, which tells its files from leftovers")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def packaged(files: list[str]) -> dict[str, str]:
    """Place in the wheel -> place in the repository."""
    places = {"iclip_hf/model_card.md": "model_card.md"}
    for name in files:
        for folder, place in PLACES.items():
            if PurePosixPath(name).is_relative_to(folder) and name != "hub_configs/README.md":
                places[f"{place}/{PurePosixPath(name).relative_to(folder)}"] = name
    return places


def build(kind: str, tree: Path, folder: Path) -> Path:
    """Builds with the setuptools that are installed, so that no network is needed."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    built = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert built.returncode == 0 and "*****" not in built.stderr, built.stderr  # setuptools frames a warning
    return folder / built.stdout.split()[-1]


@pytest.fixture(scope="module")
def files():
    return repository_files()


@pytest.fixture(scope="module")
def wheel(files, tmp_path_factory):
    """Built from a copy of the repository, where nothing lies about."""
    folder = tmp_path_factory.mktemp("build")
    for name in files:
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "tree" / name)
    return build("wheel", folder / "tree", folder)


def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(files, wheel):
    info = f"iclip_hf-{__version__}.dist-info"
    held = {name: content for name, content in contents(wheel).items() if not name.startswith(info)}
    expected = packaged(files)
    assert set(held) == set(expected)
    assert all(content == (ROOT / expected[name]).read_bytes() for name, content in held.items())
    assert "iclip_hf/py.typed" in held
    metadata = contents(wheel)[f"{info}/METADATA"].decode()
    assert "\nRequires-Python: >=3.10\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata


OPTIONAL = "accelerate datasets evaluate gradio onnx onnxruntime onnxscript open_clip pycocotools".split()
OPTIONAL += ["skimage", "sklearn", "tensorboard"]
NEEDS = {  # names of modules by the extra that they need
    "demo": ["demo.app"],
    "eval": [
        f"evaluation.{name}" for name in ("evaluate", "evaluate_modules", "metrics.label_maps", "metrics.recognition")
    ],
    "train": ["cli.train.training", "training.callbacks", "training.trainer"],
}


# Runs statements without the optional packages, and prints what each says.
WITHOUT = """
import json, sys

results = []
optional, statements = json.load(sys.stdin)
sys.modules.update(dict.fromkeys(optional))
for statement in statements:
    try:
        exec(statement, {})
        results.append(None)
    except ImportError as error:
        results.append(str(error))
print(json.dumps(results))
"""


def test_what_needs_an_extra_says_its_name(files):
    """Modules, and what is loaded late; all others do without any extra."""
    paths = [PurePosixPath(place).with_suffix("") for place in packaged(files) if place.endswith(".py")]
    modules = [".".join(path.parts).removesuffix(".__init__") for path in paths if path.name != "__main__"]
    modules = sorted(name for name in modules if not name.startswith("iclip_hf.evaluate_metrics."))
    late = ["from iclip_hf.data import load_pairs; load_pairs('org/name')"]
    late += ["from iclip_hf.data import load_segmentation; load_segmentation('coco2017', '.')"]
    statements = json.dumps([OPTIONAL, [*(f"import {name}" for name in modules), *late]])
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT]
    done = subprocess.run(command, cwd=ROOT, input=statements, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *of_modules, pairs, segmentation = json.loads(done.stdout.splitlines()[-1])
    said = dict(zip(modules, of_modules, strict=True))
    needs = {f"iclip_hf.{name}": extra for extra, names in NEEDS.items() for name in names}
    assert {name for name, sentence in said.items() if sentence} == needs.keys()
    for name, extra in needs.items():
        assert f"the extra [{extra}] with `pip install " in said[name], said[name]
    # The requirements themselves, so that the command works for a wheel too.
    assert "[train]" in pairs and "'datasets>=" in pairs
    assert "[eval]" in segmentation and "'pycocotools>=" in segmentation
