"""Pickles read as data: arrays, dictionaries and plain values are made, and nothing else ever is.

A pickle is a program for a small stack machine. The one here knows only the instructions by which values are
put together: nothing is imported and nothing called, whatever a file asks for. What it does not know, such as
an `argparse.Namespace` beside the weights, becomes an `Unknown`, which holds its name and is never
constructed. A file that names what runs code, as `os.system`, is refused although nothing would run.
"""

from __future__ import annotations

import pickle
import struct
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from rbn_core.bfloat16 import bfloat16

PROTOCOLS = range(2, 6)

OBJECTS = 10_000
BYTES_PER_OBJECT = 10
"""How many objects a pickle may make: so many, and one more for so many of its bytes; a variable takes 15."""

DTYPES = {
    code: np.dtype(code) for code in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
}
"""The arrays that are made, as NumPy calls what is in them in a pickle."""

STATES = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "weights",
    "params",
    "module",
    "state_dict_ema",
    "model_ema",
)
"""Where a checkpoint that holds more than a network keeps the network, the first that is there first."""

PREFIXES = ("module.", "_orig_mod.")
"""What wrappers for several devices and for compilation put before every name."""


class Array:
    """An array in the making, which is empty until its values come."""

    __slots__ = ("array",)

    def __init__(self, array: NDArray[Any] | None = None) -> None:
        self.array = array


class Name:
    """What a pickle refers to by its module and name, where the machine knows it: never the thing itself."""

    __slots__ = ("means",)
    __match_args__ = ("means",)

    def __init__(self, means: str) -> None:
        self.means = means


class Unknown:
    """What stands for a class, a function or an object that the machine does not know.

    Args:
        name: The dotted name of the class or function.
        arguments: What it would have been made from; nothing if it is the class itself.
        state: Its attributes.
    """

    __slots__ = ("arguments", "name", "state")
    __match_args__ = ("name",)

    def __init__(self, name: str, arguments: Any = None, state: Any = None) -> None:
        self.name, self.arguments, self.state = name, arguments, state


HARMLESS = {
    *(
        "argparse",
        "array",
        "collections",
        "copyreg",
        "dataclasses",
        "datetime",
        "decimal",
        "enum",
        "fractions",
    ),
    *("functools", "ipaddress", "logging", "numbers", "pathlib", "random", "re", "string", "time", "types"),
    *("typing", "uuid", "zoneinfo", "_codecs", "_io", "io"),
}
"""The modules of Python whose classes hold data; any other module of Python can run something."""

PLAIN = {
    *(
        "bool",
        "bytearray",
        "bytes",
        "complex",
        "dict",
        "float",
        "frozenset",
        "int",
        "list",
        "object",
        "range",
    ),
    *("set", "slice", "str", "tuple", "type"),
}
"""The builtins that hold data."""

RUNS = {
    *("eval", "exec", "execfile", "compile", "open", "input", "breakpoint", "apply", "reload", "globals"),
    *("locals", "vars", "getattr", "setattr", "delattr", "system", "popen", "FunctionType", "CodeType"),
    *("LambdaType", "MethodType", "FileIO", "FileLoader", "load_module", "exec_module"),
}
"""Names that run something, or lead to what does, whatever the module."""

MAKERS = {
    *("array._array_reconstructor", "collections.defaultdict", "collections.deque", "copyreg._reconstructor"),
    *("copyreg.__newobj__", "copyreg.__newobj_ex__", "datetime.date", "datetime.datetime", "datetime.time"),
    *("datetime.timedelta", "datetime.timezone", "functools.partial", "logging.getLogger", "re._compile"),
    *("_codecs.encode", "numpy.dtype", "numpy.ndarray", "torch.device"),
}
"""Callables that are called like functions and make data."""


def check_name(name: str) -> None:
    """Refuse what runs code, or leads to what does: no weights need it.

    Args:
        name: The dotted name of a class or function.

    Raises:
        ValueError: It is such.
    """
    root, *rest = name.split(".")
    hostile = any(part in RUNS or (part.startswith("__") and part.endswith("__")) for part in rest)
    if root == "builtins":
        hostile = hostile or (rest[0] not in PLAIN and rest[0].startswith("_"))
    elif root in sys.stdlib_module_names:
        hostile = hostile or root not in HARMLESS
    # A module can be reached through another that imports it, as torch.os.
    stdlib = {
        part for part in rest[:-1] if part in ("os", "sys", "subprocess", "builtins", "importlib", "shutil")
    }
    if (hostile or stdlib) and name not in MAKERS:
        raise ValueError(f"it holds {name[:120]}, which can run code")


