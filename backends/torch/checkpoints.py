"""PyTorch's files: `.pth` and `.pt`, in the zip form and the one before it, and safetensors with its names.

A checkpoint is read by `torch.load(weights_only=True)`, which runs no code from it. What the file claims is
held against what the file is before that, as `torch.load` allocates what it is told to: the zip's directory,
and by `_Inspector` every tensor's place in its storage.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from rbn.backends.torch.weights import to_tensor
from rbn_core import weights
from rbn_core.bfloat16 import bfloat16
from rbn_core.config import check_choice
from rbn_core.errors import RBNError, RBNValueError
from rbn_core.files import replacing
from rbn_core.matching import State
from rbn_core.weights import Layers

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

PUBLISHED = {"weight_readjust": "scale_weight", "bias_readjust": "scale_bias"}
"""IEBN's parameters in its published code, and ours."""

ADDED = ("center_weight", "scale_weight", "scale_bias")
"""The parameters that are shaped (1, C, 1, 1) in the published code."""

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How the form before the zip begins: the pickle of a magic number."""

LEGACY_PICKLES = 5
"""Its pickles: the magic number, the version, what kind of machine, the object, the storages' keys."""

MOST_OPERATIONS = 100_000
"""How many steps the pickle of a small file may have; ten bytes of the file allow one more."""

MOST_SHARING = 4
"""How many times the file's size its arrays may have together, as views of the same numbers."""


def read(path: str | PathLike[str]) -> State:
    """The arrays of a checkpoint, under PyTorch's names for them.

    The network may stand beside other entries, such as an optimizer, under "state_dict", "model", "net" or
    the like; a prefix of every name, as `module.`, goes. The published forms of RBN, IEBN and BNET become
    ours: parameters of shape (1, C, 1, 1) become (C,), `weight_readjust` and `bias_readjust` become
    `scale_weight` and `scale_bias`, and `bnconv` becomes `conv`.

    Args:
        path: A file of `torch.save`, or a safetensors file; the content tells which.

    Returns:
        Copies, in the file's dtypes; bfloat16 is that of `ml_dtypes`.

    Raises:
        RBNValueError: There is no such file, or it is damaged, claims what it does not hold, or holds what is
            no plain tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise RBNValueError(
            f"RBN: expected a PyTorch checkpoint, got {path}, which is no file. Check the path."
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(LEGACY))
        file.seek(0)
        if start[8:9] == b"{":
            return _ours(_without_prefix(weights.read_safetensors(path)[0]))
        try:
            if start.startswith(b"PK\x03\x04"):
                _check_zip(file, size)
                loaded = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            elif start == LEGACY:
                _check_legacy(file, size)
                loaded = torch.load(path, weights_only=True, map_location="cpu")
            else:
                raise RBNValueError("its first bytes are those of no file of torch.save")
            tensors = {name: _plain(name, value) for name, value in _state(loaded).items()}
            _check_sharing(tensors.values(), size)
        except Exception as error:  # what a damaged file raises on its way through zip and pickle is anything
            reason = str(error) if isinstance(error, RBNError) else f"{type(error).__name__}: {error}"
            raise RBNValueError(
                f"RBN: expected a PyTorch checkpoint of plain tensors, got {path} ({_short(reason)}). "
                "Save the network alone: torch.save(model.state_dict(), path)."
            ) from error
    return _ours(_without_prefix(_arrays(tensors)))


def write(
    path: str | PathLike[str],
    stored: Mapping[str, Any],
    *,
    layout: Literal["own", "published"] = "own",
    layers: Layers | None = None,
) -> None:
    """Write arrays as a checkpoint, in one step.

    Args:
        path: Where; a name that ends in ".safetensors" becomes a safetensors file, any other one of
            `torch.save`. A file that is there is replaced when the new one is whole.
        stored: Arrays under PyTorch's names for them.
        layout: "published" is the form of the published RBN, IEBN and BNET code.
        layers: What owns the arrays: where there is no `center_weight`, RBN and IEBN have the same names.
            What it does not say is IEBN if it has a `scale_weight` alone.

    Raises:
        RBNError: The layout is unknown, or PyTorch has not the dtype of an array.
    """
    check_choice("layout", layout, ("own", "published"), "write")
    arrays = {name: np.asarray(value) for name, value in stored.items()}
    if layout == "published":
        arrays = _published(arrays, layers or {})
    if fspath(path).endswith(".safetensors"):
        with replacing(path) as temporary:
            save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, temporary)
        return
    tensors = OrderedDict((name, to_tensor(array)) for name, array in arrays.items())
    with replacing(path) as temporary:
        torch.save(tensors, temporary)


class _Storage(NamedTuple):
    """What a pickle says of one storage."""

    dtype: str
    numel: int


class _Inert:
    """What stands for a value that is no tensor and of no use here, such as a learning rate scheduler's."""


