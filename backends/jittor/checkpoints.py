"""Jittor's checkpoints, `.pkl`: read and written without Jittor, and read without running what is in them.

`jittor.save` and `Module.save` write a pickle, its SHA-1 sum and a mark. A pickle is a program for a small
stack machine. The one here knows only the instructions by which NumPy arrays, and Jittor's variables around
them, are put into dictionaries: nothing is imported and nothing called, whatever a file asks for.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Callable, Mapping
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from rbn_core.bfloat16 import bfloat16
from rbn_core.config import check_choice
from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.files import replacing
from rbn_core.matching import COUNTER, State

LAYOUTS = ("pkl",)

MARK = b"HCAJSLHD"
CHECKSUM = 20
"""How many bytes the sum before the mark has."""

PROTOCOLS = range(2, 6)
WRAPPERS = ("state_dict", "model")
"""Under what a file's dictionary may hold that of the arrays."""

OBJECTS = 10_000
BYTES_PER_OBJECT = 10
"""How many objects a pickle may make: so many, and one more for so many of its bytes; a variable takes 15."""

DTYPES = {
    code: np.dtype(code) for code in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
}
"""What Jittor's variables can be, as NumPy calls it in a pickle."""


def read(path: str | PathLike[str]) -> State:
    """The arrays of a checkpoint, under Jittor's names; numbers and texts beside them are left out.

    Jittor stores a bfloat16 variable as one of uint16, which comes as bfloat16 here.

    Args:
        path: What `jittor.save` or `Module.save` has written, or any pickle of a dictionary of arrays.

    Raises:
        RBNValueError: The file is not there, is damaged, or holds anything else.
    """
    if not Path(path).is_file():
        raise RBNValueError(
            f"RBN: expected a Jittor checkpoint, got {path}, which is no file. Check the path."
        )
    try:
        return _named_arrays(Machine(_pickle(Path(path).read_bytes())).run())
    except (ValueError, OverflowError) as error:
        raise RBNValueError(
            f"RBN: expected a Jittor checkpoint, got {path} ({error}). "
            "Write it with jittor.save or Module.save."
        ) from error


def write(path: str | PathLike[str], stored: Mapping[str, Any], layout: str | None = None) -> None:
    """Write arrays as a checkpoint, in one step.

    Args:
        path: Where; a file that is there is replaced when the new one is whole.
        stored: The arrays, under Jittor's names. bfloat16 becomes float32, as no pickle that Jittor reads has
            it, and a number an array of one, as Jittor has no 0-dimensional variables.
        layout: "pkl", which is the only one.

    Raises:
        RBNError: The layout is unknown, or an array is of a dtype that Jittor does not have.
    """
    check_choice("layout", layout or "pkl", LAYOUTS, "write")
    arrays = {name: np.atleast_1d(np.asarray(value)) for name, value in stored.items()}
    for name, array in arrays.items():
        dtype = np.dtype(np.float32) if array.dtype.name == "bfloat16" else array.dtype.newbyteorder("=")
        arrays[name] = array.astype(dtype, copy=False)
    if wrong := [
        f"{name} of {array.dtype}" for name, array in arrays.items() if array.dtype not in DTYPES.values()
    ]:
        raise RBNTypeError(
            f"RBN: expected arrays of {', '.join(map(str, DTYPES.values()))}, got {', '.join(wrong)}. "
            "Convert them first."
        )
    with replacing(path) as temporary, open(temporary, "wb") as file:
        summed = _Summed(file)
        pickle.Pickler(summed, 4).dump(arrays)
        file.write(summed.sum.digest() + MARK)


class _Summed:
    """A file whose sum is taken as it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sum = hashlib.sha1(usedforsecurity=False)

    def write(self, data: bytes) -> int:
        """Write some bytes."""
        self.sum.update(data)
        return self.file.write(data)


def _pickle(data: bytes) -> memoryview:
    """The pickle of a file: what is before Jittor's sum and mark, if there are any."""
    view = memoryview(data)
    if not data.endswith(MARK):
        return view
    end = max(0, len(data) - len(MARK) - CHECKSUM)
    if hashlib.sha1(view[:end], usedforsecurity=False).digest() != data[end : -len(MARK)]:
        raise ValueError("its checksum is that of other data")
    return view[:end]


