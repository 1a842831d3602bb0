"""PyTorch's files: `.pth` and `.pt`, in the zip form and the one before it, and safetensors with its names.

A checkpoint is read without PyTorch, and without running what is in it: `rbn_core.pickles` makes nothing but
data of its pickle. What the file claims is held against what the file is before anything is allocated: the
zip's directory and sums, every storage's length, and every tensor's place in its storage.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rbn_core import pickles, published, stored_optimizers, weights
from rbn_core.bfloat16 import bfloat16
from rbn_core.config import check_choice
from rbn_core.counting import Meter, part_of, read_into, telling, writing
from rbn_core.errors import RBNError, RBNValueError
from rbn_core.files import replacing
from rbn_core.matching import State
from rbn_core.stored_optimizers import Beside, Sketch
from rbn_core.training import Training
from rbn_core.weights import Layers

INDEX = ".index.json"
"""How the list of the parts of a network ends that Hugging Face stores in several files."""

METADATA = ".metadata"
"""What a folder of `torch.distributed.checkpoint` says of its arrays."""

AVERAGED = "n_averaged"
"""What `torch.optim.swa_utils.AveragedModel` adds to a network."""

LIGHTNING = "pytorch-lightning_version"
"""What Lightning writes beside a network, whose names then begin with the attribute that holds it."""

LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How the form before the zip begins: the pickle of this number."""

LEGACY_PICKLES = 5
"""Its pickles: the magic number, the version, what kind of machine, the object, the storages' keys."""

LEGACY_START = 1 << 22
"""How many bytes of it are read for them first."""

MOST_SHARING = 4
"""How many times the file's size its arrays may have together, as views of the same numbers."""


def read(path: str | PathLike[str], key: str | None = None, note: pickles.Note = pickles.no_note) -> State:
    """The arrays of a checkpoint, under PyTorch's names for them.

    The network may stand beside other entries, such as an optimizer, under "state_dict", "model", "net" or
    the like; a prefix of every name, as `module.`, goes. The published forms of RBN, IEBN and BNET become
    ours: parameters of shape (1, C, 1, 1) become (C,), `weight_readjust` and `bias_readjust` become
    `scale_weight` and `scale_bias`, and `bnconv` becomes `conv`.

    Args:
        path: A file of `torch.save`, or a safetensors file; the content tells which. Or an index of Hugging
            Face with its parts beside it, or a folder with one, or one of `torch.distributed.checkpoint`.
        key: Under what name the network is, where there are several.
        note: Told of everything that is left out.

    Returns:
        The arrays, in the file's dtypes; bfloat16 is that of `ml_dtypes`.

    Raises:
        RBNValueError: There is no such file, or it is damaged, claims what it does not hold, or holds what is
            no plain tensor.
    """
    return _read(path, key, note, trained=False)[0]


def read_trained(
    path: str | PathLike[str], key: str | None = None, note: pickles.Note = pickles.no_note
) -> tuple[State, Training | None]:
    """The arrays of a checkpoint as `read` gives them, and where the optimizer beside the network stands.

    That is nothing where there is none, or where it is not certain to be SGD, Adam or AdamW and whose its
    arrays are: see `rbn_core.stored_optimizers`. `note` is then told why, and else what of it is left out.
    Parameters have the names of the arrays, and the errors are those of `read`.
    """
    return _read(path, key, note, trained=True)


def _read(
    path: str | PathLike[str], key: str | None, note: pickles.Note, trained: bool
) -> tuple[State, Training | None]:
    path = Path(path)
    left_out: list[tuple[str, str]] = []

    def keep(name: str, what: str) -> None:
        left_out.append((name, what))

    try:
        if path.is_dir() or path.name.endswith(INDEX):
            stored, beside = _read_parts(path, key, keep)
        elif path.is_file():
            stored, beside = _read_file(path, key, keep, trained)
        else:
            raise RBNValueError(
                f"RBN: expected a PyTorch checkpoint, got {path}, which is no file. Check the path."
            )
    except Exception as error:  # what a damaged file raises on its way through zip and pickle is anything
        if isinstance(error, RBNError | OSError):
            raise
        known = isinstance(error, pickles.CutError) or type(error) is ValueError
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        raise RBNValueError(
            f"RBN: expected a PyTorch checkpoint of plain tensors, got {path} ({_short(reason)}). "
            "Where it was made, save the network alone: torch.save(model.state_dict(), path)."
        ) from error
    state = published.to_ours(_unwrapped(stored, keep))
    training = beside.training(dict(zip(stored, state, strict=False)), state)
    stored_optimizers.tell(left_out, beside.told, note)
    return state, training


