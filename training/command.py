"""The commands `rbn train` and `rbn eval`."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

import typer
from rich.console import Console

from rbn.backends.frameworks import FRAMEWORKS, is_installed, missing_message
from rbn.progress import Progress, Row
from rbn.training.preset import PRESETS, Preset, read_preset
from rbn.training.share import ALONE, Share
from rbn_core.errors import RBNError, RBNValueError

NEEDED = {"grain": "grain", "tensorboardX": "tensorboardX", "PIL": "pillow", "sklearn": "scikit-learn"}
"""What the extra `train` installs for this: the distribution of each module."""

FIELDS = {each.name: each for each in dataclasses.fields(Preset)}


def train(
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"{', '.join(PRESETS)}, or a TOML file; digits by default."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Go on from the file of a run, of any framework.")
    ] = None,
    framework: Annotated[
        str | None, typer.Option(help=f"{', '.join(FRAMEWORKS)}; by default the file's, or the first one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run's folder; run, or the resumed file's.")
    ] = None,
    device: Annotated[str, typer.Option(help="As the framework calls it; by default its own.")] = "",
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images; 0 is threads.")] = 0,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between two rows of log.csv.")] = 10,
    save_every: Annotated[
        int, typer.Option(min=0, help="Save after so many steps, too, and not only after each epoch.")
    ] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep what --save-every saves.")] = False,
    amp: Annotated[
        str, typer.Option(metavar="DTYPE", help="Autocast to bfloat16 or float16; in PyTorch.")
    ] = "",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network; in PyTorch.")] = False,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Have the channels last in memory; in PyTorch.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the run would be, and do nothing.")
    ] = False,
    print_preset: Annotated[
        bool, typer.Option("--print-preset", help="Print the run's values as TOML, and do nothing.")
    ] = False,
    **values: Any,
) -> None:
    """Train a network, in any framework; a run goes on in another one where the first stopped.

    Exit status: 0 when it is done, 1 when the loss is not finite, 2 when it cannot be done, 130 after Ctrl-C.
    """
    console, share = _console(), ALONE
    try:
        changes = {name: _parsed(name, value) for name, value in values.items() if value is not None}
        if print_preset and resume is None:
            typer.echo(read_preset(preset or "digits").changed(**changes).to_toml(), nl=False)
            return
        _check_installed()
        from rbn.training import loop, run, run_file

        if resume is not None and preset is not None:
            raise RBNValueError(
                "train: expected --resume or --preset, got both. Leave --preset out: the file knows it."
            )
        saved = None if resume is None else run_file.load(resume)
        chosen = (saved.preset if saved else read_preset(preset or "digits")).changed(**changes)
        if print_preset:
            typer.echo(chosen.to_toml(), nl=False)
            return
        name = _framework(framework, saved.framework if saved else None)
        folder = out or (resume.parent if resume else Path("run"))
        share = ALONE if dry_run else loop.join(name, device)
        leads = share.index == 0
        plan = run.Plan(chosen, saved, share)
        for line in plan.lines() if leads else ():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if dry_run:
            return
        if plan.progress.step >= plan.total:
            if leads:
                console.print(
                    f"nothing to do: all {plan.total} steps are made. More: --epochs.", highlight=False
                )
            return
        if leads and resume is None and (folder / run.LAST).exists():
            raise RBNValueError(
                f"train: expected a folder without a run, got {folder}, which has one. Go on with --resume "
                f"{folder / run.LAST}, or give another folder with --out."
            )
        means = loop.Means(amp, compile, channels_last)
        options = run.Options(name, folder, device, workers, log_every, save_every, keep, means)
        with _shown(console, share) as (show, tell):
            finished = run.train(plan, options, show, tell)
    except RBNError as error:
        _fail(error, share)
    except BaseException:
        _leave_if_several(share)
        raise
    if leads:
        last = folder / run.LAST
        told = (
            f"the run is in {folder}" if finished else f"stopped and saved: rbn train --resume {last} goes on"
        )
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    if not finished:
        raise typer.Exit(130)


def evaluate(
    file: Annotated[Path, typer.Argument(help="The file of a run.")],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help=f"{FIELDS['data'].metadata['help']} As trained.")
    ] = None,
    framework: Annotated[
        str | None, typer.Option(help=f"{', '.join(FRAMEWORKS)}; by default the file's.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at a time; as trained.")] = None,
    device: Annotated[str, typer.Option(help="As the framework calls it; by default its own.")] = "",
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images; 0 is threads.")] = 0,
) -> None:
    """Print the top-1 and top-5 of a trained network, in any framework.

    Exit status: 0 when it is done, 2 when it cannot be done.
    """
    console, share = _console(), ALONE
    try:
        _check_installed()
        from rbn.training import loop, run, run_file
        from rbn.training.sources import open_data

        saved = run_file.load(file)
        changes = {"data": data, "batch_size": batch_size}
        preset = saved.preset.changed(**{key: value for key, value in changes.items() if value is not None})
        name = _framework(framework, saved.framework)
        _, source = open_data(preset.data)
        if len(source.classes) != (trained := saved.network.nodes[-1].shape((1, 1))[-1]):
            raise RBNValueError(
                f"eval: expected data of {trained} classes, as the network of {file} has them, got "
                f"{preset.data} with {len(source.classes)}. Give the data that it was trained for."
            )
        share = loop.join(name, device)
        built = loop.build(name, saved.network, preset.changed(accumulate=1), device, share)
        built.load(saved.state, None)
        shown = run.Shown(saved.progress.step, saved.progress.step, 1)
        with _shown(console, share) as (show, tell):
            found = run.evaluate(built, source, preset, workers, shown, show, tell)
        values = run.means(found)
        if share.index == 0:
            console.print(
                f"{found.count} images of {preset.data} in {name}: top-1 {values['top1']:.2f} %, top-5 "
                f"{values['top5']:.2f} %, loss {values['loss']:.4f}",
                highlight=False,
                soft_wrap=True,
            )
    except RBNError as error:
        _fail(error, share)
    except BaseException:
        _leave_if_several(share)
        raise


def _with_options(command: Callable[..., None]) -> None:
    """Give a command an option for every value of a preset."""
    signature = inspect.signature(command)
    hints = get_type_hints(Preset)
    own = [each for each in signature.parameters.values() if each.name != "values"]
    for name, each in FIELDS.items():
        kind: Any = hints[name] if hints[name] in (int, float, str, bool) else str
        option = typer.Option(f"--{name.replace('_', '-')}", help=each.metadata["help"])
        if kind is bool:
            words = name.replace("_", "-")
            option = typer.Option(f"--{words}/--no-{words}", help=each.metadata["help"])
        annotation = Annotated[kind | None, option]
        command.__annotations__[name] = annotation
        own.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    command.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]


_with_options(train)


def _parsed(name: str, value: Any) -> Any:
    """A value of the command line: lists have commas, and a layer may be JSON."""
    if name == "norm" and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except ValueError as error:
            raise RBNValueError(
                f"train: expected --norm as a name or as JSON, got {value!r} ({error}). Write it as "
                """'{"layer": "rbn", "stages": [1, 4]}'."""
            ) from error
    if not isinstance(value, str) or get_type_hints(Preset)[name] is str or name == "norm":
        return value
    try:
        return [float(part) for part in value.split(",") if part.strip()]
    except ValueError:
        raise RBNValueError(
            f"train: expected numbers with commas between them for {name}, got {value!r}. Give for example "
            "30,60,90."
        ) from None


def _check_installed() -> None:
    """Refuse to go on without what the extra installs."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # grain warns of a profile that nobody asked for
    if absent := [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]:
        raise RBNValueError(
            f"train: expected {', '.join(NEEDED.values())}, got no {', '.join(absent)}. Install them: "
            "pip install 'rbn[train]'."
        )


