"""The Makefile's set-up and exit statuses, with a Python that only pretends to install."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Stands for python3.11 and for everything in .venv/bin: notes how it was called, fails when the call contains
# the text in the file `fail`, and otherwise runs nothing but `-m venv` and tools/elapsed.py.
STUB = f"""#!/bin/sh
case "$*" in
    "-m venv .venv")
        mkdir -p .venv/bin
        for name in python pytest rbn ruff mypy coverage; do cp "$0" .venv/bin/$name; done;;
    tools/elapsed.py*)
        exec {sys.executable} "$@";;
esac
echo "$(basename "$0") $*" >> "$CALLS"
if grep -qxF -- "$(basename "$0") $*" "$FAIL"; then echo "it broke"; exit 1; fi
"""


@pytest.fixture
def make(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "tools", tree / "tools")
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "kernels", tree / "kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    stub = tmp_path / "bin" / "python3.11"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    calls, fail = tmp_path / "calls", tmp_path / "fail"

    def make(target, fails=""):
        calls.write_text("")
        fail.write_text(fails)
        path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "CALLS": str(calls), "FAIL": str(fail), "MAKEFLAGS": ""}
        result = subprocess.run(["make", target], cwd=tree, env=environment, capture_output=True, text=True)
        return result, calls.read_text().splitlines()

    make.tree = tree
    return make


INSTALL = [
    "python3.11 -m venv .venv",
    "python -m pip install -c constraints.txt pip setuptools",
    "python -m pip install -c constraints.txt --no-build-isolation -e .[torch,flax,mindspore,jittor,dev]",
    "python -c import rbn.backends.jittor",
]
FRAMEWORK_TESTS = {
    "coverage run --data-file=.coverage.{0} -m pytest --framework {0}": "pytest --framework {0}",
    "coverage combine --quiet --data-file=.coverage.{0}": None,
    "coverage report --data-file=.coverage.{0} --include=backends/{0}/* --fail-under=95": "coverage of {0}",
}
TESTS = {"pytest ": "pytest"} | {
    call.format(name): failure and failure.format(name)
    for name in ("torch", "flax", "mindspore", "jittor")
    for call, failure in FRAMEWORK_TESTS.items()
}
"""What `make test` calls, and what it says has failed where that fails."""
CONFORM = ["rbn conform torch flax mindspore jittor"]


def stamps(make):
    return [path.name for path in (make.tree / ".venv").glob(".set-up-*")]


def test_set_up_once_for_all_targets(make):
    result, calls = make("conform")
    assert result.returncode == 0, result.stderr
    assert calls == INSTALL + CONFORM
    assert make("test")[1] == list(TESTS)


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "setup.py", "kernels/loops.h"])
def test_set_up_again_when_the_content_changes_and_only_then(make, name):
    make("setup")
    (make.tree / name).touch()
    assert make("setup")[1] == []
    with (make.tree / name).open("a") as file:
        file.write("# changed\n")
    assert make("setup")[1] == INSTALL
    assert len(stamps(make)) == 1


@pytest.mark.parametrize("step", INSTALL)
@pytest.mark.parametrize("target", ["lint", "test", "conform"])
def test_a_failed_step_stops_the_target(make, step, target):
    result, calls = make(target, fails=step)
    assert result.returncode != 0
    assert calls == INSTALL[: INSTALL.index(step) + 1]
    assert "it broke" in result.stdout
    assert stamps(make) == []


def test_a_set_up_that_fails_after_a_change_leaves_no_old_stamp(make):
    make("setup")
    original = (make.tree / "constraints.txt").read_text()
    (make.tree / "constraints.txt").write_text("numpy==0\n")
    make("setup", fails=INSTALL[2])
    (make.tree / "constraints.txt").write_text(original)
    assert make("setup")[1] == INSTALL


@pytest.mark.parametrize("failing", [call for call, failure in TESTS.items() if failure])
def test_every_test_run_and_every_coverage_counts(make, failing):
    make("setup")
    result, calls = make("test", fails=failing)
    assert result.returncode != 0
    assert f"failed: {TESTS[failing]}\n" in result.stderr
    assert calls == list(TESTS)


def test_what_a_killed_run_measured_is_left_out(make):
    make("setup")
    stale = make.tree / ".coverage.torch.host.1"
    for target in ("test", "clean"):
        stale.touch()
        make(target)
        assert not stale.exists()


def test_mypy_gets_the_tree_of_import_names(make):
    for folder in ("rbn", "rbn_core", "backends", "kernels", "conformance", "benchmarks"):
        (make.tree / folder).mkdir(exist_ok=True)
        (make.tree / folder / "__init__.py").touch()
    result, calls = make("lint")
    assert result.returncode == 0, result.stderr
    assert calls[-1].startswith("mypy ")
    types = make.tree / "build" / "types"
    for name in ("rbn", "rbn_core", "rbn/backends", "rbn/kernels", "rbn/conformance", "rbn/benchmarks"):
        assert (types / name / "__init__.py").is_file()


def test_conform_fails_when_the_suite_does(make):
    assert make("conform", fails=CONFORM[0])[0].returncode != 0


@pytest.mark.parametrize("target", ["setup", "test"])
def test_no_python_3_11(make, target, tmp_path):
    stub = tmp_path / "bin" / "python3.11"
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.rename(stub.with_name("python3"))
    os.symlink("/bin/sh", tmp_path / "bin" / "sh")
    for program in ("make", "cat", "sha256sum", "cut"):
        os.symlink(shutil.which(program), tmp_path / "bin" / program)
    result = subprocess.run(
        ["make", target], cwd=make.tree, env={"PATH": str(tmp_path / "bin")}, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "needs Python 3.11" in result.stderr
    assert not (make.tree / ".venv").exists()
