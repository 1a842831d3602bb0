"""Trained weights from one framework's file to another's: what `rbn port` does."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import re
import secrets
import shutil
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from rbn.backends.frameworks import FRAMEWORKS, missing_message
from rbn_core import (
    architectures,
    conversion,
    pickles,
    published,
    renaming,
    stored_optimizers,
    training,
    weights,
    zoos,
)
from rbn_core.config import check_choice
from rbn_core.counting import PIECE, Meter
from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.files import replacing
from rbn_core.matching import COUNTER, Row, State, Status, Table, match, summed_up
from rbn_core.names import KINDS, PARAMETERS, RUNNING_STATISTICS, Kind, from_own, own_name, to_layout, to_own
from rbn_core.networks import Linear, Network, Norm
from rbn_core.training import Training, few
from rbn_core.weights import Layers

FilePath = str | PathLike[str]

STEPS = 4
"""How many steps `port` tells of: reading, hashing, writing, and reading back."""

CANONICAL = "canonical"
FORMATS = (CANONICAL, *FRAMEWORKS)

SUFFIXES = {".pth": "torch", ".pt": "torch", ".msgpack": "flax", ".ckpt": "mindspore", ".pkl": "jittor"}
"""Whose format a file is in; a folder is Orbax's, so Flax's, and a `.safetensors` file can be anyone's."""

SAFETENSORS = {"rbn": CANONICAL, "pt": "torch", "flax": "flax", "ms": "mindspore"}
"""Whose a `.safetensors` file is, by the `format` of its metadata."""

STARTS = (
    (b"PK\x03\x04", "torch"),
    *((b"\x80" + bytes([protocol]), "jittor") for protocol in pickles.PROTOCOLS),
    (b"\xdf", "flax"),
    (b"\xde", "flax"),
    *((bytes([first]), "flax") for first in range(0x81, 0x90)),
    (b"\x0a", "mindspore"),
)
"""How the files of each framework begin: zips, pickles, maps of msgpack, messages of protobuf."""

