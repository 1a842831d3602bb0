"""Trained weights from one framework's file to another's: what `rbn port` does."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

import rbn.backends
from rbn.backends.frameworks import FRAMEWORKS, missing_message
from rbn_core import architectures, weights
from rbn_core.config import check_choice
from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.matching import COUNTER, Row, State, Table, match
from rbn_core.names import KINDS, PARAMETERS, STATISTICS, Kind, from_own, own_name, to_layout, to_own
from rbn_core.networks import Linear, Network, Norm
from rbn_core.weights import Layers, Training

FilePath = str | PathLike[str]

CANONICAL = "canonical"
FORMATS = (CANONICAL, *FRAMEWORKS)

SUFFIXES = {".pth": "torch", ".pt": "torch", ".msgpack": "flax", ".ckpt": "mindspore", ".pkl": "jittor"}
"""Whose format a file is in; a folder is Orbax's, so Flax's, and a `.safetensors` file can be anyone's."""

SAFETENSORS = {"rbn": CANONICAL, "pt": "torch", "flax": "flax", "ms": "mindspore"}
"""Whose a `.safetensors` file is, by the `format` of its metadata."""

LAYOUTS = {"torch": ("own", "published"), "flax": ("linen", "nnx")}
"""The forms of a framework's files: the papers' published code has its own, and so have linen and NNX."""

CALIBRATIONS = ("center_weight", "scale_weight", "scale_bias", "conv_weight")
"""What our layers have and plain BatchNorm has not."""

COUNTERS = {"torch": "int64", "flax": "int32", "mindspore": "int32", "jittor": "int32"}
"""What each framework's layers count batches in."""


@dataclass(frozen=True)
class Content:
    """What a file holds, under canonical names.

    Args:
        state: The arrays.
        kinds: What owns them, by dotted path.
        layers: What is known about these layers beside that.
        network: The network they make up, if it is known.
        training: The optimizer that goes on with them, if there is one.
    """

    state: State
    kinds: dict[str, Kind]
    layers: Layers
    network: Network | None = None
    training: Training | None = None


class Fingerprint(NamedTuple):
    """An array's dtype, its shape and a hash of its numbers."""

    dtype: str
    shape: tuple[int, ...]
    digest: bytes