def _read_file(path: Path, key: str | None, note: pickles.Note, trained: bool) -> tuple[State, Beside]:
    """The arrays of a file, whichever form it has, and the optimizers beside them."""
    with path.open("rb") as file:
        start = file.read(32)
        file.seek(0)
        if start[8:9] == b"{":
            return pickles.chosen(weights.read_safetensors(path)[0], _is_array, key, note), Beside()
        size = path.stat().st_size
        if start.startswith(b"PK\x03\x04"):
            return _read_zip(file, size, key, note, trained)
        if start[:1] == b"\x80" and LEGACY in start:
            return _read_legacy(file, size, key, note, trained)
    raise ValueError("its first bytes are those of no file of torch.save")


def _read_parts(path: Path, key: str | None, note: pickles.Note) -> tuple[State, Beside]:
    """The arrays of several files: those of an index of Hugging Face, or of a distributed checkpoint."""
    if path.is_dir() and (path / METADATA).is_file():
        return _read_distributed(path, key, note)
    indexes = [path] if path.is_file() else sorted(path.glob(f"*{INDEX}"))
    if len(indexes) != 1:
        raise ValueError(f"which has {len(indexes)} files that end in {INDEX}, and no {METADATA}")
    files = json.loads(indexes[0].read_bytes())["weight_map"]
    wanted: dict[str, set[str]] = {}
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"whose index names {str(file)[:60]!r}, which is no file beside it")
        wanted.setdefault(file, set()).add(name)
    found: State = {}
    sizes = {file: _size(indexes[0].parent / file) for file in wanted}
    before = 0
    for file, names in wanted.items():
        with part_of(sum(sizes.values()), before):
            state, _ = _read_file(indexes[0].parent / file, None, note, trained=False)
        before += sizes[file]
        if lacking := names - state.keys():
            raise ValueError(f"whose part {file} lacks {sorted(lacking)[0][:60]}")
        found |= {name: state[name] for name in names}
    return pickles.chosen({name: found[name] for name in files}, _is_array, key, note), Beside()


def _size(part: Path) -> int:
    if not part.is_file():
        raise ValueError(f"whose part {part.name} is not there")
    return part.stat().st_size


def _read_distributed(folder: Path, key: str | None, note: pickles.Note) -> tuple[State, Beside]:
    """The arrays of a folder of `torch.distributed.checkpoint`, put together from their parts.

    Its metadata is a pickle of objects, of which nothing but the attributes is looked at.
    """
    content = (folder / METADATA).read_bytes()
    described = _Machine(memoryview(content), len(content)).run()
    tensors, stored = described.state["state_dict_metadata"], described.state["storage_data"]
    places: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
    for index, information in stored.items():
        name, offset = index.arguments.state["fqn"], index.arguments.state.get("offset")
        places.setdefault(name, []).append((_shape(offset) if offset else (), information.state))
    sizes: dict[str, int] = {}
    loaded: dict[str, Any] = {}
    paths = described.state.get("planner_data") or {}
    for name, tensor in tensors.items():
        branch = loaded
        *outer, last = paths[name] if isinstance(paths, dict) and name in paths else (name,)
        for part in outer:
            branch = branch.setdefault(part, {})
        shape = (tensor.state or {}).get("size")  # what is no tensor has none
        branch[last] = _Distributed(_shape(shape), places.get(name, [])) if shape is not None else tensor
    for *_, information in itertools.chain(*places.values()):
        file = information["relative_path"]
        if not isinstance(file, str) or Path(file).name != file or (folder / file).is_symlink():
            raise ValueError(f"whose metadata names {str(file)[:60]!r}, which is no file in it")
        sizes[file] = (folder / file).stat().st_size
    chosen = pickles.chosen(loaded, lambda value: isinstance(value, _Distributed), key, note)
    most = MOST_SHARING * (sum(sizes.values()) + len(content))
    if sum(math.prod(tensor.shape) for tensor in chosen.values()) > most:
        raise ValueError("whose arrays are far more than its files")
    beside = stored_optimizers.of_distributed(loaded)
    with Meter("read", sum(sizes.values())) as meter:
        return {name: _put_together(folder, tensor, meter) for name, tensor in chosen.items()}, beside


