"""
README and pages: their commands parse, their Python runs, their links and paths exist, and the API reference is
complete.
"""

import ast
import builtins
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import iclip

from iclip_hf import cli, example_image


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Pages for readers, as Markdown that GitHub shows too.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "hub_configs" / "README.md", *sorted(DOCS.rglob("*.md"))]
# What a page writes for several words.
ABBREVIATIONS = {"DATASET": ["--dataset", "coco2017", "--data-root", "COCO"]}


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """
    What the page tells to type, in blocks and in the cells of tables, as words; several commands of a line one by one.
    """
    lines = "".join(code_blocks(page, "bash")).replace("\\\n", " ").splitlines()
    for row in re.findall(r"^\|.*", page.read_text(encoding="utf-8"), re.MULTILINE):
        lines += re.findall(r"`((?:iclip \S+|python|make) [^`]+)`", row)
    parts = [part for line in lines for part in line.split(" && ")]
    return [words for words in (shlex.split(part, comments=True) for part in parts) if words]


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


def iclip_arguments(words: list[str]) -> list[str] | None:
    """The arguments of the `iclip` command, however it is started; None for another command."""
    if words[0] == "iclip":
        return words[1:]
    return words[words.index("iclip_hf.cli") + 1 :] if "iclip_hf.cli" in words else None


ICLIP = [(page, arguments) for page, words in COMMANDS if (arguments := iclip_arguments(words)) is not None]