TORCH_PICKLE = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The number that PyTorch's files begin with that are no zips: a pickle, as Jittor's are."""

IMPOSTORS = {
    b"version https://git-lfs": "a pointer of Git LFS. Fetch the file: git lfs pull",
    b"<!doctype html": "a web page. Download the file itself, which is often behind another link",
    b"<html": "a web page. Download the file itself, which is often behind another link",
    b"\x89hdf": "an HDF5 file, of Keras for example. Load it there, and save NumPy arrays",
}
"""How what is no weights begins, in small letters, and what it is."""

LAYOUTS = {"torch": ("own", "published"), "flax": ("linen", "nnx"), "jittor": ("own", "published")}
"""The forms of a framework's files: the papers' published code has its own, and so have linen and NNX."""

WEIGHTS = {"weight", "bias", *PARAMETERS, *RUNNING_STATISTICS}
"""What layers call the arrays that they compute with."""

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
        untrained: What it has trained and is not in it any more, as the arrays are left out.
        names: What the file calls them, where that is something else.
        left_out: What the file holds beside them.
        notes: What else is to be said of it.
    """

    state: State
    kinds: dict[str, Kind]
    layers: Layers
    network: Network | None = None
    training: Training | None = None
    untrained: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()


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
    key: str | None = None,
    network: str | None = None,
    norm: str | Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    rename: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    zoo_map: str | None = None,
    layout: str | None = None,
    convert: str | Mapping[str, Any] | None = None,
    preserve: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Table:
    r"""Write the weights of one file as another, and read them back to compare them bit for bit.

    Of the frameworks only those whose own formats are read or written are imported, if at all.

    Args:
        source: The file, or the folder of Orbax, to read.
        destination: What to write, in one step; what is there is replaced.
        source_format: One of `FORMATS`; by default told by the content, and where that does not tell by the
            suffix.
        destination_format: The same of the destination, by the suffix; a `.safetensors` file is canonical by
            default.
        key: Where a file holds several networks, under what name the one to port is, as "state_dict_ema".
        network: The network that the arrays must make up, one of `rbn_core.architectures.ARCHITECTURES`; by
            default the one that a canonical file names.
        norm: Its normalization, as `rbn_core.architectures.network` takes it; by default told by the names.
        num_classes: Its number of classes; by default told by the shape of its classifier.
        rename: Regular expressions that match a whole canonical name, each with the new name, in which \1,
            \2, ... stand for their groups; the first one that matches counts.
        kinds: Regular expressions that match the whole dotted path of a layer of the source, each with what
            it is, one of `rbn_core.names.KINDS`. Names and ranks do not tell transposed convolutions, and
            outside of Flax and MindSpore not embeddings.
        zoo_map: A named map from or to the names of a model zoo, one of `rbn_core.zoos.MAPS`.
        layout: One of `LAYOUTS` of the destination's framework; by default the first.
        convert: What the normalizations become on the way, as `norm` says what they are: BatchNorm another
            layer, or an inert one BatchNorm.
        preserve: Whether a converted network must give what it gave: see `rbn_core.conversion`.
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
    content = read(source, reader, kinds, key, trained=writer == CANONICAL)
    if zoo_map is not None and zoo_map.startswith("from-"):
        rename = dict(rename or {}) | zoos.table(zoo_map, content.state)
    content, table = fitted(content, rename, network, norm, num_classes)
    if convert is not None:
        content, table = converted(content, table, convert, preserve)
    elif preserve:
        raise RBNValueError("port: expected --convert where --preserve is given, got none. Give it.")
    if zoo_map is not None and not zoo_map.startswith("from-"):
        content, table = as_in_zoo(content, table, zoo_map)
    content = trained_alone(content)
    if note := told_against_suffix(source, source_format, reader):
        content = replace(content, notes=(note, *content.notes))
    return_memory()
    rows = planned(table, content, reader, writer, layout)
    written = content.state if writer == CANONICAL else own_state(content, writer, layout)
    slots = content.training.slots if writer == CANONICAL and content.training is not None else {}
    trained = {
        f"{weights.TRAINING}{slot}/{name}": array
        for slot, arrays in slots.items()
        for name, array in arrays.items()
    }
    whose = "" if content.network is None else f" of {summary(content.network)}"
    progress(f"hashing the arrays{whose}, to know them when they are read back")
    expected = fingerprints("hashed", written | trained)
    named, left_out, notes = content.names, content.left_out, content.notes
    with placed(destination, writer) as temporary:
        progress(f"writing {destination} ({writer})")
        write(temporary, writer, content, written, layout)
        del content, written, slots, trained  # what is read back takes their place in memory
        return_memory()
        progress(f"reading {destination} back")
        changed = compared(destination, expected, stored_arrays(temporary, writer))
    found = tuple(
        replace(row, detail=f"{row.detail}, stored as {changed[own]}") if own in changed else row
        for row, own in rows
    )
    return Table(in_file(found, named) + left_out, notes)


@contextmanager
def placed(path: Path, framework: str) -> Iterator[Path]:
    """Put a file or a folder in its place in one step, once it is whole: until then the old one stays.

    Args:
        path: Where it goes.
        framework: Whose it is.

    Yields:
        Where to write it, in the same folder.

    Raises:
        RBNError: Nothing can be there.
    """
    if framework != "flax" or path.suffix == ".msgpack":
        with replacing(path) as temporary:
            yield temporary
        return
    format_of(framework).check_new(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def in_file(rows: tuple[Row, ...], names: Mapping[str, str]) -> tuple[Row, ...]:
    """The rows with what the user's file calls the arrays, where that is something else."""
    return tuple(replace(row, source=row.source or names.get(row.name, "")) for row in rows)


def told_format(path: Path, given: str | None, *, writes: bool) -> str:
    """Whose format a file is in.

    Args:
        path: The file.
        given: What the user says, if anything.
        writes: Whether the file is to be written; one to be read must be there.

    Raises:
        RBNError: There is no such file, it is no weights at all, or it cannot be told whose they are.
    """
    option = "--to" if writes else "--from"
    if given is not None:
        check_choice(option, given, FORMATS, "port")
    if not writes:
        if not path.exists():
            raise RBNValueError(
                f"port: expected a file to read, got {path}, which is not there. Check the path."
            )
        check_weights(path)
    if given is not None:
        return given
    if not writes and (told := told_by_content(path)):
        return told
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
    raise RBNValueError(
        f"port: expected a .safetensors file that says whose it is, got {path}. Say it with --from, "
        f"{', '.join(FORMATS)}."
    )