class _Distributed(NamedTuple):
    """A tensor of a distributed checkpoint: where its parts begin in it, and where they are stored."""

    shape: tuple[int, ...]
    parts: list[tuple[tuple[int, ...], Any]]


def _shape(size: Any) -> tuple[int, ...]:
    """The numbers of a pickled torch.Size."""
    numbers = tuple(size.arguments[0])
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("with a negative size")
    return numbers


def _put_together(folder: Path, tensor: _Distributed, meter: Meter) -> NDArray[Any]:
    whole, filled = None, 0
    for offset, information in tensor.parts:
        start, length = information["offset"], information["length"]
        with (folder / information["relative_path"]).open("rb") as file:
            file.seek(start)
            part = file.read(length)
        with telling(None):
            loaded = _read_zip(io.BytesIO(part), len(part), None, pickles.no_note, trained=False)[0][""]
        meter(len(part))
        if whole is None:
            whole = np.empty(tensor.shape, loaded.dtype)
        whole[tuple(slice(at, at + n) for at, n in zip(offset, loaded.shape, strict=True))] = loaded
        filled += loaded.size
    if whole is None or filled != whole.size:
        raise ValueError("whose parts do not make up their arrays")
    return whole


def _unwrapped(state: State, note: pickles.Note) -> State:
    """The state under the names of the network inside of `DataParallel`, `AveragedModel` and their like."""
    if AVERAGED in state and all(name.startswith("module.") for name in state if name != AVERAGED):
        state = {name: array for name, array in state.items() if name != AVERAGED}
        note(AVERAGED, "the count of AveragedModel")
    return pickles.without_prefix(state, note=note)


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
        arrays = published.to_theirs(arrays, layers or {})
    if fspath(path).endswith(".safetensors"):
        with replacing(path) as temporary:
            weights.write_safetensors(temporary, arrays, {"format": "pt"})
        return
    # Reading does without it.
    import torch

    from rbn.backends.torch.weights import to_tensor

    tensors = OrderedDict((name, to_tensor(array)) for name, array in arrays.items())
    total = sum(array.nbytes for array in arrays.values())
    with replacing(path) as temporary, writing(temporary, total) as file:
        torch.save(tensors, file)


STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "b1",
}
"""The storages that arrays are made of, and what NumPy calls the numbers in each."""


class _Storage(NamedTuple):
    """What a pickle says of one storage."""

    key: str
    dtype: np.dtype[Any]
    numel: int


