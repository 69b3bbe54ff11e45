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


# Runs doors, each without a package: which exception, and which name of an extra it says.
DOORS_WITHOUT = """
import importlib, json, re, sys

kept, results = {}, []
for packages, door in json.load(sys.stdin):
    if packages != [*kept]:  # what was imported beside others is imported anew
        for name in [name for name in sys.modules if re.match(r"iclip_hf\\b", name)]:
            del sys.modules[name]
        for package, module in kept.items():
            del sys.modules[package]
            if module is not None:
                sys.modules[package] = module
        kept = {package: sys.modules.get(package) for package in packages}
        sys.modules.update(dict.fromkeys(packages))
    try:
        exec(door, {})
        results.append(None)
    except ImportError as error:
        results.append(str(error))
print(json.dumps(results))
"""


def open_doors(doors: list[tuple[list[str], str]]) -> list[str | None]:
    """What each door says without the packages: None if it opens."""
    command = [sys.executable, "-W", "ignore", "-c", DOORS_WITHOUT]
    opened = subprocess.run(command, cwd=ROOT, input=json.dumps(doors), capture_output=True, text=True)
    assert opened.returncode == 0, opened.stderr
    return json.loads(opened.stdout.splitlines()[-1])


OPTIONAL = "accelerate datasets evaluate gradio onnx onnxruntime onnxscript open_clip pycocotools".split()
OPTIONAL += ["skimage", "sklearn", "tensorboard"]
NEEDS = {  # names of modules by the extra that they need
    "demo": ["demo.app"],
    "eval": [
        f"evaluation.{name}" for name in ("evaluate", "evaluate_modules", "metrics.label_maps", "metrics.recognition")
    ],
    "train": ["cli.train.training", "training.callbacks", "training.trainer"],
}


def test_modules_without_their_extra_say_its_name(files):
    """And all others do without any extra."""
    paths = [PurePosixPath(place).with_suffix("") for place in packaged(files) if place.endswith(".py")]
    modules = [".".join(path.parts).removesuffix(".__init__") for path in paths if path.name != "__main__"]
    modules = sorted(name for name in modules if not name.startswith("iclip_hf.evaluate_metrics."))
    said = dict(zip(modules, open_doors([(OPTIONAL, f"import {name}") for name in modules])))
    needs = {f"iclip_hf.{name}": extra for extra, names in NEEDS.items() for name in names}
    assert {name for name, sentence in said.items() if sentence} == needs.keys()
    for name, extra in needs.items():
        assert f"the extra [{extra}] with `pip install " in said[name], said[name]


def test_what_is_loaded_late_says_its_extra_too():
    doors = {
        ("accelerate", "train"): "import iclip_hf.training.trainer",
        ("datasets", "train"): "from iclip_hf.data import load_pairs; load_pairs('org/name')",
        ("pycocotools", "eval"): "from iclip_hf.data import load_segmentation; load_segmentation('coco2017', '.')",
        ("evaluate", "eval"): "from iclip_hf.evaluation.evaluate_modules import install_metrics; install_metrics()",
    }
    said = open_doors([([package], door) for (package, _), door in doors.items()])
    for (package, extra), sentence in zip(doors, said):
        assert sentence.startswith(f"{package} is not installed: install the extra [{extra}] with `pip install ")
        # The requirements themselves, so that the command works for a wheel too.
        assert f"'{'scikit-learn' if package == 'sklearn' else package}>=" in sentence


def test_make_installs_again_where_the_package_is_a_copy(tmp_path):
    for name in ("Makefile", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    packages = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    for stamp in (".package", ".installed"):
        (tmp_path / ".venv" / stamp).touch()

    def installs() -> bool:
        steps = subprocess.run(["make", "--dry-run", "test"], cwd=tmp_path, capture_output=True, text=True)
        return "--editable '.[dev]'" in steps.stdout

    assert installs()
    (packages / f"__editable__.iclip_hf-{__version__}.pth").touch()
    assert not installs()