ITEM_SIZES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
}
"""The storages that arrays are made of, and the bytes of one number in each."""


class _Inspector(pickle._Unpickler):
    """Goes through a pickle without making anything of it, and refuses what `torch.load` is not to be given.

    That is anything but plain tensors, containers, numbers and texts; tensors that reach beyond their
    storage; keys that are not plain; and more work than the file's size accounts for.

    Args:
        file: Where the pickle is.
        budget: How many steps and items it may take.

    Attributes:
        storages: What it says of every storage, by key.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {}
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: BinaryIO, budget: int) -> None:
        super().__init__(_Counted(file, self.spend), encoding="utf-8")
        self.budget = budget
        self.storages: dict[str, _Storage] = {}
        self.known: dict[str, Any] = {
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_parameter": self.parameter,
            "collections.OrderedDict": self.ordered,
            "collections.Counter": self.inert,
            "torch.Size": self.inert,
            "torch.device": self.inert,
        }

    def spend(self, steps: int) -> None:
        """Count work that is done here and again by `torch.load`."""
        self.budget -= steps
        if self.budget < 0:
            raise RBNValueError("its pickle is longer than the file's size accounts for")

    def find_class(self, module: str, name: str) -> Any:
        """What stands here for a class or a function; only those in `known` do."""
        if module == "torch" and name in ITEM_SIZES:
            return _Storage(name, 0)
        if f"{module}.{name}" not in self.known:
            raise RBNValueError(f"it holds {module}.{name}, which is no plain tensor")
        return self.known[f"{module}.{name}"]

    def persistent_load(self, key: Any) -> _Storage:
        """A storage: ("storage", type, key, location, numel), and in the form before the zip a view of it."""
        if (
            type(key) is not tuple
            or len(key) not in (5, 6)
            or key[0] != "storage"
            or key[5:] not in ((), (None,))
        ):
            raise RBNValueError("it holds a storage of an unknown kind")
        _, storage, name, location, numel = key[:5]
        if not isinstance(storage, _Storage) or type(name) is not str or type(location) is not str:
            raise RBNValueError("it holds a storage without a type or a name")
        if type(numel) is not int or numel < 0:
            raise RBNValueError("it holds a storage without a size")
        found = _Storage(storage.dtype, numel)
        if self.storages.setdefault(name, found) != found:
            raise RBNValueError(f"it says two things of storage {name[:20]!r}")
        return found

    def tensor(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        grad: Any = False,
        hooks: Any = None,
        metadata: Any = None,
    ) -> _Inert:
        """A tensor, which must lie inside of its storage."""
        if not isinstance(storage, _Storage) or len(size) > 16 or len(size) != len(stride):
            raise RBNValueError("it holds a tensor without a storage or a shape")
        if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
            raise RBNValueError("it holds a tensor with a negative size")
        if type(grad) is not bool or hooks or metadata:
            raise RBNValueError("it holds a tensor with hooks, or conjugated")
        last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        needed = offset if 0 in size else offset + last + 1
        if needed > storage.numel:
            raise RBNValueError("it holds a tensor that reaches beyond its storage")
        return _Inert()

    def parameter(self, data: Any, grad: Any, hooks: Any) -> _Inert:
        """A parameter of a tensor."""
        if not isinstance(data, _Inert) or type(grad) is not bool or hooks:
            raise RBNValueError("it holds a parameter of something else than a tensor")
        return _Inert()

    def ordered(self, pairs: Iterable[Any] = ()) -> OrderedDict[Any, Any]:
        """An ordered dictionary, as which Python 2 wrote one."""
        pairs = list(pairs)
        self.spend(len(pairs))
        made: OrderedDict[Any, Any] = OrderedDict()
        _set_items(made, [key for key, _ in pairs], [value for _, value in pairs])
        return made

    def inert(self, items: Any) -> _Inert:
        """A collection or a name that torch.load makes and nothing here takes."""
        if isinstance(items, list | tuple | dict):
            self.spend(len(items))
            _check_keys(items)
        return _Inert()

    def load_reduce(self) -> None:
        """Call what `find_class` gave."""
        args = self.stack.pop()
        if type(args) is not tuple:
            raise RBNValueError("it calls something without arguments")
        self.spend(len(args))
        self.stack[-1] = self.stack[-1](*args)

    def load_build(self) -> None:
        """Attributes: only those of state dictionaries, which say their version with them."""
        state = self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict or type(state) is not dict or len(state) != 1:
            raise RBNValueError("it sets attributes of something else than a state dictionary")

    def load_setitem(self) -> None:
        """Set one item of a dictionary."""
        value = self.stack.pop()
        key = self.stack.pop()
        _set_items(self.stack[-1], [key], [value])

    def load_setitems(self) -> None:
        """Set several items of a dictionary."""
        items = self.pop_mark()
        _set_items(self.stack[-1], items[::2], items[1::2])


_Inspector.dispatch = {
    code[0]: pickle._Unpickler.dispatch[code[0]]
    for code in (
        *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.BINPERSID),
        *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2),
        *(pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINSTRING),
        *(pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.APPEND, pickle.APPENDS),
        *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
        *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
    )
} | {
    pickle.REDUCE[0]: _Inspector.load_reduce,
    pickle.BUILD[0]: _Inspector.load_build,
    pickle.SETITEM[0]: _Inspector.load_setitem,
    pickle.SETITEMS[0]: _Inspector.load_setitems,
}


class _Counted:
    """A file whose every read counts, and none of which reaches beyond its end.

    Args:
        file: The file.
        spend: Told of every read.
    """

    def __init__(self, file: BinaryIO, spend: Callable[[int], None]) -> None:
        self.file, self.spend = file, spend
        start = file.tell()
        self.size = file.seek(0, io.SEEK_END)
        file.seek(start)

    def read(self, count: int) -> bytes:
        """Read so many bytes."""
        self.spend(1)
        if count > self.size - self.file.tell():  # a file makes room for all before it reads
            raise RBNValueError("its pickle is truncated")
        return self.file.read(count)

    def readline(self) -> bytes:
        """Read a line."""
        self.spend(1)
        return self.file.readline()


def _check_zip(file: BinaryIO, size: int) -> None:
    """Hold a zip's directory against the file, its contents against their sums, and inspect its pickle."""
    start = _directory(file, size)
    with zipfile.ZipFile(file) as opened:
        members = opened.infolist()
        names = [member.filename for member in members]
        root = names[0].partition("/")[0] if names else ""
        if f"{root}/constants.pkl" in names:
            raise RBNValueError("it is a TorchScript archive, which holds code")
        if opened.start_dir != start or len({name.lower() for name in names}) < len(names):
            raise RBNValueError("its zip is behind something else, or has two entries of one name")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise RBNValueError("its zip is compressed")
        if sum(member.file_size for member in members) > size:
            raise RBNValueError("its zip claims more than the file holds")
        for member in members:
            _check_sum(opened, member)
        contents = io.BytesIO(opened.read(f"{root}/data.pkl"))
        inspector = _Inspector(contents, MOST_OPERATIONS + size // 10)
        inspector.load()
        sizes = {member.filename: member.file_size for member in members}
    for key, (dtype, numel) in inspector.storages.items():
        if sizes.get(f"{root}/data/{key}") != numel * ITEM_SIZES[dtype]:
            raise RBNValueError(f"storage {key[:20]!r} is not as long as it should be")


def _directory(file: BinaryIO, size: int) -> int:
    """Where a zip's directory begins, at the one place where all readers of zips agree that it is."""
    file.seek(max(0, size - 98))
    tail = file.read()
    end, long_end = tail[-22:], tail[-42:-38] == b"PK\x06\x07"
    if not end.startswith(b"PK\x05\x06") or end[20:] != b"\x00\x00":
        raise RBNValueError("its zip is truncated")
    if long_end and (
        not tail.startswith(b"PK\x06\x06") or int.from_bytes(tail[-34:-26], "little") != size - 98
    ):
        raise RBNValueError("its zip has its directory somewhere else")
    start = int.from_bytes(tail[48:56] if long_end else end[16:20], "little")
    file.seek(min(start, size))
    if file.read().count(b"PK\x01\x02") > 1000 + size // 128:
        raise RBNValueError("its zip has more entries than the file's size accounts for")
    return start


def _check_sum(opened: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Refuse what does not match its checksum."""
    if member.CRC == 0:  # PyTorch can be told to leave it out
        member.CRC = None  # type: ignore[assignment]
    with opened.open(member) as content:
        while content.read(1 << 20):
            pass


def _check_legacy(file: BinaryIO, size: int) -> None:
    """Inspect the pickles of the form before the zip, and hold the storages against the rest of the file."""
    inspectors, objects = [], []
    for _ in range(LEGACY_PICKLES):
        inspectors.append(_Inspector(file, MOST_OPERATIONS + size // 10))
        objects.append(inspectors[-1].load())
    storages, keys = inspectors[3].storages, objects[4]
    if (
        type(keys) is not list
        or any(type(key) is not str for key in keys)
        or sorted(keys) != sorted(storages)
    ):
        raise RBNValueError("its storages are not those of its tensors")
    for key in keys:
        length = storages[key].numel * ITEM_SIZES[storages[key].dtype]
        (claimed,) = struct.unpack("<q", file.read(8))
        if claimed != storages[key].numel or file.tell() + length > size:
            raise RBNValueError(f"storage {key[:20]!r} is not as long as it should be")
        file.seek(length, io.SEEK_CUR)


def _set_items(target: Any, keys: list[Any], values: list[Any]) -> None:
    """Set items of a dictionary, each once."""
    _check_keys(keys)
    if not isinstance(target, dict):
        raise RBNValueError("it sets items of something else than a dictionary")
    before = len(target)
    target.update(zip(keys, values, strict=True))
    if len(target) < before + len(keys):
        raise RBNValueError("it has a dictionary with one key twice")


def _check_keys(keys: Iterable[Any]) -> None:
    """Refuse keys that are not plain: the hash of a deep one overruns the stack."""
    for key in keys:
        if type(key) not in (str, int, float, bool, type(None)):
            raise RBNValueError("it has a dictionary with keys that are neither texts nor numbers")


def _state(loaded: Any) -> dict[str, Any]:
    """The network of a checkpoint: the dictionary that holds tensors under texts."""
    known: dict[int, bool] = {}
    while isinstance(loaded, dict):
        inner = {key: value for key, value in dict.items(loaded) if _holds(value, known)}
        named = [key for key in STATES if key in inner]
        if not named and (not inner or any(isinstance(value, torch.Tensor) for value in dict.values(loaded))):
            break
        if not named and len(inner) > 1:
            raise RBNValueError(f"it holds several networks: {', '.join(map(str, inner))}")
        loaded = inner[named[0] if named else next(iter(inner))]
    if not isinstance(loaded, dict):
        raise RBNValueError(f"it holds no dictionary but a {type(loaded).__name__}")
    beside = (int, float, str, dict, type(None))
    state = {key: value for key, value in dict.items(loaded) if not isinstance(value, beside)}
    if not state and loaded:
        raise RBNValueError("it holds no tensors")
    if odd := [key for key in state if not isinstance(key, str)]:
        raise RBNValueError(f"it holds a tensor under {odd[0]!r}, which is no name")
    return state


def _holds(entries: Any, known: dict[int, bool]) -> bool:
    """Whether something is a dictionary with tensors under texts, or has one inside; looks at each once."""
    if not isinstance(entries, dict) or id(entries) in known:
        return known.get(id(entries), False)
    known[id(entries)] = False
    values = [value for key, value in dict.items(entries) if isinstance(key, str)]
    known[id(entries)] = any(isinstance(value, torch.Tensor) or _holds(value, known) for value in values)
    return known[id(entries)]


def _plain(name: str, value: Any) -> torch.Tensor:
    """The value, if it is a tensor; `_Inspector` has seen that it is an array."""
    if not isinstance(value, torch.Tensor):
        raise RBNValueError(f"{name[:60]!r} is no tensor but a {type(value).__name__}")
    return value.detach()


def _check_sharing(tensors: Iterable[torch.Tensor], size: int) -> None:
    """Refuse views that are together far more than the file, as one number seen as a billion."""
    total = sum(math.prod(tensor.shape) * tensor.element_size() for tensor in _distinct(tensors).values())
    if total > MOST_SHARING * size:
        raise RBNValueError(f"its tensors have {total} bytes, and the file {size}")


def _distinct(tensors: Iterable[torch.Tensor]) -> dict[tuple[Any, ...], torch.Tensor]:
    """The tensors without those that are the same numbers under another name."""
    return {_identity(tensor): tensor for tensor in tensors}


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _arrays(tensors: Mapping[str, torch.Tensor]) -> State:
    """Copies of the tensors, one for all names of the same numbers."""
    copies = {identity: _array(tensor) for identity, tensor in _distinct(tensors.values()).items()}
    return {name: copies[_identity(tensor)] for name, tensor in tensors.items()}


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    if tensor.dtype == torch.bfloat16:
        bits: NDArray[Any] = tensor.contiguous().view(torch.int16).numpy()
        return bits.view(bfloat16()).copy()
    return np.array(tensor.numpy(), order="C")


def _without_prefix(state: State) -> State:
    """The state without what a wrapper has put before every name."""
    while prefix := next((p for p in PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): array for name, array in state.items()}
    return state


def _ours(state: State) -> State:
    """The published form of RBN, IEBN and BNET as ours; anything else as it is."""
    ours = {}
    for name, array in state.items():
        path, _, last = name.rpartition(".")
        last = PUBLISHED.get(last, last)
        outer, _, inner = path.rpartition(".")
        if inner == "bnconv" and _join(outer, "running_mean") in state:
            path = _join(outer, "conv")
        if last in ADDED and array.ndim > 1 and array.shape == (1, array.size, *(1,) * (array.ndim - 2)):
            array = array.reshape(-1)
        ours[_join(path, last)] = array
    if len(ours) < len(state):
        raise RBNValueError(
            "RBN: expected a checkpoint of one form, got one with both ours and the published names. "
            "Leave one of them out."
        )
    return ours


def _published(state: State, layers: Layers) -> State:
    """The state in the form of the published RBN, IEBN and BNET code."""
    theirs = {ours: published for published, ours in PUBLISHED.items()}
    published = {}
    for name, array in state.items():
        path, _, last = name.rpartition(".")
        outer, _, inner = path.rpartition(".")
        if last in ADDED and array.ndim == 1:
            array = array.reshape(1, -1, 1, 1)
        layer = layers.get(path, {}).get("layer")
        if layer == "IEBN" or (layer is None and _join(path, "center_weight") not in state):
            last = theirs.get(last, last)
        if inner == "conv" and _is_bnet(outer, state, layers):
            path = _join(outer, "bnconv")
        published[_join(path, last)] = array
    return published


def _is_bnet(path: str, state: State, layers: Layers) -> bool:
    """Whether a layer is a BNET: it has statistics, and a convolution in place of gamma."""
    if "layer" in layers.get(path, {}):
        return bool(layers[path]["layer"] == "BNET")
    return _join(path, "running_mean") in state and _join(path, "weight") not in state


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _short(reason: str) -> str:
    """The first line of a reason: PyTorch's run to pages."""
    first = reason.splitlines()[0] if reason else ""
    return first if len(first) <= 200 else f"{first[:200]}..."
