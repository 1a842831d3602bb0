"""The `rbn` command: what it prints and the exit status it gives."""

import io
import json
import re
import time

import pytest
import typer
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

import rbn
from rbn import cli, kernels
from rbn.backends import frameworks
from rbn.conformance import loading, runner


def call(*arguments):
    return CliRunner().invoke(cli.app, arguments)


def words(result):
    """What a table says, whatever lines its cells were folded into."""
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def no_framework(monkeypatch):
    """As on a machine with none of the four installed."""
    monkeypatch.setattr(cli, "is_installed", lambda name: False)
    monkeypatch.setattr(cli, "versions", lambda name: {})


def commands():
    """Every command with its parameters, under its name."""
    main = typer.main.get_command(cli.app)
    return {"": main, **main.commands}


@pytest.mark.parametrize("name", commands())
def test_a_help_text_says_all_its_words(name, monkeypatch):
    """What looks like markup is none, and a line breaks where the terminal does."""
    monkeypatch.setenv("COLUMNS", "500")
    command = commands()[name]
    shown = call(*filter(None, [name]), "--help").output
    lines = [" ".join(line.strip("│ ").split()) for line in shown.splitlines()]
    texts = [text for each in command.params if (text := getattr(each, "help", None))]
    for text in texts:
        due = " ".join(text.replace("\\[", "[").split())
        assert any(due in line for line in lines), due
        assert Text.from_markup(text).plain == text.replace("\\[", "["), text
    for paragraph in command.help.split("\n\n"):
        assert " ".join(paragraph.split()) in lines, paragraph


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("rbn conf", {"conform"}),
        ("rbn conform fl", {"flax", "flax.nnx", "flax.plain"}),
        ("rbn conform n", {"numpy", "new"}),
        ("rbn bench mind", {"mindspore"}),
        ("rbn conform --fail", {"--fail-fast"}),
    ],
)
def test_the_shell_completes_commands_options_and_frameworks(line, offered, monkeypatch):
    monkeypatch.setenv("_RBN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    result = CliRunner().invoke(cli.app, prog_name="rbn")
    assert set(result.output.split()) == offered


def test_list_prints_ids_in_a_pipe_and_rows_on_a_terminal(monkeypatch):
    chosen = (
        "conform",
        "--list",
        "--only",
        "bn/train/offset0/8x3/float??",
        "--only",
        "bn/eval/offset0/8x3/float32",
    )
    ids = [
        f"bn/{name}"
        for name in ("train/offset0/8x3/float32", "train/offset0/8x3/float64", "eval/offset0/8x3/float32")
    ]
    assert call(*chosen).output.split() == ids
    terminal = Console(file=io.StringIO(), force_terminal=True, no_color=True, width=80, highlight=False)
    monkeypatch.setattr(cli, "_console", lambda: terminal)
    call(*chosen)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.file.getvalue()).splitlines()
    assert lines[:2] == ["bn/train/data/float32  1 case", f"  {ids[0]}"]
    assert lines[-1].startswith("3 cases in 3 rows")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--subject", "nomod:x"), "nomod:x: there is no module nomod"),
        (("--subject", "nomod"), "nomod: expected PKG.MODULE:NAME"),
        (("--expected", "nowhere.toml"), "nowhere.toml: "),
        (("--from", "nowhere.partial"), "nowhere.partial: expected the .partial file"),
        (("--write-expected", "x.toml", "--seeds", "2"), "--write-expected goes with one set of numbers"),
        (("--only", "bn/trian/*"), "expected a pattern that matches a case, got 'bn/trian/*'"),
        (("new",), "expected rbn conform new FILE"),
        (("new", "mine.py", "tensorflow"), "tensorflow: expected one of numpy, torch, flax"),
        (("--json", "file/below.json"), "expected a folder to write file/below.json into"),
        (("--junit", "folder"), "expected a file to write, got folder, which is a folder"),
    ],
)
def test_what_is_asked_for_wrongly_is_one_line_and_exit_status_2(tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    started = time.monotonic()
    result = call("conform", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"rbn: {text}")
    assert result.stderr.count("\n") == 1
    assert time.monotonic() - started < 60  # and no case has run
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_a_new_subject_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("conform", "new", "mine.py")
    assert result.exit_code == 0
    assert result.output.endswith("Run it as it is: rbn conform --subject mine:subject\n")
    assert (tmp_path / "mine.py").exists()


def test_version():
    result = call("--version")
    assert (result.exit_code, result.output) == (0, f"rbn {rbn.__version__}\n")


def test_info_names_versions_devices_and_what_is_wrong(monkeypatch):
    monkeypatch.setattr(cli, "devices", lambda name: ("cpu, cuda:0", ""))
    monkeypatch.setattr(cli, "problems", lambda name: ["jittor 1 and NumPy 2"] if name == "jittor" else [])
    result = call("info")
    assert result.exit_code == 0
    for text in (rbn.__version__, "torch", "flax", "mindspore", "jittor 1 and NumPy 2", "cpu, cuda:0"):
        assert text in result.output


def test_info_says_how_to_install_what_is_missing(no_framework):
    result = words(call("info"))
    assert result.count("not installed") >= 4
    assert "'rbn[mindspore]'" in result


def test_info_says_what_was_tested_and_what_is_newer(no_framework, monkeypatch):
    monkeypatch.setattr(cli, "versions", lambda name: {name: "99"})
    monkeypatch.setattr(cli, "untested", lambda name: ["99 is [newer]"] if name == "flax" else [])
    result = words(call("info"))
    assert frameworks.tested("mindspore") in result
    assert "99 is [newer]" in result


def test_info_names_the_instructions_of_the_compiled_loops(no_framework, monkeypatch):
    monkeypatch.setattr(kernels, "problem", lambda: "")
    monkeypatch.setattr(kernels, "instructions", lambda: "AVX2")
    assert "compiled loops: AVX2\n" in call("info").output


def test_info_says_why_there_are_no_compiled_loops(no_framework, monkeypatch):
    monkeypatch.setattr(kernels, "problem", lambda: "[no] library")
    assert "no compiled loops, framework operations instead: [no] library\n" in call("info").output


def test_devices_says_why_a_backend_cannot_be_imported():
    found, failure = frameworks.devices("no_such_backend")
    assert found == ""
    assert failure.startswith("rbn.backends.no_such_backend cannot be imported: ModuleNotFoundError")


def test_conform_without_frameworks_names_them_and_checks_numpy(no_framework, tmp_path):
    result = call("conform", "--json", str(tmp_path / "results.json"))
    assert result.exit_code == 0, result.output
    for name in frameworks.FRAMEWORKS:
        assert f"{name} is not installed: pip install 'rbn[{name}]'" in result.output
    assert list(json.loads((tmp_path / "results.json").read_text())["runs"]) == ["numpy"]


def test_conform_of_a_missing_framework_is_exit_status_2(no_framework):
    result = call("conform", "torch")
    assert result.exit_code == 2
    assert "torch is not installed" in result.output


def test_conform_of_an_unknown_framework_is_exit_status_2():
    result = call("conform", "tensorflow")
    assert result.exit_code == 2
    assert "tensorflow" in result.output


def test_conform_says_what_a_first_run_compiles(monkeypatch):
    monkeypatch.setattr(cli, "is_installed", lambda name: True)
    monkeypatch.setattr(runner, "run", lambda targets, cases, progress, *_, **__: progress([]) or [])
    assert "jittor compiles itself on its first run on a machine" in call("conform", "jittor").output
    assert "compiles" not in call("conform", "torch").output


def test_conform_of_a_wrong_layer_is_exit_status_1(no_framework, monkeypatch):
    monkeypatch.setitem(loading.SUBJECTS, "numpy", ("no_such_module:Subject",))
    result = call("conform")
    assert result.exit_code == 1
    assert "numpy DIFFERS" in result.output