def told_by_content(path: Path) -> str | None:
    """Whose format a file or folder is in, if its first bytes or its files say so."""
    if path.is_dir():
        torch = (path / ".metadata").is_file() or any(path.glob("*.index.json"))
        return "torch" if torch else None
    with os_errors_explained(path), path.open("rb") as file:
        start = file.read(32)
    if start[8:9] == b"{":
        with os_errors_explained(path):
            return SAFETENSORS.get(weights.read_metadata(path).get("format", ""))
    if path.name.endswith(".index.json") or TORCH_PICKLE in start:
        return "torch"
    return next((framework for begins, framework in STARTS if start.startswith(begins)), None)


def told_against_suffix(path: Path, given: str | None, reader: str) -> str:
    """What is to be said where the content of a file is another format's than its suffix."""
    expected = SUFFIXES.get(path.suffix.lower(), reader)
    if given is not None or expected == reader or path.is_dir():
        return ""
    return (
        f"{path.name} is read as {reader}'s, which its content is; --from {expected} reads it as {expected}'s"
    )


def check_weights(path: Path) -> None:
    """Refuse what people have in place of weights.

    Raises:
        RBNValueError: It is such.
    """
    if path.is_dir():
        return
    with os_errors_explained(path), path.open("rb") as file:
        start = file.read(1024).lstrip().lower()
    for begins, what in IMPOSTORS.items():
        if start.startswith(begins):
            raise RBNValueError(f"port: expected weights, got {path}, which is {what}")
    if shard := re.search(r"-(\d{5})-of-(\d{5})\.", path.name):
        number, count = int(shard[1]), int(shard[2])
        if count > 1:
            raise RBNValueError(
                f"port: expected all weights, got {path}, which is part {number} of {count} alone. "
                "Give the .index.json beside the parts, or their folder."
            )


def read(
    path: Path,
    framework: str,
    kinds: Mapping[str, str] | None = None,
    key: str | None = None,
    *,
    trained: bool = False,
) -> Content:
    """What a file holds, under canonical names.

    Args:
        path: The file.
        framework: One of `FORMATS`.
        kinds: Patterns of paths with what the layers are, as `port` takes them.
        key: Under what name the network is in it, as `port` takes it.
        trained: Whether the optimizer beside the network is wanted, too, of a file of PyTorch or Jittor.

    Raises:
        RBNError: The file is damaged or hostile, holds nothing, or a pattern or the key is wrong.
    """
    if framework == CANONICAL:
        if key is not None:
            raise RBNValueError(
                f"port: expected --key with a framework's file, got {path}, a canonical one, which holds one "
                "network. Leave it out."
            )
        with os_errors_explained(path):
            known = weights.read(path)
        state = known.state
        described = (known.network.layers() if known.network else {}) | known.layers
        told = told_kinds(state) | {owner: cast("Kind", layer["kind"]) for owner, layer in described.items()}
        said = said_kinds(kinds, told)
        content = Content(state, told | said, known.layers, known.network, known.training)
        if known.run is not None:
            note = f"where the training run was stays in {path}: rbn train --resume takes that file itself"
            content = replace(content, notes=(note,))
    else:
        beside: dict[str, str] = {}
        reader = format_of(framework)
        stored: Training | None = None
        with os_errors_explained(path):
            if trained and framework in stored_optimizers.SLOTS:
                own, stored = reader.read_trained(path, key, beside.setdefault)
            else:
                own = reader.read(path, key, beside.setdefault)
        said = said_kinds(kinds, from_own(framework, own)[1])
        state, told = from_own(framework, own, said)
        if len(state) < len(own):
            raise RBNValueError(
                f"port: expected arrays whose names differ, got {path}, where {len(own)} names become "
                f"{len(state)}. Say what the layers are with a map's [kinds]."
            )
        names = {name: stored for name, stored in zip(state, own, strict=True) if name != stored}
        left_out = tuple(Row(name, "left out", detail=what) for name, what in beside.items())
        notes = guessed(framework, own, told, said)
        if stored is not None:
            stored, _ = training.renamed(stored, dict(zip(own, state, strict=True)))
        content = Content(state, told, {}, None, stored, names=names, left_out=left_out, notes=notes)
    if not content.state:
        raise RBNValueError(f"port: expected arrays, got none in {path}. Write it again.")
    return content


