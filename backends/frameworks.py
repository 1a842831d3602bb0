"""What is known about the four frameworks without importing any of them."""

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Framework:
    """A framework that has a backend.

    Attributes:
        name: the backend's name, as in ``rbn.backends.<name>``.
        distributions: the distributions the backend needs, the framework's own first.
        extra: the extra of ``rbn`` that installs them.
        tested: the oldest and the newest version of a distribution that the tests were run with.
    """

    name: str
    distributions: tuple[str, ...]
    extra: str
    tested: Mapping[str, tuple[str, str]]


FRAMEWORKS: dict[str, Framework] = {
    framework.name: framework
    for framework in (
        Framework("torch", ("torch",), "torch", {"torch": ("2.7.0", "2.15.0")}),
        Framework(
            "flax",
            ("flax", "jax", "jaxlib"),  # jaxlib's version is jax's
            "flax",
            {"flax": ("0.12.0", "0.12.12"), "jax": ("0.7.1", "0.12.0.1")},
        ),
        Framework("mindspore", ("mindspore",), "mindspore", {"mindspore": ("2.10.0", "2.10.0")}),
        Framework("jittor", ("jittor",), "jittor", {"jittor": ("1.3.11.0", "1.3.11.0")}),
    )
}


def versions(name: str) -> dict[str, str]:
    """Return the installed versions of a framework's distributions, leaving out those that are absent."""
    found = {distribution: _version(distribution) for distribution in FRAMEWORKS[name].distributions}
    return {distribution: version for distribution, version in found.items() if version is not None}


def is_installed(name: str) -> bool:
    """Return whether all of a framework's distributions are installed."""
    return len(versions(name)) == len(FRAMEWORKS[name].distributions)


def problems(name: str) -> list[str]:
    """Return what is wrong with an installation of a framework, each with the way out.

    A framework that is absent altogether has no problems: see `missing_message`.
    """
    found = versions(name)
    if not found:
        return []
    texts = []
    absent = [distribution for distribution in FRAMEWORKS[name].distributions if distribution not in found]
    if absent:
        present = " and ".join(found)
        texts.append(f"{present} without {' and '.join(absent)} cannot run: {_install(name)}.")
    numpy = _version("numpy") or "1"
    if name in ("mindspore", "jittor") and int(numpy.split(".")[0]) >= 2:
        harm = {
            "mindspore": "is compiled against NumPy 1 and fails in places",
            "jittor": "returns garbage without an error",
        }[name]
        texts.append(f"{name} {found[name]} {harm} under NumPy {numpy}: pip install 'numpy<2'.")
    if name == "jittor" and shutil.which("g++") is None:
        texts.append("jittor compiles its operators with g++, which is not on the PATH: install g++.")
    return texts


def tested(name: str) -> str:
    """Say with which versions of a framework the tests were run, a line for each of its distributions."""
    return "\n".join(
        f"{distribution} {oldest}" + (f" to {newest}" if newest != oldest else "")
        for distribution, (oldest, newest) in FRAMEWORKS[name].tested.items()
    )


def untested(name: str) -> list[str]:
    """Return which installed versions of a framework are none that was tested, each with the way out."""
    found = versions(name)
    texts = []
    for distribution, (oldest, newest) in FRAMEWORKS[name].tested.items():
        version = found.get(distribution)
        if version is not None and _numbers(version) > _numbers(newest):
            texts.append(f"{distribution} {version} is newer than tested: run rbn conform {name}.")
        if version is not None and _numbers(version) < _numbers(oldest):
            texts.append(f"{distribution} {version} is older than tested: {_install(name)}.")
    return texts


def devices(name: str) -> tuple[str, str]:
    """Import a backend in a process of its own and ask it where it can run.

    Returns:
        The devices, and why the backend cannot be imported; one of the two is empty.
    """
    mark = "devices:"  # a framework may print of its own accord
    code = f"from rbn.backends.{name}.devices import devices; print('{mark}', ', '.join(devices()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return done.stdout.rpartition(mark)[2].strip(), ""
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return "", f"rbn.backends.{name} cannot be imported: {reason}"


def missing_message(name: str) -> str:
    """Return the sentence that says a framework is not installed and which extra installs it."""
    return f"{name} is not installed: {_install(name)}."


def _install(name: str) -> str:
    return f"pip install 'rbn[{FRAMEWORKS[name].extra}]'"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """What orders versions: the numbers of the release, without what is added to them as in 2.13.0+cpu."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in release[0].split(".")) if release else ()
