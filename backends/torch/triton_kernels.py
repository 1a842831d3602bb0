"""The passes of the two-pass form as Triton kernels, for PyTorch tensors on CUDA devices.

Forward is two launches, and so is backward: one reduces every plane, one transforms it, and its programs
compute what they need of their channels by themselves, from the (N, C) numbers that the first one left. Where
a channel has many such numbers, a small launch between the two does so once. Names are those of
`rbn_core.fused`.

A program takes a tile: IMAGES x CHANNELS planes, BLOCK positions at a time. Both memory formats take the same
kernels, and only strides differ. No sum depends on the order in which programs run: results are reproducible.
"""

# Triton gives the arguments of its kernels types of their own.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rbn.kernels.library import PARAMETERS
from rbn_core.errors import RBNValueError
from rbn_core.options import CHANNEL_STATISTICS, RESTRICTIONS, Statistic

# ---- arithmetic ----


@triton.jit
def _quotient(a, b):
    """A / b, correctly rounded; the plain division is not in float32."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _root(a):
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


@triton.jit
def _restricted_slope(r, RESTRICT: tl.constexpr):
    """R'(z) from r = R(z)."""
    if RESTRICT == "sigmoid":
        slope = r * (1 - r)
    else:
        slope = tl.where((r > 0) & (r < 1), tl.full(r.shape, 1, r.dtype) / 6, 0.0)
    return slope


# ---- where a program's values are ----


