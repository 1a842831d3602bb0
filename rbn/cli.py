"""The `rbn` command."""

from __future__ import annotations

import importlib.util
import inspect
import io
import os
import platform
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import rbn
from rbn import kernels
from rbn.backends.frameworks import (
    FRAMEWORKS,
    devices,
    is_installed,
    missing_message,
    problems,
    tested,
    untested,
    versions,
)
from rbn.training import command as training

app = typer.Typer(no_args_is_help=True, help="Representative Batch Normalization.")


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command, in whose help a paragraph is one line: typer would break it where the source does."""
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    app.command(help="\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))(function)
    return function


def wrong(text: str) -> typer.Exit:
    """Say on one line what was asked for wrongly; the exception to raise, of exit status 2."""
    typer.echo(f"rbn: {text}", err=True)
    return typer.Exit(2)


def _console(*, stderr: bool = False) -> Console:
    """A console that does not fold the matrix where there is no terminal to fit it to.

    What the terminal has no character for is a question mark there: no text ends a run whose reports are due.
    """
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=120)


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


@command
def info() -> None:
    """Show which frameworks are installed, on which devices they run, and what is wrong with them.

    It also shows the versions with which the layers were tested, and whether the compiled loops for the CPU
    are there.
    """
    console = _console()
    console.print(
        f"rbn {rbn.__version__}, Python {platform.python_version()}, NumPy {np.__version__}, "
        f"{platform.machine()} with {os.cpu_count()} processors"
    )
    if lacking := kernels.problem():
        console.print(f"no compiled loops, framework operations instead: {lacking}", markup=False)
    else:
        console.print(f"compiled loops: {kernels.instructions()}")
    table = Table("framework", "versions", "tested with", "devices", "what to do")
    for name in FRAMEWORKS:
        found = "\n".join(f"{key} {value}" for key, value in versions(name).items())
        advice = problems(name) + untested(name) if found else [missing_message(name)]
        runs_on = ""
        if is_installed(name):
            with console.status(f"asking {name} for its devices (Jittor compiles for minutes on first use)"):
                runs_on, failure = devices(name)
            advice += [failure] if failure else []
        table.add_row(
            name, found or "not installed", tested(name), runs_on, escape("\n".join(advice)) or "nothing"
        )
    console.print(table)


def _complete_names(incomplete: str) -> list[str]:
    """What the shell offers for the names of `rbn conform`."""
    from rbn.conformance.loading import SUBJECTS, registered

    return [name for name in (*SUBJECTS, *registered(), NEW) if name.startswith(incomplete)]


NEW = "new"
"""What makes `rbn conform` write a subject instead of checking one."""


@command
def conform(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="numpy, torch, flax, mindspore, jittor, or a name that an installed package has registered; "
            "by default every installed framework. Or: new FILE FRAMEWORK.",
            autocompletion=_complete_names,
        ),
    ] = None,
    subject: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PKG.MODULE:NAME", help="Check this subject, and only the frameworks that are named."
        ),
    ] = None,
    expected: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The list of what is known to differ; anything else fails."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Only cases whose id matches; * is anything."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="No cases whose id matches.")
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Run every case with N sets of numbers.")
    ] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="One case of each row, within a minute.")] = False,
    fail_fast: Annotated[
        bool,
        typer.Option("--fail-fast", help="Stop at the first failed case, without looking for its cause."),
    ] = False,
    time_limit: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="The time limit of one case.")
    ] = 600.0,
    list_cases: Annotated[
        bool,
        typer.Option("--list", help="Show the cases and run none: by rows, or in a pipe one id a line."),
    ] = False,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every result to this file.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write a page with everything into this folder.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the results to this file as JUnit XML.")
    ] = None,
    badge: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the verdict for a README, as SVG.")
    ] = None,
    write_expected: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the list of what fails, for --expected.")
    ] = None,
    from_journal: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Run nothing: make the reports from the .partial file of a killed run.",
        ),
    ] = None,
) -> None:
    """Compare implementations with the NumPy reference: by default the layers of the installed frameworks.

    `rbn conform new FILE` writes a subject to fill in. It is in NumPy, or in the framework named after FILE.

    Exit status: 0 when everything conforms, 1 when anything differs, 2 when a name is unknown, not installed,
    or cannot be loaded, 130 after Ctrl-C. The reports then have the cases that were finished.
    """
    # Not needed by the other commands, and slow to import.
    from rbn.conformance.expectations import read_expectations, write_expectations
    from rbn.conformance.journal import Journal, read_journal
    from rbn.conformance.loading import SUBJECTS, SubjectError, registered
    from rbn.conformance.report import FIRST_RUN, listed, progress_row, render, seconds_left
    from rbn.conformance.reports import Reports
    from rbn.conformance.runner import ignore, run
    from rbn.conformance.suite import all_cases, quick_cases, select, with_seeds
    from rbn.progress import Progress
    from rbn.stopping import stopping
    from rbn_core import RBNError

    if names and names[0] == NEW:
        _new_subject(names[1:])
        return
    console = _console()
    called = shlex.join(["rbn", *sys.argv[1:]])
    reports = Reports(json, junit, badge, html)
    try:
        reports.prepare()
        if from_journal is not None:
            called, runs = read_journal(from_journal)
            console.print(render(runs))
            reports.write(runs, called, console)
            raise typer.Exit(0 if all(each.passed for each in runs) else 1)
        cases = select(quick_cases() if quick else all_cases(), only or (), exclude or ())
        known_to_differ = {} if expected is None else read_expectations(expected)
    except RBNError as error:
        raise wrong(str(error)) from None
    if write_expected is not None and seeds > 1:
        raise wrong("--write-expected goes with one set of numbers: leave --seeds out.")
    cases = with_seeds(cases, seeds)
    if list_cases:
        if console.is_terminal:
            console.print(listed(cases), soft_wrap=True)
        else:
            typer.echo("\n".join(case.id for case in cases))
        return
    known = SUBJECTS | registered()
    asked = list(dict.fromkeys(names or []))
    if unknown := [name for name in asked if name not in known]:
        raise wrong(f"{', '.join(unknown)}: expected some of {', '.join(known)}.")
    asked = asked or ([] if subject else list(FRAMEWORKS))
    asked = [key for name in asked for key in known if key == name or key.startswith(f"{name}.")]
    missing = [name for name in FRAMEWORKS if name in asked and not is_installed(name)]
    for name in missing:
        console.print(missing_message(name), style="yellow", markup=False)
    if names and missing:
        raise typer.Exit(2)
    targets = {name: known[name] for name in asked if name.partition(".")[0] not in missing}
    targets = (
        {"numpy": SUBJECTS["numpy"]} | targets | {reference: (reference,) for reference in subject or []}
    )
    for name in targets:
        if name in FIRST_RUN:
            console.print(FIRST_RUN[name], markup=False, highlight=False)
    processors = os.cpu_count() or 1
    journal = None if reports.journal is None else Journal(reports.journal, called, targets, cases)

    def stop(runs: Sequence[Any]) -> str:
        if signals:
            return "interrupted"
        return "stopped at the first failure" if fail_fast and any(each.failed for each in runs) else ""

    with stopping() as signals:
        try:
            with Progress(
                console, progress_row, left=lambda runs: seconds_left(runs, processors)
            ) as progress:
                runs = run(
                    targets,
                    cases,
                    progress,
                    time_limit,
                    first=subject or (),
                    expectations=known_to_differ,
                    stop=stop,
                    record=ignore if journal is None else journal.record,
                )
        except SubjectError as error:
            if journal is not None:
                journal.remove()
            raise wrong(str(error)) from None
    console.print(render(runs))
    reports.write(runs, called, console)
    if journal is not None:
        journal.remove()
    if write_expected is not None:
        if any(each.stopped for each in runs):
            raise wrong(f"{write_expected} is not written: not all cases have a result.")
        for line in write_expectations(write_expected, runs, known_to_differ):
            typer.echo(f"rbn: cannot be expected: {line}", err=True)
        console.print(f"wrote {write_expected}", markup=False, highlight=False, soft_wrap=True)
    if signals:
        raise typer.Exit(128 + signals[0])
    if not all(each.passed for each in runs):
        raise typer.Exit(1)


def _new_subject(arguments: Sequence[str]) -> None:
    """Write a subject to fill in."""
    from rbn.conformance.blank import FRAMEWORKS_OF_BLANKS, write_blank
    from rbn_core import RBNError

    if not 1 <= len(arguments) <= 2:
        raise wrong(f"expected rbn conform {NEW} FILE, or FILE and one of {', '.join(FRAMEWORKS_OF_BLANKS)}.")
    path = Path(arguments[0])
    try:
        text = write_blank(path, *arguments[1:])
    except RBNError as error:
        raise wrong(str(error)) from None
    typer.echo(text)


@command
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="torch, flax, mindspore, jittor; by default every installed one.",
            autocompletion=lambda incomplete: [name for name in FRAMEWORKS if name.startswith(incomplete)],
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Measure training steps of this network, such as resnet50; in PyTorch only."
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="The dtype of the inputs; in PyTorch only."),
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, or cuda; in PyTorch only.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Five repetitions of everything.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write every measurement to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the measurements into this file.")] = None,
) -> None:
    """Measure the time of RBN and compare it with that of the framework's own BatchNorm.

    Exit status: 0 when everything was measured, 1 when a framework failed, 2 when a name is unknown or not
    installed.
    """
    # Not needed by the other commands, and slow to import.
    from rbn.benchmarks.cases import NETWORK_SECONDS, SECONDS, Options
    from rbn.benchmarks.report import machine, progress_row, render, write_json
    from rbn.benchmarks.runner import run
    from rbn.progress import Progress
    from rbn_core import architectures

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes end, too
    console = _console()
    torch_alone = network is not None or dtype != "float32" or device != "cpu"
    asked = list(dict.fromkeys(names or (["torch"] if torch_alone else FRAMEWORKS)))
    if unknown := [name for name in asked if name not in FRAMEWORKS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: expected some of {', '.join(FRAMEWORKS)}.")
    if torch_alone and asked != ["torch"]:
        raise typer.BadParameter(f"--network, --dtype and --device are for torch, got {', '.join(asked)}.")
    if network is not None and network not in architectures.ARCHITECTURES:
        raise typer.BadParameter(f"{network}: expected one of {', '.join(architectures.ARCHITECTURES)}.")
    if plot is not None and network is not None:
        raise typer.BadParameter("--plot draws the layers, and --network measures none. Leave one out.")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("--plot draws with matplotlib: pip install 'rbn[bench]'.")
    missing = [name for name in asked if not is_installed(name)]
    for name in missing:
        console.print(missing_message(name), style="yellow", markup=False)
    if missing and (names or torch_alone):
        raise typer.Exit(2)
    seconds = 0.0 if quick else SECONDS if network is None else NETWORK_SECONDS
    options = Options(network=network, dtype=dtype, device=device, seconds=seconds)
    with Progress(console, progress_row) as progress:
        runs = run([name for name in asked if name not in missing], options, progress)
    console.print(render(runs, options))
    command = shlex.join(["rbn", *sys.argv[1:]])
    if json is not None:
        write_json(json, runs, options, command)
    if plot is not None:
        from rbn.benchmarks.plot import write_plot

        write_plot(plot, runs, f"milliseconds of a step: {machine()}")
    if any(each.failure for each in runs):
        raise typer.Exit(1)


def _print_maps(wanted: bool) -> None:
    """The maps between our names, which are torchvision's, and those of other model zoos."""
    if not wanted:
        return
    from rbn_core.zoos import MAPS, ZOOS

    table = Table("map", "the other side", "networks", "what else differs there")
    for name in MAPS:
        zoo = ZOOS[name.partition("-")[2]]
        table.add_row(name, zoo.title, ", ".join(zoo.networks), zoo.differs)
    console = _console()
    console.print(table)
    console.print(
        "torchvision, jittor.models and timm's ResNets have our names: they need no map.", highlight=False
    )
    raise typer.Exit