def _named_arrays(loaded: Any) -> State:
    """The arrays of what a file holds."""
    for wrapper in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict):
        raise ValueError("it holds no dictionary")
    arrays = {
        name: value.array
        for name, value in loaded.items()
        if isinstance(name, str) and isinstance(value, Array) and value.array is not None
    }
    if not arrays:
        raise ValueError("it holds no arrays")
    return {
        name: array.reshape(()) if name.rpartition(".")[2] == COUNTER and array.size == 1 else array
        for name, array in arrays.items()
    }


class Array:
    """An array in the making, which is empty until its values come."""

    __slots__ = ("array",)

    def __init__(self, array: NDArray[Any] | None = None) -> None:
        self.array = array


class Name:
    """What a pickle refers to by its module and name: never the thing itself."""

    __match_args__ = ("means",)

    def __init__(self, means: str) -> None:
        self.means = means


NAMES = {
    ("jittor", "jittor_core.Var"): Name("variable"),
    ("jittor", "Var"): Name("variable"),
    ("collections", "OrderedDict"): Name("dictionary"),
    ("numpy", "ndarray"): Name("array class"),
    ("numpy", "dtype"): Name("dtype"),
    ("ml_dtypes", "bfloat16"): Name("bfloat16"),
    ("_codecs", "encode"): Name("bytes"),
    ("__builtin__", "bytes"): Name("no bytes"),
    **{
        (f"numpy.{core}.{module}", name): Name(means)
        for core in ("core", "_core")
        for module, name, means in (
            ("multiarray", "_reconstruct", "array"),
            ("multiarray", "scalar", "number"),
            ("numeric", "_frombuffer", "buffer"),
        )
    },
}
"""All that a pickle may refer to."""