def guessed(
    framework: str, own: State, told: Mapping[str, Kind], said: Mapping[str, Kind]
) -> tuple[str, ...]:
    """What names and shapes alone have told, and what they have not, in words."""
    notes = []
    norms = [path for path, kind in told.items() if kind == "norm" and path not in said]
    if norms:
        notes.append(f"taken for normalizations, by their statistics or names: {few(norms)}")
    vectors = [
        name
        for name, array in own.items()
        if (name == "weight" or name.endswith(".weight"))
        and array.ndim == 1
        and told.get(name.rpartition(".")[0]) == "other"
    ]
    if vectors:
        notes.append(
            f"kept under their own names, as neither names nor shapes tell what they are of: {few(vectors)}; "
            "a map's [kinds] says which are norm"
        )
    return tuple(notes)


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
    content, table = renamed(content, rename or {})
    if network is not None and (around := beside_backbone(content.state, network)):
        content, table = renamed(content, dict(rename or {}) | around)
    check_finite(content)
    described = content.network
    if network is not None:
        described = description(network, norm, num_classes, content.state)
    if described is None:
        return content, table
    taken, matched = match(content.state, described.state_shapes(), strict=False)
    if matched.faults:
        raise RBNValueError(mismatch(content, described, matched.faults))
    sources = {row.name: row.source for row in table.rows}
    rows = tuple(
        replace(row, status="renamed", source=sources[row.name])
        if row.status == "matched" and sources[row.name]
        else replace(row, detail="is left out" if row.name in content.state else "starts at 0")
        if row.status == "no counterpart"
        else replace(row, source=sources[row.source] or row.source)
        if row.source
        else row
        for row in matched.rows
    ) + tuple(row for row in table.rows if row.status == "left out")
    # A count may lack, and a framework's own way of loading wants it nevertheless.
    state = {name: taken.get(name, np.zeros((), np.int64)) for name in described.state_shapes()}
    layers = described.layers()
    kinds = {path: cast("Kind", layer["kind"]) for path, layer in layers.items()}
    content = trained_alone(content, {row.source or row.name: row.name for row in matched.rows})
    return replace(content, state=state, kinds=kinds, layers=layers, network=described), Table(rows)


def as_in_zoo(content: Content, table: Table, zoo_map: str) -> tuple[Content, Table]:
    """The content under the names of a model zoo, and what every array was called in the file.

    Raises:
        RBNError: The map is unknown, or is of other networks.
    """
    content, found = renamed(content, zoos.table(zoo_map, content.state))
    before = {row.name: row for row in table.rows}
    rows = []
    for row in found.rows:
        old = before.pop(row.source or row.name)
        usual = old.status in ("matched", "renamed")
        rows.append(replace(row, source=old.source or row.source) if usual else replace(old, name=row.name))
    return content, Table((*rows, *before.values()), table.notes)