@command
def port(
    source: Annotated[Path, typer.Argument(help="The file, or the Orbax folder, to read.")],
    destination: Annotated[
        Path, typer.Argument(help="The file or folder to write; an existing file is replaced.")
    ],
    source_format: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FORMAT",
            help="canonical, torch, flax, mindspore or jittor; by default found from the content.",
        ),
    ] = None,
    destination_format: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="The same for the destination; by default found from the suffix. .safetensors is canonical.",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Which network to take if a file holds several, such as state_dict_ema."
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The network to which the weights must belong, such as resnet50."),
    ] = None,
    norm: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER",
            help="Its normalization: bn, rbn, iebn, bnet, or JSON such as "
            """'{"layer": "rbn", "stages": [1, 4]}'; by default found from the names.""",
        ),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="The number of classes; by default found from the shape.")
    ] = None,
    map_file: Annotated[
        str | None,
        typer.Option(
            "--map",
            metavar="FILE",
            help="A TOML file with the tables \\[rename] and \\[kinds], or a named map, which --maps lists.",
        ),
    ] = None,
    _: Annotated[
        bool,
        typer.Option("--maps", callback=_print_maps, is_eager=True, help="List the named maps."),
    ] = False,
    convert: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER", help="Replace BatchNorm by this layer: rbn, iebn, bnet, or JSON as for --norm."
        ),
    ] = None,
    preserve: Annotated[
        bool, typer.Option("--preserve", help="With --convert: keep the network's outputs the same.")
    ] = False,
    layout: Annotated[
        str | None, typer.Option(help="published with --to torch; linen or nnx with --to flax.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run both networks on photographs, and compare their logits.")
    ] = False,
    all_rows: Annotated[
        bool, typer.Option("--all", help="Print every array, not only those that changed or were left out.")
    ] = False,
) -> None:
    """Write the weights of one framework's file as a file of another framework.

    Either file can be the canonical file, which needs no framework.

    Exit status: 0 when it is done, 1 when the networks differ (--verify), 2 when it cannot be done.
    """
    # Not needed by the other commands, and slow to import.
    from rbn import porting
    from rbn.transfer import Steps
    from rbn_core import RBNError, RBNValueError, counting, zoos

    console = _console()
    try:
        zoo_map = map_file if map_file in zoos.MAPS else None
        if verify and (convert or zoo_map):
            raise RBNValueError(
                "port: expected --verify of one network under our names, got --convert or a named map. "
                "Leave one out."
            )
        rename, kinds = porting.read_map(map_file) if map_file and not zoo_map else ({}, {})
        choices: dict[str, Any] = {
            "source_format": source_format,
            "destination_format": destination_format,
            "key": key,
            "network": network,
            "norm": None if norm is None else porting.parse_norm(norm),
            "num_classes": num_classes,
            "rename": rename,
            "kinds": kinds,
        }
        count = porting.STEPS
        if verify:
            from rbn import verification

            count += verification.STEPS
        difference = None
        steps = Steps(_console(stderr=True), count)
        with steps.progress, counting.telling(steps.bytes):
            found = porting.port(
                source,
                destination,
                **choices,
                zoo_map=zoo_map,
                layout=layout,
                convert=None if convert is None else porting.parse_norm(convert),
                preserve=preserve,
                progress=steps.step,
            )
            if verify:
                difference = verification.verify(source, destination, **choices, progress=steps.step)
    except RBNError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    shown = found.rows if all_rows else found.exceptions
    if shown:
        table = Table("status", "array", "in the source", "shape and dtype")
        for row in shown:
            table.add_row(*(escape(text) for text in (row.status, row.name, row.source, row.detail)))
        console.print(table)
    counts = Counter(row.status for row in found.rows)
    rest = "" if len(shown) == len(found.rows) else "; --all shows every one"
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()) + rest, highlight=False)
    for note in found.notes:
        Console(stderr=True).print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if difference is not None:
        console.print(
            f"largest difference of the logits, {difference.source} and {difference.destination}: "
            f"{difference.largest:.1e}, {difference.relative:.1e} of the largest "
            f"({'rounding' if difference.allowed else 'NOT the same network'})",
            highlight=False,
        )
        if not difference.allowed:
            raise typer.Exit(1)


app.command("train")(training.train)
app.command("eval")(training.evaluate)
