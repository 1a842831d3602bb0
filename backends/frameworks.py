"""What is known about the four frameworks without importing any of them."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Framework:
    """A framework that has a backend.

    Attributes:
        name: the backend's name, as in ``rbn.backends.<name>``.
        distributions: the distributions the backend needs, the framework's own first.
        extra: the extra of ``rbn`` that installs them.
    """

    name: str
    distributions: tuple[str, ...]
    extra: str


FRAMEWORKS: dict[str, Framework] = {
    framework.name: framework
    for framework in (
        Framework("torch", ("torch",), "torch"),
        Framework("flax", ("flax", "jax", "jaxlib"), "flax"),
        Framework("mindspore", ("mindspore",), "mindspore"),
        Framework("jittor", ("jittor",), "jittor"),
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
