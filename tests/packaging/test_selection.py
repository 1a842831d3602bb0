"""Which tests ``--framework`` selects: pytest runs on a small tree of its own with this conftest."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
FILES = {
    "pyproject.toml": '[tool.pytest.ini_options]\naddopts = "--import-mode=importlib --strict-markers"\n'
    'testpaths = ["tests"]\n',
    "tests/test_both.py": "import pytest\n"
    "def test_plain(): pass\n"
    "def test_each(framework): pass\n"
    "@pytest.mark.framework('torch', 'flax')\n"
    "def test_two(): pass\n",
    "tests/torch/test_folder.py": "def test_in_torch_folder(): pass\n",
    "tests/flax/test_folder.py": "import pytest\n@pytest.mark.long\ndef test_long(): pass\n",
    "tests/jittor/test_folder.py": "raise ImportError('collected')\n",
    "tests/integrations/torch/test_library.py": "def test_library(): pass\n",
    "tests/integrations/flax/test_library.py": "raise ImportError('collected')\n",
}


@pytest.fixture
def run(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(CONFTEST, tmp_path / "tests")

    # No plugin but that of several processes: importing all of them takes longer than the tests.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    plugins = ["-p", "no:cacheprovider", "-p", "xdist.plugin"]

    def run(*arguments):
        command = [sys.executable, "-m", "pytest", "-v", *plugins, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    ("arguments", "header", "passed", "deselected"),
    [
        ([], "tests that need: no framework", {"test_plain", "test_each[reference]"}, 5),
        (
            ["--framework", "torch"],
            "tests that need: torch\n",
            {"test_each[torch]", "test_two", "test_in_torch_folder"},
            5,
        ),
        (["--framework", "flax"], "tests that need: flax\n", {"test_each[flax]", "test_two", "test_long"}, 5),
        (["--framework", "mindspore"], "tests that need: mindspore\n", {"test_each[mindspore]"}, 6),
    ],
)
def test_selected(run, arguments, header, passed, deselected):
    result = run(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert header in result.stdout
    lines = [line for line in result.stdout.splitlines() if " PASSED " in line]
    assert {line.split(" ")[0].split("::")[1] for line in lines} == passed
    assert f"{len(passed)} passed, {deselected} deselected" in result.stdout


@pytest.mark.parametrize("processes", [[], ["-n", "2"]])
def test_what_is_left_out_is_counted(run, processes):
    result = run("--framework", "flax", "-m", "not long", *processes)
    assert "2 passed" in result.stdout
    assert "\nlong tests left out: 1\n" in result.stdout
    assert "left out" not in run("--framework", "flax", *processes).stdout
    assert "left out" not in run("--framework", "torch", "-m", "not long", *processes).stdout


def test_the_folder_of_the_framework_is_collected(run):
    assert "ImportError: collected" in run("--framework", "jittor").stdout


def test_the_tests_of_libraries_run_where_they_are_named(run):
    for named in ("tests/integrations", "tests/integrations/torch"):
        result = run("--framework", "torch", named)
        assert "test_library PASSED" in result.stdout
        assert "1 passed in" in result.stdout
    assert "ImportError: collected" in run("--framework", "flax", "tests/integrations/flax").stdout


def test_an_unknown_framework_is_a_usage_error(run):
    result = run("--framework", "tensorflow")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "invalid choice: 'tensorflow'" in result.stderr


def test_an_unknown_name_in_the_mark_is_a_usage_error(run, tmp_path):
    marked = "import pytest\n@pytest.mark.framework('pytorch')\ndef test(): pass\n"
    (tmp_path / "tests" / "test_marked.py").write_text(marked)
    result = run()
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "unknown in the framework mark: pytorch" in result.stderr