def check_call(name: str) -> None:
    """Refuse a pickle that calls a function: objects are made by their classes.

    Raises:
        ValueError: It is the name of neither a class nor one of `MAKERS`.
    """
    root, *rest = name.split(".")
    if name in MAKERS or (root == "builtins" and rest[0] in PLAIN):
        return
    # Classes begin with a capital, and the functions that stand in for them with an underscore.
    private = rest[-1].startswith("_") and root not in sys.stdlib_module_names
    if not private and not any(part.lstrip("_")[:1].isupper() for part in rest):
        raise ValueError(f"it calls {name[:120]}, which is no class")


def said(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, Unknown):
        return value.name
    if isinstance(value, Name):
        return value.means
    if isinstance(value, Array):
        return "an array" if value.array is None else f"an array of shape {value.array.shape}"
    if isinstance(value, bool | int | float | str | None):
        shown = repr(value)
        return shown if len(shown) <= 40 else f"{shown[:40]}..."
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


class Machine:
    """The stack machine that a pickle is a program for, as far as data needs it.

    What it makes is bounded by the length of the program, so that no file takes ten times its size.

    Args:
        program: The pickle, from its first byte to its last, or what begins with it.
        size: How many bytes the file has where it holds more than the pickle.
    """

    NAMES: ClassVar[Mapping[str, Name]] = {
        "collections.OrderedDict": Name("dictionary"),
        "collections.defaultdict": Name("dictionary with a default"),
        "copyreg._reconstructor": Name("object"),
        "builtins.getattr": Name("attribute"),
        "numpy.ndarray": Name("array class"),
        "numpy.dtype": Name("dtype"),
        "_codecs.encode": Name("bytes"),
        "builtins.bytes": Name("no bytes"),
        **{
            f"numpy.{core}.{module}.{name}": Name(means)
            for core in ("core", "_core")
            for module, name, means in (
                ("multiarray", "_reconstruct", "array"),
                ("multiarray", "scalar", "number"),
                ("numeric", "_frombuffer", "buffer"),
            )
        },
    }
    """What is known by a name."""

    def __init__(self, program: Program, size: int = 0) -> None:
        self.program = program
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.limit = OBJECTS + max(len(program), size) // BYTES_PER_OBJECT
        self.objects = 0.0
        self.bytes_left = 2 * len(program)  # protocol 2 has bytes as a text, so that they are copied twice

    def run(self, *, whole: bool = True) -> Any:
        """What the pickle describes.

        Args:
            whole: Whether nothing may follow it.

        Raises:
            ValueError: It is damaged, or asks for what is no data.
        """
        if self.number(1) != pickle.PROTO[0] or self.number(1) not in PROTOCOLS:
            raise ValueError("it is no pickle of the protocols 2 to 5")
        while (code := self.take(1)[0]) != pickle.STOP[0]:
            if code not in INSTRUCTIONS:
                raise ValueError(f"data do not need the instruction {bytes([code])!r}")
            INSTRUCTIONS[code](self)
            if max(len(self.stack), len(self.marks), len(self.memo)) > self.limit:
                raise ValueError("it is longer than its arrays need")
        if whole and self.position != len(self.program):
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
            raise CutError("it is cut off")
        return self.program[start : self.position]

    def number(self, size: int) -> int:
        """The next unsigned number of the program."""
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        """The next line of the program: a module or a name in it."""
        length = bytes(self.program[self.position : self.position + 200]).find(b"\n")
        if length < 0:
            raise CutError("a name has no end")
        return str(self.take(length + 1)[:-1], "utf-8")

    def count(self, objects: float) -> None:
        """Account for objects that take 70 bytes each or less."""
        self.objects += objects
        if self.objects > self.limit:
            raise ValueError("it is longer than its arrays need")

    def push(self, value: Any, objects: float = 1) -> None:
        """Put a new object on the stack."""
        self.count(objects)
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
        self.count(max(0, len(values) - 8) / 8)
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
        """A signed number, after its length."""
        self.push(int.from_bytes(self.take(self.number(1)), "little", signed=True), 2)

    def unpack(self, form: str) -> None:
        """A number in a fixed form."""
        self.push(struct.unpack(form, self.take(struct.calcsize(form)))[0], 0.5)

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
        if type(target) is list:
            target += values
        elif not isinstance(target, Unknown):
            raise ValueError("it appends to what is no list")
        self.stack.append(target)

    def add(self, values: list[Any]) -> None:
        """Add values to the set below them, which is none that is made."""
        target = self.pop()
        if not isinstance(target, Unknown):
            raise ValueError("it adds to what is no set")
        self.stack.append(target)

    def fill(self, values: list[Any]) -> None:
        """Put keys with their values into the dictionary below them."""
        target = self.pop()
        if len(values) % 2 or not isinstance(target, dict | Unknown):
            raise ValueError("it puts into what is no dictionary")
        if isinstance(target, dict):
            self.count(len(values))
            self.put_items(target, zip(values[::2], values[1::2], strict=True))
        self.stack.append(target)

    def put_items(self, target: dict[Any, Any], items: Iterator[tuple[Any, Any]]) -> None:
        """Put items into a dictionary, each once."""
        for key, value in items:
            plain = type(key) in (str, float, bool, type(None)) or (
                type(key) is int and -(2**63) <= key < 2**64
            )
            if not plain:  # others can take forever to compare, and are no names
                self.count(1)
                key = Unknown("a key", key)
            if key in target:
                raise ValueError(f"{str(key)[:60]!r} comes twice")
            target[key] = value

    def name(self, module: Any, name: Any) -> None:
        """What is meant by a name."""
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name is no text")
        # Pickles of protocol 2 have the names that Python 2 had.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        self.push(self.named(f"{module}.{name}"), 1 + len(module) / 70 + len(name) / 70)

    def named(self, full_name: str) -> Name | Unknown:
        """What is meant by a dotted name."""
        if full_name in self.NAMES:
            return self.NAMES[full_name]
        check_name(full_name)
        return Unknown(full_name)

    def reduce(self) -> None:
        """What calls a function in other machines."""
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple:
            raise ValueError("it calls something without arguments")
        if isinstance(function, Unknown):
            check_call(function.name)
            self.push(Unknown(function.name, arguments), 2)
        elif isinstance(function, Name):
            self.push(self.made(function.means, arguments))
        else:
            raise ValueError("it calls what is no class")

    def made(self, means: str, arguments: tuple[Any, ...]) -> Any:
        """What a known function makes of its arguments.

        Raises:
            ValueError: These are others than it takes.
        """
        match means, arguments:
            case ("dictionary", ()) | ("dictionary with a default", () | (_,)):
                return {}
            case "dictionary", ([*pairs],):  # as Python 2 wrote one
                self.count(2 * len(pairs))
                made: dict[Any, Any] = {}
                if any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs):
                    raise ValueError("it puts into what is no dictionary")
                self.put_items(made, ((pair[0], pair[1]) for pair in pairs))
                return made
            case "object", (Unknown(name), *_):
                return Unknown(name, ())
            case "attribute", (Unknown(name), str(attribute)) if attribute.isidentifier():
                return self.named(f"{name}.{attribute}")
            case "array", (Name("array class"), (0,), _):
                return Array()
            case "array", (Unknown(name), _, _):
                return Unknown(name, ())
            case "dtype", (Unknown("ml_dtypes.bfloat16"), False, True):
                return bfloat16()
            case "dtype", (Unknown(name), False, True):
                return Unknown(name, ())
            case "dtype", (str(code), False, True):
                return DTYPES.get(code, Unknown(f"numpy.dtype {code[:20]}", ()))
            case "bytes", (str(text), "latin1"):
                return self.copied(text.encode("latin1"))
            case "no bytes", ():
                return b""
            case "number", (np.dtype() as dtype, bytes(data)):
                return self.array(dtype, (), "C", data)
            case "number", (Unknown(name), _):
                return Unknown(f"a scalar of {name}", ())
            case "buffer", (
                bytes() | memoryview() as data,
                np.dtype() as dtype,
                shape,
                "C" | "F" as order,
            ):
                return self.array(dtype, shape, order, data)
            case _:
                raise ValueError("a value is not put together as Python and NumPy do")

    def new(self, keywords: bool) -> None:
        """What makes an object of a class in other machines."""
        if keywords and type(self.pop()) is not dict:
            raise ValueError("it makes an object of what is none")
        arguments, made_of = self.pop(), self.pop()
        if type(arguments) is not tuple:
            raise ValueError("it calls something without arguments")
        if isinstance(made_of, Unknown):
            self.push(Unknown(made_of.name, arguments), 2)
        elif isinstance(made_of, Name) and made_of.means.startswith("dictionary"):
            self.push({})
        else:
            raise ValueError("it makes an object of what is no class")

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
            case Array(array=None), (1, _, Unknown(), bool(), _):
                self.stack.append(target)  # of texts, dates or objects: it stays empty
            case dict(), dict():  # the attributes of a state dictionary say the version of its layers
                self.stack.append(target)
            case Unknown(), _:
                target.state = state
                self.stack.append(target)
            case _:
                raise ValueError("a value is not put together as Python and NumPy do")

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

    def persistent(self, key: Any) -> Any:
        """What is stored beside the pickle, under a key."""
        raise ValueError("it refers to what is stored elsewhere")


