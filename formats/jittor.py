"""Jittor's checkpoints, `.pkl`: read and written without Jittor, and read without running what is in them.

`jittor.save` and `Module.save` write a pickle, its SHA-1 sum and a mark. `rbn_core.pickles` makes nothing but
data of a pickle, whatever it asks for; here are Jittor's variables, which are arrays inside.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np

from rbn_core import pickles, published, stored_optimizers
from rbn_core.bfloat16 import bfloat16
from rbn_core.config import check_choice
from rbn_core.counting import Counted, Meter, writing
from rbn_core.errors import RBNError, RBNTypeError, RBNValueError
from rbn_core.files import replacing
from rbn_core.matching import COUNTER, State
from rbn_core.stored_optimizers import Sketch
from rbn_core.training import Training
from rbn_core.weights import Layers

LAYOUTS = ("own", "published")

MARK = b"HCAJSLHD"
CHECKSUM = 20
"""How many bytes the sum before the mark has."""

COUNTED = 1 << 10
"""A pickle is read byte by byte where there are no arrays: so many are counted together."""


def read(path: str | PathLike[str], key: str | None = None, note: pickles.Note = pickles.no_note) -> State:
    """The arrays of a checkpoint, under Jittor's names.

    The network may stand beside other entries, as in `rbn.formats.torch.read`. The form of the
    published RBN code, whose parameters are (1, C, 1, 1), becomes ours. Jittor stores a bfloat16 variable as
    one of uint16, which comes as bfloat16 here.

    Args:
        path: What `jittor.save` or `Module.save` has written, or any pickle of a dictionary of arrays.
        key: Under what name the network is, where there are several.
        note: Told of everything that is left out.

    Raises:
        RBNValueError: The file is not there, is damaged, or holds anything else.
    """
    return _read(path, key, note, trained=False)[0]


def read_trained(
    path: str | PathLike[str], key: str | None = None, note: pickles.Note = pickles.no_note
) -> tuple[State, Training | None]:
    """The arrays of a checkpoint, and where the optimizer beside the network stands, as in PyTorch's.

    Jittor's optimizers hold the arrays that they train: the same in the file as the network's, or another
    network's.
    """
    return _read(path, key, note, trained=True)


def _read(
    path: str | PathLike[str], key: str | None, note: pickles.Note, trained: bool
) -> tuple[State, Training | None]:
    left_out: list[tuple[str, str]] = []

    def keep(name: str, what: str) -> None:
        left_out.append((name, what))

    if not Path(path).is_file():
        raise RBNValueError(
            f"RBN: expected a Jittor checkpoint, got {path}, which is no file. Check the path."
        )
    try:
        with open(path, "rb") as file:
            program = _pickle(file)
            with Meter("read", program.whole) as program.meter:
                loaded = _Machine(program).run()
        found = pickles.chosen(loaded, _is_array, key, keep)
    except (ValueError, OverflowError) as error:
        if isinstance(error, RBNError):
            raise
        raise RBNValueError(
            f"RBN: expected a Jittor checkpoint, got {path} ({error}). "
            "Write it with jittor.save or Module.save."
        ) from error
    beside = (
        stored_optimizers.beside(loaded, found, _sketch, stored_optimizers.of_jittor)
        if trained
        else stored_optimizers.unwanted(loaded)
    )
    if beside.stored is not None:
        beside.arrays = {place: value.array for place, value in beside.stored.arrays.items()}
    state = pickles.without_prefix({name: value.array for name, value in found.items()}, note=keep)
    for name, array in state.items():
        if name.rpartition(".")[2] == COUNTER and array.size == 1:
            state[name] = array.reshape(())  # of a number Jittor makes a variable of shape (1,)
    state = published.to_ours(state)
    training = beside.training(dict(zip(found, state, strict=True)), state)
    stored_optimizers.tell(left_out, beside.told, note)
    return state, training


def write(
    path: str | PathLike[str],
    stored: Mapping[str, Any],
    *,
    layout: Literal["own", "published"] = "own",
    layers: Layers | None = None,
) -> None:
    """Write arrays as a checkpoint, in one step.

    Args:
        path: Where; a file that is there is replaced when the new one is whole.
        stored: The arrays, under Jittor's names. bfloat16 becomes float32, as no pickle that Jittor reads has
            it. Of a number Jittor makes a variable of shape (1,), as it has no others.
        layout: "published" is the form of the published RBN code, which counts no batches.
        layers: What owns the arrays, as in PyTorch's `write`.

    Raises:
        RBNError: The layout is unknown, or an array is of a dtype that Jittor does not have.
    """
    check_choice("layout", layout, LAYOUTS, "write")
    arrays = {name: np.asarray(value) for name, value in stored.items()}
    if layout == "published":
        counted = {name: array for name, array in arrays.items() if name.rpartition(".")[2] != COUNTER}
        arrays = published.to_theirs(counted, layers or {})
    if wrong := [
        f"{name} of {array.dtype}"
        for name, array in arrays.items()
        if array.dtype.name != "bfloat16" and array.dtype.newbyteorder("=") not in pickles.DTYPES.values()
    ]:
        raise RBNTypeError(
            f"RBN: expected arrays of {', '.join(map(str, pickles.DTYPES.values()))}, "
            f"got {', '.join(wrong)}. Convert them first."
        )
    total = sum(array.nbytes * (2 if array.dtype.name == "bfloat16" else 1) for array in arrays.values())
    with replacing(path) as temporary, writing(temporary, total) as file:
        summed = _Summed(file)
        _Pickler(summed, 4).dump(arrays)
        file.write(summed.sum.digest() + MARK)


class _Pickler(pickle.Pickler):
    """Writes arrays one by one: none is kept in memory in a second form once it is written."""

    def __init__(self, file: Any, protocol: int) -> None:
        super().__init__(file, protocol)
        self.fast = True  # without notes of what was written, which would keep all of it

    def reducer_override(self, value: Any) -> Any:
        """An array in the dtype and the order that Jittor reads."""
        if not isinstance(value, np.ndarray):
            return NotImplemented
        dtype = np.dtype(np.float32) if value.dtype.name == "bfloat16" else value.dtype.newbyteorder("=")
        return np.asarray(value, dtype, order="C").__reduce__()


class _Summed:
    """A file whose sum is taken as it is written."""

    def __init__(self, file: Counted) -> None:
        self.file = file
        self.sum = hashlib.sha1(usedforsecurity=False)

    def write(self, data: Any) -> int:
        """Write some bytes."""
        self.sum.update(data)
        return self.file.write(data)


class _Program:
    """The bytes of a file from its start on, read as they are asked for.

    Args:
        file: The file.
        size: How many.
        whole: How many the file has.
    """

    def __init__(self, file: BinaryIO, size: int, whole: int) -> None:
        self.file, self.size, self.whole = file, size, whole
        self.meter = Meter("read", whole)
        self.counted = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> memoryview:
        start, stop, _ = part.indices(self.size)
        self.file.seek(start)
        content = memoryview(self.file.read(max(0, stop - start)))
        if stop - self.counted > COUNTED:
            self.meter(stop - self.counted)
            self.counted = stop
        return content


def _pickle(file: BinaryIO) -> _Program:
    """The pickle of a file: what is before Jittor's sum and mark, if there are any."""
    size = file.seek(0, io.SEEK_END)
    end = max(0, size - len(MARK) - CHECKSUM)
    file.seek(end)
    tail = file.read()
    if not tail.endswith(MARK):
        return _Program(file, size, size)
    found, left = hashlib.sha1(usedforsecurity=False), end
    file.seek(0)
    with Meter("checked", size) as meter:
        while left and (part := file.read(min(left, 1 << 20))):
            found.update(part)
            left -= len(part)
            meter(len(part))
    if found.digest() != tail[: -len(MARK)]:
        raise ValueError("its checksum is that of other data")
    return _Program(file, end, size)


def _is_array(value: Any) -> bool:
    return isinstance(value, pickles.Array) and value.array is not None


def _sketch(value: Any) -> Sketch | None:
    return Sketch(value.array.shape, value.array.dtype, id(value)) if _is_array(value) else None


class _Machine(pickles.Machine):
    """Puts Jittor's variables together, too: arrays inside."""

    NAMES: ClassVar[Mapping[str, pickles.Name]] = {
        **pickles.Machine.NAMES,
        "jittor.jittor_core.Var": pickles.Name("variable"),
        "jittor.Var": pickles.Name("variable"),
    }

    def made(self, means: str, arguments: tuple[Any, ...]) -> Any:
        """A variable, and what every pickle can hold."""
        match means, arguments:
            case "variable", (pickles.Array(array=np.ndarray() as array),):
                return pickles.Array(array.view(bfloat16()) if array.dtype == np.uint16 else array)
        return super().made(means, arguments)