class Machine:
    """The stack machine that a pickle is a program for, as far as dictionaries of arrays need it.

    What it makes is bounded by the length of the program, so that no file takes ten times its size.

    Args:
        program: The pickle, from its first byte to its last.
    """

    def __init__(self, program: memoryview) -> None:
        self.program = program
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.limit = OBJECTS + len(program) // BYTES_PER_OBJECT
        self.objects = 0
        self.bytes_left = 2 * len(program)  # protocol 2 has bytes as a text, so that they are copied twice

    def run(self) -> Any:
        """What the pickle describes.

        Raises:
            ValueError: It is damaged, or describes anything but dictionaries of arrays.
        """
        if self.number(1) != pickle.PROTO[0] or self.number(1) not in PROTOCOLS:
            raise ValueError("it is no pickle of the protocols 2 to 5")
        while (code := self.take(1)[0]) != pickle.STOP[0]:
            if code not in INSTRUCTIONS:
                raise ValueError(f"arrays do not need the instruction {bytes([code])!r}")
            INSTRUCTIONS[code](self)
            if max(len(self.stack), len(self.marks), len(self.memo)) > self.limit:
                raise ValueError("it is longer than its arrays need")
        if self.position != len(self.program):
            raise ValueError("it goes on after its end")
        result = self.pop()
        if self.stack or self.marks:
            raise ValueError("it ends too early")
        return result

    def take(self, count: int) -> memoryview:
        """The next bytes of the program."""
        start = self.position
        self.position += count
        if self.position > len(self.program):
            raise ValueError("it is cut off")
        return self.program[start : self.position]

    def number(self, size: int) -> int:
        """The next unsigned number of the program."""
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        """The next line of the program: a module or a name in it."""
        length = bytes(self.program[self.position : self.position + 100]).find(b"\n")
        if length < 0:
            raise ValueError("a name has no end")
        return str(self.take(length + 1)[:-1], "utf-8")

    def count(self, objects: int) -> None:
        """Account for objects that take 70 bytes each or less."""
        self.objects += objects
        if self.objects > self.limit:
            raise ValueError("it is longer than its arrays need")

    def push(self, value: Any) -> None:
        """Put a new object on the stack."""
        self.count(1)
        self.stack.append(value)

    def pop(self) -> Any:
        """Take the uppermost value from the stack, but none from below the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("an instruction lacks its values")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """Take what is above the last mark from the stack."""
        if not self.marks:
            raise ValueError("an instruction lacks its mark")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        self.count(max(0, len(values) - 8) // 4)
        return values

    def text(self, size: int) -> None:
        """A text, after so many bytes with its length."""
        text = str(self.take(self.number(size)), "utf-8")
        self.count(0 if text.isascii() else 1)  # others take up to four bytes for each character
        self.push(text)

    def binary(self, size: int) -> None:
        """Bytes, after so many with their length: a long array's are not copied yet."""
        taken = self.take(self.number(size))
        self.push(taken if len(taken) > 200 else bytes(taken))

    def integer(self) -> None:
        """A signed number of up to 64 bits, after its length."""
        size = self.number(1)
        if size > 8:
            raise ValueError("a number has more than 64 bits")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def unpack(self, form: str) -> None:
        """A number in a fixed form."""
        self.push(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def group(self, size: int) -> None:
        """A tuple of the uppermost values."""
        self.push((*[self.pop() for _ in range(size)][::-1],))

    def put(self, index: int) -> None:
        """Note the uppermost value; picklers count their notes."""
        if index != len(self.memo):
            raise ValueError("its notes are out of order")
        self.memo.append(self.pop())
        self.stack.append(self.memo[-1])

    def get(self, index: int) -> None:
        """Put a noted value on the stack."""
        if index >= len(self.memo):
            raise ValueError("it refers to what has not come")
        self.stack.append(self.memo[index])

    def append(self, values: list[Any]) -> None:
        """Append values to the list below them."""
        target = self.pop()
        if type(target) is not list:
            raise ValueError("it appends to what is no list")
        target += values
        self.stack.append(target)

    def fill(self, values: list[Any]) -> None:
        """Put keys with their values into the dictionary below them."""
        target = self.pop()
        if type(target) is not dict or len(values) % 2:
            raise ValueError("it puts into what is no dictionary")
        self.count(len(values))
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):  # other keys can take forever to compare
                raise ValueError("a key is neither a text nor a number")
            if key in target:
                raise ValueError(f"{str(key)[:60]!r} comes twice")
            target[key] = value
        self.stack.append(target)

    def name(self, module: Any, name: Any) -> None:
        """What is allowed to be meant by a name."""
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name is no text")
        if (module, name) not in NAMES:
            raise ValueError(f"it asks for {f'{module}.{name}'[:120]!r}, which is no array's")
        self.push(NAMES[module, name])

    def reduce(self) -> None:
        """What calls a function in other machines."""
        arguments, function = self.pop(), self.pop()
        match function, arguments:
            case Name("dictionary"), ():
                made: Any = {}
            case Name("array"), (Name("array class"), (0,), _):
                made = Array()
            case Name("dtype"), (str(code), False, True) if code in DTYPES:
                made = DTYPES[code]
            case Name("dtype"), (Name("bfloat16"), False, True):
                made = bfloat16()
            case Name("bytes"), (str(text), "latin1"):
                made = self.copied(text.encode("latin1"))
            case Name("no bytes"), ():
                made = b""
            case Name("number"), (np.dtype() as dtype, bytes(data)):
                made = self.array(dtype, (), "C", data)
            case Name("buffer"), (
                bytes() | memoryview() as data,
                np.dtype() as dtype,
                shape,
                "C" | "F" as order,
            ):
                made = self.array(dtype, shape, order, data)
            case Name("variable"), (Array(array=np.ndarray() as array),):
                made = Array(array.view(bfloat16()) if array.dtype == np.uint16 else array)
            case _:
                raise ValueError("a value is not put together as Jittor and NumPy do")
        self.push(made)

    def build(self) -> None:
        """What sets an object's attributes in other machines."""
        state, target = self.pop(), self.pop()
        match target, state:
            case np.dtype(), (3, "<" | ">" | "|" | "=" as order, None, None, None, int(), int(), int()):
                self.stack.append(target.newbyteorder(order))
            case Array(array=None), (
                1,
                shape,
                np.dtype() as dtype,
                bool(fortran),
                bytes() | memoryview() as data,
            ):
                target.array = self.array(dtype, shape, "F" if fortran else "C", data).array
                self.stack.append(target)
            case _:
                raise ValueError("a value is not put together as Jittor and NumPy do")

    def array(self, dtype: np.dtype[Any], shape: Any, order: Any, data: bytes | memoryview) -> Array:
        """An array with a copy of the bytes, in this machine's own order."""
        if type(shape) is not tuple or not all(type(extent) is int and extent >= 0 for extent in shape):
            raise ValueError("an array's shape is none")
        if prod(shape) * dtype.itemsize != len(data):
            raise ValueError("an array's values are not as many as its shape says")
        self.count(3)
        flat = np.frombuffer(self.copied(data), dtype)
        return Array(flat.reshape(shape, order=order).astype(dtype.newbyteorder("="), order="C"))

    def copied(self, data: Any) -> Any:
        """Bytes that are copied, once they are accounted for."""
        self.bytes_left -= len(data)
        if self.bytes_left < 0:
            raise ValueError("it has more values than bytes")
        return data


