"""The state of any MindSpore model to and from canonical NumPy arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn
from numpy.typing import NDArray

from rbn.backends.mindspore.internals import no_grad
from rbn.backends.mindspore.layers import CalibratedNorm
from rbn_core import config
from rbn_core.config import Config
from rbn_core.errors import RBNValueError
from rbn_core.matching import State, Table, match
from rbn_core.names import NAMES, Kind
from rbn_core.weights import Layers

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
MINT_BATCH_NORMS = (
    mint.nn.BatchNorm1d,
    mint.nn.BatchNorm2d,
    mint.nn.BatchNorm3d,
    mint.nn.SyncBatchNorm,
)

KINDS: dict[Kind, tuple[type[nn.Cell], ...]] = {
    "convolution": (nn.Conv1d, nn.Conv2d, nn.Conv3d, mint.nn.Conv1d, mint.nn.Conv2d, mint.nn.Conv3d),
    "transposed_convolution": (
        nn.Conv1dTranspose,
        nn.Conv2dTranspose,
        nn.Conv3dTranspose,
        mint.nn.ConvTranspose2d,
    ),
    "linear": (nn.Dense, mint.nn.Linear),
    "embedding": (nn.Embedding, nn.EmbeddingLookup, mint.nn.Embedding),
    "norm": (
        CalibratedNorm,
        *BATCH_NORMS,
        *MINT_BATCH_NORMS,
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
        nn.LayerNorm,
        nn.GroupNorm,
        mint.nn.LayerNorm,
        mint.nn.GroupNorm,
    ),
}
"""What a cell is, as far as that decides how its arrays are called and lie."""

CANONICAL: dict[Kind, dict[str, str]] = {
    "embedding": {"embedding_table": "weight"},
    "norm": {own: canonical for canonical, own in NAMES["mindspore"].items()}
    | {"weight": "gamma", "bias": "beta"},  # those of `mint`; its statistics have the canonical names
}
"""The canonical names of attributes that have another."""


class Place(NamedTuple):
    """A parameter, and the shape that it has canonically."""

    parameter: Parameter
    shape: tuple[int, ...]


def to_numpy(model: nn.Cell) -> State:
    """Copies of everything that a model or a layer stores, under canonical names.

    Args:
        model: Any cell. A layer alone has the empty path: "gamma". What is not of a kind in `rbn_core.names`
            keeps its attributes' names. As in a checkpoint, buffers are left out.

    Returns:
        The arrays, in MindSpore's dtypes; half precision becomes float32. A parameter that is used under two
        names is there under both.
    """
    return {name: to_array(place) for name, place in places(model).items()}


def from_numpy(
    model: nn.Cell, state: Mapping[str, Any], *, rename: Mapping[str, str] | None = None, strict: bool = True
) -> Table:
    r"""Load a state into a model or a layer, in place; dtypes and devices stay the model's.

    Args:
        model: The cell to fill.
        state: Arrays under canonical names, as `to_numpy` gives them; of what the model has under two names
            one is enough.
        rename: Patterns of the state's names, each with the model's name for what it matches, such as
            `{r"backbone\.(.*)": r"\1"}`: see `rbn_core.matching.match`.
        strict: Whether anything missing, unexpected or wrong is an error; else it is left out.

    Returns:
        What became of every array.

    Raises:
        RBNValueError: Something does not fit; everything wrong is listed, and nothing has changed.
    """
    targets = places(model)
    shapes = {name: place.shape for name, place in targets.items()}
    integers = {name for name, place in targets.items() if not place.parameter.is_floating_point()}
    if len({id(place.parameter) for place in targets.values()}) < len(targets):
        given, _ = match(state, shapes, rename=rename, strict=False, integers=integers)
        filled = _filled(targets, given)
        shapes = {
            name: shape
            for name, shape in shapes.items()
            if name in given or id(targets[name].parameter) not in filled
        }
    arrays, table = match(state, shapes, rename=rename, strict=strict, integers=integers)
    tensors = {name: to_tensor(array, targets[name].parameter) for name, array in arrays.items()}
    with no_grad():  # an exception inside of a gradient leaves the recording on, which forbids copy_
        for name, tensor in tensors.items():
            targets[name].parameter.copy_(tensor)  # compiled graphs do not see what set_data puts there
    return table


def describe(model: nn.Cell) -> Layers:
    """What owns a model's arrays, for the metadata of a canonical file.

    Returns:
        By dotted path the layer's `kind`, one of `rbn_core.names.KINDS`, and of RBN, IEBN and BNET the
        options of `rbn_core.Config`.
    """
    return {
        path: {"kind": kind(cell)}
        | (dataclasses.asdict(config_of(cell)) if isinstance(cell, CalibratedNorm) else {})
        for path, cell in layers(model)
        if _own(cell)
    }


def kind(cell: nn.Cell) -> Kind:
    """What a cell is, as far as that decides how its arrays lie."""
    return next((kind for kind, types in KINDS.items() if isinstance(cell, types)), "other")


def config_of(layer: CalibratedNorm) -> Config:
    """A layer's options in the conventions of `rbn_core.Config`."""
    return config.config_of("mindspore", layer)


