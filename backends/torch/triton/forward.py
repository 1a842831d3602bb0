"""The kernels of a forward pass, and what those of a backward pass share with them.

Values that go together are named tuples, which Triton takes from 3.3 on, the version of PyTorch 2.7. What its
compiler knows is in none: Triton 3.3 cannot read it there, nor take three conditions in one `and` or `or`.
"""

# Triton gives the arguments of its kernels types of their own.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Parameters(NamedTuple):
    """Those of a layer, or their gradients: where they lie, or of the channels of a program."""

    gamma: Any
    beta: Any
    center_weight: Any
    scale_weight: Any
    scale_bias: Any


class Tile(NamedTuple):
    """Where a program's values are; C or M is seen to be divisible by ALIGN."""

    n: Any  # its images
    c: Any  # its channels
    inside: Any  # which of its planes there are
    part: Any  # its part of the positions
    begin: Any  # the first of these
    offsets: Any  # where the first BLOCK positions of every plane lie
    C: Any
    M: Any


class Planes(NamedTuple):
    """The moments of all planes, in `parts` of `span` positions each: (parts, N, C)."""

    mu: Any
    v: Any
    N: Any
    C: Any
    M: Any
    parts: Any
    span: Any


class Channel(NamedTuple):
    """What a channel's planes share: the origin of their means, E from there, and 1 / sqrt(Var + eps)."""

    origin: Any
    mean_0: Any
    inverse_std: Any


class Plane(NamedTuple):
    """What becomes of a plane: X_cm - X, the mean of X_m, K_s, R and a."""

    shift: Any
    deviation: Any
    k: Any
    restriction: Any
    a: Any


# ---- arithmetic ----


