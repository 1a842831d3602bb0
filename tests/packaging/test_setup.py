"""The Makefile's set-up and exit statuses, with a Python that only pretends to install."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Stands for python3.11, python3.12 and all that is in the bin of an environment: notes how it was called and
# how threads are to wait, fails when the call is in the file `fail`, and otherwise runs nothing but `-m venv`
# and what is in tools/.
STUB = f"""#!/bin/sh
case "$*" in
    "-m venv "*)
        mkdir -p "$3/bin"
        for name in python pytest rbn ruff mypy coverage; do cp "$0" "$3/bin/$name"; done;;
    "-m pip list"*)
        echo "flax==99";;
    *"-m not long")
        echo "long tests left out: 3";;
    tools/*)
        exec {sys.executable} "$@";;
esac
echo "$(basename "$0") $*" >> "$CALLS"
echo "$OMP_WAIT_POLICY" > "$CALLS.waiting"
if grep -qxF -- "$(basename "$0") $*" "$FAIL"; then echo "it broke"; exit 1; fi
"""


@pytest.fixture
def make(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "tools", tree / "tools")
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "constraints-integrations.txt", "setup.py"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "kernels", tree / "kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name in ("python3.11", "python3.12"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    calls, fail = tmp_path / "calls", tmp_path / "fail"

    def make(*targets, fails="", **variables):
        calls.write_text("")
        fail.write_text(fails)
        path = f"{stubs}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "CALLS": str(calls), "FAIL": str(fail), "MAKEFLAGS": ""}
        environment |= {"HOME": str(tmp_path)} | variables
        result = subprocess.run(["make", *targets], cwd=tree, env=environment, capture_output=True, text=True)
        return result, [line for line in calls.read_text().splitlines() if " -c import sys; " not in line]

    make.tree = tree
    return make


INSTALL = [
    "python3.11 -m venv .venv",
    "python -m pip install -c constraints.txt pip setuptools",
    "python -m pip install -c constraints.txt --no-build-isolation -e .[cli,torch,flax,mindspore,jittor,dev]",
    "python -c import rbn.backends.jittor",
]
SLOWEST, SHORT = " --durations 20", " -m not long"
FRAMEWORK_TESTS = {
    "coverage run --data-file=.coverage.{0} -m pytest --framework {0}"
    + SLOWEST
    + SHORT: "pytest --framework {0}",
    "coverage combine --quiet --data-file=.coverage.{0}": "combining the coverage of {0}",
    "coverage report --data-file=.coverage.{0} --include=backends/{0}/*,formats/{0}.py"
    " --fail-under=95": "coverage of {0}",
}
PARTS = [{"pytest -n 2 --dist loadfile" + SLOWEST + SHORT: "pytest"}] + [
    {call.format(name): failure.format(name) for call, failure in FRAMEWORK_TESTS.items()}
    for name in ("torch", "flax", "mindspore", "jittor")
]
"""What `make test` calls for each part, one after another, and what it says has failed where that fails."""
TESTS = {call: failure for part in PARTS for call, failure in part.items()}
CONFORM = ["rbn conform torch flax mindspore jittor"]


INSTALL_NEWEST = [
    "python3.12 -m venv .venv-newest",
    "python -m pip install --upgrade pip setuptools",
    "python -m pip install --no-build-isolation -e .[cli,test,flax]",
]
UPGRADE = "python -m pip install --upgrade --upgrade-strategy eager pip setuptools "
TESTS_NEWEST = (
    "pytest -n 2 --dist loadfile --framework {0} "
    "tests/test_layers.py tests/{0}/test_layers.py tests/{0}/test_surgery.py -m not long"
)
NEWEST = ["python -m pip list --format freeze", "rbn conform flax --quick", TESTS_NEWEST.format("flax")]

INSTALL_LIBRARIES = [
    "python3.11 -m venv .venv-integrations",
    "python -m pip install -c constraints.txt pip setuptools wheel",
    "python -m pip install -c constraints.txt -c constraints-integrations.txt -e .[integrations]",
]
LIBRARIES = [
    "pytest --framework torch tests/integrations/torch",
    "pytest --framework flax -m not long tests/integrations/flax",
    "pytest tests/integrations/test_strangers.py",
]


def stamps(make, environment=".venv"):
    return [path.name for path in (make.tree / environment).glob(".set-up-*")]


def assert_all_tests_were_called(calls, long=False):
    expected = [[call.removesuffix(SHORT) if long else call for call in part] for part in PARTS]
    assert sorted(calls) == sorted(call for part in expected for call in part)
    for part in expected:
        assert [call for call in calls if call in part] == part


def test_set_up_once_for_all_targets(make):
    result, calls = make("conform")
    assert result.returncode == 0, result.stderr
    assert calls == INSTALL + CONFORM
    assert_all_tests_were_called(make("test")[1])


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


@pytest.mark.parametrize("failing", TESTS)
def test_every_test_run_and_every_coverage_counts(make, failing):
    make("setup")
    result, calls = make("test", fails=failing)
    assert result.returncode != 0
    assert f"failed: {TESTS[failing]}\n" in result.stderr
    assert "it broke" in result.stdout
    assert_all_tests_were_called(calls)


def test_the_long_searches_are_left_out_and_counted_unless_asked_for(make):
    make("setup")
    assert "\nleft out: 15 long searches; make test LONG=1 runs them, too\n" in make("test")[0].stdout
    result, calls = make("test", LONG="1")
    assert "left out" not in result.stdout
    assert_all_tests_were_called(calls, long=True)


def test_what_a_killed_run_measured_is_left_out(make):
    make("setup")
    stale = make.tree / ".coverage.torch.host.1"
    for target in ("test", "clean"):
        stale.touch()
        make(target)
        assert not stale.exists()


def test_mypy_gets_the_tree_of_import_names(make):
    folders = (
        "rbn",
        "rbn_core",
        "backends",
        "kernels",
        "conformance",
        "benchmarks",
        "formats",
        "training",
    )
    for folder in folders:
        (make.tree / folder).mkdir(exist_ok=True)
        (make.tree / folder / "__init__.py").touch()
    result, calls = make("lint")
    assert result.returncode == 0, result.stderr
    assert calls[-1].startswith("mypy ")
    types = make.tree / "build" / "types"
    parts = ("backends", "kernels", "conformance", "benchmarks", "formats", "training")
    for name in ("rbn", "rbn_core", *(f"rbn/{part}" for part in parts)):
        assert (types / name / "__init__.py").is_file()


def test_threads_sleep_while_they_wait_unless_the_environment_says_otherwise(make, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for given, waiting in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        make("conform", **given)
        assert (tmp_path / "calls.waiting").read_text() == f"{waiting}\n"


def test_conform_fails_when_the_suite_does(make):
    assert make("conform", fails=CONFORM[0])[0].returncode != 0


def test_the_newest_is_installed_once_and_upgraded_each_time(make):
    result, calls = make("newest")
    assert result.returncode == 0, result.stdout + result.stderr
    assert calls[:3] == INSTALL_NEWEST
    assert calls[3].startswith(UPGRADE)
    assert {"numpy>=1.26", "typer", "pytest", "jax>=0.7.1"} <= set(calls[3].split())
    assert not any(word.startswith("torch") for word in calls[3].split())
    assert calls[4:] == NEWEST
    assert "flax==99\n" in result.stdout
    assert make("newest")[1] == calls[3:]
    assert make("newest", TORCH="1")[1][2:] == [
        "rbn conform flax torch --quick",
        TESTS_NEWEST.format("flax"),
        TESTS_NEWEST.format("torch"),
    ]


@pytest.mark.parametrize("failing", [*INSTALL_NEWEST, *NEWEST[1:]])
def test_a_failure_in_the_newest_counts(make, failing):
    result, calls = make("newest", fails=failing)
    assert result.returncode != 0
    assert calls[-1] == failing
    assert len(stamps(make, ".venv-newest")) == (failing in NEWEST)


def test_the_newest_needs_python_3_12(make, tmp_path):
    for name in ("python3.12", "python3"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\nexit 127\n")  # as a shim that leads nowhere
        (tmp_path / "bin" / name).chmod(0o755)
    result, calls = make("newest")
    assert result.returncode != 0
    assert calls == []
    assert "make newest needs Python 3.12" in result.stderr
    named = str(tmp_path / "bin" / "python3.11")
    assert make("newest", PYTHON_NEWEST=named)[1][0] == "python3.11 -m venv .venv-newest"


def test_the_libraries_are_installed_once_and_again_when_their_versions_change(make):
    result, calls = make("integrations")
    assert result.returncode == 0, result.stdout + result.stderr
    assert calls == INSTALL_LIBRARIES + LIBRARIES
    assert make("integrations")[1] == LIBRARIES
    with (make.tree / "constraints-integrations.txt").open("a") as file:
        file.write("# changed\n")
    assert make("setup")[1] == INSTALL
    assert make("integrations")[1] == INSTALL_LIBRARIES + LIBRARIES
    assert len(stamps(make, ".venv-integrations")) == 1


@pytest.mark.parametrize("failing", [*INSTALL_LIBRARIES, *LIBRARIES])
def test_a_failure_in_the_libraries_counts(make, failing):
    result, calls = make("integrations", fails=failing)
    assert result.returncode != 0
    assert calls[-1] == failing
    assert len(stamps(make, ".venv-integrations")) == (failing in LIBRARIES)


@pytest.mark.parametrize("target", ["setup", "test", "integrations"])
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
