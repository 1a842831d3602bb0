"""Subjects by their names: "package.module:Name", or what an installed package has registered."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, NoReturn

from rbn.conformance.readable import first_line, said
from rbn.conformance.subject import Subject
from rbn_core.errors import RBNError

SUBJECTS: dict[str, tuple[str, ...]] = {
    "numpy": ("rbn.conformance.subjects.numpy:Numpy",),
    "torch": ("rbn.conformance.subjects.torch:Torch",),
    "torch.plain": ("rbn.conformance.subjects.torch:plain",),
    "flax": ("rbn.conformance.subjects.flax:Flax",),
    "flax.nnx": ("rbn.conformance.subjects.flax:FlaxNNX",),
    # Of both kinds of Flax's layers: they call the same function for it.
    "flax.plain": ("rbn.conformance.subjects.flax:plain",),
    "mindspore": ("rbn.conformance.subjects.mindspore:MindSpore",),
    "mindspore.plain": ("rbn.conformance.subjects.mindspore:plain",),
    "jittor": ("rbn.conformance.subjects.jittor:Jittor",),
    "jittor.plain": ("rbn.conformance.subjects.jittor:plain",),
}
"""The project's own subjects. A `.plain` one has the same layers with `fused=False`."""

ENTRY_POINTS = "rbn.conformance"
"""The group under which an installed package can name subjects of its own."""

OURS = (os.path.dirname(__file__), "<frozen importlib")
"""The code between a command and a subject's file."""

LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
"""Where the code of others lies."""


class SubjectError(RBNError):
    """A name leads to no subject: one line with the name, what is wrong with it, and where in whose file."""


def load(reference: str) -> Subject:
    """The subject that "package.module:Name" names, an object or a class or function that makes one.

    Raises:
        SubjectError: The name is no such name, its module cannot be imported, or what it names is no subject.
    """
    place, _, name = reference.partition(":")
    if not place or not name:
        raise SubjectError(
            f"{reference}: expected PKG.MODULE:NAME, a module and what is called so in it, "
            "such as my_layers:subject."
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the command finds what `python -m` would
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and f"{place}.".startswith(f"{error.name}."):
            raise SubjectError(f"{reference}: {not_there(place, name, error.name)}") from None
        cannot(reference, error)
    except (Exception, SystemExit) as error:  # whatever somebody's file does
        cannot(reference, error)
    if not hasattr(module, name):
        raise SubjectError(f"{reference}: {described(module)} has no {name}. {subjects_in(module, place)}")
    found = getattr(module, name)
    if not isinstance(found, Subject) and callable(found):
        try:
            found = found()
        except (Exception, SystemExit) as error:
            cannot(reference, error, found)
    if not isinstance(found, Subject):
        raise SubjectError(
            f"{reference}: expected a rbn.conformance.Subject, or a class or function that makes one, got "
            f"{first_line(repr(found))}. {subjects_in(module, place)}"
        )
    return found


def registered() -> dict[str, tuple[str, ...]]:
    """The subjects that installed packages name as entry points."""
    return {point.name: (point.value,) for point in entry_points(group=ENTRY_POINTS)}


def not_there(place: str, name: str, missing: str) -> str:
    """What to say of a module that there is not."""
    if place.endswith(".py"):
        folder, file = os.path.split(place)
        advice = f"name the module and not its file: {file.removesuffix('.py')}:{name}"
        return f"{advice}, in the folder {folder}." if folder else f"{advice}."
    return f"there is no module {missing} in {os.getcwd()} or among what is installed."


def described(module: ModuleType) -> str:
    """A module with its file."""
    file = getattr(module, "__file__", None)
    return f"{module.__name__} ({shortened(file)})" if file else module.__name__


def subjects_in(module: ModuleType, place: str) -> str:
    """What could have been meant."""
    names = [
        name
        for name, value in vars(module).items()
        if isinstance(value, Subject)
        or (
            inspect.isclass(value)
            and issubclass(value, Subject)
            and value.__module__ == module.__name__
            and not inspect.isabstract(value)
        )
    ]
    return f"It has {', '.join(f'{place}:{name}' for name in names)}." if names else "It has no subject."


def cannot(reference: str, error: BaseException, maker: Any = None) -> NoReturn:
    """Raise the error of a subject that cannot be imported or made, with where that is in its file."""
    raise SubjectError(f"{reference}: {where(error, maker)}{first_line(said(error))}") from error


def where(error: BaseException, maker: Any) -> str:
    """The last line of somebody's own code that led to an error; of a syntax error its line."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{shortened(error.filename)}, line {error.lineno}: "
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(OURS)
    ]
    own = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)] or frames[:1]
    if own:
        return f"{shortened(own[-1].filename)}, line {own[-1].lineno}, in {own[-1].name}: "
    try:  # it never came to a line of theirs
        return f"{shortened(inspect.getfile(maker))}, line {inspect.getsourcelines(maker)[1]}: "
    except (TypeError, OSError):
        return ""


def shortened(path: str) -> str:
    """A path as one writes it in this folder."""
    near = os.path.relpath(path)
    return path if near.startswith(os.pardir) else near