def port(
    source: FilePath,
    destination: FilePath,
    *,
    source_format: str | None = None,
    destination_format: str | None = None,
    network: str | None = None,
    norm: str | Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    rename: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    layout: str | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Table:
    r"""Write the weights of one file as another, and read them back to compare them bit for bit.

    Of the frameworks only those whose own formats are read or written are imported, if at all.

    Args:
        source: The file, or the folder of Orbax, to read.
        destination: What to write, in one step; what is there is replaced.
        source_format: One of `FORMATS`; by default told by the suffix, and of `.safetensors` by the metadata.
        destination_format: The same of the destination; a `.safetensors` file is canonical by default.
        network: The network that the arrays must make up, one of `rbn_core.architectures.ARCHITECTURES`; by
            default the one that a canonical file names.
        norm: Its normalization, as `rbn_core.architectures.network` takes it; by default told by the names.
        num_classes: Its number of classes; by default told by the shape of its classifier.
        rename: Regular expressions that match a whole canonical name, each with the new name, in which \1,
            \2, ... stand for their groups; the first one that matches counts.
        kinds: Regular expressions that match the whole dotted path of a layer of the source, each with what
            it is, one of `rbn_core.names.KINDS`. Names and ranks do not tell transposed convolutions, and
            outside of Flax and MindSpore not embeddings.
        layout: One of `LAYOUTS` of the destination's framework; by default the first.
        progress: Called with what is done next, in words.

    Returns:
        Every array, and what became of it.

    Raises:
        RBNError: The source is damaged, something does not fit, an array is not finite, or what is read back
            is not what was written; but for the last, the destination stays as it was.
    """
    source, destination = Path(source), Path(destination)
    reader = told_format(source, source_format, writes=False)
    writer = told_format(destination, destination_format, writes=True)
    if layout is not None:
        check_choice("--layout", layout, LAYOUTS.get(writer, ()), f"port to {writer}")
    progress(f"reading {source} ({reader})")
    content, table = fitted(read(source, reader, kinds), rename, network, norm, num_classes)
    if content.network is not None:
        progress(f"the arrays are those of {summary(content.network)}")
    return_memory()
    rows = planned(table, content, reader, writer)
    written = content.state if writer == CANONICAL else own_state(content, writer)
    expected = {name: fingerprint(array) for name, array in written.items()}
    if writer == CANONICAL and content.training is not None:
        for slot, arrays in content.training.slots.items():
            expected |= {
                f"{weights.TRAINING}{slot}/{name}": fingerprint(array) for name, array in arrays.items()
            }
    progress(f"writing {destination} ({writer})")
    write(destination, writer, content, written, layout)
    del content, written  # what is read back takes their place in memory
    return_memory()
    progress(f"reading {destination} back")
    changed = compared(destination, expected, stored_arrays(destination, writer))
    return Table(
        tuple(
            replace(row, detail=f"{row.detail}, stored as {changed[own]}") if own in changed else row
            for row, own in rows
        )
    )


def told_format(path: Path, given: str | None, *, writes: bool) -> str:
    """Whose format a file is in.

    Args:
        path: The file.
        given: What the user says, if anything.
        writes: Whether the file is to be written; one to be read must be there.

    Raises:
        RBNError: There is no such file, or it cannot be told.
    """
    option = "--to" if writes else "--from"
    if given is not None:
        check_choice(option, given, FORMATS, "port")
    if not writes and not path.exists():
        raise RBNValueError(f"port: expected a file to read, got {path}, which is not there. Check the path.")
    if given is not None:
        return given
    suffix = path.suffix.lower()
    if path.is_dir() or (writes and not suffix):
        return "flax"
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    if suffix != ".safetensors":
        raise RBNValueError(
            f"port: expected a folder or one of {', '.join(SUFFIXES)} or .safetensors, got {path.name}. "
            f"Say whose format it is with {option}."
        )
    if writes:
        return CANONICAL
    with os_errors_explained(path):
        _, metadata = weights.read_safetensors(path)
    if metadata.get("format") not in SAFETENSORS:
        raise RBNValueError(
            f"port: expected a .safetensors file that says whose it is, got {path}. Say it with --from, "
            f"{', '.join(FORMATS)}."
        )
    return SAFETENSORS[metadata["format"]]


def read(path: Path, framework: str, kinds: Mapping[str, str] | None = None) -> Content:
    """What a file holds, under canonical names.

    Args:
        path: The file.
        framework: One of `FORMATS`.
        kinds: Patterns of paths with what the layers are, as `port` takes them.

    Raises:
        RBNError: The file is damaged or hostile, holds nothing, or a pattern is wrong.
    """
    if framework == CANONICAL:
        with os_errors_explained(path):
            known = weights.read(path)
        state = known.state
        described = (known.network.layers() if known.network else {}) | known.layers
        told = told_kinds(state) | {owner: cast("Kind", layer["kind"]) for owner, layer in described.items()}
        said = said_kinds(kinds, told)
        content = Content(state, told | said, known.layers, known.network, known.training)
    else:
        own = stored_arrays(path, framework)
        said = said_kinds(kinds, from_own(framework, own)[1])
        state, told = from_own(framework, own, said)
        if len(state) < len(own):
            raise RBNValueError(
                f"port: expected arrays whose names differ, got {path}, where {len(own)} names become "
                f"{len(state)}. Say what the layers are with a map's [kinds]."
            )
        content = Content(state, told, {})
    if not content.state:
        raise RBNValueError(f"port: expected arrays, got none in {path}. Write it again.")
    return content


def fitted(
    content: Content,
    rename: Mapping[str, str] | None,
    network: str | None,
    norm: str | Mapping[str, Any] | None,
    num_classes: int | None,
) -> tuple[Content, Table]:
    """The content under the names that the user wants, and held to its network if there is one.

    Args:
        content: What a file holds.
        rename: As `port` takes it, as are the others.
        network: Without one a canonical file's own counts, unless names are changed.
        norm: Only with a network.
        num_classes: Only with a network.

    Raises:
        RBNError: A pattern or an option is wrong, an array is not finite, or it is another network's.
    """
    if network is None and (norm is not None or num_classes is not None):
        raise RBNValueError(
            "port: expected --network where --norm or --num-classes is given, got none. Give it."
        )
    check_finite(content.state)
    content, table = renamed(content, rename or {})
    described = content.network
    if network is not None:
        described = description(network, norm, num_classes, content.state)
    if described is None:
        return content, table
    taken, matched = match(content.state, described.state_shapes(), strict=False)
    if matched.faults:
        raise RBNValueError(
            f"port: expected the arrays of {summary(described)}, got others. Nothing was written; name "
            f"another network, or rename with --map.\n{Table(matched.faults)}"
        )
    sources = {row.name: row.source for row in table.rows}
    rows = tuple(
        replace(row, status="renamed", source=sources[row.name])
        if row.status == "matched" and sources[row.name]
        else replace(row, detail="is left out" if row.name in content.state else "starts at 0")
        if row.status == "no counterpart"
        else row
        for row in matched.rows
    )
    # A count may lack, and a framework's own way of loading wants it nevertheless.
    state = {name: taken.get(name, np.zeros((), np.int64)) for name in described.state_shapes()}
    layers = described.layers()
    kinds = {path: cast("Kind", layer["kind"]) for path, layer in layers.items()}
    return replace(content, state=state, kinds=kinds, layers=layers, network=described), Table(rows)


def renamed(content: Content, rename: Mapping[str, str]) -> tuple[Content, Table]:
    """The content under the names of a rename table, and what every array was called.

    Raises:
        RBNValueError: A pattern is wrong, or two arrays, or two layers of different kinds, get one name.
    """
    _, found = match(content.state, {}, rename=rename, strict=False)
    old_names = {row.name: row.source or row.name for row in found.rows}
    kinds: dict[str, Kind] = {}
    layers: Layers = {}
    for new, old in old_names.items():
        path, old_path = new.rpartition(".")[0], old.rpartition(".")[0]
        kind = content.kinds.get(old_path, "other")
        if kinds.setdefault(path, kind) != kind:
            raise RBNValueError(
                f"port: expected one kind of layer at {path!r}, got {kinds[path]} and {kind}. "
                "Rename them apart."
            )
        layers[path] = {"kind": kind} | content.layers.get(old_path, {})
    rows = [
        Row(
            new, "renamed" if old != new else "matched", old if old != new else "", _shown(content.state[old])
        )
        for new, old in old_names.items()
    ]
    new_names = {old: new for new, old in old_names.items()}
    training = content.training and replace(
        content.training,
        slots={
            slot: {new_names.get(name, name): array for name, array in arrays.items()}
            for slot, arrays in content.training.slots.items()
        },
    )
    state = {new: content.state[old] for new, old in old_names.items()}
    network = None if rename else content.network
    return Content(state, kinds, layers, network, training), Table(tuple(rows))


def check_finite(state: State) -> None:
    """Refuse weights with which no network can run.

    Raises:
        RBNValueError: An array holds NaN or infinity; all such are named.
    """
    with np.errstate(invalid="ignore"):  # half precision is compared as float32, which some NaNs are not
        wrong = [
            f"{name} ({np.count_nonzero(~np.isfinite(array))} of {array.size})"
            for name, array in state.items()
            if array.dtype.kind in "fV" and not np.isfinite(array).all()
        ]
    if wrong:
        raise RBNValueError(
            f"port: expected finite numbers, got NaN or infinity in {', '.join(wrong)}. "
            "Take a checkpoint from before the training diverged."
        )


def description(
    name: str, norm: str | Mapping[str, Any] | None, num_classes: int | None, state: State
) -> Network:
    """A network of the papers; what is not said is told by the arrays.

    Raises:
        RBNError: Something is unknown, or cannot be told.
    """
    plain = architectures.network(name)
    if num_classes is None:
        classifier = next(node.name for node in reversed(plain.nodes) if isinstance(node, Linear))
        shape = np.shape(state.get(f"{classifier}.bias", 0))
        num_classes = shape[0] if len(shape) == 1 and shape[0] else None
    return architectures.network(name, told_norm(plain, state) if norm is None else norm, num_classes)


def told_norm(plain: Network, state: State) -> str | dict[str, Any]:
    """The normalization of a network's arrays, by their names, as `rbn_core.architectures.network` takes it.

    `center_weight` is RBN's and `conv_weight` BNET's; `scale_weight` without `center_weight` is taken for
    IEBN's. Which statistics a layer takes is not told: those are taken to be the defaults.

    Raises:
        RBNValueError: Several kinds of layers are there.
    """
    found: dict[str, str] = {}
    options: dict[str, Any] = {}
    for node in plain.nodes:
        own = {name for name in CALIBRATIONS if f"{node.name}.{name}" in state}
        if "conv_weight" in own:
            found[node.name] = "bnet"
            options["kernel_size"] = state[f"{node.name}.conv_weight"].shape[-1]
        elif "center_weight" in own:
            found[node.name] = "rbn"
            options |= {} if "scale_weight" in own else {"scaling": None}
        elif own:
            found[node.name] = "iebn"
    layers = sorted(set(found.values()))
    if not layers:
        return "bn"
    if len(layers) > 1:
        raise RBNValueError(
            f"port: expected one layer beside BatchNorm, got {' and '.join(layers)}. Say which with --norm."
        )
    stages = []
    stage = 0
    while True:
        try:
            one = architectures.network(plain.name, {"layer": layers[0], "stages": (stage,)})
        except RBNValueError:
            break
        taken = [node.name for node in one.nodes if isinstance(node, Norm) and node.layer == layers[0]]
        stages += [stage] if any(path in found for path in taken) or not taken else []
        stage += 1
    chosen = {} if len(stages) == stage else {"stages": tuple(stages)}
    return {"layer": layers[0], **chosen, **options}


def summary(network: Network) -> str:
    """A network in a few words."""
    norms = Counter(node.layer for node in network.nodes if isinstance(node, Norm))
    counted = " and ".join(f"{count} {layer}" for layer, count in norms.items())
    return f"{network.name} ({counted}, {network.nodes[-1].shape((1, 1))[-1]} classes)"


def told_kinds(state: State) -> dict[str, Kind]:
    """What owns canonical arrays, as far as names and ranks tell it."""
    kinds: dict[str, Kind] = {}
    for full_name, array in state.items():
        path, _, name = full_name.rpartition(".")
        if name in (*PARAMETERS, *STATISTICS):
            kinds[path] = "norm"
        elif name == "weight" and array.ndim >= 2:
            kinds.setdefault(path, "linear" if array.ndim == 2 else "convolution")
    return kinds


def said_kinds(kinds: Mapping[str, str] | None, told: Mapping[str, Kind]) -> dict[str, Kind]:
    """What the user says that the layers of these paths are.

    Raises:
        RBNError: A pattern is no regular expression or matches nothing, or a kind is unknown.
    """
    said: dict[str, Kind] = {}
    for pattern, kind in (kinds or {}).items():
        check_choice("a kind", kind, KINDS, "port")
        try:
            paths = [path for path in told if re.fullmatch(pattern, path)]
        except re.error as error:
            raise RBNValueError(
                f"port: expected kinds to hold regular expressions, got {pattern!r} ({error}). "
                "See Python's re module; a dot in a path is \\."
            ) from error
        if not paths:
            raise RBNValueError(
                f"port: expected the patterns of kinds to match the paths of layers, got {pattern!r}, which "
                f"matches none of {', '.join(list(told)[:12])}{', ...' if len(told) > 12 else ''}. Mend it."
            )
        said |= {path: cast("Kind", kind) for path in paths if path not in said}
    return said


def own_state(content: Content, framework: str) -> State:
    """The arrays under a framework's names and in its layout.

    Counters of batches get the integers of the framework's layers, and are left out where its own BatchNorm
    has none.

    Raises:
        RBNValueError: Two arrays get one name.
    """
    state = {}
    for name, array in content.state.items():
        if is_left_out(content, name, framework):
            continue
        if name.rpartition(".")[2] == COUNTER and array.dtype.kind in "iu":
            largest = np.iinfo(COUNTERS[framework]).max
            array = np.minimum(array, largest).astype(COUNTERS[framework])
        state[name] = array
    own = to_own(framework, state, content.kinds)
    if len(own) < len(state):
        raise RBNValueError(
            f"port: expected arrays whose names differ in {framework}, too, got {len(state)}, of which only "
            f"{len(own)} do. Rename some with --map."
        )
    return own


def is_left_out(content: Content, full_name: str, framework: str) -> bool:
    """Whether an array is the count of a plain BatchNorm, which none but PyTorch's keeps."""
    path, _, name = full_name.rpartition(".")
    if name != COUNTER or framework in (CANONICAL, "torch") or content.kinds.get(path) != "norm":
        return False
    named = (f"{path}.{calibration}".removeprefix(".") for calibration in CALIBRATIONS)
    return "layer" not in content.layers.get(path, {}) and not any(name in content.state for name in named)


def planned(table: Table, content: Content, reader: str, writer: str) -> list[tuple[Row, str]]:
    """Every row as it is once the arrays are written, with the array's name in the file."""
    rows = []
    for row in table.rows:
        path, _, name = row.name.rpartition(".")
        kind = content.kinds.get(path, "other")
        own = row.name if writer == CANONICAL else own_name(writer, path, name, kind)
        if row.name in content.state and row.status != "no counterpart":
            array = content.state[row.name]
            if is_left_out(content, row.name, writer):
                row = replace(row, status="no counterpart", detail=f"BatchNorm counts no batches in {writer}")
            elif (reader == "flax") != (writer == "flax") and to_layout(
                "flax", name, kind, array
            ) is not array:
                row = replace(row, status="transposed")
        rows.append((row, own))
    if content.training is not None and writer != CANONICAL:
        training = content.training
        detail = f"{training.optimizer} at step {training.step} stays behind: only a canonical file takes it"
        rows.append((Row("training", "no counterpart", detail=detail), ""))
    return rows


def fingerprint(array: NDArray[Any]) -> Fingerprint:
    """What tells whether an array is another one; half precision counts as the float32 that it is."""
    widened = array.astype(np.float32) if array.dtype.itemsize == 2 and array.dtype.kind in "fV" else array
    return Fingerprint(array.dtype.name, array.shape, hashlib.blake2b(widened.tobytes()).digest())


def compared(path: Path, expected: Mapping[str, Fingerprint], found: State) -> dict[str, str]:
    """Hold what was read back to what was written.

    Returns:
        The names of the arrays whose dtype the format has changed, with the new dtype.

    Raises:
        RBNValueError: Names or numbers differ.
    """
    back = {name: fingerprint(array) for name, array in found.items()}
    wrong = sorted(expected.keys() ^ back.keys()) + [
        name for name in expected.keys() & back.keys() if expected[name][1:] != back[name][1:]
    ]
    if wrong:
        raise RBNValueError(
            f"port: expected to read back what was written, got other arrays in {path}: "
            f"{', '.join(wrong)}. Delete the file, and check the disk."
        )
    return {name: back[name].dtype for name in expected if back[name].dtype != expected[name].dtype}


def return_memory() -> None:
    """Give free memory back to the system: glibc keeps small pieces, and tensorstore's are all the arrays."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def stored_arrays(path: Path, framework: str) -> State:
    """All arrays of a file, under the names of its framework or of the canonical file.

    Raises:
        RBNValueError: The file is damaged or hostile.
    """
    with os_errors_explained(path):
        if framework == CANONICAL:
            return weights.read_safetensors(path)[0]
        return checkpoints(framework).read(path)


def write(path: Path, framework: str, content: Content, stored: State, layout: str | None) -> None:
    """Write a file in one step.

    Args:
        path: Where.
        framework: Whose format.
        content: What is known about the arrays: all of it goes into a canonical file, and the published form
            of PyTorch's differs between RBN and IEBN.
        stored: The arrays under the framework's names.
        layout: One of `LAYOUTS`.

    Raises:
        RBNError: The file cannot be written, or the format cannot hold an array.
    """
    with os_errors_explained(path):
        if framework == CANONICAL:
            weights.save(
                path, stored, layers=content.layers, network=content.network, training=content.training
            )
            return
        options: dict[str, Any] = {} if layout is None else {"layout": layout}
        if layout == "published":
            options["layers"] = content.layers
        checkpoints(framework).write(path, stored, **options)


def checkpoints(framework: str) -> Any:
    """A backend's module `checkpoints`, without the rest of the backend, which imports the framework.

    Raises:
        RBNValueError: The format needs the framework, and it is not installed.
    """
    name = f"rbn.backends.{framework}.checkpoints"
    if name in sys.modules:
        return sys.modules[name]
    alone = f"rbn.porting.{framework}_checkpoints"
    if alone in sys.modules:
        return sys.modules[alone]
    file = next(
        file
        for folder in rbn.backends.__path__
        if (file := Path(folder, framework, "checkpoints.py")).is_file()
    )
    spec = importlib.util.spec_from_file_location(alone, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[alone] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        del sys.modules[alone]
        raise RBNValueError(
            f"port: expected {framework} for its own format, got none. {missing_message(framework)}"
        ) from error
    return module


@contextmanager
def os_errors_explained(path: Path) -> Iterator[None]:
    """Turn what the system refuses into an error of ours.

    Raises:
        RBNValueError: A file cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        raise RBNValueError(
            f"port: expected a file that can be read and written, got {path} ({error.strerror or error}). "
            "Check the path, its permissions, and the space that is left."
        ) from error


def read_map(path: FilePath) -> tuple[dict[str, str], dict[str, str]]:
    """The tables of a map file: `[rename]` and `[kinds]`.

    Raises:
        RBNError: It is no TOML, or holds anything else.
    """
    path = Path(path)
    try:
        with os_errors_explained(path):
            tables = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RBNValueError(f"port: expected a map in TOML, got {path} ({error}). Mend it.") from error
    if unknown := sorted(tables.keys() - {"rename", "kinds"}):
        raise RBNValueError(
            f"port: expected the tables [rename] and [kinds] in {path}, got {', '.join(unknown)}. "
            "Leave it out."
        )
    for table in tables.values():
        if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
            raise RBNTypeError(
                f"port: expected tables of 'PATTERN' = 'TEXT' in {path}, got {table!r}. "
                "Quote each pattern: a dot outside of quotes makes a table."
            )
    return tables.get("rename", {}), tables.get("kinds", {})


def parse_norm(text: str) -> str | dict[str, Any]:
    """A normalization as the command takes it: a name, or JSON such as {"layer": "rbn", "stages": [1, 4]}.

    Raises:
        RBNValueError: It begins as JSON and is none.
    """
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RBNValueError(
            f"port: expected --norm to be a name or JSON, got {text!r} ({error}). "
            """Give for example '{"layer": "rbn", "stages": [1, 4]}'."""
        ) from error


def _shown(array: NDArray[Any]) -> str:
    return f"{array.shape} {array.dtype}"
