"""A PyTorch model's state to and from canonical NumPy arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from rbn.backends.torch.layers import BNET, CalibratedNorm
from rbn_core import config, published
from rbn_core.config import Config
from rbn_core.errors import RBNValueError
from rbn_core.matching import State, Table, match
from rbn_core.names import NAMES, Kind
from rbn_core.weights import Layers

KINDS: tuple[tuple[tuple[type[nn.Module], ...], Kind], ...] = (
    ((_ConvTransposeNd,), "transposed_convolution"),  # before their base class
    ((_ConvNd,), "convolution"),
    ((nn.Linear,), "linear"),
    ((nn.Embedding, nn.EmbeddingBag), "embedding"),
    ((CalibratedNorm, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), "norm"),
)
"""What a module is, as far as that decides how its arrays are called and lie; the first that fits counts."""

CANONICAL = {own: canonical for canonical, own in NAMES["torch"].items()} | published.CANONICAL
"""The canonical name of what a norm layer stores, of the papers' own code, too."""


class Place(NamedTuple):
    """Where a tensor is: the dotted path and the kind of the layer that owns it, its canonical name there."""

    path: str
    kind: Kind
    name: str

    @property
    def full_name(self) -> str:
        """The canonical name in the whole model."""
        return f"{self.path}.{self.name}" if self.path else self.name


def to_numpy(model: nn.Module) -> State:
    """Copies of everything that a model or a layer stores, under canonical names.

    Args:
        model: Any module. A layer alone has the empty path: "gamma". What is not of a kind in
            `rbn_core.names` keeps its own names. A wrapper for several devices or for compilation is looked
            through.

    Returns:
        The arrays, in PyTorch's dtypes; half precision becomes float32. A parameter that is used under two
        names is there under both.

    Raises:
        RBNValueError: A parameter has no value yet.
    """
    found = places(model)
    for place, tensor in found.items():
        _check_value(place, tensor)
    shapes = _shapes(found)
    return {place.full_name: to_array(tensor).reshape(shapes[place]) for place, tensor in found.items()}


def from_numpy(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    rename: Mapping[str, str] | None = None,
    strict: bool = True,
) -> Table:
    r"""Load a state into a model or a layer, in place; dtypes and devices stay the model's.

    Args:
        model: The module to fill.
        state: Arrays under canonical names, as `to_numpy` gives them.
        rename: Patterns of the state's names, each with the model's name for what it matches, such as
            `{r"backbone\.(.*)": r"\1"}`: see `rbn_core.matching.match`.
        strict: Whether anything missing, unexpected or wrong is an error; else it is left out.

    Returns:
        What became of every array.

    Raises:
        RBNValueError: Something does not fit; everything wrong is listed, and nothing has changed.
    """
    found = places(model)
    targets = {place.full_name: tensor for place, tensor in found.items()}
    shapes = {place.full_name: shape for place, shape in _shapes(found).items()}
    integers = {name for name, tensor in targets.items() if not torch.is_floating_point(tensor)}
    arrays, table = match(state, shapes, rename=rename, strict=strict, integers=integers)
    tensors = {name: to_tensor(array) for name, array in arrays.items()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor.reshape(targets[name].shape))
    return table


def describe(model: nn.Module) -> Layers:
    """What owns a model's arrays, for the metadata of a canonical file.

    Returns:
        By dotted path the layer's `kind`, one of `rbn_core.names.KINDS`, and of RBN, IEBN and BNET the
        options of `rbn_core.Config`.
    """
    model = unwrapped(model)
    return {
        place.path: {"kind": place.kind}
        | (dataclasses.asdict(config_of(layer)) if isinstance(layer, CalibratedNorm) else {})
        for place in places(model)
        for layer in (model.get_submodule(place.path),)
    }


def config_of(layer: CalibratedNorm) -> Config:
    """A layer's options in the conventions of `rbn_core.Config`."""
    known: dict[str, Any] = {"gamma": layer.weight is not None, "beta": layer.bias is not None}
    if isinstance(layer, BNET):
        known["kernel_size"] = layer.conv.kernel_size[0]
    return config.config_of("torch", layer, **known)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of wrappers for several devices or for compilation, which only lengthen its names."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's
            model = model._orig_mod
        else:
            return model


def places(model: nn.Module) -> dict[Place, Tensor]:
    """Every parameter and persistent buffer of a model, and where it is; one in two places is there twice."""
    model = unwrapped(model)
    found: dict[Place, Tensor] = {}
    bnets = set()
    for path, module in model.named_modules(remove_duplicate=False):
        outer, _, inner = path.rpartition(".")
        if isinstance(module, BNET) or (isinstance(module, _NormBase) and "bnconv" in module._modules):
            bnets.add(path)
        if inner in ("conv", "bnconv") and outer in bnets:
            found |= {
                Place(outer, "norm", CANONICAL[f"{inner}.{name}"]): own for name, own in _stored(module)
            }
            continue
        kind: Kind = next((kind for types, kind in KINDS if isinstance(module, types)), "other")
        for name, own in _stored(module):
            found[Place(path, kind, CANONICAL.get(name, name) if kind == "norm" else name)] = own
    return found


def to_array(tensor: Tensor) -> NDArray[Any]:
    """A copy of a tensor as an array; half precision becomes float32."""
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return np.array(tensor.numpy(), order="C")


def to_tensor(array: NDArray[Any]) -> Tensor:
    """An array as a tensor of the same dtype, without a copy where PyTorch can take its memory.

    Raises:
        RBNValueError: PyTorch has no such dtype.
    """
    bfloat16 = array.dtype.name == "bfloat16"
    if not bfloat16 and array.dtype.kind not in "fiub":
        raise RBNValueError(
            f"RBN: expected arrays of numbers, got dtype {array.dtype}. Convert them, for example to float32."
        )
    # PyTorch takes neither negative strides nor another byte order, and warns of what is read-only.
    native = array.dtype.newbyteorder("=")
    ready = np.require(array.view(np.int16) if bfloat16 else array, None if bfloat16 else native, ["C", "W"])
    tensor = torch.from_numpy(ready.reshape(array.shape))
    return tensor.view(torch.bfloat16) if bfloat16 else tensor


def _stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and persistent buffers."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield name, tensor


def _shapes(found: Mapping[Place, Tensor]) -> dict[Place, tuple[int, ...]]:
    """The canonical shape of everything: the papers' own code has (1, C, 1, 1) for (C,)."""
    shapes = {place.full_name: _shape(place.full_name, tensor) for place, tensor in found.items()}
    flat = published.flat_shapes(shapes)
    return {
        place: flat[place.full_name] if place.kind == "norm" else shapes[place.full_name] for place in found
    }


def _shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    if is_lazy(tensor):
        raise RBNValueError(
            f"RBN: expected a model whose parameters have their shapes, got a lazy {name}. "
            "Run the model once on an example."
        )
    return tuple(tensor.shape)


def _check_value(place: Place, tensor: Tensor) -> None:
    _shape(place.full_name, tensor)
    if tensor.is_meta:
        raise RBNValueError(
            f"RBN: expected a model whose parameters have values, got {place.full_name} on the meta device. "
            "Move the model with to_empty, and load or reset its parameters."
        )