@pytest.mark.parametrize(("page", "arguments"), ICLIP, ids=lambda part: part.name if isinstance(part, Path) else None)
def test_iclip_commands_parse(page, arguments, tmp_path, monkeypatch):
    # As the pages' trainings and exports leave them.
    runs = ("pairs", "own", "iclip-vit-b16", "iclip-dinov2-s14-minilm", "export", "onnx")
    for folder in (*(f"runs/{name}" for name in runs), "onnx"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text('{"model_type": "iclip"}')
    monkeypatch.chdir(tmp_path)
    spelled = [word for argument in arguments for word in ABBREVIATIONS.get(argument, [argument])]
    assert cli.parser(spelled[0]).parse_args(spelled[1:]).run


def written_folder(words: list[str]) -> str | None:
    """The folder that a command of a page writes, which must be new."""
    scripted = ["train", *words[words.index("train.py") + 1 :]] if "train.py" in words else [""]
    command, *arguments = iclip_arguments(words) or scripted
    if command == "train":
        options = vars(cli.parser("train").parse_args(arguments))
        return options.get("output_dir") or f"runs/{Path(options.get('config') or options['data'][0]).stem}"
    return {"export": arguments[1:2], "init": arguments[-1:]}.get(command, [None])[0]


def test_all_pages_can_be_typed_in_one_folder():
    """In the order of the README, whose trainings and exports would otherwise be refused."""
    readme = ROOT / "README.md"
    guides = dict.fromkeys(re.findall(r"\]\((docs/guide/[\w-]+\.md)\)", readme.read_text(encoding="utf-8")))
    pages = [readme, *(ROOT / guide for guide in guides)]
    folders = [folder for page in pages for words in commands(page) if (folder := written_folder(words))]
    assert {"runs/pairs", "runs/own", "my-model", "runs/onnx", "page"} <= {*folders}
    assert len({*folders}) == len(folders), folders


def test_make_targets_and_scripts_exist():
    targets = set(re.findall(r"^([\w-]+)[\w -]*:", (ROOT / "Makefile").read_text(), re.MULTILINE)) | {"test-newest"}
    for page, words in COMMANDS:
        if words[0] == "make":
            assert words[1] in targets, (page.name, words)
        for script in (word for word in words if word.endswith((".py", ".yaml"))):
            assert (ROOT / script).is_file(), (page.name, script)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_and_named_paths_exist(page):
    """In docs/ the build checks links; this also covers the pages that are read in the repository alone."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:src|tests|docs|hub_configs|benchmarks|notebooks|evaluate_metrics)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or "NAME" in path, path


LINKS = {
    ("index.md", "[speed](docs/speed.md#training)"): "[speed](speed.md#training)",
    ("index.md", "![x](docs/demo.jpg) [a notebook](notebooks/tutorial.ipynb)"): "![x](demo.jpg) a notebook",
    ("guide/explain.md", "[start](../../README.md#quick-start)"): "[start](../index.md#quick-start)",
    ("guide/explain.md", "[files](models.md) [web](https://a.b/c.md)"): "[files](models.md) [web](https://a.b/c.md)",
    ("methods.md", "[`load`](../src/iclip_hf/data/__init__.py)"): "[`load`][iclip_hf.data.load]",
}


@pytest.mark.parametrize(("page", "text"), LINKS)
def test_links_of_the_site(page, text, monkeypatch):
    pytest.importorskip("mkdocs", reason="needs the extra [docs]")
    monkeypatch.syspath_prepend(DOCS)
    from pages import relinked

    assert relinked(f"See {text}.", page) == f"See {LINKS[page, text]}."


def test_every_module_is_in_the_api_reference():
    directives = {}
    for page in (DOCS / "api").glob("*.md"):
        for name, options in re.findall(r"^::: (\S+)\n((?: .*\n)*)", page.read_text() + "\n", re.MULTILINE):
            directives[name] = options
    modules = set()
    for file in (ROOT / "src" / "iclip_hf").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT / "src").with_suffix("").parts)
        if not re.search(r"\._|\.(cli|demo)\.", name):
            modules.add(name)
    whole = tuple(f"{name}." for name, options in directives.items() if "members" not in options)
    assert [name for name in modules if name not in directives and not name.startswith(whole)] == []


DOCSTRINGS = '''
class Thing:
    """Documented."""

    other = None

    def use(self, size):
        """
        Uses a [`~sample.Thing`], its [`Thing.other`] and an [`Absent`].

        Args:
            size (`int`, defaults to 3): first line
                and second line.
            depth: `Args:` of another kind.

        Returns:
            `tuple`: one item
            on two lines.

        Raises:
            `ValueError`: for a size
            below 1.
        """
'''
RENDERED = """
Uses a [`Thing`][sample.Thing], its `other` and an [`Absent`][Absent].

**Args**

- size (`int`, defaults to 3): first line
    and second line.
- depth: `Args:` of another kind.

**Returns**

- `tuple`: one item
    on two lines.

**Raises**

- `ValueError`: for a size
    below 1.
"""


def test_docstrings_are_rendered_as_lists_and_links(tmp_path):
    griffe = pytest.importorskip("griffe", reason="needs the extra [docs]")
    (tmp_path / "sample.py").write_text(DOCSTRINGS)
    extensions = griffe.load_extensions(DOCS / "docstrings.py")
    package = griffe.load("sample", search_paths=[tmp_path], extensions=extensions)
    rendered = re.sub(r"\n\s*\n+", "\n\n", package["Thing.use"].docstring.value)
    assert rendered.strip() == RENDERED.strip()


def test_the_readme_begins_with_a_command_for_its_picture_and_one_for_the_tests():
    """In a fresh clone, on a machine with Python and make alone. The continuous integration calls the second."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    clone, demo, test = (
        line.partition("#")[0].strip() for line in code_blocks(ROOT / "README.md", "bash")[0].splitlines()
    )
    assert clone.startswith("git clone ")
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == test
    for command in (demo, test):
        steps = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert steps.returncode == 0, steps.stderr
    # The same texts as in Python, all of which stand below the picture.
    texts = re.search(r"^TEXTS := \"(.*)\"$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split(", ")
    (called,) = re.findall(r"explain\(load\(\"embedded\"\), example_image\(\), (\[.*?\])\)", readme)
    (shown,) = re.findall(r"^!\[(.*)\]\(docs/demo.jpg\)$", readme, re.MULTILINE)
    assert json.loads(called) == texts and all(f'"{text}"' in shown for text in texts)


@pytest.mark.slow
def test_the_demo_writes_its_picture_and_prints_where_it_is(embedded_folder, tmp_path):
    """By the Python that runs the tests, without an installation."""
    programs = Path(sys.executable).parent
    command = ["make", "demo", "--assume-old=.venv/.package", f"BIN={programs}", f"CURDIR={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"-> {tmp_path / 'demo.jpg'}\n" in done.stdout, done.stderr
    assert (tmp_path / "demo.jpg").is_file()


def test_the_recipe_for_coco100_keeps_its_images_alone(tmp_path, monkeypatch):
    ids = [int(line) for line in (DOCS / "coco100.txt").read_text().split()]
    assert len(set(ids)) == 100
    (recipe,) = [block for block in code_blocks(DOCS / "results.md", "py") if "coco100.txt" in block]
    official = {
        "images": [{"id": id_} for id_ in (1, *ids, 10**6)],
        "annotations": [{"id": 7, "image_id": 1}, {"id": 8, "image_id": ids[0]}, {"id": 9, "image_id": ids[-1]}],
        "categories": [{"id": 1, "name": "person"}],
    }
    for folder in ("COCO/annotations", "COCO/train2017", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "COCO" / "annotations" / "instances_train2017.json").write_text(json.dumps(official))
    (tmp_path / "docs" / "coco100.txt").write_text((DOCS / "coco100.txt").read_text())
    monkeypatch.chdir(tmp_path)
    exec(recipe, {})
    subset = json.loads((tmp_path / "DATA" / "coco100" / "annotations" / "instances_train2017.json").read_text())
    assert [image["id"] for image in subset["images"]] == ids
    assert [annotation["id"] for annotation in subset["annotations"]] == [8, 9]
    assert subset["categories"] == official["categories"] and (tmp_path / "DATA" / "coco100" / "train2017").is_dir()


PYTHON = [page for page in PAGES if code_blocks(page, "python")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_examples_define_their_names(page):
    """A reader copies one example into a file of its own."""
    for block in code_blocks(page, "(?:py|python)"):
        used, defined = set(), set(dir(builtins))
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Name):
                (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
            elif isinstance(node, ast.alias):
                defined.add((node.asname or node.name).partition(".")[0])
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.arg):
                defined.add(node.arg)
        assert used <= defined, (used - defined, block)


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_examples_run(page, embedded_folder, tmp_path, monkeypatch):
    """The blocks of a page run one after the other, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(example_image(), "dog.jpg")  # the photograph that other pages take
    if "iclip install-metrics" in page.read_text(encoding="utf-8"):
        evaluate = pytest.importorskip("evaluate", reason="needs the extra [eval]")
        monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        assert iclip("install-metrics") == 0
    names = {}
    for block in code_blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