@triton.jit
def quotient(a, b):
    """A / b, correctly rounded; the plain division is not in float32."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def root(a):
    """The square root of a, correctly rounded."""
    return tl.sqrt(a) if a.dtype == tl.float64 else tl.sqrt_rn(a)


@triton.jit
def _restricted(z, RESTRICT: tl.constexpr):
    """R(z); a NaN stays one."""
    if RESTRICT == "sigmoid":
        r = 1 / (1 + tl.exp(-z))
    else:
        r = z / 6 + 0.5
        r = tl.where(r < 0, 0.0, tl.where(r > 1, 1.0, r))
    return r


# ---- on a tile of the image ----


@triton.jit
def tile_of(
    program, N, C, M, parts, blocks,
    ALIGN: tl.constexpr, LAST: tl.constexpr,
    IMAGES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The tile of a program."""
    # What the values lie side by side along is seen to be divisible by ALIGN.
    C = C // ALIGN * ALIGN if LAST else C
    M = M if LAST else M // ALIGN * ALIGN
    tiles = tl.cdiv(C, CHANNELS)
    rest = program // tiles
    n = (rest // parts * IMAGES + tl.arange(0, IMAGES)).to(tl.int64)
    c = program % tiles * CHANNELS + tl.arange(0, CHANNELS)
    part = (rest % parts).to(tl.int64)
    inside = (n < N)[:, None] & (c < C)[None, :]
    begin = part * blocks * BLOCK
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    image = n[:, None] * C * M
    if LAST:
        offsets = (image + c[None, :])[:, :, None] + (lanes * C)[None, None, :]
    else:
        offsets = (image + c[None, :].to(tl.int64) * M)[:, :, None] + lanes[None, None, :]
    return Tile(n, c, inside, part, begin, offsets, C, M)


@triton.jit
def block_of(tile, k, BLOCK: tl.constexpr, LAST: tl.constexpr):
    """Where the k-th block of positions lies, and which of them there are."""
    start = tile.begin + k * BLOCK
    here = tile.inside[:, :, None] & (start + tl.arange(0, BLOCK) < tile.M)[None, None, :]
    return tile.offsets + (start * tile.C if LAST else start), here


@triton.jit
def _moments(
    x, first, here, tile, blocks, ONE: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """The mean and biased variance of a part of every plane, whose first block is already there.

    Of several blocks every lane takes its own, value by value (Welford 1962); then those of all lanes are
    combined (Chan et al. 1983).
    """
    values = tl.minimum(tile.M - tile.begin, blocks * BLOCK).to(tl.int32)
    size = values.to(first.dtype)
    if ONE:
        mean = quotient(tl.sum(first, axis=2), size)
        deviations = tl.where(here, first - mean[:, :, None], 0.0)
        squares = deviations * deviations
    else:
        means = first
        squares = tl.zeros_like(first)
        for k in range(1, blocks):
            at, here = block_of(tile, k, BLOCK, LAST)
            value = tl.load(x + at, mask=here, other=0.0).to(first.dtype)
            delta = tl.where(here, value - means, 0.0)
            means += delta * (1 / tl.full((1, 1, 1), k + 1, first.dtype))
            squares += delta * (value - means)
        whole = values // BLOCK
        rest = values - whole * BLOCK
        counts = (whole + (tl.arange(0, BLOCK) < rest).to(tl.int32)).to(first.dtype)[None, None, :]
        mean = quotient(tl.sum(counts * means, axis=2), size)
        deviations = means - mean[:, :, None]
        squares += counts * deviations * deviations
    return mean, quotient(tl.sum(squares, axis=2), size)


# ---- on (N, C) numbers: `calibrate` ----


@triton.jit
def parameter(values, c, C, otherwise, dtype: tl.constexpr):
    """A parameter of the channels c, or what stands for one that the layer lacks."""
    return (
        tl.full(c.shape, otherwise, dtype) if values is None else tl.load(values + c, mask=c < C, other=0.0)
    )


@triton.jit
def parameters_of(layer, center_weight, c, C, dtype: tl.constexpr):
    """The parameters of the channels c, one of which is there already."""
    return Parameters(
        parameter(layer.gamma, c, C, 1, dtype),
        parameter(layer.beta, c, C, 0, dtype),
        center_weight,
        parameter(layer.scale_weight, c, C, 0, dtype),
        parameter(layer.scale_bias, c, C, 0, dtype),
    )


@triton.jit
def planes_of(k, c, C, N, BATCH: tl.constexpr):
    """Where the planes of the k-th BATCH images lie in (N, C) arrays, and which of them there are."""
    n = k * BATCH + tl.arange(0, BATCH).to(tl.int64)
    return n[:, None] * C + c[None, :], (n < N)[:, None] & (c < C)[None, :]


@triton.jit
def _combined(planes, k, c, BATCH: tl.constexpr, PARTS: tl.constexpr):
    """The moments of the k-th BATCH whole planes from those of their parts (Chan et al. 1983)."""
    at, inside = planes_of(k, c, planes.C, planes.N, BATCH)
    s = tl.arange(0, PARTS).to(tl.int64)
    parts_at = at[:, None, :] + (s * planes.N)[None, :, None] * planes.C
    there = inside[:, None, :] & (s < planes.parts)[None, :, None]
    means = tl.load(planes.mu + parts_at, mask=there, other=0.0)
    variances = tl.load(planes.v + parts_at, mask=there, other=0.0)
    values = tl.maximum(tl.minimum(planes.M - s * planes.span, planes.span), 0).to(means.dtype)
    shares = quotient(values, tl.full((PARTS,), planes.M, means.dtype))[None, :, None]
    mean = tl.sum(shares * means, axis=1)
    deviations = means - mean[:, None, :]
    return mean, tl.sum(shares * (variances + deviations * deviations), axis=1), at, inside


@triton.jit
def _shift(mu_0, v, center_weight, EPS: tl.constexpr, CENTERING: tl.constexpr):
    """X_cm - X of every plane."""
    if CENTERING == "channel_mean":
        shift = center_weight[None, :] * mu_0
    elif CENTERING == "channel_std":
        shift = center_weight[None, :] * root(v + EPS)
    else:
        shift = tl.zeros_like(mu_0)
    return shift


@triton.jit
def channel_of(
    planes, layer, center_weight, c, batches,
    EPS: tl.constexpr, CENTERING: tl.constexpr, BATCH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What the planes of the channels c share, and Var."""
    C = planes.C
    dtype: tl.constexpr = planes.mu.dtype.element_ty
    if layer.running_mean is None:
        images = tl.full(c.shape, planes.N, dtype)
        total = tl.zeros(c.shape, dtype)
        for k in range(batches):
            mean, variance, _, inside = _combined(planes, k, c, BATCH, PARTS)
            total += tl.sum(mean, axis=0)
        origin = quotient(total, images)
        total = tl.zeros(c.shape, dtype)
        for k in range(batches):
            mean, variance, _, inside = _combined(planes, k, c, BATCH, PARTS)
            mu_0 = mean - origin[None, :]
            shifted = mu_0 + _shift(mu_0, variance, center_weight, EPS, CENTERING)
            total += tl.sum(tl.where(inside, shifted, 0.0), axis=0)
        mean_0 = quotient(total, images)
        total = tl.zeros(c.shape, dtype)
        for k in range(batches):
            mean, variance, _, inside = _combined(planes, k, c, BATCH, PARTS)
            mu_0 = mean - origin[None, :]
            deviation = mu_0 + _shift(mu_0, variance, center_weight, EPS, CENTERING) - mean_0[None, :]
            total += tl.sum(tl.where(inside, variance + deviation * deviation, 0.0), axis=0)
        var = quotient(total, images)
    else:
        origin = tl.zeros(c.shape, dtype)
        mean_0 = tl.load(layer.running_mean + c, mask=c < C, other=0.0)
        var = tl.load(layer.running_var + c, mask=c < C, other=1.0)
    return Channel(origin, mean_0, quotient(tl.full(c.shape, 1, dtype), root(var + EPS))), var


@triton.jit
def store_channel(channels, channel, c, C):
    """Write what the planes of the channels c share, for the programs of the next launch."""
    tl.store(channels + c, channel.origin, mask=c < C)
    tl.store(channels + C + c, channel.mean_0, mask=c < C)
    tl.store(channels + 2 * C + c, channel.inverse_std, mask=c < C)


@triton.jit
def stored_channel(channels, c, C):
    """What `store_channel` wrote."""
    return Channel(
        tl.load(channels + c, mask=c < C, other=0.0),
        tl.load(channels + C + c, mask=c < C, other=0.0),
        tl.load(channels + 2 * C + c, mask=c < C, other=0.0),
    )


@triton.jit
def plane_of(
    mu, v, parameters, channel,
    EPS: tl.constexpr, CENTERING: tl.constexpr, SCALING: tl.constexpr, RESTRICT: tl.constexpr,
):  # fmt: skip
    """What becomes of every plane."""
    inverse_std = channel.inverse_std
    mu_0 = mu - channel.origin[None, :]
    shift = _shift(mu_0, v, parameters.center_weight, EPS, CENTERING)
    deviation = mu_0 + shift - channel.mean_0[None, :]
    k = mu
    if SCALING == "channel_mean":
        k = deviation * inverse_std[None, :]
    elif SCALING == "channel_std":
        k = root(v * (inverse_std * inverse_std)[None, :] + EPS)
    if SCALING is None:
        restriction = tl.full(mu.shape, 1, mu.dtype)
    else:
        restriction = _restricted(
            parameters.scale_weight[None, :] * k + parameters.scale_bias[None, :], RESTRICT
        )
    return Plane(shift, deviation, k, restriction, restriction * (inverse_std * parameters.gamma)[None, :])


@triton.jit
def _store_statistics(mean, var, channel, variance, center_weight, c, C, CENTERING: tl.constexpr):
    """Write E(X_cm) and Var(X_cm) of the batch."""
    origin = channel.origin
    if CENTERING == "channel_mean":
        origin += center_weight * origin
    tl.store(mean + c, origin + channel.mean_0, mask=c < C)
    tl.store(var + c, variance, mask=c < C)


# ---- the kernels ----

# How large the batch is and into how many blocks it falls is no reason to compile again, but for one block:
# its loops fall away.
kernel = triton.jit(
    do_not_specialize=["N", "span"], do_not_specialize_on_alignment=["blocks", "parts", "batches"]
)


@kernel
def measure_kernel(
    x, mu, v, N, C, M, parts, blocks,
    ONE: tl.constexpr, ALIGN: tl.constexpr, LAST: tl.constexpr,
    IMAGES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mu and v of every part of every plane, (parts, N, C) each."""
    tile = tile_of(tl.program_id(0), N, C, M, parts, blocks, ALIGN, LAST, IMAGES, CHANNELS, BLOCK)
    at, here = block_of(tile, 0, BLOCK, LAST)
    first = tl.load(x + at, mask=here, other=0.0).to(mu.dtype.element_ty)
    mean, variance = _moments(x, first, here, tile, blocks, ONE, BLOCK, LAST)
    plane = (tile.part * N + tile.n[:, None]) * tile.C + tile.c[None, :]
    tl.store(mu + plane, mean, mask=tile.inside)
    tl.store(v + plane, variance, mask=tile.inside)


@kernel
def calibrate_kernel(
    part_mu, part_v, mu, v, layer, channels, mean, var, N, C, M, parts, span, batches,
    EPS: tl.constexpr, CENTERING: tl.constexpr,
    CHANNELS: tl.constexpr, BATCH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What a channel's planes share, into `channels`; and their mu and v, if measured in parts."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    planes = Planes(part_mu, part_v, N, C, M, parts, span)
    if layer.running_mean is None:
        weight = parameter(layer.center_weight, c, C, 0, mu.dtype.element_ty)
        channel, variance = channel_of(planes, layer, weight, c, batches, EPS, CENTERING, BATCH, PARTS)
        store_channel(channels, channel, c, C)
        _store_statistics(mean, var, channel, variance, weight, c, C, CENTERING)
    if PARTS > 1:
        for k in range(batches):
            whole_mu, whole_v, at, inside = _combined(planes, k, c, BATCH, PARTS)
            tl.store(mu + at, whole_mu, mask=inside)
            tl.store(v + at, whole_v, mask=inside)


@kernel
def transform_kernel(
    x, y, mu, v, layer, channels, mean, var, N, C, M, parts, blocks, batches,
    EPS: tl.constexpr, CENTERING: tl.constexpr, SCALING: tl.constexpr, RESTRICT: tl.constexpr,
    MEASURE: tl.constexpr, ONE: tl.constexpr, ALIGN: tl.constexpr, LAST: tl.constexpr,
    IMAGES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Y = a X + b; with MEASURE of planes that are whole in the tile and measured here."""
    dtype: tl.constexpr = mu.dtype.element_ty
    PLAIN: tl.constexpr = CENTERING is None and SCALING is None
    # Backwards: what the pass before read last is still near.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    tile = tile_of(program, N, C, M, parts, blocks, ALIGN, LAST, IMAGES, CHANNELS, BLOCK)
    c, C = tile.c, tile.C
    at, here = block_of(tile, 0, BLOCK, LAST)
    first = tl.load(x + at, mask=here, other=0.0).to(dtype)

    weight = parameter(layer.center_weight, c, C, 0, dtype)
    if channels is None:
        planes = Planes(mu, v, N, C, tile.M, 1, tile.M)
        channel, variance = channel_of(planes, layer, weight, c, batches, EPS, CENTERING, BATCH, 1)
        if layer.running_mean is None:  # noqa: SIM102 - this one is known to the compiler
            if tl.program_id(0) < tl.cdiv(C, CHANNELS):
                _store_statistics(mean, var, channel, variance, weight, c, C, CENTERING)
    else:
        channel = stored_channel(channels, c, C)

    plane = tile.n[:, None] * C + c[None, :]
    if MEASURE:
        tile_mu, tile_v = _moments(x, first, here, tile, blocks, ONE, BLOCK, LAST)
    elif layer.running_mean is not None and PLAIN:
        # Any mu will do for the backward pass.
        tile_mu = tl.zeros((IMAGES, CHANNELS), dtype) + channel.mean_0[None, :]
        tile_v = tl.zeros((IMAGES, CHANNELS), dtype)
    else:
        tile_mu = tl.load(mu + plane, mask=tile.inside, other=0.0)
        tile_v = tl.load(v + plane, mask=tile.inside, other=0.0)
    parameters = parameters_of(layer, weight, c, C, dtype)  # not before: registers are scarce
    whole = plane_of(tile_mu, tile_v, parameters, channel, EPS, CENTERING, SCALING, RESTRICT)
    a = whole.a
    b = a * (whole.shift - channel.mean_0[None, :] - channel.origin[None, :]) + parameters.beta[None, :]

    tl.store(y + at, first * a[:, :, None] + b[:, :, None], mask=here)
    for k in range(1, blocks):
        at, here = block_of(tile, k, BLOCK, LAST)
        value = tl.load(x + at, mask=here, other=0.0).to(dtype)
        tl.store(y + at, value * a[:, :, None] + b[:, :, None], mask=here)
    if layer.running_mean is not None and (MEASURE or PLAIN):
        tl.store(mu + plane, tile_mu, mask=tile.inside)
        tl.store(v + plane, tile_v, mask=tile.inside)
