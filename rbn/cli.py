"""The `rbn` command."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import rbn
from rbn.backends.frameworks import (
    FRAMEWORKS,
    devices,
    is_installed,
    missing_message,
    problems,
    versions,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Representative Batch Normalization.")


def _console() -> Console:
    """A console that does not fold the matrix where there is no terminal to fit it to."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rbn {rbn.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Representative Batch Normalization for PyTorch, JAX/Flax, MindSpore and Jittor."""


@app.command()
def info() -> None:
    """Show which frameworks are installed, on which devices they run, and what is wrong with them."""
    console = _console()
    console.print(
        f"rbn {rbn.__version__}, Python {platform.python_version()}, NumPy {np.__version__}, "
        f"{platform.machine()} with {os.cpu_count()} processors"
    )
    table = Table("framework", "versions", "devices", "what to do")
    for name in FRAMEWORKS:
        found = ", ".join(f"{key} {value}" for key, value in versions(name).items())
        advice = problems(name) if found else [missing_message(name)]
        runs_on = ""
        if is_installed(name):
            with console.status(f"asking {name} for its devices (Jittor compiles for minutes on first use)"):
                runs_on, failure = devices(name)
            advice += [failure] if failure else []
        table.add_row(name, found or "not installed", runs_on, escape("\n".join(advice)) or "nothing")
    console.print(table)


@app.command()
def conform(
    frameworks: Annotated[
        list[str] | None, typer.Argument(help="torch, flax, mindspore, jittor; all that are installed.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One case for each row, in about a minute.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write every result to this file.")] = None,
) -> None:
    """Hold the layers of the installed frameworks to the NumPy reference.

    Exit status: 0 when everything conforms, 1 when anything differs, 2 when a framework that was asked for is
    unknown or not installed.
    """
    # Not needed by the other commands, and slow to import.
    from rbn.conformance.cases import all_cases, quick_cases
    from rbn.conformance.report import Progress, render, write_json
    from rbn.conformance.runner import run

    console = _console()
    asked = list(frameworks or [])
    if unknown := [name for name in asked if name not in FRAMEWORKS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: expected some of {', '.join(FRAMEWORKS)}.")
    missing = [name for name in asked or FRAMEWORKS if not is_installed(name)]
    for name in missing:
        console.print(missing_message(name), style="yellow", markup=False)
    if asked and missing:
        raise typer.Exit(2)
    chosen = [name for name in asked or FRAMEWORKS if name not in missing]
    with Progress(console) as progress:
        runs = run(["numpy", *dict.fromkeys(chosen)], progress, quick_cases() if quick else all_cases())
    console.print(render(runs))
    if json is not None:
        write_json(json, runs)
    if not all(each.passed for each in runs):
        raise typer.Exit(1)