def _framework(asked: str | None, stored: str | None) -> str:
    """The framework to run in."""
    name = asked or stored or next((each for each in FRAMEWORKS if is_installed(each)), "torch")
    if name not in FRAMEWORKS:
        raise RBNValueError(
            f"train: expected a framework, {', '.join(FRAMEWORKS)}, got {name!r}. Give one of these."
        )
    if not is_installed(name):
        raise RBNValueError(f"train: expected {name} to be installed, but {missing_message(name)}")
    return name


def _fail(error: RBNError, share: Share) -> NoReturn:
    """Print an error and end."""
    diverged = type(error).__name__ == "DivergedError"
    if share.index == 0 or not diverged:  # which all meet in the same step
        told = f"process {share.index}: {error}" if share.index else str(error)
        Console(stderr=True).print(told, style="red", markup=False, highlight=False, soft_wrap=True)
    if share.count > 1:
        _leave(1 if diverged else 2)
    raise typer.Exit(1 if diverged else 2) from None


def _leave_if_several(share: Share) -> None:
    """End a process in which something unforeseen happened, if others wait for it."""
    if share.count > 1:
        traceback.print_exc()
        _leave(1)


def _leave(code: int) -> NoReturn:
    """End at once: Python's own end would wait for the other processes, and they for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=120)


@contextmanager
def _shown(console: Console, share: Share) -> Iterator[tuple[Callable[[Any], None], Callable[[str], None]]]:
    """What shows a run, in process 0 alone, and what prints a line."""
    if share.index:
        yield _hide, _teller(console, f"process {share.index}: ")
        return
    with _progress(console) as progress:
        yield _throttled(progress), _teller(progress.console)


def _hide(_: Any) -> None:
    """Show nothing of a run."""


def _progress(console: Console) -> Progress[Any]:
    """Bars on a terminal, and elsewhere a line a minute."""
    return Progress(console, _row, 60.0, _seconds_left, first=5.0)


def _row(shown: Any) -> Row:
    """What is to be said of a run."""
    seen, images = shown.evaluating
    if images:
        return Row("evaluation", seen, images, f"{seen} of {images} images", True)
    epoch = (shown.step - 1) // shown.steps_per_epoch + 1
    return Row(
        f"epoch {epoch} of {shown.total / shown.steps_per_epoch:g}, step {shown.step} of {shown.total}",
        shown.step,
        shown.total,
        f"loss {shown.loss:.4f}, top-1 {shown.top1:.1f} %, {shown.images_per_second:.0f} images/s",
        True,
    )


def _seconds_left(runs: Sequence[Any]) -> float | None:
    """About how long the run still takes."""
    (shown,) = runs
    done = shown.step - shown.began
    if done < 2:
        return None
    return float((shown.total - shown.step) * (time.monotonic() - shown.since) / done)


def _throttled(progress: Progress[Any]) -> Callable[[Any], None]:
    """Show a run ten times a second at most, so that it costs nothing."""
    last = [0.0]

    def show(shown: Any) -> None:
        now = time.monotonic()
        if now - last[0] >= 0.1:
            last[0] = now
            progress([shown])

    return show


def _teller(console: Console, before: str = "") -> Callable[[str], None]:
    """Print a line above the bars."""

    def tell(line: str) -> None:
        console.print(before + line, markup=False, highlight=False, soft_wrap=True)

    return tell
