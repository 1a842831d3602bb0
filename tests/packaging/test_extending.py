"""The worked examples of docs/extending.md: a copy with each patch does what the page says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATCHES = ROOT / "docs" / "extending"
FOLDERS = (
    *("rbn", "rbn_core", "backends", "kernels", "conformance", "benchmarks", "formats", "training"),
    *("tests", "examples", "tools"),
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """What makes a copy of the project with one of the patches."""
    made = {}

    def patched(name):
        if name not in made:
            folder = made[name] = tmp_path_factory.mktemp(name)
            for each in FOLDERS:
                ignored = shutil.ignore_patterns("__pycache__", "results")
                shutil.copytree(ROOT / each, folder / each, ignore=ignored)
            shutil.copy(ROOT / "pyproject.toml", folder)
            alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}  # in no repository around it
            subprocess.run(["git", "apply", PATCHES / f"{name}.patch"], cwd=folder, env=alone, check=True)
        return made[name]

    return patched


def run(folder, *arguments):
    """Run Python with the copy and return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def conform(folder, framework, pattern):
    """How many cases conform in a copy, by subject."""
    printed = run(folder, "-m", "rbn", "conform", framework, "--only", pattern)
    return {name: int(count) for name, count in re.findall(r"^(\S+) conforms: (\d+) passed", printed, re.M)}


def test_a_statistic_is_held_to_finite_differences(copy):
    printed = run(copy("statistic"), "-m", "pytest", "-p", "no:cacheprovider", "tests/core/test_reference.py")
    before = run(ROOT, "-m", "pytest", "-p", "no:cacheprovider", "tests/core/test_reference.py")
    passed, passed_before = (int(re.search(r"(\d+) passed", text)[1]) for text in (printed, before))
    assert passed > passed_before


@pytest.mark.framework("torch", "flax", "mindspore", "jittor")
def test_a_statistic_conforms_in_every_framework(copy, request):
    framework = request.config.option.framework
    found = conform(copy("statistic"), framework, "rbn/train/*/scaling=channel_max/float??")
    assert found[framework] == 2


@pytest.mark.framework("torch")
def test_an_option_reaches_the_layers(copy):
    run(
        copy("option"),
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--framework",
        "torch",
        "tests/test_layers.py",
    )
    code = (
        "import rbn_core; from rbn.backends import torch; "
        "print(torch.RBN(2, attention_start=0.5).scale_bias.tolist(), "
        "rbn_core.RBN(2, attention_start=0.5).parameters['scale_bias'].tolist())"
    )
    assert run(copy("option"), "-c", code).split() == ["[0.5,", "0.5]", "[0.5,", "0.5]"]


@pytest.mark.framework("torch")
def test_a_layer_conforms_and_convert_makes_it(copy):
    found = conform(copy("layer"), "torch", "sbn/*/float64")
    assert found["torch"] == found["numpy"] > 10
    code = (
        "from torch import nn; from rbn.backends.torch import convert; "
        "model = nn.Sequential(nn.BatchNorm2d(3)); convert(model, 'sbn'); print(type(model[0]).__name__)"
    )
    assert run(copy("layer"), "-c", code).strip() == "SBN"


def test_the_page_names_every_file_that_a_patch_changes():
    page = (ROOT / "docs" / "extending.md").read_text()
    for patch in PATCHES.glob("*.patch"):
        assert f"(extending/{patch.name})" in page
        for file in re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.M):
            named = re.sub(r"backends/\w+/functional.py", "backends/*/functional.py", file)
            assert f"`{named}`" in page, file
