"""Flax's own files: msgpack, and Orbax folders, of linen variables and of NNX states."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes  # noqa: F401  (NumPy then knows bfloat16 by name)
import msgpack  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from rbn_core import pickles
from rbn_core.config import check_choice
from rbn_core.counting import Counted, Meter, read_whole, writing
from rbn_core.errors import RBNValueError
from rbn_core.files import replacing
from rbn_core.matching import State
from rbn_core.weights import DTYPES

Layout = Literal["linen", "nnx"]

SUFFIX = ".msgpack"
MOST_AXES = 32
"""Of an array in every NumPy."""
TRAINING = ("opt_state", "step")
"""What `flax.training.train_state.TrainState` holds beside the variables."""

BATCH_STATS = ("mean", "var", "num_batches_tracked")

Names = tuple[str, ...]
Arrays = dict[Names, NDArray[Any]]


def read(path: str | os.PathLike[str], key: str | None = None, note: pickles.Note = pickles.no_note) -> State:
    """The arrays of a msgpack file or an Orbax folder, under names such as "params/conv1/kernel".

    Linen variables have their collection in front. The state of an NNX module has none: its `mean`, `var` and
    `num_batches_tracked` are then in "batch_stats", all else is in "params". An optimizer's state and a step
    meter beside `params` are left out. No code is run, nothing but this file or folder is read, and arrays
    that would take far more memory than it are refused.

    Args:
        path: The file or folder.
        key: The branch that holds the network, such as "ema" or "model/ema", where there are several.
        note: Told of everything that is left out.

    Raises:
        RBNValueError: There is no such file, or it is damaged or no checkpoint.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _named(_read_orbax(path), key, note)
        if not path.is_file():
            raise ValueError("which is not there")
        return _named(_read_msgpack(path), key, note)
    except Exception as error:  # tensorstore has no class of errors of its own
        reason = str(error).partition("\n")[0][:300] or type(error).__name__
        raise RBNValueError(
            f"RBN: expected a whole checkpoint of Flax, a msgpack file or an Orbax folder, got {path} "
            f"({reason}). Save it again."
        ) from error


def write(path: str | os.PathLike[str], stored: Mapping[str, Any], layout: Layout = "linen") -> None:
    """Write arrays as a checkpoint of Flax, in one step.

    Args:
        path: A name that ends in ".msgpack" for such a file, which is replaced if it is there; any other for
            an Orbax folder, which must not be there, as a folder cannot be replaced in one step.
        stored: Arrays under names such as "params/conv1/kernel".
        layout: "linen" for variables with their collections, "nnx" for the pure dictionary of a state
            without.

    Raises:
        RBNValueError: The layout is unknown, two arrays would get one place, or the folder is there already.
    """
    check_choice("layout", layout, ("linen", "nnx"), "write")
    path = Path(path)
    nested = _nested(stored, layout)
    if path.suffix == SUFFIX:
        total = sum(array.nbytes for _, array in _leaves(nested))
        with replacing(path) as temporary, writing(temporary, total) as file:
            _write_msgpack(file, nested)
    else:
        _write_orbax(path, nested)


def _named(arrays: Arrays, key: str | None, note: pickles.Note) -> State:
    """Arrays under their own names."""
    if key is not None:
        branch = tuple(key.split("/"))
        beside = Counter(names[0] for names in arrays if names[: len(branch)] != branch)
        arrays = {
            names[len(branch) :]: array
            for names, array in arrays.items()
            if names[: len(branch)] == branch and len(names) > len(branch)
        }
        if not arrays:
            raise ValueError(f"without a branch {key!r}, but with {', '.join(beside)}")
        for name, count in beside.items():
            note(name, f"{count} arrays")
    if not arrays:
        raise ValueError("without any array")
    for names in arrays:
        if any("/" in name for name in names):
            raise ValueError(f"with a slash in the name {names}")
    if any(names[0] == "params" for names in arrays):
        for name, count in Counter(names[0] for names in arrays).items():
            if name in TRAINING:
                note(name, f"{count} arrays of the training")
        return {
            "/".join(names): array
            for names, array in arrays.items()
            if len(names) > 1 and names[0] not in TRAINING
        }
    state: State = {}
    for names, array in arrays.items():
        if len(names) > 1 and names[-1] == "value":  # a state whose variables are not taken out
            names = names[:-1]
        if "rngs" in names[:-1] and names[-1] in ("count", "key"):
            continue  # of dropout
        own = "/".join(("batch_stats" if names[-1] in BATCH_STATS else "params", *names))
        if own in state:
            raise ValueError(f"with {own} twice")
        state[own] = array
    return state