INSTRUCTIONS: dict[int, Callable[[Machine], Any]] = {
    code[0]: instruction
    for code, instruction in {
        pickle.FRAME: lambda m: m.take(8),
        pickle.NONE: lambda m: m.stack.append(None),
        pickle.NEWTRUE: lambda m: m.stack.append(True),
        pickle.NEWFALSE: lambda m: m.stack.append(False),
        pickle.BININT1: lambda m: m.stack.append(m.number(1)),
        pickle.BININT2: lambda m: m.unpack("<H"),
        pickle.BININT: lambda m: m.unpack("<i"),
        pickle.LONG1: Machine.integer,
        pickle.BINFLOAT: lambda m: m.unpack(">d"),
        pickle.SHORT_BINUNICODE: lambda m: m.text(1),
        pickle.BINUNICODE: lambda m: m.text(4),
        pickle.BINUNICODE8: lambda m: m.text(8),
        pickle.SHORT_BINBYTES: lambda m: m.binary(1),
        pickle.BINBYTES: lambda m: m.binary(4),
        pickle.BINBYTES8: lambda m: m.binary(8),
        pickle.BYTEARRAY8: lambda m: m.binary(8),
        pickle.EMPTY_TUPLE: lambda m: m.group(0),
        pickle.TUPLE1: lambda m: m.group(1),
        pickle.TUPLE2: lambda m: m.group(2),
        pickle.TUPLE3: lambda m: m.group(3),
        pickle.MARK: lambda m: m.marks.append(len(m.stack)),
        pickle.TUPLE: lambda m: m.push((*m.pop_to_mark(),)),
        pickle.EMPTY_LIST: lambda m: m.push([]),
        pickle.APPEND: lambda m: m.append([m.pop()]),
        pickle.APPENDS: lambda m: m.append(m.pop_to_mark()),
        pickle.EMPTY_DICT: lambda m: m.push({}),
        pickle.SETITEM: lambda m: m.fill([m.pop(), m.pop()][::-1]),
        pickle.SETITEMS: lambda m: m.fill(m.pop_to_mark()),
        pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
        pickle.BINPUT: lambda m: m.put(m.number(1)),
        pickle.LONG_BINPUT: lambda m: m.put(m.number(4)),
        pickle.BINGET: lambda m: m.get(m.number(1)),
        pickle.LONG_BINGET: lambda m: m.get(m.number(4)),
        pickle.GLOBAL: lambda m: m.name(m.line(), m.line()),
        pickle.STACK_GLOBAL: lambda m: m.name(*[m.pop(), m.pop()][::-1]),
        pickle.REDUCE: Machine.reduce,
        pickle.BUILD: Machine.build,
    }.items()
}