@triton.jit
def _place(program, C, parts, IMAGES: tl.constexpr, CHANNELS: tl.constexpr):
    """The images, the channels and the part of the positions that a program takes."""
    tiles = tl.cdiv(C, CHANNELS)
    rest = program // tiles
    n = (rest // parts * IMAGES + tl.arange(0, IMAGES)).to(tl.int64)
    c = program % tiles * CHANNELS + tl.arange(0, CHANNELS)
    return n, c, (rest % parts).to(tl.int64)


@triton.jit
def _aligned(C, M, ALIGN: tl.constexpr, LAST: tl.constexpr):
    """C and M, where the one that values lie side by side along is seen to be divisible by ALIGN."""
    if LAST:
        C = C // ALIGN * ALIGN
    else:
        M = M // ALIGN * ALIGN
    return C, M


@triton.jit
def _offsets(n, c, C, M, BLOCK: tl.constexpr, LAST: tl.constexpr):
    """Where the first BLOCK positions of every plane lie."""
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    image = n[:, None] * C * M
    if LAST:
        offsets = (image + c[None, :])[:, :, None] + (lanes * C)[None, None, :]
    else:
        offsets = (image + c[None, :].to(tl.int64) * M)[:, :, None] + lanes[None, None, :]
    return offsets


@triton.jit
def _block(offsets, inside, start, C, M, BLOCK: tl.constexpr, LAST: tl.constexpr):
    """Where the positions from `start` on lie, and which of them there are."""
    here = inside[:, :, None] & (start + tl.arange(0, BLOCK) < M)[None, None, :]
    step = start
    if LAST:
        step = start * C
    return offsets + step, here


# ---- on a tile of the image ----


@triton.jit
def _moments(
    x,
    first,
    here,
    offsets,
    inside,
    begin,
    blocks,
    C,
    M,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST: tl.constexpr,
):
    """The mean and biased variance of a part of every plane, whose first block is already there.

    Of several blocks every lane takes its own, value by value (Welford 1962); then those of all lanes are
    combined (Chan et al. 1983).
    """
    values = tl.minimum(M - begin, blocks * BLOCK).to(tl.int32)
    size = values.to(first.dtype)
    if ONE:
        mean = _quotient(tl.sum(first, axis=2), size)
        deviations = tl.where(here, first - mean[:, :, None], 0.0)
        squares = deviations * deviations
    else:
        means = first
        squares = tl.zeros_like(first)
        for k in range(1, blocks):
            at, here = _block(offsets, inside, begin + k * BLOCK, C, M, BLOCK, LAST)
            value = tl.load(x + at, mask=here, other=0.0).to(first.dtype)
            delta = tl.where(here, value - means, 0.0)
            means += delta * (1 / tl.full((1, 1, 1), k + 1, first.dtype))
            squares += delta * (value - means)
        whole = values // BLOCK
        rest = values - whole * BLOCK
        counts = (whole + (tl.arange(0, BLOCK) < rest).to(tl.int32)).to(first.dtype)[None, None, :]
        mean = _quotient(tl.sum(counts * means, axis=2), size)
        deviations = means - mean[:, :, None]
        squares += counts * deviations * deviations
    return mean, _quotient(tl.sum(squares, axis=2), size)


# ---- on (N, C) numbers: `calibrate` and `calibrate_backward` ----


@triton.jit
def _parameter(values, c, C, otherwise, dtype: tl.constexpr):
    """A parameter of the channels c, or what stands for one that the layer lacks."""
    if values is None:
        found = tl.full(c.shape, otherwise, dtype)
    else:
        found = tl.load(values + c, mask=c < C, other=0.0)
    return found


@triton.jit
def _planes_of(k, c, C, N, BATCH: tl.constexpr):
    """Where the planes of the k-th BATCH images lie in (N, C) arrays, and which of them there are."""
    n = k * BATCH + tl.arange(0, BATCH).to(tl.int64)
    return n[:, None] * C + c[None, :], (n < N)[:, None] & (c < C)[None, :]


@triton.jit
def _combined(mu, v, at, inside, C, N, M, parts, span, PARTS: tl.constexpr):
    """The moments of whole planes from those of their parts, of `span` positions each (Chan et al. 1983)."""
    s = tl.arange(0, PARTS).to(tl.int64)
    at = at[:, None, :] + (s * N)[None, :, None] * C
    inside = inside[:, None, :] & (s < parts)[None, :, None]
    means = tl.load(mu + at, mask=inside, other=0.0)
    variances = tl.load(v + at, mask=inside, other=0.0)
    values = tl.maximum(tl.minimum(M - s * span, span), 0).to(means.dtype)
    shares = _quotient(values, tl.full((PARTS,), M, means.dtype))[None, :, None]
    mean = tl.sum(shares * means, axis=1)
    deviations = means - mean[:, None, :]
    return mean, tl.sum(shares * (variances + deviations * deviations), axis=1)


@triton.jit
def _summed(s, at, inside, C, N, parts, PARTS: tl.constexpr):
    """S0 and S1 of whole planes from those of their parts."""
    part = tl.arange(0, PARTS).to(tl.int64)
    at = at[:, None, :] + (part * N)[None, :, None] * C
    inside = inside[:, None, :] & (part < parts)[None, :, None]
    s0 = tl.load(s + at, mask=inside, other=0.0)
    s1 = tl.load(s + tl.full((), parts, tl.int64) * N * C + at, mask=inside, other=0.0)
    return tl.sum(s0, axis=1), tl.sum(s1, axis=1)


@triton.jit
def _shift(mu_0, v, center_weight, EPS: tl.constexpr, CENTERING: tl.constexpr):
    """X_cm - X of every plane."""
    if CENTERING == "channel_mean":
        shift = center_weight[None, :] * mu_0
    elif CENTERING == "channel_std":
        shift = center_weight[None, :] * _root(v + EPS)
    else:
        shift = tl.zeros_like(mu_0)
    return shift


@triton.jit
def _channel(
    mu, v, running_mean, running_var, center_weight, c, C, N, M, parts, span, batches,
    EPS: tl.constexpr, CENTERING: tl.constexpr, BATCH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The origin of the channels' plane means, E from there, and Var."""
    dtype: tl.constexpr = mu.dtype.element_ty
    if running_mean is None:
        images = tl.full(c.shape, N, dtype)
        total = tl.zeros(c.shape, dtype)
        for k in range(batches):
            at, inside = _planes_of(k, c, C, N, BATCH)
            mean, variance = _combined(mu, v, at, inside, C, N, M, parts, span, PARTS)
            total += tl.sum(mean, axis=0)
        origin = _quotient(total, images)
        total = tl.zeros(c.shape, dtype)
        for k in range(batches):
            at, inside = _planes_of(k, c, C, N, BATCH)
            mean, variance = _combined(mu, v, at, inside, C, N, M, parts, span, PARTS)
            mu_0 = mean - origin[None, :]
            shifted = mu_0 + _shift(mu_0, variance, center_weight, EPS, CENTERING)
            total += tl.sum(tl.where(inside, shifted, 0.0), axis=0)
        mean_0 = _quotient(total, images)
        total = tl.zeros(c.shape, dtype)
        for k in range(batches):
            at, inside = _planes_of(k, c, C, N, BATCH)
            mean, variance = _combined(mu, v, at, inside, C, N, M, parts, span, PARTS)
            mu_0 = mean - origin[None, :]
            deviation = mu_0 + _shift(mu_0, variance, center_weight, EPS, CENTERING) - mean_0[None, :]
            total += tl.sum(tl.where(inside, variance + deviation * deviation, 0.0), axis=0)
        var = _quotient(total, images)
    else:
        origin = tl.zeros(c.shape, dtype)
        mean_0 = tl.load(running_mean + c, mask=c < C, other=0.0)
        var = tl.load(running_var + c, mask=c < C, other=1.0)
    return origin, mean_0, var


@triton.jit
def _inverse_std(var, EPS: tl.constexpr):
    return _quotient(tl.full(var.shape, 1, var.dtype), _root(var + EPS))


@triton.jit
def _plane(
    mu, v, gamma, center_weight, scale_weight, scale_bias, origin, mean_0, inverse_std,
    EPS: tl.constexpr, CENTERING: tl.constexpr, SCALING: tl.constexpr, RESTRICT: tl.constexpr,
):  # fmt: skip
    """The shift, deviation, K_s, R and a of every plane."""
    mu_0 = mu - origin[None, :]
    shift = _shift(mu_0, v, center_weight, EPS, CENTERING)
    deviation = mu_0 + shift - mean_0[None, :]
    k = mu
    if SCALING == "channel_mean":
        k = deviation * inverse_std[None, :]
    elif SCALING == "channel_std":
        k = _root(v * (inverse_std * inverse_std)[None, :] + EPS)
    if SCALING is None:
        restriction = tl.full(mu.shape, 1, mu.dtype)
    else:
        restriction = _restricted(scale_weight[None, :] * k + scale_bias[None, :], RESTRICT)
    return shift, deviation, k, restriction, restriction * (inverse_std * gamma)[None, :]


@triton.jit
def _scaling_gradients(
    s0, s1, deviation, restriction, gamma, scale_weight, inverse_std,
    SCALING: tl.constexpr, RESTRICT: tl.constexpr,
):  # fmt: skip
    """The gradients of a, of z = w_v K_s + w_b, and of K_s, in every plane."""
    da = s1 + s0 * deviation
    if SCALING is None:
        dz = tl.zeros_like(da)
    else:
        dz = da * (gamma * inverse_std)[None, :] * _restricted_slope(restriction, RESTRICT)
    return da, dz, dz * scale_weight[None, :]


@triton.jit
def _plane_gradients(
    s0, da, dk, v, k, a, deviation, center_weight, inverse_std, dvar, dmean,
    EPS: tl.constexpr, CENTERING: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """The gradients of mu, v and the shift of every plane, from its share of its channel's dvar and dmean."""
    dshifted = 2 * dvar[None, :] * deviation + dmean[None, :]
    dmu = tl.zeros_like(da)
    dv = dmu + dvar[None, :]
    if SCALING == "channel_mean":
        dshifted += dk * inverse_std[None, :]
    elif SCALING == "channel_std":
        dv += dk * (inverse_std * inverse_std)[None, :] / (2 * k)
    elif SCALING == "input_mean":
        dmu += dk
    dshift = s0 * a + dshifted
    dmu += dshifted
    if CENTERING == "channel_mean":
        dmu += dshift * center_weight[None, :]
    elif CENTERING == "channel_std":
        dv += dshift * center_weight[None, :] / (2 * _root(v + EPS))
    return dmu, dv, dshift


@triton.jit
def _channel_gradients(
    s, mu, v, gamma, center_weight, scale_weight, scale_bias, origin, mean_0, inverse_std,
    c, C, N, parts, batches,
    EPS: tl.constexpr, CENTERING: tl.constexpr, SCALING: tl.constexpr, RESTRICT: tl.constexpr,
    BATCH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The gradients of the batch's Var and E from `origin` on, divided by N: each plane's share."""
    dmean = tl.zeros(c.shape, mu.dtype.element_ty)
    dinverse_std = tl.zeros(c.shape, mu.dtype.element_ty)
    for i in range(batches):
        at, inside = _planes_of(i, c, C, N, BATCH)
        s0, s1 = _summed(s, at, inside, C, N, parts, PARTS)
        variance = tl.load(v + at, mask=inside, other=0.0)
        _, deviation, k, restriction, a = _plane(
            tl.load(mu + at, mask=inside, other=0.0), variance,
            gamma, center_weight, scale_weight, scale_bias, origin, mean_0, inverse_std,
            EPS, CENTERING, SCALING, RESTRICT,
        )  # fmt: skip
        da, _, dk = _scaling_gradients(
            s0, s1, deviation, restriction, gamma, scale_weight, inverse_std, SCALING, RESTRICT
        )
        through_mean = s0 * a
        through_std = da * restriction * gamma[None, :]
        if SCALING == "channel_mean":
            through_mean += dk * inverse_std[None, :]
            through_std += dk * deviation
        elif SCALING == "channel_std":
            through_std += dk * variance * inverse_std[None, :] / k
        dmean -= tl.sum(through_mean, axis=0)
        dinverse_std += tl.sum(through_std, axis=0)
    images = tl.full(c.shape, N, dmean.dtype)
    # Var = mean_n v + mean_n deviation^2, whose own mean term cancels.
    dvar = -0.5 * dinverse_std * inverse_std * inverse_std * inverse_std / images
    return dvar, dmean / images


@triton.jit
def _store_parameter_gradients(
    dgamma, dbeta, dcenter_weight, dscale_weight, dscale_bias,
    s, mu, v, gamma, center_weight, scale_weight, scale_bias, origin, mean_0, inverse_std, dvar, dmean,
    c, C, N, parts, batches,
    EPS: tl.constexpr, CENTERING: tl.constexpr, SCALING: tl.constexpr, RESTRICT: tl.constexpr,
    BATCH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the channels' parameters, those that somebody wants."""
    to_gamma = tl.zeros(c.shape, mu.dtype.element_ty)
    to_beta = tl.zeros(c.shape, mu.dtype.element_ty)
    to_center_weight = tl.zeros(c.shape, mu.dtype.element_ty)
    to_scale_weight = tl.zeros(c.shape, mu.dtype.element_ty)
    to_scale_bias = tl.zeros(c.shape, mu.dtype.element_ty)
    for i in range(batches):
        at, inside = _planes_of(i, c, C, N, BATCH)
        s0, s1 = _summed(s, at, inside, C, N, parts, PARTS)
        mean = tl.load(mu + at, mask=inside, other=0.0)
        variance = tl.load(v + at, mask=inside, other=0.0)
        _, deviation, k, restriction, a = _plane(
            mean, variance, gamma, center_weight, scale_weight, scale_bias, origin, mean_0, inverse_std,
            EPS, CENTERING, SCALING, RESTRICT,
        )  # fmt: skip
        da, dz, dk = _scaling_gradients(
            s0, s1, deviation, restriction, gamma, scale_weight, inverse_std, SCALING, RESTRICT
        )
        _, _, dshift = _plane_gradients(
            s0, da, dk, variance, k, a, deviation, center_weight, inverse_std, dvar, dmean,
            EPS, CENTERING, SCALING,
        )  # fmt: skip
        dshift = tl.where(inside, dshift, 0.0)
        to_gamma += tl.sum(da * restriction, axis=0) * inverse_std
        to_beta += tl.sum(s0, axis=0)
        to_scale_weight += tl.sum(dz * k, axis=0)
        to_scale_bias += tl.sum(dz, axis=0)
        if CENTERING == "channel_mean":
            to_center_weight += tl.sum(dshift * (mean - origin[None, :]), axis=0)
        elif CENTERING == "channel_std":
            to_center_weight += tl.sum(dshift * _root(variance + EPS), axis=0)
    if dgamma is not None:
        tl.store(dgamma + c, to_gamma, mask=c < C)
    if dbeta is not None:
        tl.store(dbeta + c, to_beta, mask=c < C)
    if dcenter_weight is not None:
        tl.store(dcenter_weight + c, to_center_weight, mask=c < C)
    if dscale_weight is not None:
        tl.store(dscale_weight + c, to_scale_weight, mask=c < C)
    if dscale_bias is not None:
        tl.store(dscale_bias + c, to_scale_bias, mask=c < C)


@triton.jit
def _store_statistics(mean, var, origin, mean_0, variance, center_weight, c, C, CENTERING: tl.constexpr):
    """Write E(X_cm) and Var(X_cm) of the batch."""
    if CENTERING == "channel_mean":
        origin += center_weight * origin
    tl.store(mean + c, origin + mean_0, mask=c < C)
    tl.store(var + c, variance, mask=c < C)


# ---- the kernels ----

# How large the batch is and into how many blocks it falls is no reason to compile again, but for one block:
# its loops fall away.
kernel = triton.jit(
    do_not_specialize=["N", "span"], do_not_specialize_on_alignment=["blocks", "parts", "batches"]
)


@kernel
def _measure_kernel(
    x, mu, v, N, C, M, parts, blocks,
    ONE: tl.constexpr, ALIGN: tl.constexpr, LAST: tl.constexpr,
    IMAGES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mu and v of every part of every plane, (parts, N, C) each."""
    C, M = _aligned(C, M, ALIGN, LAST)
    n, c, part = _place(tl.program_id(0), C, parts, IMAGES, CHANNELS)
    inside = (n < N)[:, None] & (c < C)[None, :]
    begin = part * blocks * BLOCK
    offsets = _offsets(n, c, C, M, BLOCK, LAST)
    at, here = _block(offsets, inside, begin, C, M, BLOCK, LAST)
    first = tl.load(x + at, mask=here, other=0.0).to(mu.dtype.element_ty)
    mean, variance = _moments(x, first, here, offsets, inside, begin, blocks, C, M, ONE, BLOCK, LAST)
    plane = (part * N + n[:, None]) * C + c[None, :]
    tl.store(mu + plane, mean, mask=inside)
    tl.store(v + plane, variance, mask=inside)


@kernel
def _calibrate_kernel(
    part_mu, part_v, mu, v, running_mean, center_weight, channels, mean, var,
    N, C, M, parts, span, batches,
    EPS: tl.constexpr, CENTERING: tl.constexpr,
    CHANNELS: tl.constexpr, BATCH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What a channel's planes share, into `channels`; and their mu and v, if measured in parts."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    if running_mean is None:
        weight = _parameter(center_weight, c, C, 0, mu.dtype.element_ty)
        origin, mean_0, variance = _channel(
            part_mu, part_v, None, None, weight, c, C, N, M, parts, span, batches,
            EPS, CENTERING, BATCH, PARTS,
        )  # fmt: skip
        tl.store(channels + c, origin, mask=c < C)
        tl.store(channels + C + c, mean_0, mask=c < C)
        tl.store(channels + 2 * C + c, _inverse_std(variance, EPS), mask=c < C)
        _store_statistics(mean, var, origin, mean_0, variance, weight, c, C, CENTERING)
    if PARTS > 1:
        for k in range(batches):
            at, inside = _planes_of(k, c, C, N, BATCH)
            whole_mu, whole_v = _combined(part_mu, part_v, at, inside, C, N, M, parts, span, PARTS)
            tl.store(mu + at, whole_mu, mask=inside)
            tl.store(v + at, whole_v, mask=inside)


@kernel
def _transform_kernel(
    x, y, mu, v, gamma, beta, center_weight, scale_weight, scale_bias, running_mean, running_var,
    channels, mean, var, N, C, M, parts, blocks, batches,
    EPS: tl.constexpr, CENTERING: tl.constexpr, SCALING: tl.constexpr, RESTRICT: tl.constexpr,
    MEASURE: tl.constexpr, ONE: tl.constexpr, ALIGN: tl.constexpr, LAST: tl.constexpr,
    IMAGES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Y = a X + b; with MEASURE of planes that are whole in the tile and measured here."""
    dtype: tl.constexpr = mu.dtype.element_ty
    C, M = _aligned(C, M, ALIGN, LAST)
    # Backwards: what the pass before read last is still near.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    n, c, part = _place(program, C, parts, IMAGES, CHANNELS)
    inside = (n < N)[:, None] & (c < C)[None, :]
    begin = part * blocks * BLOCK
    offsets = _offsets(n, c, C, M, BLOCK, LAST)
    at, here = _block(offsets, inside, begin, C, M, BLOCK, LAST)
    first = tl.load(x + at, mask=here, other=0.0).to(dtype)

    weight = _parameter(center_weight, c, C, 0, dtype)
    if channels is None:
        origin, mean_0, variance = _channel(
            mu, v, running_mean, running_var, weight, c, C, N, M, 1, M, batches, EPS, CENTERING, BATCH, 1
        )
        inverse_std = _inverse_std(variance, EPS)
        if running_mean is None:  # noqa: SIM102 - this one is known to the compiler
            if tl.program_id(0) < tl.cdiv(C, CHANNELS):
                _store_statistics(mean, var, origin, mean_0, variance, weight, c, C, CENTERING)
    else:
        origin = tl.load(channels + c, mask=c < C, other=0.0)
        mean_0 = tl.load(channels + C + c, mask=c < C, other=0.0)
        inverse_std = tl.load(channels + 2 * C + c, mask=c < C, other=0.0)

    plane = n[:, None] * C + c[None, :]
    if MEASURE:
        tile_mu, tile_v = _moments(x, first, here, offsets, inside, begin, blocks, C, M, ONE, BLOCK, LAST)
    elif running_mean is not None and CENTERING is None and SCALING is None:
        tile_mu = tl.zeros((IMAGES, CHANNELS), dtype) + mean_0[None, :]  # any will do for the backward pass
        tile_v = tl.zeros((IMAGES, CHANNELS), dtype)
    else:
        tile_mu = tl.load(mu + plane, mask=inside, other=0.0)
        tile_v = tl.load(v + plane, mask=inside, other=0.0)
    shift, _, _, _, a = _plane(
        tile_mu, tile_v,
        _parameter(gamma, c, C, 1, dtype), weight,
        _parameter(scale_weight, c, C, 0, dtype), _parameter(scale_bias, c, C, 0, dtype),
        origin, mean_0, inverse_std, EPS, CENTERING, SCALING, RESTRICT,
    )  # fmt: skip
    b = a * (shift - mean_0[None, :] - origin[None, :]) + _parameter(beta, c, C, 0, dtype)[None, :]

    tl.store(y + at, first * a[:, :, None] + b[:, :, None], mask=here)
    for k in range(1, blocks):
        at, here = _block(offsets, inside, begin + k * BLOCK, C, M, BLOCK, LAST)
        value = tl.load(x + at, mask=here, other=0.0).to(dtype)
        tl.store(y + at, value * a[:, :, None] + b[:, :, None], mask=here)
    if running_mean is not None and (MEASURE or (CENTERING is None and SCALING is None)):
        tl.store(mu + plane, tile_mu, mask=inside)
        tl.store(v + plane, tile_v, mask=inside)


@kernel
def _sums_kernel(
    dy, x, mu, s, N, C, M, parts, blocks,
    ALIGN: tl.constexpr, LAST: tl.constexpr,
    IMAGES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """S0 and S1 of every part of every plane, (2, parts, N, C)."""
    dtype: tl.constexpr = mu.dtype.element_ty
    C, M = _aligned(C, M, ALIGN, LAST)
    n, c, part = _place(tl.program_id(0), C, parts, IMAGES, CHANNELS)
    inside = (n < N)[:, None] & (c < C)[None, :]
    begin = part * blocks * BLOCK
    offsets = _offsets(n, c, C, M, BLOCK, LAST)
    at, here = _block(offsets, inside, begin, C, M, BLOCK, LAST)
    s0 = tl.load(dy + at, mask=here, other=0.0).to(dtype)
    first = tl.load(x + at, mask=here, other=0.0).to(dtype)
    tile_mu = tl.load(mu + n[:, None] * C + c[None, :], mask=inside, other=0.0)[:, :, None]
    s1 = s0 * (first - tile_mu)
    for k in range(1, blocks):
        at, here = _block(offsets, inside, begin + k * BLOCK, C, M, BLOCK, LAST)
        gradient = tl.load(dy + at, mask=here, other=0.0).to(dtype)
        value = tl.load(x + at, mask=here, other=0.0).to(dtype)
        s0 += gradient
        s1 += gradient * (value - tile_mu)
    plane = (part * N + n[:, None]) * C + c[None, :]
    tl.store(s + plane, tl.sum(s0, axis=2), mask=inside)
    tl.store(s + tl.full((), parts, tl.int64) * N * C + plane, tl.sum(s1, axis=2), mask=inside)


@kernel
def _calibrate_backward_kernel(
    part_s, s, mu, v, gamma, center_weight, scale_weight, scale_bias, running_mean, running_var, channels,
    dgamma, dbeta, dcenter_weight, dscale_weight, dscale_bias, N, C, M, parts, batches,
    EPS: tl.constexpr, CENTERING: tl.constexpr, SCALING: tl.constexpr, RESTRICT: tl.constexpr,
    CHANNELS: tl.constexpr, BATCH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The gradients of a channel's parameters, what its planes share into `channels`, and S0 and S1."""
    dtype: tl.constexpr = mu.dtype.element_ty
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    gamma = _parameter(gamma, c, C, 1, dtype)
    center_weight = _parameter(center_weight, c, C, 0, dtype)
    scale_weight = _parameter(scale_weight, c, C, 0, dtype)
    scale_bias = _parameter(scale_bias, c, C, 0, dtype)
    origin, mean_0, variance = _channel(
        mu, v, running_mean, running_var, center_weight, c, C, N, M, 1, M, batches, EPS, CENTERING, BATCH, 1
    )
    inverse_std = _inverse_std(variance, EPS)
    dvar = tl.zeros(c.shape, dtype)
    dmean = tl.zeros(c.shape, dtype)
    if running_mean is None:
        dvar, dmean = _channel_gradients(
            part_s, mu, v, gamma, center_weight, scale_weight, scale_bias, origin, mean_0, inverse_std,
            c, C, N, parts, batches, EPS, CENTERING, SCALING, RESTRICT, BATCH, PARTS,
        )  # fmt: skip
    _store_parameter_gradients(
        dgamma, dbeta, dcenter_weight, dscale_weight, dscale_bias, part_s, mu, v,
        gamma, center_weight, scale_weight, scale_bias, origin, mean_0, inverse_std, dvar, dmean,
        c, C, N, parts, batches, EPS, CENTERING, SCALING, RESTRICT, BATCH, PARTS,
    )  # fmt: skip
    tl.store(channels + c, origin, mask=c < C)
    tl.store(channels + C + c, mean_0, mask=c < C)
    tl.store(channels + 2 * C + c, inverse_std, mask=c < C)
    tl.store(channels + 3 * C + c, dvar, mask=c < C)
    tl.store(channels + 4 * C + c, dmean, mask=c < C)
    if PARTS > 1:
        for i in range(batches):
            at, inside = _planes_of(i, c, C, N, BATCH)
            s0, s1 = _summed(part_s, at, inside, C, N, parts, PARTS)
            tl.store(s + at, s0, mask=inside)
            tl.store(s + tl.full((), N, tl.int64) * C + at, s1, mask=inside)


@kernel
def _transform_backward_kernel(
    dy, x, dx, s, mu, v, gamma, center_weight, scale_weight, scale_bias, running_mean, running_var, channels,
    dgamma, dbeta, dcenter_weight, dscale_weight, dscale_bias, N, C, M, parts, blocks, batches,
    EPS: tl.constexpr, CENTERING: tl.constexpr, SCALING: tl.constexpr, RESTRICT: tl.constexpr,
    ALIGN: tl.constexpr, LAST: tl.constexpr,
    IMAGES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """dX = a dY + e (X - mu) + f."""
    dtype: tl.constexpr = mu.dtype.element_ty
    C, M = _aligned(C, M, ALIGN, LAST)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    n, c, part = _place(program, C, parts, IMAGES, CHANNELS)
    inside = (n < N)[:, None] & (c < C)[None, :]
    begin = part * blocks * BLOCK
    offsets = _offsets(n, c, C, M, BLOCK, LAST)
    at, here = _block(offsets, inside, begin, C, M, BLOCK, LAST)
    gradient = tl.load(dy + at, mask=here, other=0.0).to(dtype)
    # No statistic of X is in Y: what X is does not matter, not even where it is NaN.
    if running_mean is None or CENTERING is not None or SCALING is not None:
        value = tl.load(x + at, mask=here, other=0.0).to(dtype)

    gamma = _parameter(gamma, c, C, 1, dtype)
    center_weight = _parameter(center_weight, c, C, 0, dtype)
    scale_weight = _parameter(scale_weight, c, C, 0, dtype)
    scale_bias = _parameter(scale_bias, c, C, 0, dtype)
    if channels is None:
        origin, mean_0, variance = _channel(
            mu,
            v,
            running_mean,
            running_var,
            center_weight,
            c,
            C,
            N,
            M,
            1,
            M,
            batches,
            EPS,
            CENTERING,
            BATCH,
            1,
        )
        inverse_std = _inverse_std(variance, EPS)
        dvar = tl.zeros(c.shape, dtype)
        dmean = tl.zeros(c.shape, dtype)
        if running_mean is None:
            dvar, dmean = _channel_gradients(
                s, mu, v, gamma, center_weight, scale_weight, scale_bias, origin, mean_0, inverse_std,
                c, C, N, 1, batches, EPS, CENTERING, SCALING, RESTRICT, BATCH, 1,
            )  # fmt: skip
        if tl.program_id(0) < tl.cdiv(C, CHANNELS):
            _store_parameter_gradients(
                dgamma, dbeta, dcenter_weight, dscale_weight, dscale_bias, s, mu, v,
                gamma, center_weight, scale_weight, scale_bias, origin, mean_0, inverse_std, dvar, dmean,
                c, C, N, 1, batches, EPS, CENTERING, SCALING, RESTRICT, BATCH, 1,
            )  # fmt: skip
    else:
        origin = tl.load(channels + c, mask=c < C, other=0.0)
        mean_0 = tl.load(channels + C + c, mask=c < C, other=0.0)
        inverse_std = tl.load(channels + 2 * C + c, mask=c < C, other=0.0)
        dvar = tl.load(channels + 3 * C + c, mask=c < C, other=0.0)
        dmean = tl.load(channels + 4 * C + c, mask=c < C, other=0.0)

    plane = n[:, None] * C + c[None, :]
    tile_mu = tl.load(mu + plane, mask=inside, other=0.0)
    tile_v = tl.load(v + plane, mask=inside, other=0.0)
    _, deviation, k, restriction, a = _plane(
        tile_mu, tile_v, gamma, center_weight, scale_weight, scale_bias, origin, mean_0, inverse_std,
        EPS, CENTERING, SCALING, RESTRICT,
    )  # fmt: skip
    if running_mean is None or CENTERING is not None or SCALING is not None:
        s0 = tl.load(s + plane, mask=inside, other=0.0)
        s1 = tl.load(s + tl.full((), N, tl.int64) * C + plane, mask=inside, other=0.0)
        da, _, dk = _scaling_gradients(
            s0, s1, deviation, restriction, gamma, scale_weight, inverse_std, SCALING, RESTRICT
        )
        dmu, dv, _ = _plane_gradients(
            s0,
            da,
            dk,
            tile_v,
            k,
            a,
            deviation,
            center_weight,
            inverse_std,
            dvar,
            dmean,
            EPS,
            CENTERING,
            SCALING,
        )
        positions = tl.full((1, 1), M, dtype)
        e = (2 * dv / positions)[:, :, None]
        f = (dmu / positions)[:, :, None]
        centre = tile_mu[:, :, None]
        tl.store(dx + at, gradient * a[:, :, None] + ((value - centre) * e + f), mask=here)
        for i in range(1, blocks):
            at, here = _block(offsets, inside, begin + i * BLOCK, C, M, BLOCK, LAST)
            gradient = tl.load(dy + at, mask=here, other=0.0).to(dtype)
            value = tl.load(x + at, mask=here, other=0.0).to(dtype)
            tl.store(dx + at, gradient * a[:, :, None] + ((value - centre) * e + f), mask=here)
    else:
        tl.store(dx + at, gradient * a[:, :, None], mask=here)
        for i in range(1, blocks):
            at, here = _block(offsets, inside, begin + i * BLOCK, C, M, BLOCK, LAST)
            gradient = tl.load(dy + at, mask=here, other=0.0).to(dtype)
            tl.store(dx + at, gradient * a[:, :, None], mask=here)


# ---- the layer ----

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


def _launch(compiled: dict[str, Any], kernel: Any, programs: int, warps: int, *arguments: Any) -> None:
    """Launch a kernel. Triton looks at its arguments once for a signature: it takes longer than a launch."""
    name = kernel.__name__
    if compiled.get(name) is None:
        compiled[name] = kernel[(programs,)](*arguments, num_warps=warps)
    else:
        compiled[name][(programs, 1, 1)](*arguments)


def _dense(*values: Tensor | None) -> list[Tensor | None]:
    """(C,) values without gaps in memory."""
    return [None if value is None else value.contiguous() for value in values]


def _check(
    x: Tensor,
    planes: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    running: tuple[Tensor, Tensor] | None,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
) -> None:
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
    for name, value in zip(PARAMETERS, parameters, strict=True):
        needed = centering if name == "center_weight" else scaling if name.startswith("scale") else None
        if value is None and needed is not None:
            raise RBNValueError(f"RBN: expected {name} with these options, got None. Hand it over.")
    vectors = [value for value in (*parameters, *(running or ())) if value is not None]
    for arrays, shape in ((vectors, x.shape[1:2]), (planes, x.shape[:2])):
        for value in arrays:
            if value.shape != shape or value.dtype is not wide or value.device != x.device:
                raise RBNValueError(
                    f"RBN: expected numbers of shape {tuple(shape)} in {wide} on {x.device}, got "
                    f"{tuple(value.shape)} in {value.dtype} on {value.device}. Hand over those of one layer."
                )
    known = (
        centering in (None, *CHANNEL_STATISTICS)
        and scaling in (None, *CHANNEL_STATISTICS, "input_mean")
        and restrict in RESTRICTIONS
    )
    if not known:
        raise RBNValueError(
            f"RBN: expected options of the two-pass form, got centering={centering!r}, scaling={scaling!r}, "
            f"restrict={restrict!r}. Choose others, or the plain form."
        )


def _kind(values: Tensor | None) -> bool | None:
    """What Triton compiles for: whether there is a tensor, and whether it starts at a multiple of 16."""
    return None if values is None else values.data_ptr() % 16 == 0


def forward(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    running: tuple[Tensor, Tensor] | None,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Y of eq. 12, and what `backward` needs beside X.

    Args:
        x: (N, C, *spatial), float32, float64, bfloat16 or float16, contiguous or with its channels last.
        parameters: gamma, beta, center_weight, scale_weight and scale_bias, (C,) each, float32 (float64
            beside float64), `None` for those that the layer lacks.
        running: E and Var of eq. 1, like parameters; `None` takes the batch's.
        eps: epsilon of eq. 1.
        centering: K_m of eq. 5, a statistic over channels, or `None`.
        scaling: K_s of eq. 9, likewise.
        restrict: R of eq. 9.

    Returns:
        Y, of x's dtype and memory format; mu and v, the mean and biased variance of every plane, (N, C) each;
        E and the biased Var of the batch, (C,) each, or `running`. All but Y have the parameters' dtype.

    Raises:
        RBNValueError: Something does not fit the rest.
    """
    _check(x, (), parameters, running, centering, scaling, restrict)
    images, channels, positions, last = _sizes(x)
    y = torch.empty_like(x)
    mu = torch.empty((images, channels), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    v = torch.empty_like(mu)
    mean, var = (mu.new_empty(channels), mu.new_empty(channels)) if running is None else running
    if x.numel() == 0:
        for statistic in (mu, v, mean, var) if running is None else (mu, v):
            statistic.fill_(math.nan)
        return y, mu, v, mean, var
    layer = _dense(*parameters, *(running or (None, None)))
    _, _, center_weight, *_, running_mean, _ = layer
    t = tiling(images, channels, positions, last, x.element_size(), processors(x.device))
    sizes = (images, channels, positions)
    tile = (t.blocks == 1, t.align, last, t.images, t.channels, t.block)
    options = (eps, centering, scaling, restrict)
    compiled = _compiled(x.device, x.dtype, last, *sizes, *options, *map(_kind, (x, *layer)))
    measured = running is None or centering is not None or scaling is not None
    at_once = measured and running is not None and t.parts == 1  # measured and transformed while it is near
    shared, batch = None, 1
    with torch.cuda.device_of(x):
        if measured and not at_once:
            part_mu, part_v = (mu, v) if t.parts == 1 else mu.new_empty((2, t.parts, images, channels))
            _launch(
                compiled, _measure_kernel, t.programs, t.warps,
                x, part_mu, part_v, *sizes, t.parts, t.blocks, *tile,
            )  # fmt: skip
            if t.parts > 1 or images > IN_PLACE:
                c = channel_tiling(images, channels, t.parts)
                shared = mu.new_empty((3, channels)) if running is None else None
                _launch(
                    compiled, _calibrate_kernel, c.programs, c.warps,
                    part_mu, part_v, mu, v, running_mean, center_weight, shared, mean, var,
                    *sizes, t.parts, t.blocks * t.block, c.batches, eps, centering,
                    c.channels, c.batch, c.parts,
                )  # fmt: skip
            elif running is None:
                batch = _power(images)
        _launch(
            compiled, _transform_kernel, t.programs, t.warps,
            x, y, mu, v, *layer, shared, mean, var, *sizes, t.parts, t.blocks, 1, *options,
            at_once, *tile, batch,
        )  # fmt: skip
    return y, mu, v, mean, var


def backward(
    dy: Tensor,
    x: Tensor,
    mu: Tensor,
    v: Tensor,
    parameters: Sequence[Tensor | None],
    running: tuple[Tensor, Tensor] | None,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
    needs_dx: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of X and of the parameters.

    Args:
        dy: The gradient of Y, of its shape and dtype.
        x: As in `forward`.
        mu: As `forward` returned it.
        v: As `forward` returned it.
        parameters: As in `forward`.
        running: As in `forward`.
        eps: As in `forward`.
        centering: As in `forward`.
        scaling: As in `forward`.
        restrict: As in `forward`.
        needs_dx: Whether the gradient of X is asked for.
        wanted: Whether that of each parameter is.

    Returns:
        dX, of x's dtype and memory format, and the gradients of the parameters, (C,) each; `None` for what
        was not asked for.

    Raises:
        RBNValueError: Something does not fit the rest.
    """
    _check(x, (mu, v), parameters, running, centering, scaling, restrict)
    if dy.shape != x.shape or dy.dtype is not x.dtype or dy.device != x.device:
        raise RBNValueError(
            f"RBN: expected dY of shape {tuple(x.shape)} in {x.dtype} on {x.device}, got {tuple(dy.shape)} "
            f"in {dy.dtype} on {dy.device}. Hand over the gradient of this Y."
        )
    images, channels, positions, last = _sizes(x)
    dy = dy.movedim(1, -1).contiguous().movedim(-1, 1) if last else dy.contiguous()
    dx = torch.empty_like(x) if needs_dx else None
    gradients = [mu.new_empty(channels) if want else None for want in wanted]
    if x.numel() == 0:
        return dx, [None if gradient is None else gradient.zero_() for gradient in gradients]
    gamma, _, *others = parameters  # the gradients do not depend on beta
    layer = _dense(gamma, *others, *(running or (None, None)))
    t = tiling(images, channels, positions, last, x.element_size(), processors(x.device))
    sizes = (images, channels, positions)
    tile = (t.align, last, t.images, t.channels, t.block)
    options = (eps, centering, scaling, restrict)
    kinds = map(_kind, (dy, x, mu, v, *layer))
    compiled = _compiled(x.device, x.dtype, last, *sizes, *options, *kinds, needs_dx, *wanted)
    shared, batch = None, 1
    with torch.cuda.device_of(x):
        sums = parts = mu.new_empty((2, t.parts, images, channels))
        _launch(
            compiled, _sums_kernel, t.programs, t.warps, dy, x, mu, parts, *sizes, t.parts, t.blocks, *tile
        )
        if t.parts > 1 or images > IN_PLACE or dx is None:
            c = channel_tiling(images, channels, t.parts)
            shared = mu.new_empty((5, channels))
            if t.parts > 1:
                sums = mu.new_empty((2, images, channels))
            _launch(
                compiled, _calibrate_backward_kernel, c.programs, c.warps,
                parts, sums, mu, v, *layer, shared, *gradients, *sizes, t.parts, c.batches, *options,
                c.channels, c.batch, c.parts,
            )  # fmt: skip
        else:
            batch = _power(images)
        if dx is not None:
            _launch(
                compiled, _transform_backward_kernel, t.programs, t.warps,
                dy, x, dx, sums, mu, v, *layer, shared, *gradients, *sizes, t.parts, t.blocks, 1, *options,
                *tile, batch,
            )  # fmt: skip
    return dx, gradients


def _sizes(x: Tensor) -> tuple[int, int, int, bool]:
    """N, C, M, and whether the channels lie side by side."""
    images, channels, *spatial = x.shape
    positions = math.prod(spatial)
    return images, channels, positions, positions == 1 or not x.is_contiguous()
