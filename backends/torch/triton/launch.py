"""What is launched for a forward and a backward pass: the arguments, the grids and the memory."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from rbn.backends.torch.fused import OPTIONS, Options, Vectors
from rbn.backends.torch.triton.backward import (
    calibrate_backward_kernel,
    sums_kernel,
    transform_backward_kernel,
)
from rbn.backends.torch.triton.forward import Parameters, calibrate_kernel, measure_kernel, transform_kernel
from rbn_core.errors import RBNValueError

IN_PLACE = 64
"""Up to how many images each program of the second pass computes what it needs of its channels."""


@dataclass(frozen=True)
class Tiling:
    """How the planes are shared out among programs.

    Args:
        images: IMAGES of a program.
        channels: CHANNELS of a program.
        block: BLOCK, the positions that are in registers at a time.
        blocks: How many blocks a part of the positions has.
        parts: Into how many parts the positions are cut, each for a program.
        align: A power of two that the extent along which values lie side by side is divisible by.
        warps: The warps of a program.
        programs: How many programs there are.
    """

    images: int
    channels: int
    block: int
    blocks: int
    parts: int
    align: int
    warps: int
    programs: int


TILE = 4096
"""The values of a tile: 32 for each thread of four warps."""

SECTOR = 32
"""Bytes of memory that are read together."""


@lru_cache(maxsize=1024)
def tiling(images: int, channels: int, positions: int, last: bool, itemsize: int, processors: int) -> Tiling:
    """A tiling that keeps the processors busy, from the sizes alone."""
    if last:  # whole sectors of neighbouring channels, two so that a request does not touch too many lines
        width = min(_power(channels), 2 * SECTOR // itemsize)
        block = min(_power(positions), TILE // width)
    else:  # the (N, C) numbers of neighbouring channels fill a sector
        block = min(_power(positions), TILE)
        width = min(_power(channels), TILE // block, SECTOR // 4)
    height = min(_power(images), TILE // (width * block))
    tiles = triton.cdiv(channels, width)
    while height > 1 and triton.cdiv(images, height) * tiles < 2 * processors:
        height //= 2
    total = triton.cdiv(positions, block)
    warps = 8 if total > 1 else min(max(height * width * block // 1024, 1), 4)
    programs = triton.cdiv(images, height) * tiles
    parts = 1
    if programs * warps < 12 * processors:  # too few to hide the latency of memory
        parts = min(triton.cdiv(32 * processors, programs * warps), total)
    blocks = triton.cdiv(total, parts)
    parts = triton.cdiv(total, blocks)
    row = channels if last else positions
    align = min(row & -row, 16)
    return Tiling(height, width, block, blocks, parts, align, warps, programs * parts)


@dataclass(frozen=True)
class ChannelTiling:
    """How the channels are shared out among programs that work on (N, C) numbers alone.

    Args:
        channels: CHANNELS of a program.
        batch: BATCH, the images it takes at a time.
        batches: How many times.
        parts: PARTS, the parts of a plane's positions, up to a power of two.
        warps: The warps of a program.
        programs: How many programs there are.
    """

    channels: int
    batch: int
    batches: int
    parts: int
    warps: int
    programs: int


@lru_cache(maxsize=1024)
def channel_tiling(images: int, channels: int, parts: int) -> ChannelTiling:
    """A tiling of (parts, N, C) numbers: sectors of neighbouring channels, and what fits of the batch."""
    width = min(_power(channels), SECTOR // 4)
    batch = min(_power(images), max(2 * TILE // (width * _power(parts)), 1))
    warps = min(max(batch * width * _power(parts) // 256, 1), 16)
    return ChannelTiling(
        width, batch, triton.cdiv(images, batch), _power(parts), warps, triton.cdiv(channels, width)
    )


def _power(size: int) -> int:
    """The next power of two."""
    return triton.next_power_of_2(size)


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """How many programs a device works on at a time, at least; Triton's interpreter on one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache(maxsize=1024)
def _compiled(*signature: Hashable) -> dict[str, Any]:
    """The kernels that were compiled for a signature, by name."""
    return {}


COMPILER = {"enable_fp_fusion": True}  # or Triton 3.9 warns that another default will come