def converted(
    content: Content, table: Table, norm: str | Mapping[str, Any], preserve: bool
) -> tuple[Content, Table]:
    """The content with other normalizations, and what every array is then.

    Raises:
        RBNError: `norm` is wrong, or asks for stages or places of arrays that are no known network's; nothing
            is there to convert, or something that cannot be.
    """
    described = content.network
    before = norms_of(content)
    if described is not None and described.name in architectures.ARCHITECTURES:
        last = described.nodes[-1]
        classes = last.out_features if isinstance(last, Linear) else 0
        built = architectures.network(described.name, norm, classes)
        after = {node.name: node for node in built.nodes if isinstance(node, Norm)}
        target: Network | None = built
    else:
        layer, options = architectures.layer_of(norm)
        target = described
        after = {path: replace(node, layer=layer, options=options) for path, node in before.items()}
        if target is not None:
            nodes = tuple(after[node.name] if isinstance(node, Norm) else node for node in target.nodes)
            target = replace(target, nodes=nodes)
    if all(node.layer == after[path].layer for path, node in before.items()):
        raise RBNValueError(
            f"port: expected normalizations that {norm!r} changes, got none. Leave --convert out."
        )
    state = conversion.convert_state(content.state, before, after, preserve)
    layers = content.layers | {path: layer_entry(node) for path, node in after.items()}
    old = {row.name: row for row in table.rows}
    rows = []
    for name, array in state.items():
        if name in old and array is content.state.get(name):
            rows.append(old.pop(name))
        else:
            source = old.pop(name, None)
            rows.append(Row(name, "replaced", source.source if source else "", _shown(array)))
    rows += [
        replace(row, status="left out", detail="is part of the new layer")
        if row.name in content.state
        else row
        for row in old.values()
    ]
    return replace(content, state=state, layers=layers, network=target), Table(tuple(rows), table.notes)


def norms_of(content: Content) -> dict[str, Norm]:
    """The normalizations with running statistics, by dotted path."""
    if content.network is not None:
        return {node.name: node for node in content.network.nodes if isinstance(node, Norm)}
    found = {}
    for path, kind in content.kinds.items():
        mean = content.state.get(f"{path}.running_mean" if path else "running_mean")
        if kind == "norm" and mean is not None:
            own = {name for name in architectures.CALIBRATIONS if f"{path}.{name}" in content.state}
            layer = "bnet" if "conv_weight" in own else "rbn" if "center_weight" in own else "iebn"
            found[path] = Norm(path, (), len(mean), layer if own else "bn")
    return found


def layer_entry(node: Norm) -> dict[str, Any]:
    """What is known about a normalization, as `rbn_core.networks.Network.layers` has it."""
    return Network("", (replace(node, inputs=()),)).layers()[node.name]


def beside_backbone(state: State, network: str) -> dict[str, str]:
    """The renaming that takes a detector's backbone out of its arrays, if they are a detector's."""
    first = f"{architectures.network(network).nodes[0].name}.weight"
    inside = f"{published.BACKBONE}{first}"
    if first in state or inside not in state:
        return {}
    return {rf"{re.escape(published.BACKBONE)}(.*)": r"\1", ".*": ""}


def mismatch(content: Content, described: Network, faults: tuple[Row, ...]) -> str:
    """What to say of arrays that are another network's than the user means, and what to do."""
    shapes = {name: np.shape(array) for name, array in content.state.items()}
    table = renaming.suggested(shapes, described.state_shapes())
    calibrated = next(
        (node.layer for node in described.nodes if isinstance(node, Norm) and node.layer != "bn"), ""
    )
    plain = calibrated and not match(content.state, without_calibrations(described), strict=False)[1].faults
    if plain:
        way_out = (
            "The file's normalizations are BatchNorm: leave --norm out, or convert them with "
            f"--convert {calibrated}, and --preserve for the same results."
        )
    elif table:
        way_out = f"Nearly all match with --map FILE and these lines in FILE:\n{renaming.as_toml(table)}\n"
    else:
        way_out = "Name another network, or rename with --map."
    rows = []
    for status, (shown, more) in summed_up(faults).items():
        rows += [replace(row, name=content.names.get(row.name, row.name)) for row in shown]
        rows += [Row(f"{more} more", status)] if more else []
    return (
        f"port: expected the arrays of {summary(described)}, got others. Nothing was written. {way_out}\n"
        f"{Table(tuple(rows))}"
    )


def without_calibrations(described: Network) -> dict[str, tuple[int, ...]]:
    """What the same network with BatchNorm stores."""
    nodes = (
        replace(node, layer="bn", options={}) if isinstance(node, Norm) else node for node in described.nodes
    )
    return replace(described, nodes=tuple(nodes)).state_shapes()


