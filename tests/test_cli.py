import json
import subprocess
import sys

import pytest
from conftest import tiny_model
from PIL import Image

from iclip_hf import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_processor):
    """A tiny model, three photographs of different shapes and a damaged one."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model().save_pretrained(folder / "model")
    tiny_processor.save_pretrained(folder / "model")
    for number, size in enumerate([(60, 40), (30, 90), (64, 64)]):
        (folder / str(number)).mkdir()
        Image.effect_noise(size, 80).convert("RGB").save(folder / str(number) / "a.jpg")
    (folder / "broken.jpg").write_bytes((folder / "0" / "a.jpg").read_bytes()[:200])
    return folder


def run(folder, *arguments):
    return cli.main(["explain", *map(str, arguments), "--model", str(folder / "model")])


def test_one_photograph_becomes_one_picture(folder, tmp_path, capsys):
    output = tmp_path / "sub" / "out.png"
    assert run(folder, folder / "0" / "a.jpg", "--text", "dog", "--text", "red ball", "--output", output) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith(f"a.jpg -> {output}") and {line.split()[0] for line in printed[1:]} == {"dog", "red"}
    with Image.open(output) as picture:
        assert picture.width > 3 * picture.height / 2  # original and two maps side by side
    assert [path.name for path in output.parent.iterdir()] == ["out.png"]


def test_many_photographs_and_one_that_is_broken(folder, tmp_path, capsys):
    images = [folder / "0" / "a.jpg", folder / "broken.jpg", folder / "1" / "a.jpg"]
    assert run(folder, *images, "--text", "dog", "--output", tmp_path / "maps", "--json") == 2
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert [entry["image"] for entry in report] == [str(images[0]), str(images[2])]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["a-2.png", "a.png"]
    assert -1 <= report[0]["texts"][0]["score"] <= 1
    assert "broken.jpg" in err and "undamaged copy" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jpg", "--text", "dog"], "none.jpg.*check the path"),
        (["{image}", "--text", ""], "at least one character"),
        (["{image}", "--text", "dog", "--template", "photo"], "one {} each"),
        (["{image}", "--text", "dog", "--image-size", "30"], "multiples of the patch size 8"),
        (["{image}", "--text", "dog", "--output", "{tmp}"], "--output.*ends in .png"),
        (["{image}", "{image}", "--text", "dog", "--output", "{tmp}/a.png"], "expected a folder"),
        (["{image}", "--text", "dog", "--colormap", "x"], "colormap"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    filled = [a.replace("{image}", str(folder / "2" / "a.jpg")).replace("{tmp}", str(tmp_path)) for a in arguments]
    assert run(folder, *filled) == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1 and err.startswith("iclip explain: ")
    assert all(part in err for part in message.split(".*"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_model(tmp_path, folder, capsys):
    arguments = ["explain", str(folder / "2" / "a.jpg"), "--text", "dog", "--model", str(tmp_path)]
    assert cli.main(arguments) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [[], ["explain"], ["explain", "a.jpg"], ["paint"], ["evaluate", "--dataset", "x"]]
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_import_and_help_load_neither_torch_nor_transformers():
    code = (
        "import sys, iclip_hf, iclip_hf.cli\n"
        "try: iclip_hf.cli.main(['explain', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_auto_classes_know_the_package_whatever_is_imported_first(folder):
    load = f"AutoModel.from_pretrained({str(folder / 'model')!r})"
    for imports in (
        "import iclip_hf; from transformers import AutoModel",
        "from transformers import AutoModel; import iclip_hf",
    ):
        code = f"{imports}; print(type({load}).__name__)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "ICLIPModel"


def test_methods_of_the_command_are_those_of_the_package():
    from iclip_hf.cli.common import METHODS
    from iclip_hf.explainers import METHODS as OF_PACKAGE

    assert set(METHODS) == set(OF_PACKAGE)