class _Tensor(NamedTuple):
    """What a pickle says of one tensor: where it lies in its storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """How many numbers of the storage it reaches over."""
        if 0 in self.size:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))


class _Machine(pickles.Machine):
    """Puts tensors together, too: those that lie inside of their storage, and are nothing but numbers.

    Attributes:
        storages: What it says of every storage, by key.
    """

    NAMES: ClassVar[Mapping[str, pickles.Name]] = {
        **pickles.Machine.NAMES,
        **{f"torch.{name}": pickles.Name(name) for name in STORAGES},
        "torch._utils._rebuild_tensor": pickles.Name("tensor"),
        "torch._utils._rebuild_tensor_v2": pickles.Name("tensor"),
        "torch._utils._rebuild_parameter": pickles.Name("parameter"),
        "torch._utils._rebuild_parameter_with_state": pickles.Name("parameter"),
        "torch._tensor._rebuild_from_type_v2": pickles.Name("typed"),
    }

    def __init__(self, program: pickles.Program, size: int) -> None:
        super().__init__(program, size)
        self.storages: dict[str, _Storage] = {}

    def persistent(self, key: Any) -> Any:
        """A storage: ("storage", type, key, location, numel), and in the form before the zip a view of it."""
        self.count(4)
        match key:
            case "module", pickles.Unknown() as module, _, _:  # beside the source of its class
                return module
            case ("storage", pickles.Name(kind), str(name), str(), int(numel)) | (
                "storage",
                pickles.Name(kind),
                str(name),
                str(),
                int(numel),
                None,
            ) if type(key) is tuple and kind in STORAGES and type(numel) is int and numel >= 0:
                dtype = bfloat16() if kind == "BFloat16Storage" else np.dtype(STORAGES[kind])
                found = _Storage(name, dtype, numel)
            case "storage", pickles.Unknown(kind), *_:
                return pickles.Unknown(kind, ())
            case _:
                raise ValueError("it holds a storage of an unknown kind, without a name or a size")
        if self.storages.setdefault(name, found) != found:
            raise ValueError(f"it says two things of storage {name[:20]!r}")
        return found

    def made(self, means: str, arguments: tuple[Any, ...]) -> Any:
        """A tensor or a parameter, and what every pickle can hold."""
        match means, arguments:
            case "tensor", (_Storage() as storage, offset, tuple(size), tuple(stride), *rest):
                return self.tensor(storage, offset, size, stride, rest)
            case "tensor", (pickles.Unknown(name), *_):  # of complex numbers, for example
                return pickles.Unknown(f"torch.Tensor of {name}", ())
            case "parameter", (_Tensor() | pickles.Unknown() as data, bool(), hooks, *rest) if (
                not hooks and len(rest) < 2
            ):
                return data
            case "typed", (
                pickles.Name("tensor" | "parameter" as inner),
                pickles.Unknown(
                    "torch.Tensor" | "torch.nn.parameter.Parameter" | "torch.nn.parameter.Buffer"
                ),
                tuple(inside),
                _,
            ):
                return self.made(inner, inside)
            case "typed", (_, pickles.Unknown(name), *_):
                return pickles.Unknown(f"torch.Tensor of {name}", ())
            case "tensor" | "parameter" | "typed", _:
                raise ValueError("it holds a tensor without a storage or a shape")
        return super().made(means, arguments)

    def tensor(
        self, storage: _Storage, offset: Any, size: tuple[Any, ...], stride: tuple[Any, ...], rest: list[Any]
    ) -> _Tensor:
        """A tensor, which must lie inside of its storage."""
        padded: list[Any] = [*rest, *(False, None, None)[len(rest) :]]
        grad, hooks, metadata, *more = padded
        if len(size) > 16 or len(size) != len(stride):
            raise ValueError("it holds a tensor without a storage or a shape")
        if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
            raise ValueError("it holds a tensor with a negative size")
        if type(grad) is not bool or hooks or metadata or more:
            raise ValueError("it holds a tensor with hooks, or conjugated")
        made = _Tensor(storage, offset, size, stride)
        if offset + made.span > storage.numel:
            raise ValueError("it holds a tensor that reaches beyond its storage")
        return made


def _read_zip(
    file: BinaryIO, size: int, key: str | None, note: pickles.Note, trained: bool
) -> tuple[State, Beside]:
    """What is wanted of a zip, once its directory and its sums are held against the file."""
    start = _directory(file, size)
    with zipfile.ZipFile(file) as opened:
        members = opened.infolist()
        names = [member.filename for member in members]
        root = names[0].partition("/")[0] if names else ""
        if f"{root}/constants.pkl" in names:
            raise ValueError("it is a TorchScript archive, which holds code")
        if opened.start_dir != start or len({name.lower() for name in names}) < len(names):
            raise ValueError("its zip is behind something else, or has two entries of one name")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its zip is compressed")
        if any(member.compress_size != member.file_size for member in members):
            raise ValueError("its zip gives an entry two lengths")
        if sum(member.file_size for member in members) > size:
            raise ValueError("its zip claims more than the file holds")
        with Meter("checked", size) as meter:
            for member in members:
                _check_sum(opened, member, meter)
        machine = _Machine(memoryview(opened.read(f"{root}/data.pkl")), size)
        loaded = machine.run()
        order = opened.read(f"{root}/byteorder") if f"{root}/byteorder" in names else b"little"
        entries = {member.filename: member for member in members}
    places = {}
    for name, (_, dtype, numel) in machine.storages.items():
        entry = entries.get(f"{root}/data/{name}")
        if entry is None or entry.file_size != numel * dtype.itemsize:
            raise ValueError(f"storage {name[:20]!r} is not as long as it should be")
        file.seek(entry.header_offset + 26)  # behind the name and what pads it, which the sum has found there
        lengths = struct.unpack("<HH", file.read(4))
        places[name] = entry.header_offset + 30 + sum(lengths)
    loaded = {"": loaded} if _is_tensor(loaded) else loaded  # a part of a distributed checkpoint
    content = _Content(file, size, places, ">" if order == b"big" else "<")
    return _wanted(content, loaded, key, note, trained)


def _directory(file: BinaryIO, size: int) -> int:
    """Where a zip's directory begins, at the one place where all readers of zips agree that it is."""
    file.seek(max(0, size - 98))
    tail = file.read()
    end, long_end = tail[-22:], tail[-42:-38] == b"PK\x06\x07"
    if not end.startswith(b"PK\x05\x06") or end[20:] != b"\x00\x00":
        raise ValueError("its zip is truncated")
    if long_end and (
        not tail.startswith(b"PK\x06\x06") or int.from_bytes(tail[-34:-26], "little") != size - 98
    ):
        raise ValueError("its zip has its directory somewhere else")
    start = int.from_bytes(tail[48:56] if long_end else end[16:20], "little")
    file.seek(min(start, size))
    if file.read().count(b"PK\x01\x02") > 1000 + size // 128:
        raise ValueError("its zip has more entries than the file's size accounts for")
    return start