def _nested(stored: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The tree that a checkpoint holds."""
    leaves: dict[Names, Any] = {}
    for name, array in stored.items():
        names = tuple(name.split("/"))[0 if layout == "linen" else 1 :]
        if not names or names in leaves:
            raise RBNValueError(
                f"RBN: expected names that differ behind their collections, got {name!r}. Rename the array, "
                "or write the linen layout."
            )
        leaves[names] = np.asarray(array)
    if inner := [names for names in leaves for i in range(1, len(names)) if names[:i] in leaves]:
        raise RBNValueError(
            f"RBN: expected no array to be a folder of others, got {'/'.join(inner[0])!r}. Rename one."
        )
    tree: dict[str, Any] = {}
    for names, array in leaves.items():
        branch = tree
        for name in names[:-1]:
            branch = branch.setdefault(name, {})
        branch[names[-1]] = array
    return tree


def _leaves(tree: Any, names: Names = ()) -> Iterator[tuple[Names, Any]]:
    """Every array of a tree with its names."""
    if not isinstance(tree, dict):
        yield names, tree
        return
    for name, inner in tree.items():
        yield from _leaves(inner, (*names, name))


# msgpack

DEEPEST = 100
"""How many levels of names there may be."""

FEW = 10_000
"""So many names there may be in any file, and one for 50 bytes of it: a name takes much more memory."""

LENGTHS: dict[str, dict[int, int]] = {
    "map": {0xDE: 2, 0xDF: 4},
    "list": {0xDC: 2, 0xDD: 4},
    "text": {0xD9: 1, 0xDA: 2, 0xDB: 4, 0xC4: 1, 0xC5: 2, 0xC6: 4},
    "extension": {0xC7: 1, 0xC8: 2, 0xC9: 4},
}
"""How many bytes of length follow the byte of a type."""

VALUES: dict[str, dict[int, int]] = {
    "extension": {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16},
    "nothing": {0xC0: 0, 0xC2: 0, 0xC3: 0},
    "float": {0xCA: 4, 0xCB: 8},
    "number": {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8},
}
"""How many bytes of value do."""

CHUNKED = "__msgpack_chunked_array__"
LARGEST = 1 << 30
"""Flax writes an array of more bytes in parts, which is marked so."""

ARRAYS = (1, 3)
"""The extensions that hold arrays, and scalars of NumPy."""


def _read_msgpack(path: Path) -> Arrays:
    """The arrays of a file."""
    data = read_whole(path)
    arrays: Arrays = {}
    with Meter("unpacked", len(data)) as meter:
        for names, array in Reader(data).arrays():
            arrays[names] = array
            meter(array.nbytes)
    return arrays


def _write_msgpack(file: Counted, tree: Any) -> None:
    """Write what Flax's `msgpack_serialize` would, array by array, without a copy of all of them."""
    if isinstance(tree, np.ndarray) and tree.nbytes > LARGEST:
        flat, step = tree.reshape(-1), max(1, LARGEST // tree.itemsize)
        parts = [flat[start : start + step] for start in range(0, flat.size, step)]
        tree = {
            CHUNKED: True,
            "shape": {str(i): extent for i, extent in enumerate(tree.shape)},
            "chunks": {str(i): part for i, part in enumerate(parts)},
        }
    if isinstance(tree, dict):
        file.write(b"\xdf" + len(tree).to_bytes(4, "big"))
        for name, inner in tree.items():
            file.write(msgpack.packb(name))
            _write_msgpack(file, inner)
    elif isinstance(tree, np.ndarray):
        content = msgpack.packb((tree.shape, tree.dtype.name, tree.tobytes()))
        file.write(msgpack.packb(msgpack.ExtType(ARRAYS[0], content)))
    else:
        file.write(msgpack.packb(tree))


class Reader:
    """Reads what Flax writes: maps of arrays.

    The library's reader makes an object of every byte of a hostile file, and takes lengths on trust; this one
    makes arrays alone.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = memoryview(data)
        self.at = 0
        self.names_left = max(FEW, len(data) // 50)

    def arrays(self) -> Iterator[tuple[Names, NDArray[Any]]]:
        """Every array with its names."""
        kind, length = self.header()
        if kind != "map":
            raise ValueError("which is no msgpack of names and arrays")
        yield from self.inside((), length)
        if self.at != len(self.data):
            raise ValueError(f"with {len(self.data) - self.at} bytes behind its end")

    def inside(self, names: Names, length: int) -> Iterator[tuple[Names, NDArray[Any]]]:
        """The arrays of a map."""
        if len(names) > DEEPEST:
            raise ValueError(f"with more than {DEEPEST} levels of names")
        known = set()
        for _ in range(length):
            name = self.text()
            self.names_left -= 1
            if self.names_left < 0:
                raise ValueError("with far more names than arrays have place in it")
            if name in known:
                raise ValueError(f"with {'/'.join((*names, name))} twice")
            known.add(name)
            kind, inner = self.header()
            if kind != "map":
                array = self.leaf(kind, inner)
                if array is not None:
                    yield (*names, name), array
            elif self.peek_text() == CHUNKED:
                yield (*names, name), self.chunked(inner)
            else:
                yield from self.inside((*names, name), inner)

    def leaf(self, kind: str, length: int) -> NDArray[Any] | None:
        """The array that a value is; anything else is passed over."""
        if kind == "list":
            raise ValueError("with a list")
        code = self.take(1)[0] if kind == "extension" else None
        content = self.take(length)
        if code not in ARRAYS:
            return None
        inner = Reader(content)
        kind, count = inner.header()
        if (kind, count) != ("list", 3):
            raise ValueError("with an array that is none")
        kind, rank = inner.header()
        if kind != "list" or rank > MOST_AXES:
            raise ValueError("with an array without a shape")
        shape = [inner.number() for _ in range(rank)]
        dtype = inner.text()
        if dtype not in DTYPES:
            raise ValueError(f"with an array of dtype {dtype[:40]!r}, none of {', '.join(DTYPES)}")
        kind, size = inner.header()
        if kind != "text" or size != math.prod(shape) * np.dtype(dtype).itemsize:
            raise ValueError(f"with {size} bytes for an array of shape {tuple(shape)} and dtype {dtype}")
        return np.frombuffer(inner.take(size), dtype).reshape(shape).copy()

    def chunked(self, length: int) -> NDArray[Any]:
        """An array of more than 2^30 bytes, which is stored in parts."""
        self.text()
        self.leaf(*self.header())
        parts: dict[str, list[Any]] = {"shape": [], "chunks": []}
        for _ in range(length - 1):
            values = parts.get(self.text())
            kind, count = self.header()
            if values is None or kind != "map":
                raise ValueError("with an array in parts that are none")
            for i in range(count):
                if self.text() != str(i):
                    raise ValueError("with an array whose parts are not in order")
                values.append(self.number() if values is parts["shape"] else self.leaf(*self.header()))
        return np.concatenate(parts["chunks"]).reshape(parts["shape"])

    def header(self) -> tuple[str, int]:
        """What comes next, and its length: entries of a map or a list, bytes of anything else."""
        first = self.take(1)[0]
        if first < 0x80 or first >= 0xE0:
            self.at -= 1  # the byte is the number
            return "number", 1
        if first < 0x90:
            return "map", first & 0x0F
        if first < 0xA0:
            return "list", first & 0x0F
        if first < 0xC0:
            return "text", first & 0x1F
        for kind, sizes in VALUES.items():
            if first in sizes:
                return kind, sizes[first]
        for kind, sizes in LENGTHS.items():
            if first in sizes:
                return kind, int.from_bytes(self.take(sizes[first]), "big")
        raise ValueError(f"with a byte {first:#x} that msgpack does not have")

    def number(self) -> int:
        """A whole number, not negative."""
        kind, length = self.header()
        if kind != "number":
            raise ValueError("with something else where a number belongs")
        return int.from_bytes(self.take(length), "big")

    def text(self) -> str:
        """A text."""
        kind, length = self.header()
        if kind != "text":
            raise ValueError("with something else where a name belongs")
        return str(self.take(length), "utf-8")

    def peek_text(self) -> str:
        """The text that comes next, or nothing."""
        at = self.at
        try:
            return self.text()
        except ValueError:
            return ""
        finally:
            self.at = at

    def take(self, length: int) -> memoryview:
        """The next bytes."""
        if length > len(self.data) - self.at:
            raise ValueError("which ends too early")
        self.at += length
        return self.data[self.at - length : self.at]


# Orbax

METADATA = "_METADATA"
ARRAY_VALUES = ("np.ndarray", "jax.Array", "scalar")
"""The kinds of values that are arrays."""

CODECS = {"bytes", "crc32c", "sharding_indexed", "zstd"}
"""How Orbax lets arrays be encoded."""

GROWTH = 10
SMALL = 1 << 22
"""Arrays may take ten times the bytes of their folder, or this many where that is more."""

PIECE = 1 << 22
"""About how many bytes a written file of a folder has: each is in memory as a whole, when read again, too."""

SLOWEST = 10_000_000
"""How many bytes a second are read, at the least, beyond the first half minute."""


def _read_orbax(folder: Path) -> Arrays:
    """The arrays of an Orbax folder.

    tensorstore reads them from a copy in memory, so that nothing in the folder can name a file outside of it.

    Raises:
        Exception: The folder is damaged; tensorstore has no class of errors of its own.
    """
    folder = _item(folder)
    files = _files(folder)
    size = sum(len(data) for data in files.values())
    metadata = files.pop(METADATA)
    if len(metadata) > max(SMALL // 4, size // GROWTH):
        raise ValueError(f"whose {METADATA} has {len(metadata)} bytes")
    described = json.loads(metadata, object_pairs_hook=_without_repetition)
    names: dict[str, Names] = {}
    for entry in described["tree_metadata"].values():
        if entry["value_metadata"]["value_type"] in ARRAY_VALUES:
            keys = tuple(str(key["key"]) for key in entry["key_metadata"])
            if ".".join(keys) in names:
                raise ValueError(f"with {'/'.join(keys)} twice")
            names[".".join(keys)] = keys
    store = Store(files, size, described)
    with Meter("unpacked", size) as store.meter:
        return {keys: store.array(name) for name, keys in names.items()}


def _write_orbax(path: Path, tree: dict[str, Any]) -> None:
    """Write a folder, in one step.

    Args:
        path: Its name; nothing must be there.
        tree: Dictionaries of dictionaries and NumPy arrays.

    Raises:
        RBNValueError: Something is there, there is no folder around it, or an array is empty.
    """
    path = path.absolute()
    check_new(path)
    if empty := ["/".join(names) for names, array in _leaves(tree) if not array.size]:
        raise RBNValueError(
            f"RBN: expected arrays that hold something, as Orbax stores no others, got {', '.join(empty)} "
            "without a value. Leave them out, or write a file that ends in .msgpack."
        )
    # A second, which reading does without.
    import orbax.checkpoint as ocp  # type: ignore[import-untyped]

    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            pieces = ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=PIECE)
            with Meter("written", sum(array.nbytes for _, array in _leaves(tree))) as meter:
                checkpointer.save(folder / "checkpoint", args=pieces)
                meter.total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        (folder / "checkpoint").rename(path)
    finally:
        shutil.rmtree(folder)


def check_new(path: Path) -> None:
    """Refuse to write a folder where something is, or where there is no folder around it.

    Raises:
        RBNValueError: It is so.
    """
    if path.exists() or path.is_symlink():
        raise RBNValueError(
            f"RBN: expected the name of a new folder, got {path}, which is there. Remove it, or give another "
            "name; one that ends in .msgpack makes a file, which is replaced in one step."
        )
    if not path.parent.is_dir():
        raise RBNValueError(
            f"RBN: expected a folder to write {path.name} into, got {path.parent}, which is none. "
            "Make it first."
        )


def _item(folder: Path) -> Path:
    """The folder that holds the arrays: the one given, or the only one in it that does."""
    if (folder / METADATA).is_file():
        return folder
    items = [item for item in sorted(folder.iterdir()) if (item / METADATA).is_file()]
    if len(items) != 1:
        raise ValueError(f"which has {len(items)} folders with a {METADATA}")
    return items[0]


def _files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    paths = []
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place, name)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise ValueError(f"with {path.relative_to(folder)}, which is neither a file nor a folder")
            if path.is_file():
                paths.append(path)
    files = {}
    with Meter("read", sum(path.stat().st_size for path in paths)) as meter:
        for path in paths:
            data = path.read_bytes()
            files[path.relative_to(folder).as_posix()] = data
            meter(len(data))
    return files


class Store:
    """The arrays of an Orbax folder, opened by tensorstore.

    Args:
        files: All files but the metadata; taken out of the dictionary one by one.
        size: How many bytes they have.
        described: The metadata.
    """

    def __init__(self, files: dict[str, bytes], size: int, described: Mapping[str, Any]) -> None:
        import tensorstore  # half a second, which msgpack does without

        self.tensorstore = tensorstore
        self.deadline = time.monotonic() + 30 + size / SLOWEST
        self.bytes_left = self.unpacked_left = max(GROWTH * size, SMALL)
        self.chunks_left = max(10_000, size // 1000)
        self.driver = "zarr3" if described.get("use_zarr3") else "zarr"
        # What old versions of Orbax did not write are zeros; the others write everything.
        self.fills = not described.get("store_array_data_equal_to_fill_value")
        self.meter = Meter("unpacked", size)
        self.context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
        memory = self.wait(tensorstore.KvStore.open("memory://", context=self.context))
        packed = "manifest.ocdbt" in files
        while files:
            name, data = files.popitem()
            self.unpack(data)
            self.wait(memory.write(name, data))
        self.base: Any = {"driver": "ocdbt", "base": "memory://"} if packed else {"driver": "memory"}
        self.pairs = self.wait(tensorstore.KvStore.open(self.base, context=self.context))

    def array(self, name: str) -> NDArray[Any]:
        """An array, once what its metadata declares is found to be no more than may be."""
        metadata = self.value(f"{name}/{'zarr.json' if self.driver == 'zarr3' else '.zarray'}")
        if metadata is None or len(metadata) > SMALL // 64:
            raise ValueError(f"without the array {name[:100]}")
        spec = {
            "driver": self.driver,
            "kvstore": self.base | {"path": f"{name}/"},
            "fill_missing_data_reads": self.fills,
        }
        opened = self.wait(self.tensorstore.open(spec, open=True, read=True, context=self.context))
        dtype, shape, chunk = (
            opened.dtype.numpy_dtype,
            opened.shape,
            opened.chunk_layout.write_chunk.shape or (),
        )
        if dtype.name not in DTYPES:
            raise ValueError(f"with an array of dtype {dtype}, none of {', '.join(DTYPES)}")
        declared = json.loads(metadata)
        if codecs := _codecs(declared) - CODECS:
            raise ValueError(f"with an array encoded by {', '.join(sorted(codecs))}")
        if any(part > max(whole, 1) for part, whole in zip(chunk, shape, strict=True)):
            raise ValueError(f"with parts of shape {chunk} of an array of shape {shape}")
        self.bytes_left -= math.prod(shape) * dtype.itemsize
        grid = [range(-(-whole // part)) for whole, part in zip(shape, chunk, strict=True)]
        self.chunks_left -= math.prod(len(steps) for steps in grid)
        if self.bytes_left < 0 or self.chunks_left < 0:
            raise ValueError(
                f"with arrays as large as {name[:100]} of shape {shape}, more than its size allows"
            )
        for place in itertools.product(*grid):
            part = self.value(f"{name}/{self.key(place, declared)}") or b""
            self.unpack(part)
            self.meter(len(part))
        return np.asarray(self.wait(opened.read()))

    def key(self, place: tuple[int, ...], metadata: Mapping[str, Any]) -> str:
        """What a part of an array is called."""
        if self.driver == "zarr3":
            encoding = metadata["chunk_key_encoding"]
            return encoding.get("configuration", {}).get("separator", "/").join(("c", *map(str, place)))
        return str(metadata.get("dimension_separator", ".")).join(map(str, place)) or "0"

    def value(self, key: str) -> bytes | None:
        """What is stored under a key."""
        found = self.wait(self.pairs.read(key))
        return found.value if found.state == "value" else None

    def unpack(self, data: bytes) -> None:
        """Refuse what becomes far more than it is when it is decompressed."""
        self.unpacked_left -= sum(_unpacked(data))
        if self.unpacked_left < 0:
            raise ValueError("which would be far larger when decompressed")

    def wait(self, future: Any) -> Any:
        """The result, if it comes in time."""
        return future.result(timeout=max(self.deadline - time.monotonic(), 0.0))


def _codecs(metadata: Any) -> set[str]:
    """How an array is encoded."""
    if "codecs" not in metadata:  # of the second version of zarr
        names = [metadata.get("compressor"), *(metadata.get("filters") or ())]
        return {str(codec["id"]) for codec in names if codec}
    found = set()
    for codec in metadata["codecs"]:
        found.add(codec["name"])
        inner = codec.get("configuration", {})
        for codecs in (inner.get("codecs"), inner.get("index_codecs")):
            found |= _codecs({"codecs": codecs or []})
    return found


def _unpacked(data: bytes) -> Iterator[int]:
    """The most that every Zstandard frame in some bytes can become (RFC 8878, section 3.1.1)."""
    at = -1
    while (at := data.find(b"\x28\xb5\x2f\xfd", at + 1)) >= 0:
        if at + 5 > len(data):
            return
        descriptor = data[at + 4]
        single = descriptor >> 5 & 1
        start = at + 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
        width = (single, 2, 4, 8)[descriptor >> 6]
        declared = int.from_bytes(data[start : start + width], "little") + (256 if width == 2 else 0)
        blocks = _blocks(data, start + width)
        yield min(declared, blocks) if width else blocks


def _blocks(data: bytes, at: int) -> int:
    """The most that the blocks of a frame can become."""
    total, largest = 0, 1 << 17
    while at + 3 <= len(data):
        header = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        if kind == 3 or size > largest:
            break
        total += largest if kind == 2 else size
        at += 3 + (1 if kind == 1 else size)
        if last:
            break
    return total


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused if a name is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("whose metadata has a name twice")
    return found