def layers(model: nn.Cell, path: str = "", above: tuple[nn.Cell, ...] = ()) -> Iterator[tuple[str, nn.Cell]]:
    """Every cell with its dotted path, but for those inside our layers; one under two names comes twice."""
    yield path, model
    if isinstance(model, CalibratedNorm | nn.BatchNorm3d):
        return
    for name, cell in model._cells.items():  # cells_and_names() has every cell once
        if cell is None or any(cell is other for other in above):  # a cell may hold what holds it
            continue
        if name == "_backbone":  # what mixed precision wraps, and leaves the names of parameters alone
            yield from layers(cell, path, (*above, model))
        else:
            yield from layers(cell, f"{path}.{name}" if path else name, (*above, model))


def places(model: nn.Cell) -> dict[str, Place]:
    """Everything that a model stores, under canonical names."""
    found = {}
    for path, cell in layers(model):
        names = CANONICAL.get(kind(cell), {})
        for own, parameter in _own(cell).items():
            name = names.get(own, own)
            found[f"{path}.{name}" if path else name] = Place(parameter, _shape(cell, parameter))
    return found


def stored(model: nn.Cell) -> dict[str, Parameter]:
    """A model's parameters and statistics under canonical names."""
    return {name: place.parameter for name, place in places(model).items()}


def to_array(place: Place) -> NDArray[Any]:
    """A copy of a parameter as an array of its canonical shape; half precision becomes float32."""
    tensor = place.parameter
    if tensor.dtype in (ms.bfloat16, ms.float16):
        tensor = tensor.astype(ms.float32)
    return np.array(tensor.asnumpy(), order="C").reshape(place.shape)


def to_tensor(array: NDArray[Any], parameter: Parameter) -> Tensor:
    """A copy of an array as a tensor of a parameter's shape and dtype."""
    return Tensor(np.asarray(array).reshape(parameter.shape)).astype(parameter.dtype)


def _own(cell: nn.Cell) -> dict[str, Parameter]:
    """What a cell stores itself, by the names of the attributes."""
    if isinstance(cell, nn.BatchNorm3d):
        cell = cell.bn2d
    return dict(cell.parameters_and_names(expand=isinstance(cell, CalibratedNorm)))


def _shape(cell: nn.Cell, parameter: Parameter) -> tuple[int, ...]:
    """The canonical shape: in MindSpore kernels of one axis have a second one, of extent 1."""
    shape = tuple(parameter.shape)
    flat = isinstance(cell, nn.Conv1d | nn.Conv1dTranspose) or getattr(cell, "spatial_dims", None) == 1
    return (*shape[:2], *shape[3:]) if flat and len(shape) == 4 else shape


def _filled(targets: Mapping[str, Place], given: State) -> set[int]:
    """The parameters for which there are arrays.

    Raises:
        RBNValueError: There are two for one, and they differ.
    """
    names: dict[int, str] = {}
    for name, array in given.items():
        first = names.setdefault(id(targets[name].parameter), name)
        if not np.array_equal(array, given[first], equal_nan=True):
            raise RBNValueError(
                f"RBN: expected one array for {first} and {name}, which the model shares, got two that "
                "differ. Nothing was changed; leave one of them out."
            )
    return set(names)