def renamed(content: Content, rename: Mapping[str, str]) -> tuple[Content, Table]:
    """The content under the names of a rename table, and what every array was called.

    Raises:
        RBNValueError: A pattern is wrong, or two arrays, or two layers of different kinds, get one name.
    """
    _, found = match(content.state, {}, rename=rename, strict=False)
    left_out = tuple(row for row in found.rows if row.status == "left out")
    old_names = {row.name: row.source or row.name for row in found.rows if row.status != "left out"}
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
    content = trained_alone(content, new_names)
    state = {new: content.state[old] for new, old in old_names.items()}
    network = None if rename else content.network
    names = {new: content.names[old] for new, old in old_names.items() if old in content.names}
    content = replace(content, state=state, kinds=kinds, layers=layers, network=network, names=names)
    return content, Table((*rows, *left_out))


def trained_alone(content: Content, names: Mapping[str, str] | None = None) -> Content:
    """The content with the training of those arrays alone that stay in it.

    Args:
        content: What a file holds.
        names: What the arrays that stay are called, by what they were called; by default all that are in it.
    """
    if content.training is None:
        return content
    staying = {name: name for name in content.state} if names is None else names
    kept, lost = training.renamed(content.training, staying)
    return replace(content, training=kept, untrained=(*content.untrained, *lost))


