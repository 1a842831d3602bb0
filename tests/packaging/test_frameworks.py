"""rbn.backends.frameworks, with the installed distributions played."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from rbn.backends import frameworks
from rbn.backends.frameworks import FRAMEWORKS

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = {
    "torch": "2.13.0",
    "flax": "0.12.0",
    "jax": "0.7.1",
    "jaxlib": "0.7.1",
    "mindspore": "2.10.0",
    "jittor": "1.3.11.0",
    "numpy": "1.26.4",
}


@pytest.fixture
def installed(monkeypatch):
    """The installed distributions and their versions, to be changed by the test."""
    distributions = dict(EVERYTHING)

    def version(name):
        if name not in distributions:
            raise metadata.PackageNotFoundError(name)
        return distributions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(frameworks.shutil, "which", lambda program: f"/usr/bin/{program}")
    return distributions


def test_the_four_in_their_order():
    assert list(FRAMEWORKS) == ["torch", "flax", "mindspore", "jittor"]
    assert all(FRAMEWORKS[name].name == name for name in FRAMEWORKS)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_sound_installation(installed, name):
    assert frameworks.is_installed(name)
    assert frameworks.problems(name) == []
    assert frameworks.versions(name) == {d: installed[d] for d in FRAMEWORKS[name].distributions}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_an_absent_framework(installed, name):
    for distribution in FRAMEWORKS[name].distributions:
        del installed[distribution]
    assert not frameworks.is_installed(name)
    assert frameworks.versions(name) == {}
    assert frameworks.problems(name) == []
    assert frameworks.missing_message(name) == f"{name} is not installed: pip install 'rbn[{name}]'."


@pytest.mark.parametrize(
    ("absent", "text"),
    [
        (["jax"], "flax and jaxlib without jax cannot run: pip install 'rbn[flax]'."),
        (["jax", "jaxlib"], "flax without jax and jaxlib cannot run: pip install 'rbn[flax]'."),
        (["flax"], "jax and jaxlib without flax cannot run: pip install 'rbn[flax]'."),
    ],
)
def test_half_of_flax(installed, absent, text):
    for distribution in absent:
        del installed[distribution]
    assert not frameworks.is_installed("flax")
    assert frameworks.problems("flax") == [text]


def test_numpy_2(installed):
    installed["numpy"] = "2.4.1"
    assert frameworks.problems("torch") == []
    assert frameworks.problems("flax") == []
    assert frameworks.problems("mindspore") == [
        "mindspore 2.10.0 is compiled against NumPy 1 and fails in places under NumPy 2.4.1: "
        "pip install 'numpy<2'."
    ]
    assert frameworks.problems("jittor") == [
        "jittor 1.3.11.0 returns garbage without an error under NumPy 2.4.1: pip install 'numpy<2'."
    ]


def test_numpy_2_without_the_framework_is_no_problem(installed):
    installed["numpy"] = "2.4.1"
    del installed["jittor"]
    assert frameworks.problems("jittor") == []


def test_jittor_without_a_compiler(installed, monkeypatch):
    monkeypatch.setattr(frameworks.shutil, "which", lambda program: None)
    assert frameworks.problems("jittor") == [
        "jittor compiles its operators with g++, which is not on the PATH: install g++."
    ]
    assert frameworks.problems("torch") == []


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_extra_is_declared(name):
    assert FRAMEWORKS[name].extra in metadata.metadata("rbn").get_all("Provides-Extra")


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_what_is_pinned_was_tested(name):
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    for distribution, (oldest, newest) in FRAMEWORKS[name].tested.items():
        versions = [frameworks._numbers(version) for version in (oldest, pinned[distribution], newest)]
        assert versions == sorted(versions)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_extra_asks_for_the_oldest_version_tested(name):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    bounds = dict(bound.split(">=") for bound in extras[FRAMEWORKS[name].extra] if ">=" in bound)
    assert bounds == {distribution: oldest for distribution, (oldest, _) in FRAMEWORKS[name].tested.items()}
    assert ("numpy<2" in extras[name]) == (name in ("mindspore", "jittor"))
    assert len(extras[name]) == len(bounds) + (name in ("mindspore", "jittor"))  # no other upper bound


def test_the_range_tested_is_said():
    assert frameworks.tested("mindspore") == "mindspore 2.10.0"
    oldest, newest = FRAMEWORKS["torch"].tested["torch"]
    assert frameworks.tested("torch") == f"torch {oldest} to {newest}"


@pytest.mark.parametrize(
    ("version", "texts"),
    [
        ("0.7.1", []),
        ("0.9.0.1", []),
        ("0.7.1.dev20260101+cpu", []),
        ("99.1", ["jax 99.1 is newer than tested: run rbn conform flax."]),
        ("0.7.0", ["jax 0.7.0 is older than tested: pip install 'rbn[flax]'."]),
        ("0.10.0rc1", []),
    ],
)
def test_versions_that_were_not_tested(installed, version, texts):
    installed["jax"] = version
    assert frameworks.untested("flax") == texts


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_what_is_absent_is_not_untested(installed, name):
    installed.clear()
    assert frameworks.untested(name) == []
