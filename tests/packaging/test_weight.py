"""The layers need NumPy, safetensors and their framework; the command and the suite need the extra `cli`."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from rbn import __main__
from rbn.backends.frameworks import FRAMEWORKS

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

BLOCKED = """
import sys
from importlib.machinery import PathFinder

blocked = set(sys.argv.pop(1).split(","))
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *more: None if name.partition(".")[0] in blocked else find(name, *more)
)
"""
"""Makes as if some modules were not installed."""


def named(requirements):
    """The distributions that requirements name."""
    return {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}


def modules_without(distributions):
    """The modules of an environment that no more than these distributions and what they need are in."""
    wanted, seen = list(distributions), set()
    while wanted:
        name = wanted.pop()
        if re.sub(r"[-_.]+", "-", name).lower() in seen:
            continue
        seen.add(re.sub(r"[-_.]+", "-", name).lower())
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another system, or not for this use
            continue
        wanted += named(requirement for requirement in requirements if "extra ==" not in requirement)
    return {
        module
        for module, owners in metadata.packages_distributions().items()
        if not any(re.sub(r"[-_.]+", "-", owner).lower() in {*seen, "rbn"} for owner in owners)
    }


def python(code, blocked, *arguments):
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code, ",".join(blocked), *arguments], capture_output=True, text=True
    )


def test_the_package_alone_needs_two():
    assert named(PROJECT["dependencies"]) == {"numpy", "safetensors"}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_extra_of_a_framework_installs_no_more_than_it(name):
    needed = named(PROJECT["optional-dependencies"][name]) - {"numpy"}
    assert needed <= set(FRAMEWORKS[name].distributions)


@pytest.mark.parametrize(
    "module", ["rbn", "rbn_core.weights", "rbn.porting", "rbn.kernels", "rbn.conformance.pytest_plugin"]
)
def test_imports_without_the_extra(module):
    """pytest's plugin is loaded into every session of everyone who has installed rbn and pytest."""
    blocked = modules_without({"numpy", "safetensors", "pytest"})
    assert {"sklearn", "PIL", "jinja2", "typer", "rich", "ml_dtypes"} <= blocked | {"rich"}
    done = python(f"import {module}", blocked)
    assert done.returncode == 0, done.stderr


@pytest.mark.framework(*FRAMEWORKS)
def test_a_backend_without_the_extra(request):
    name = request.config.option.framework
    blocked = modules_without({"numpy", "safetensors", *FRAMEWORKS[name].distributions})
    assert {"sklearn", "typer"} <= blocked
    modules = [f"rbn.backends.{name}", f"rbn.formats.{name}"]
    modules += ["rbn.backends.flax.nnx"] if name == "flax" else []
    done = python(f"import {', '.join(modules)}; print('imported')", blocked)
    assert "imported" in done.stdout, done.stderr


def test_the_command_without_the_extra_says_what_to_install():
    done = python("from rbn.__main__ import main; main()", ["typer", "sklearn"], "info")
    assert done.returncode == 2
    assert done.stderr == "rbn: the command needs scikit-learn, typer: pip install 'rbn[cli]'.\n"
    assert done.stdout == ""


def test_the_command_asks_for_all_of_the_extra_and_no_more():
    assert set(__main__.NEEDED.values()) == named(PROJECT["optional-dependencies"]["cli"])
    owners = metadata.packages_distributions()
    assert all(name in map(str.lower, owners[module]) for module, name in __main__.NEEDED.items())


def test_bfloat16_without_ml_dtypes_says_what_to_install():
    done = python("from rbn_core.bfloat16 import bfloat16; bfloat16()", ["ml_dtypes"])
    assert "RBNValueError: bfloat16: expected the package ml_dtypes" in done.stderr
    assert (
        python("from rbn_core.bfloat16 import bfloat16; print(bfloat16())", ["none"]).stdout == "bfloat16\n"
    )
