"""Write docs/integrations.md from what the tests marked `meeting` give: python tools/integrations.py.

The tests of one framework after another run, each folder in its environment, and nothing is written unless
every one of them passes. A row is one meeting; what it says is in the mark, and the versions are those that
the tests ran with. `make integrations` sets the environment of the libraries up.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PAGE, REPORTS = Path("docs", "integrations.md"), Path("reports", "integrations")
ENVIRONMENTS = {Path("tests"): Path(sys.prefix), Path("tests", "integrations"): Path(".venv-integrations")}
"""Where there are tests of every framework, and the environment that they run in."""

TITLES = {"torch": "PyTorch", "flax": "JAX and Flax", "mindspore": "MindSpore", "jittor": "Jittor"}
PACKAGES = {"flax": ("jax", "flax")}
"""What a framework is made of, where that is not one distribution of its name."""

HEAD = """# Integrations

This page says what happens with the layers in a tool, with a short example of each. Every row stands for
tests that passed with the versions given there. `python tools/integrations.py` runs the tests and writes this
page. [Recipes that look for BatchNorm](recipes.md) says what to do where a tool looks for BatchNorm.
"""


@dataclass(frozen=True)
class Meeting:
    """A row: the arguments of a mark `meeting`.

    Attributes:
        name: What the layers meet.
        shows: What the tests show.
        example: Code, on one line.
        packages: The distributions that take part, beside the framework.
        tests: The folder of `ENVIRONMENTS` that its tests are in.
    """

    name: str
    shows: str
    example: str
    packages: tuple[str, ...] = ()
    tests: Path = Path("tests")


def files(tests: Path, framework: str) -> list[Path]:
    """The files of a framework's tests."""
    return sorted((tests / framework).glob("test_*.py"))


def meetings(framework: str) -> dict[str, Meeting]:
    """The rows of a framework, in the order of its tests, as they are written there."""
    found: dict[str, Meeting] = {}
    for tests, path in [(folder, path) for folder in ENVIRONMENTS for path in files(folder, framework)]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.meeting":
                given = [ast.literal_eval(argument) for argument in node.args]
                named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
                meeting = Meeting(*given, **named, tests=tests)
                if found.setdefault(meeting.name, meeting) != meeting:
                    raise SystemExit(f"{path}: two marks describe {meeting.name!r} differently")
    return found


def run(framework: str) -> dict[str, set[str]]:
    """Run the tests of a framework that are meetings; returns the outcomes of each meeting."""
    REPORTS.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, set[str]] = {}
    for tests, environment in ENVIRONMENTS.items():
        if not files(tests, framework):
            continue
        report = REPORTS / f"{tests.name}-{framework}.xml"
        report.unlink(missing_ok=True)
        command = [
            environment / "bin" / "python",
            "-m",
            "pytest",
            "--framework",
            framework,
            tests / framework,
        ]
        subprocess.run([*command, "-m", "meeting", "--junitxml", report], check=True)
        for case in ElementTree.parse(report).iter("testcase"):
            outcome = "skipped" if case.find("skipped") is not None else "passed"
            for entry in case.iter("property"):
                if entry.get("name") == "meeting":
                    outcomes.setdefault(str(entry.get("value")), set()).add(outcome)
    return outcomes


def version(name: str, environment: Path) -> str:
    """The version of a distribution in an environment, without how it was built, which follows a +."""
    places = [str(place) for place in environment.glob("lib/python3*/site-packages")]
    (found, *_) = metadata.Distribution.discover(name=name, path=places)
    return found.version.partition("+")[0]


def table(framework: str, rows: dict[str, Meeting]) -> list[str]:
    """A framework's part of the page."""
    lines = [f"## {TITLES[framework]}", ""]
    lines += ["| meeting | what happens | example | tested with |", "|---|---|---|---|"]
    for row in rows.values():
        taking_part = (*PACKAGES.get(framework, (framework,)), *row.packages)
        environment = ENVIRONMENTS[row.tests]
        versions = ", ".join(f"{name} {version(name, environment)}" for name in taking_part)
        lines.append(f"| {row.name} | {row.shows} | `{row.example}` | {versions} |")
    return [*lines, ""]


def main() -> None:
    """Run the tests and write the page."""
    lines = [HEAD]
    for framework in TITLES:
        rows = meetings(framework)
        outcomes = run(framework)
        if missing := [name for name in rows if outcomes.get(name) != {"passed"}]:
            raise SystemExit(f"{framework}: no page is written, as these did not run: {', '.join(missing)}")
        lines += table(framework, rows)
    PAGE.write_text("\n".join(lines), "utf-8")


if __name__ == "__main__":
    main()