def _check_sum(opened: zipfile.ZipFile, member: zipfile.ZipInfo, meter: Meter) -> None:
    """Refuse what does not match its checksum."""
    if member.CRC == 0:  # PyTorch can be told to leave it out
        member.CRC = None  # type: ignore[assignment]
    with opened.open(member) as content:
        while piece := content.read(1 << 20):
            meter(len(piece))


def _read_legacy(
    file: BinaryIO, size: int, key: str | None, note: pickles.Note, trained: bool
) -> tuple[State, Beside]:
    """What is wanted of the form before the zip, once the storages are held against the rest of the file."""
    try:
        machines, objects, end = _legacy_pickles(file.read(min(LEGACY_START, size)), size)
    except pickles.CutError:
        file.seek(0)
        machines, objects, end = _legacy_pickles(file.read(), size)
    storages, keys = machines[3].storages, objects[4]
    if (
        type(keys) is not list
        or any(type(name) is not str for name in keys)
        or sorted(keys) != sorted(storages)
    ):
        raise ValueError("its storages are not those of its tensors")
    places = {}
    file.seek(end)
    for name in keys:
        length = storages[name].numel * storages[name].dtype.itemsize
        (claimed,) = struct.unpack("<q", file.read(8))
        if claimed != storages[name].numel or file.tell() + length > size:
            raise ValueError(f"storage {name[:20]!r} is not as long as it should be")
        places[name] = file.tell()
        file.seek(length, io.SEEK_CUR)
    return _wanted(_Content(file, size, places, "<"), objects[3], key, note, trained)


def _legacy_pickles(start: bytes, size: int) -> tuple[list[_Machine], list[Any], int]:
    """What the pickles say at the start of the form before the zip, and where they end."""
    machines, objects, end = [], [], 0
    for _ in range(LEGACY_PICKLES):
        machines.append(_Machine(memoryview(start)[end:], size))
        objects.append(machines[-1].run(whole=False))
        end += machines[-1].position
    return machines, objects, end


class _Content(NamedTuple):
    """Where the numbers of a file are.

    Args:
        file: The file.
        size: How many bytes it has.
        places: Where in it each storage begins.
        order: Its order of bytes.
    """

    file: BinaryIO
    size: int
    places: Mapping[str, int]
    order: Literal["<", ">"]


