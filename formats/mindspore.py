"""MindSpore's checkpoint files, read and written without MindSpore.

A `.ckpt` is a protobuf message `Checkpoint` (mindspore/train/checkpoint.proto), of which MindSpore uses this:

    Checkpoint   1: value, repeated
    value        1: tag (the name)   2: tensor
    tensor       1: dims, repeated   2: tensor_type (such as "Float32")   3: tensor_content

An array of more than 512 MiB is several values of the same tag, one after another, and `crc_num` with the
CRC-32 of what is before it may follow. Protobuf itself takes a hundred times the size of a file of empty
values; this reader takes slices of the file, and only what fits its size.
"""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rbn_core import pickles
from rbn_core.bfloat16 import bfloat16
from rbn_core.config import check_choice
from rbn_core.counting import PIECE, Counted, Meter, read_whole, writing
from rbn_core.errors import RBNValueError
from rbn_core.files import replacing
from rbn_core.matching import State
from rbn_core.weights import read_safetensors, write_safetensors

LAYOUTS = ("ckpt", "safetensors")

DTYPES = {
    "Bool": "bool",
    "Int8": "int8",
    "Int16": "int16",
    "Int32": "int32",
    "Int64": "int64",
    "UInt8": "uint8",
    "UInt16": "uint16",
    "UInt32": "uint32",
    "UInt64": "uint64",
    "Float16": "float16",
    "Float32": "float32",
    "Float64": "float64",
    "BFloat16": "bfloat16",
}
"""MindSpore's names of the dtypes that its checkpoints hold, and NumPy's."""

SLICE = 512 * 2**20
"""The bytes of an array that one value holds at most."""

CHECK = b"crc_num"
ENCRYPTED = b"\xd8\x5e\x3a\x7f"

LONE = {"mean": "moving_mean", "variance": "moving_variance"}
"""What a normalization that is no part of a network calls its statistics, and what else they are called."""


class Value(NamedTuple):
    """One tensor, or a slice of it."""

    name: str
    dims: list[int]
    kind: str
    content: memoryview


def read(path: str | PathLike[str], key: str | None = None, note: pickles.Note = pickles.no_note) -> State:
    """The arrays of a checkpoint, under MindSpore's names; texts beside them are left out.

    Args:
        path: A `.ckpt` or a safetensors file; the content tells which.
        key: What the names of the network begin with, without the dot, where there are several.
        note: Told of everything that is left out.

    Raises:
        RBNValueError: The file is no whole checkpoint, is encrypted, or holds what NumPy has no array for.
    """
    try:
        with open(path, "rb") as file:
            safetensors = file.read(9)[8:] == b"{" or Path(path).suffix == ".safetensors"
        state = read_safetensors(path)[0] if safetensors else _read(read_whole(path))
        return _renamed(_chosen(state, key, note), LONE)
    except _DamagedError as error:
        raise RBNValueError(
            f"RBN: expected a MindSpore checkpoint, got {path} ({error}). "
            "Write it with mindspore.save_checkpoint."
        ) from error


def write(path: str | PathLike[str], stored: State, layout: str | None = None) -> None:
    """Write arrays as a checkpoint, in one step.

    Args:
        path: Where; a file that is there is replaced when the new one is whole. MindSpore reads a `.ckpt`
            only under a name that ends so.
        stored: The arrays, under MindSpore's names.
        layout: "ckpt" or "safetensors"; by default as `path` ends.

    Raises:
        RBNError: The layout is unknown, or an array is of a dtype, or in a `.ckpt` of an extent 0, that
            MindSpore does not store.
    """
    if layout is None:
        layout = "safetensors" if Path(path).suffix == ".safetensors" else "ckpt"
    check_choice("layout", layout, LAYOUTS, "write")
    stored = _renamed(stored, {own: lone for lone, own in LONE.items()})
    arrays = {name: _storable(name, np.asarray(value), layout) for name, value in stored.items()}
    with replacing(path) as temporary:
        if layout == "safetensors":
            write_safetensors(temporary, arrays, {"format": "ms"})
        else:
            with writing(temporary, sum(array.nbytes for array in arrays.values())) as file:
                for name, array in arrays.items():
                    _write(file, name, array)


def _chosen(state: State, key: str | None, note: pickles.Note) -> State:
    """The arrays of the network that is asked for."""
    if key is None:
        return state
    try:
        return pickles.chosen(state, lambda value: isinstance(value, np.ndarray), key, note)
    except ValueError as error:
        raise _DamagedError(str(error)) from None


class _DamagedError(Exception):
    """What is wrong with a file."""


def _read(data: memoryview) -> State:
    """The arrays of a `.ckpt`."""
    if len(data) == 0:
        raise _DamagedError("it is empty")
    if data[:4] == ENCRYPTED:
        raise _DamagedError("it is encrypted: load it with its key, and save it without")
    end = len(data) - len(CHECK) - 10
    if end > 0 and data[end : end + len(CHECK)] == CHECK:
        if _sum(data[:end]) != int.from_bytes(data[end + len(CHECK) :], "big"):
            raise _DamagedError("its checksum is that of other data")
        data = data[:end]
    arrays: State = {}
    texts = set()
    with Meter("unpacked", len(data)) as meter:
        for name, slices in itertools.groupby(_values(data), key=lambda value: value.name):
            if name in arrays or name in texts:
                raise _DamagedError(f"{name!r} comes twice")
            array = _array(slices)
            if array is None:
                texts.add(name)
            else:
                arrays[name] = array
                meter(array.nbytes)
    return arrays


def _sum(data: memoryview) -> int:
    """The CRC-32 of some bytes."""
    found = 0
    with Meter("checked", len(data)) as meter:
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            found = zlib.crc32(piece, found)
            meter(len(piece))
    return found