class Program(Protocol):
    """Bytes, of which parts can be taken: a memoryview, or a file that is read part by part."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, part: slice, /) -> memoryview:
        """Some of them."""


class CutError(ValueError):
    """A pickle goes on behind the bytes that are there."""


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
        pickle.SHORT_BINSTRING: lambda m: m.text(1),
        pickle.BINSTRING: lambda m: m.text(4),
        pickle.SHORT_BINUNICODE: lambda m: m.text(1),
        pickle.BINUNICODE: lambda m: m.text(4),
        pickle.BINUNICODE8: lambda m: m.text(8),
        pickle.SHORT_BINBYTES: lambda m: m.binary(1),
        pickle.BINBYTES: lambda m: m.binary(4),
        pickle.BINBYTES8: lambda m: m.binary(8),
        pickle.BYTEARRAY8: lambda m: m.binary(8),
        pickle.POP: lambda m: m.pop(),
        pickle.POP_MARK: lambda m: m.pop_to_mark(),
        pickle.EMPTY_TUPLE: lambda m: m.group(0),
        pickle.TUPLE1: lambda m: m.group(1),
        pickle.TUPLE2: lambda m: m.group(2),
        pickle.TUPLE3: lambda m: m.group(3),
        pickle.MARK: lambda m: m.marks.append(len(m.stack)),
        pickle.TUPLE: lambda m: m.push((*m.pop_to_mark(),)),
        pickle.EMPTY_LIST: lambda m: m.push([]),
        pickle.APPEND: lambda m: m.append([m.pop()]),
        pickle.APPENDS: lambda m: m.append(m.pop_to_mark()),
        pickle.EMPTY_SET: lambda m: m.push(Unknown("set", ())),
        pickle.ADDITEMS: lambda m: m.add(m.pop_to_mark()),
        pickle.FROZENSET: lambda m: m.push(Unknown("frozenset", m.pop_to_mark() and ())),
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
        pickle.NEWOBJ: lambda m: m.new(False),
        pickle.NEWOBJ_EX: lambda m: m.new(True),
        pickle.BUILD: Machine.build,
        pickle.BINPERSID: lambda m: m.stack.append(m.persistent(m.pop())),
    }.items()
}


Note = Callable[[str, str], None]
"""Told of every entry that is left out: its name, and what it is, in words."""


def no_note(name: str, what: str) -> None:
    """Keep what is left out to oneself."""


def chosen(
    loaded: Any, is_array: Callable[[Any], bool], key: str | None = None, note: Note = no_note
) -> dict[str, Any]:
    """The network of what a checkpoint holds: a dictionary with arrays under texts.

    Args:
        loaded: What a `Machine` gives.
        is_array: Tells the arrays of which a network can be.
        key: Under what name the network is, or what its arrays' names begin with; by default the first of
            `STATES` that is there, or the only dictionary with arrays.
        note: Told of everything beside it.

    Returns:
        The arrays, by their names.

    Raises:
        ValueError: There is none, or there are several, or something in it is neither an array nor beside it.
    """
    known: dict[int, int] = {}
    path = ""
    if key is not None and isinstance(loaded, dict):
        found = at(loaded, key)
        if found is None:
            flat = chosen(loaded, is_array)
            under = {name: value for name, value in flat.items() if name.startswith(f"{key}.")}
            if not under:
                there = ", ".join(str(name) for name in loaded if count(loaded[name], is_array, known))
                raise ValueError(f"nothing is called {key!r} in it; there are {there[:300]}")
            for first in dict.fromkeys(name.partition(".")[0] for name in flat if name not in under):
                note(first, "arrays; choose it with --key")
            return {name.removeprefix(f"{key}."): value for name, value in under.items()}
        for name, value in loaded.items():
            if name != key.partition(".")[0] and name != key:
                note(*described(name, value, is_array, known))
        loaded, path = found, f"{key}."
    while isinstance(loaded, dict):
        inner = {name: value for name, value in loaded.items() if count(value, is_array, known)}
        inner = {name: value for name, value in inner.items() if isinstance(value, dict)}
        named = [name for name in STATES if name in inner]
        if not named and (not inner or any(is_array(value) for value in loaded.values())):
            break
        if not named and len(inner) > 1:
            raise ValueError(
                f"it holds several networks: {', '.join(map(str, inner))}; choose one with --key"
            )
        taken = named[0] if named else next(iter(inner))
        for name, value in loaded.items():
            if name != taken:
                note(*described(f"{path}{name}", value, is_array, known))
        loaded, path = inner[taken], f"{path}{taken}."
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds no dictionary but {said(loaded)}")
    state = {}
    for name, value in loaded.items():
        if is_array(value):
            if not isinstance(name, str):
                raise ValueError(f"it holds an array under {said(name)}, which is no name")
            state[name] = value
        elif is_lost(value) or (isinstance(value, list | tuple) and count(value, is_array, known)):
            raise ValueError(f"{str(name)[:60]!r} is no plain array but {said(value)}")
        else:
            note(*described(f"{path}{name}", value, is_array, known))
    if not state:
        raise ValueError("it holds no arrays")
    return state


def at(loaded: Any, key: str) -> Any:
    """What is under a key, or under its dotted parts one in another; nothing if it is not there."""
    if not isinstance(loaded, dict):
        return None
    if key in loaded:
        return loaded[key] if isinstance(loaded[key], dict) else None
    first, _, rest = key.partition(".")
    return at(loaded.get(first), rest) if rest else None


def is_lost(value: Any) -> bool:
    """Whether a value is a tensor or array that cannot be read: to leave it out would lose weights."""
    if isinstance(value, Array):
        return value.array is None
    if not isinstance(value, Unknown) or value.arguments is None:
        return False
    return value.name.startswith(
        ("torch._utils._rebuild", "torch._tensor", "torch.nn.", "torch.Tensor", "jittor")
    )


def described(
    name: Any, value: Any, is_array: Callable[[Any], bool], known: dict[int, int]
) -> tuple[str, str]:
    """An entry that is left out: its name, and what it is."""
    shown = name if isinstance(name, str) else said(name)
    arrays = count(value, is_array, known) if isinstance(value, dict) else 0
    return shown, f"{arrays} arrays; take them with --key {shown}" if arrays else said(value)


DEEPEST = 50
"""How many dictionaries and lists, one in another, are looked into."""


def count(entries: Any, is_array: Callable[[Any], bool], known: dict[int, int], depth: int = 0) -> int:
    """How many arrays under texts a dictionary or list holds, also further inside; looks at each once."""
    if not isinstance(entries, dict | list | tuple) or depth == DEEPEST:
        return 0
    if id(entries) not in known:
        known[id(entries)] = 0
        values = (
            [value for key, value in entries.items() if isinstance(key, str)]
            if isinstance(entries, dict)
            else entries
        )
        known[id(entries)] = sum(
            1 if is_array(value) else count(value, is_array, known, depth + 1) for value in values
        )
    return known[id(entries)]


def without_prefix(
    state: dict[str, Any], prefixes: tuple[str, ...] = PREFIXES, note: Note = no_note
) -> dict[str, Any]:
    """The state without what a wrapper has put before every name."""
    while prefix := next((p for p in prefixes if state and all(name.startswith(p) for name in state)), None):
        note(f"{prefix}*", "what stands before every name")
        state = {name.removeprefix(prefix): array for name, array in state.items()}
    return state
