"""The `rbn` command: what it prints and the exit status it gives."""

import json

import pytest
from typer.testing import CliRunner

import rbn
from rbn import cli, kernels
from rbn.backends import frameworks
from rbn.conformance import runner


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
    monkeypatch.setattr(runner, "run", lambda targets, cases, progress, time_limit: progress([]) or [])
    assert "jittor compiles itself on its first run on a machine" in call("conform", "jittor").output
    assert "compiles" not in call("conform", "torch").output


def test_conform_of_a_wrong_layer_is_exit_status_1(no_framework, monkeypatch):
    monkeypatch.setitem(runner.SUBJECTS, "numpy", ("no_such_module:Subject",))
    result = call("conform")
    assert result.exit_code == 1
    assert "numpy DIFFERS" in result.output