def _values(data: memoryview) -> Iterator[Value]:
    """What a checkpoint lists."""
    for number, value in _fields(data):
        if number != 1:
            raise _DamagedError(f"a checkpoint has no field {number}")
        fields = _message(value, ("tag", "tensor"))
        tensor = _message(_one(fields, "tensor"), ("dims", "tensor_type", "tensor_content"))
        try:
            name, kind = str(_one(fields, "tag"), "utf-8"), str(_one(tensor, "tensor_type"), "utf-8")
        except UnicodeDecodeError:
            raise _DamagedError("a name is no text") from None
        yield Value(name, tensor["dims"], kind, _one(tensor, "tensor_content"))


def _array(slices: Iterator[Value]) -> NDArray[Any] | None:
    """A tensor, of which each value holds a part, as an array of its own; nothing for a text."""
    name, dims, kind, content = next(slices)
    if kind not in (*DTYPES, "str"):
        raise _DamagedError(f"{name!r} is of type {kind[:20]!r}, not one of {', '.join(DTYPES)}")
    whole = bytearray(content)
    for more in slices:
        if (more.dims, more.kind) != (dims, kind):
            raise _DamagedError(f"{name!r} comes twice")
        whole += more.content
    if kind == "str":
        return None
    dtype = _dtype(kind)
    shape = () if dims == [0] and whole else tuple(dims)  # a scalar has no dims, or the one 0
    proper = len(shape) <= 32 and all(isinstance(extent, int) and extent < 2**63 for extent in shape)
    if not proper or math.prod(shape) * dtype.itemsize != len(whole):
        raise _DamagedError(f"{name!r} has {len(whole)} bytes, which are no {kind} of shape {shape[:32]}")
    if dtype == np.bool_ and whole.translate(None, b"\0\1"):
        raise _DamagedError(f"{name!r} holds what is neither true nor false")
    try:
        array = np.frombuffer(whole, dtype).reshape(shape)  # of a copy already
    except ValueError as error:  # no values, and an extent that NumPy cannot count
        raise _DamagedError(f"{name!r} has no proper shape: {error}") from None
    # What a view keeps alive weighs more than a few numbers.
    return array.copy() if array.nbytes < 1024 else array


@functools.cache
def _dtype(kind: str) -> np.dtype[Any]:
    """NumPy's dtype of MindSpore's name, as it lies in the file."""
    return bfloat16() if kind == "BFloat16" else np.dtype(DTYPES[kind]).newbyteorder("<")


def _message(data: Any, names: tuple[str, ...]) -> dict[str, list[Any]]:
    """The fields of a message, which are numbered from 1 in the order of `names`."""
    if isinstance(data, int):
        raise _DamagedError("a number stands for a message")
    fields: dict[str, list[Any]] = {name: [] for name in names}
    for number, value in _fields(data):
        if not 1 <= number <= len(names):
            raise _DamagedError(f"beside {', '.join(names)} there is a field {number}")
        fields[names[number - 1]].append(value)
    return fields


def _one(fields: dict[str, list[Any]], name: str) -> memoryview:
    """A field that comes once and holds bytes."""
    values = fields[name]
    if len(values) != 1 or isinstance(values[0], int):
        raise _DamagedError(f"there is a {name} missing, too many or of the wrong kind")
    return values[0]


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protobuf message: numbers, and views of bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value, at = _varint(data, at)
        if key & 7 == 0:
            yield key >> 3, value
        elif key & 7 == 2 and value <= len(data) - at:
            yield key >> 3, data[at : at + value]
            at += value
        else:
            raise _DamagedError("it ends early, or is something else")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number, seven bits a byte from the lowest on, and where the next begins."""
    number = 0
    for place, byte in enumerate(data[at : at + 10]):
        number |= (byte & 127) << 7 * place
        if byte < 128:
            return number, at + place + 1
    raise _DamagedError("it ends early, or is something else")


def _storable(name: str, array: NDArray[Any], layout: str) -> NDArray[Any]:
    """The array in a dtype of MindSpore's, in the order of C."""
    if array.dtype.name not in DTYPES.values() or (layout == "ckpt" and array.size == 0):
        raise RBNValueError(
            f"RBN: expected arrays of {', '.join(DTYPES)}, in a .ckpt with at least one value, got {name} of "
            f"{array.dtype} and shape {array.shape}. Convert it, or leave it out."
        )
    return np.asarray(array, array.dtype.newbyteorder("="), "C")


def _write(file: Counted, name: str, array: NDArray[Any]) -> None:
    """Append an array's values."""
    kind = next(kind for kind, name in DTYPES.items() if name == array.dtype.name)
    content = array.reshape(-1).view(np.uint8)
    tag = _field(1, name.encode())
    described = b"".join(b"\x08" + _number(extent) for extent in array.shape) + _field(2, kind.encode())
    for start in range(0, len(content), SLICE):
        part = content[start : start + SLICE]
        tensor = described + b"\x1a" + _number(len(part))
        length = len(tensor) + len(part)
        value = tag + b"\x12" + _number(length) + tensor
        file.write(b"\x0a" + _number(len(value) + len(part)) + value)
        file.write(part.data)


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field of bytes."""
    return bytes([number << 3 | 2]) + _number(len(content)) + content


def _number(value: int) -> bytes:
    """A protobuf varint."""
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _renamed(stored: State, names: dict[str, str]) -> State:
    """A lone normalization's statistics under other names; anything else as it is."""
    if not names.keys() <= stored.keys() or not {"gamma", "conv.weight"} & stored.keys():
        return stored
    return {names.get(name, name): value for name, value in stored.items()}