def _wanted(
    content: _Content, loaded: Any, key: str | None, note: pickles.Note, trained: bool
) -> tuple[State, Beside]:
    """The network's arrays, and the optimizers beside them, with the arrays of the one that goes along.

    Args:
        content: The file.
        loaded: All that it holds.
        key: Under what name the network is.
        note: Told of what is left out.
        trained: Whether an optimizer is wanted.
    """
    tensors = _named(loaded, key, note)
    beside = _optimizers(loaded, tensors, key) if trained else stored_optimizers.unwanted(loaded)
    network = {("", name): tensor for name, tensor in tensors.items()}
    all_tensors = network | (beside.stored.arrays if beside.stored else {})
    _check_sharing(all_tensors.values(), content.size)
    arrays = _arrays(content, all_tensors)
    beside.arrays = {place: array for place, array in arrays.items() if place not in network}
    return {name: arrays["", name] for name in tensors}, beside


def _optimizers(loaded: Any, tensors: Mapping[str, _Tensor], key: str | None) -> Beside:
    """The optimizers beside a network, of which one may be certain to have trained it."""
    unlike = ""
    if AVERAGED in tensors:
        unlike = "the network is an average, which it has not trained"
    elif key is not None:
        try:
            first = pickles.chosen(loaded, _is_tensor)
        except ValueError:
            first = {}
        if [*first.values()] != [*tensors.values()]:
            unlike = "nothing tells whether it has trained the network that --key names"
    return stored_optimizers.beside(loaded, tensors, _sketch, stored_optimizers.of_torch, unlike)


def _sketch(value: Any) -> Sketch | None:
    return Sketch(value.size, value.storage.dtype, value) if _is_tensor(value) else None


def _named(loaded: Any, key: str | None, note: pickles.Note) -> dict[str, _Tensor]:
    """The tensors of what a checkpoint holds, without what Lightning puts before their names."""
    tensors = pickles.chosen(loaded, _is_tensor, key, note)
    lightning = isinstance(loaded, dict) and LIGHTNING in loaded
    return pickles.without_prefix(tensors, ("model.",), note) if lightning else tensors


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, _Tensor)


def _check_sharing(tensors: Iterable[_Tensor], size: int) -> None:
    """Refuse views that are together far more than the file, as one number seen as a billion."""
    total = sum(math.prod(tensor.size) * tensor.storage.dtype.itemsize for tensor in set(tensors))
    if total > MOST_SHARING * size:
        raise ValueError(f"its tensors have {total} bytes, and the file {size}")


def _arrays(
    content: _Content, tensors: Mapping[tuple[str, str], _Tensor]
) -> dict[tuple[str, str], NDArray[Any]]:
    """Copies of the tensors, one for all names of the same numbers."""
    copies: dict[_Tensor, NDArray[Any]] = {}
    with Meter("read", content.size) as meter:
        for tensor in tensors.values():
            if tensor not in copies:
                place = content.places[tensor.storage.key]
                copies[tensor] = _array(content.file, tensor, place, content.order, meter)
    return {name: copies[tensor] for name, tensor in tensors.items()}


def _array(
    file: BinaryIO, tensor: _Tensor, place: int, order: Literal["<", ">"], meter: Meter
) -> NDArray[Any]:
    dtype = tensor.storage.dtype
    file.seek(place + tensor.offset * dtype.itemsize)
    content = bytearray(tensor.span * dtype.itemsize)
    read_into(file, content, meter)
    numbers = np.frombuffer(content, dtype)
    if order == ">":
        numbers = numbers.view(f"u{dtype.itemsize}").byteswap().view(dtype)
    if dtype.kind == "b" and numbers.view(np.uint8).max(initial=0) > 1:
        raise ValueError("it holds what is neither true nor false")
    if tensor.span == math.prod(tensor.size) and tensor.stride == _steps(tensor.size):
        return numbers.reshape(tensor.size)
    strides = [step * dtype.itemsize for step in tensor.stride]
    view = np.lib.stride_tricks.as_strided(numbers, tensor.size, strides, writeable=False)
    return np.array(view, order="C")


def _steps(size: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose numbers lie one after another."""
    return tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))


def _short(reason: str) -> str:
    """The first line of a reason, and not all of a long one."""
    first = reason.splitlines()[0] if reason else ""
    return first if len(first) <= 300 else f"{first[:300]}..."
