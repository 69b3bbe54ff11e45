"""
The rule of rooms: imports point downwards and never in a circle, and what travels with a model needs nothing else.
"""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path


ROOT = Path(__file__).parents[1]
# From the top to the bottom; a room knows only those below it. The modules of "model" travel with an exported model.
ROOMS = [
    "cli",
    "demo",
    "web",
    "training",
    "hub",
    "evaluate_metrics",
    "evaluation",
    "plots",
    "explainers",
    "backends",
    "data",
    "model",
    "utils",
]


def module_name(path: Path) -> str:
    """The name that a file of the package is imported by."""
    if path.is_relative_to(ROOT / "src"):
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
    else:
        parts = ("iclip_hf", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


PATHS = {
    module_name(path): path for top in ("src/iclip_hf", "evaluate_metrics") for path in (ROOT / top).rglob("*.py")
}


def room(module: str) -> str:
    return module.split(".")[1]


def imports(module: str, source: str) -> Iterator[str]:
    """The modules of this package that a module imports, wherever in it the import stands."""
    package = module if PATHS[module].stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:  # a module, or something in one
            found = name if name in PATHS else name.rpartition(".")[0]
            if found in PATHS and found != "iclip_hf":  # the package's own door names modules of all rooms
                yield found


ARROWS = {
    module: set(imports(module, path.read_text(encoding="utf-8")))
    for module, path in PATHS.items()
    if module != "iclip_hf"
}


def test_every_folder_is_a_room():
    folders = {module.split(".")[1] for module, path in PATHS.items() if path.stem == "__init__" and "." in module}
    assert folders == set(ROOMS)


def test_imports_point_downwards():
    assert "iclip_hf.web.export" in ARROWS["iclip_hf.cli.export"]  # imported by `from ..` in a function
    climbing = [
        f"{module} imports {target}"
        for module, targets in ARROWS.items()
        for target in targets
        if ROOMS.index(room(target)) < ROOMS.index(room(module))
    ]
    assert climbing == []


def test_no_circle():
    list(TopologicalSorter(ARROWS).static_order())  # raises CycleError, which names it


def test_what_travels_with_a_model_and_what_all_use_know_nothing_else():
    for module, targets in ARROWS.items():
        if room(module) in ("model", "utils"):
            assert {room(target) for target in targets} <= {room(module)}, module