def check_finite(content: Content) -> None:
    """Refuse weights with which no network can run.

    Infinity is what masks and observers keep in buffers of their own; a layer's weights and statistics have
    none.

    Raises:
        RBNValueError: An array holds NaN or infinity; all such are named as in the file.
    """
    wrong = []
    with np.errstate(invalid="ignore"):  # half precision is compared as float32, which some NaNs are not
        for name, array in content.state.items():
            path, _, last = name.rpartition(".")
            if array.dtype.kind not in "fV":
                continue
            weight = last in WEIGHTS or content.kinds.get(path, "other") != "other"
            fine = np.isfinite(array) if weight else ~np.isnan(array)
            if not fine.all():
                wrong.append(
                    f"{content.names.get(name, name)} ({fine.size - np.count_nonzero(fine)} of {array.size})"
                )
    if wrong:
        raise RBNValueError(
            f"port: expected finite numbers, got NaN or infinity in {few(wrong)}. "
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
        if not any(name.startswith(f"{classifier}.") for name in state):
            num_classes = 0  # a backbone
        else:
            shape = np.shape(state.get(f"{classifier}.bias", 0))
            num_classes = shape[0] if len(shape) == 1 and shape[0] else None
    told = architectures.told_norm(plain, state) if norm is None else norm
    return architectures.network(name, told, num_classes)


def summary(network: Network) -> str:
    """A network in a few words."""
    norms = Counter(node.layer for node in network.nodes if isinstance(node, Norm))
    counted = " and ".join(f"{count} {layer}" for layer, count in norms.items())
    last = network.nodes[-1]
    classes = f"{last.out_features} classes" if isinstance(last, Linear) else "no classifier"
    return f"{network.name} ({counted}, {classes})"


def told_kinds(state: State) -> dict[str, Kind]:
    """What owns canonical arrays, as far as names and ranks tell it."""
    kinds: dict[str, Kind] = {}
    for full_name, array in state.items():
        path, _, name = full_name.rpartition(".")
        if name in (*PARAMETERS, *RUNNING_STATISTICS):
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


def own_state(content: Content, framework: str, layout: str | None = None) -> State:
    """The arrays under a framework's names and in its layout.

    Counters of batches get the integers of the framework's layers, and are left out where its own BatchNorm,
    or the papers' code in it, has none.

    Raises:
        RBNValueError: Two arrays get one name.
    """
    state = {}
    for name, array in content.state.items():
        if is_left_out(content, name, framework, layout):
            continue
        if name.rpartition(".")[2] == COUNTER and array.dtype.kind in "iu":
            largest = np.iinfo(COUNTERS[framework]).max
            array = np.minimum(array, largest).astype(COUNTERS[framework])
        state[name] = array
    if framework == "flax" and (slashed := [name for name in state if "/" in name]):
        raise RBNValueError(
            f"port: expected names without a slash, as Flax separates its own by it, got {few(slashed)}. "
            "Rename them with --map."
        )
    own = to_own(framework, state, content.kinds)
    if len(own) < len(state):
        raise RBNValueError(
            f"port: expected arrays whose names differ in {framework}, too, got {len(state)}, of which only "
            f"{len(own)} do. Rename some with --map."
        )
    return own


def is_left_out(content: Content, full_name: str, framework: str, layout: str | None) -> bool:
    """Whether an array is the count of a plain BatchNorm, which none but PyTorch's keeps, or the papers'."""
    path, _, name = full_name.rpartition(".")
    if name != COUNTER or framework in (CANONICAL, "torch") or content.kinds.get(path) != "norm":
        return False
    if layout == "published":
        return True
    named = (f"{path}.{calibration}".removeprefix(".") for calibration in architectures.CALIBRATIONS)
    return "layer" not in content.layers.get(path, {}) and not any(name in content.state for name in named)


def planned(
    table: Table, content: Content, reader: str, writer: str, layout: str | None
) -> list[tuple[Row, str]]:
    """Every row as it is once the arrays are written, with the array's name in the file."""
    rows = []
    for row in table.rows:
        path, _, name = row.name.rpartition(".")
        kind = content.kinds.get(path, "other")
        own = row.name if writer == CANONICAL else own_name(writer, path, name, kind)
        if row.name in content.state and row.status != "no counterpart":
            array = content.state[row.name]
            if is_left_out(content, row.name, writer, layout):
                row = replace(row, status="no counterpart", detail=f"BatchNorm counts no batches in {writer}")
            elif (reader == "flax") != (writer == "flax") and to_layout(
                "flax", name, kind, array
            ) is not array:
                row = replace(row, status="transposed")
        rows.append((row, own))
    if content.training is not None:
        detail = training.summary(content.training)
        if writer != CANONICAL:
            detail = f"{detail} stays behind: only a canonical file takes it"
        status: Status = "matched" if writer == CANONICAL else "no counterpart"
        rows.append((Row("training", status, detail=detail), ""))
        rows += [
            (Row(f"training of {name}", "left out", detail="goes with the array"), "")
            for name in content.untrained
        ]
    return rows


def fingerprints(what: str, arrays: State) -> dict[str, Fingerprint]:
    """What tells whether arrays are others; half precision counts as the float32 that it is.

    Args:
        what: What is told to be done to their bytes.
        arrays: The arrays, by name.
    """
    found = {}
    with Meter(what, sum(array.nbytes for array in arrays.values())) as meter:
        for name, array in arrays.items():
            half = array.dtype.itemsize == 2 and array.dtype.kind in "fV"
            flat = np.ravel(array.astype(np.float32) if half else array).view(np.uint8)
            hashed = hashlib.blake2b()
            for start in range(0, len(flat), PIECE):
                hashed.update(flat[start : start + PIECE].data)
                meter(min(PIECE, len(flat) - start) // (2 if half else 1))
            found[name] = Fingerprint(array.dtype.name, array.shape, hashed.digest())
    return found


def compared(path: Path, expected: Mapping[str, Fingerprint], found: State) -> dict[str, str]:
    """Hold what was read back to what was written.

    Returns:
        The names of the arrays whose dtype the format has changed, with the new dtype.

    Raises:
        RBNValueError: Names or numbers differ.
    """
    back = fingerprints("compared", found)
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
        return format_of(framework).read(path)


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
        with missing_explained(framework):
            format_of(framework).write(path, stored, **options)


def format_of(framework: str) -> Any:
    """The module of `rbn.formats` that reads and writes a framework's files.

    Raises:
        RBNValueError: The format needs a package that comes with the framework, and it is not installed.
    """
    with missing_explained(framework):
        return importlib.import_module(f"rbn.formats.{framework}")


@contextmanager
def missing_explained(framework: str) -> Iterator[None]:
    """Turn a failed import into an error of ours.

    Raises:
        RBNValueError: The format needs the framework, and it is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise RBNValueError(
            f"port: expected {framework} for its own format, got none. {missing_message(framework)}"
        ) from error


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