def _launch(compiled: dict[str, Any], kernel: Any, programs: int, warps: int, *arguments: Any) -> None:
    """Launch a kernel. Triton looks at its arguments once for a signature: it takes longer than a launch."""
    name = kernel.__name__
    if compiled.get(name) is None:
        compiled[name] = kernel[(programs,)](*arguments, num_warps=warps, **COMPILER)
    else:
        compiled[name][(programs, 1, 1)](*arguments)


def _check(x: Tensor, planes: Iterable[Tensor], vectors: Vectors, options: Options) -> None:
    """Refuse what the kernels would read beside, or take for something else: they see addresses alone.

    Raises:
        RBNValueError: An array is missing, has another shape, dtype or device than the layer needs, or an
            option is not known.
    """
    if not x.is_floating_point() or not (x.is_contiguous() or x.movedim(1, -1).is_contiguous()):
        raise RBNValueError(
            f"RBN: expected floating-point images without gaps, got {x.dtype} with strides {x.stride()}. "
            "Hand over x.contiguous()."
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    needs = dict.fromkeys(("scale_weight", "scale_bias"), options.scaling) | {
        "center_weight": options.centering
    }
    for name, statistic in needs.items():
        if statistic is not None and getattr(vectors, name) is None:
            raise RBNValueError(f"RBN: expected {name} with these options, got None. Hand it over.")
    there = [value for value in vectors if value is not None]
    for arrays, shape in ((there, x.shape[1:2]), (planes, x.shape[:2])):
        for value in arrays:
            if value.shape != shape or value.dtype is not wide or value.device != x.device:
                raise RBNValueError(
                    f"RBN: expected numbers of shape {tuple(shape)} in {wide} on {x.device}, got "
                    f"{tuple(value.shape)} in {value.dtype} on {value.device}. Hand over those of one layer."
                )
    if options[1:] not in OPTIONS:
        raise RBNValueError(
            f"RBN: expected options of the two-pass form, got centering={options.centering!r}, "
            f"scaling={options.scaling!r}, restrict={options.restrict!r}. Choose others, or the plain form."
        )


def _sizes(x: Tensor) -> tuple[tuple[int, int, int], bool]:
    """N, C and M, and whether the channels lie side by side."""
    images, channels, *spatial = x.shape
    positions = math.prod(spatial)
    return (images, channels, positions), positions == 1 or not x.is_contiguous()


def _dense(vectors: Vectors) -> Vectors:
    """Without gaps in memory."""
    return Vectors(*(None if value is None else value.contiguous() for value in vectors))


def _kind(values: Tensor | None) -> bool | None:
    """What Triton compiles for: whether there is a tensor, and whether it starts at a multiple of 16."""
    return None if values is None else values.data_ptr() % 16 == 0


def forward(x: Tensor, vectors: Vectors, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Y of eq. 12, and what `backward` needs beside X.

    Args:
        x: (N, C, *spatial), float32, float64, bfloat16 or float16, contiguous or with its channels last.
        vectors: Those of the layer, (C,) each, float32 (float64 beside float64); without E and Var of eq. 1
            it takes the batch's.
        options: Those of the layer, with statistics that follow from the moments of a plane.

    Returns:
        Y, of x's dtype and memory format; mu and v, the mean and biased variance of every plane, (N, C) each;
        E and the biased Var that Y was made with, (C,) each. All but Y have the vectors' dtype.

    Raises:
        RBNValueError: Something does not fit the rest.
    """
    _check(x, (), vectors, options)
    sizes, last = _sizes(x)
    images, channels, _ = sizes
    layer = _dense(vectors)
    batch_statistics = layer.running_mean is None
    y = torch.empty_like(x)
    mu = torch.empty((images, channels), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    v = torch.empty_like(mu)
    if layer.running_mean is None or layer.running_var is None:
        mean, var = mu.new_empty(channels), mu.new_empty(channels)
    else:
        mean, var = layer.running_mean.clone(), layer.running_var.clone()
    if x.numel() == 0:
        for statistic in (mu, v, mean, var) if batch_statistics else (mu, v):
            statistic.fill_(math.nan)
        return y, mu, v, mean, var
    t = tiling(*sizes, last, x.element_size(), processors(x.device))
    tile = (t.blocks == 1, t.align, last, t.images, t.channels, t.block)
    compiled = _compiled(x.device, x.dtype, last, *sizes, *options, *map(_kind, (x, *layer)))
    measured = batch_statistics or options.centering is not None or options.scaling is not None
    at_once = measured and not batch_statistics and t.parts == 1  # measured and transformed while it is near
    shared, batch = None, 1
    with torch.cuda.device_of(x):
        if measured and not at_once:
            part_mu, part_v = (mu, v) if t.parts == 1 else mu.new_empty((2, t.parts, images, channels))
            _launch(
                compiled, measure_kernel, t.programs, t.warps,
                x, part_mu, part_v, *sizes, t.parts, t.blocks, *tile,
            )  # fmt: skip
            if t.parts > 1 or images > IN_PLACE:
                c = channel_tiling(images, channels, t.parts)
                shared = mu.new_empty((3, channels)) if batch_statistics else None
                _launch(
                    compiled, calibrate_kernel, c.programs, c.warps,
                    part_mu, part_v, mu, v, layer, shared, mean, var, *sizes, t.parts, t.blocks * t.block,
                    c.batches, options.eps, options.centering, c.channels, c.batch, c.parts,
                )  # fmt: skip
            elif batch_statistics:
                batch = _power(images)
        _launch(
            compiled, transform_kernel, t.programs, t.warps,
            x, y, mu, v, layer, shared, mean, var, *sizes, t.parts, t.blocks, 1, *options,
            at_once, *tile, batch,
        )  # fmt: skip
    return y, mu, v, mean, var


def backward(
    dy: Tensor, x: Tensor, mu: Tensor, v: Tensor, vectors: Vectors, options: Options, needs_dx: bool
) -> tuple[Tensor | None, Parameters]:
    """The gradients of X and of the parameters.

    Args:
        dy: The gradient of Y, of its shape and dtype.
        x: As in `forward`.
        mu: As `forward` returned it.
        v: As `forward` returned it.
        vectors: As in `forward`.
        options: As in `forward`.
        needs_dx: Whether the gradient of X is asked for.

    Returns:
        dX, of x's dtype and memory format, or `None` if it was not asked for, and the gradients of the
        parameters, (C,) each, `None` for what the layer lacks.

    Raises:
        RBNValueError: Something does not fit the rest.
    """
    _check(x, (mu, v), vectors, options)
    if dy.shape != x.shape or dy.dtype is not x.dtype or dy.device != x.device:
        raise RBNValueError(
            f"RBN: expected dY of shape {tuple(x.shape)} in {x.dtype} on {x.device}, got {tuple(dy.shape)} "
            f"in {dy.dtype} on {dy.device}. Hand over the gradient of this Y."
        )
    sizes, last = _sizes(x)
    images, channels, _ = sizes
    dy = dy.movedim(1, -1).contiguous().movedim(-1, 1) if last else dy.contiguous()
    dx = torch.empty_like(x) if needs_dx else None
    new = mu.new_empty if x.numel() > 0 else mu.new_zeros
    gradients = Parameters(*(None if value is None else new(channels) for value in vectors[:5]))
    if x.numel() == 0:
        return dx, gradients
    layer = _dense(vectors._replace(beta=None))  # the gradients do not depend on it
    t = tiling(*sizes, last, x.element_size(), processors(x.device))
    tile = (t.align, last, t.images, t.channels, t.block)
    kinds = map(_kind, (dy, x, mu, v, *layer))
    compiled = _compiled(x.device, x.dtype, last, *sizes, *options, *kinds, needs_dx, vectors.beta is None)
    shared, batch = None, 1
    with torch.cuda.device_of(x):
        sums = parts = mu.new_empty((2, t.parts, images, channels))
        _launch(
            compiled, sums_kernel, t.programs, t.warps, dy, x, mu, parts, *sizes, t.parts, t.blocks, *tile
        )
        if t.parts > 1 or images > IN_PLACE or dx is None:
            c = channel_tiling(images, channels, t.parts)
            shared = mu.new_empty((5, channels))
            if t.parts > 1:
                sums = mu.new_empty((2, images, channels))
            _launch(
                compiled, calibrate_backward_kernel, c.programs, c.warps,
                parts, sums, mu, v, layer, shared, gradients, *sizes, t.parts, c.batches, *options,
                c.channels, c.batch, c.parts,
            )  # fmt: skip
        else:
            batch = _power(images)
        if dx is not None:
            _launch(
                compiled, transform_backward_kernel, t.programs, t.warps,
                dy, x, dx, sums, mu, v, layer, shared, gradients, *sizes, t.parts, t.blocks, 1, *options,
                *tile, batch,
            )  # fmt: skip
    return dx, gradients
