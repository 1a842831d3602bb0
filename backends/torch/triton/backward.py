"""The kernels of a backward pass."""

# Triton gives the arguments of its kernels types of their own.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from rbn.backends.torch.triton.forward import (
    Planes,
    block_of,
    channel_of,
    kernel,
    parameter,
    parameters_of,
    plane_of,
    planes_of,
    root,
    store_channel,
    stored_channel,
    tile_of,
)

# ---- on (N, C) numbers: `calibrate_backward` ----


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
def _restricted_slope(r, RESTRICT: tl.constexpr):
    """R'(z) from r = R(z)."""
    if RESTRICT == "sigmoid":
        slope = r * (1 - r)
    else:
        slope = tl.where((r > 0) & (r < 1), tl.full(r.shape, 1, r.dtype) / 6, 0.0)
    return slope


@triton.jit
def _scaling_gradients(s0, s1, plane, parameters, channel, SCALING: tl.constexpr, RESTRICT: tl.constexpr):
    """The gradients of a, of z = w_v K_s + w_b, and of K_s, in every plane."""
    da = s1 + s0 * plane.deviation
    if SCALING is None:
        dz = tl.zeros_like(da)
    else:
        slope = _restricted_slope(plane.restriction, RESTRICT)
        dz = da * (parameters.gamma * channel.inverse_std)[None, :] * slope
    return da, dz, dz * parameters.scale_weight[None, :]


@triton.jit
def _plane_gradients(
    s0, da, dk, v, plane, parameters, channel, dvar, dmean,
    EPS: tl.constexpr, CENTERING: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """The gradients of mu, v and the shift of every plane."""
    inverse_std = channel.inverse_std
    dshifted = 2 * dvar[None, :] * plane.deviation + dmean[None, :]
    dmu = tl.zeros_like(da)
    dv = dmu + dvar[None, :]
    if SCALING == "channel_mean":
        dshifted += dk * inverse_std[None, :]
    elif SCALING == "channel_std":
        dv += dk * (inverse_std * inverse_std)[None, :] / (2 * plane.k)
    elif SCALING == "input_mean":
        dmu += dk
    dshift = s0 * plane.a + dshifted
    dmu += dshifted
    if CENTERING == "channel_mean":
        dmu += dshift * parameters.center_weight[None, :]
    elif CENTERING == "channel_std":
        dv += dshift * parameters.center_weight[None, :] / (2 * root(v + EPS))
    return dmu, dv, dshift


@triton.jit
def _planes(
    s, planes, i, c, parts, parameters, channel,
    EPS: tl.constexpr, CENTERING: tl.constexpr, SCALING: tl.constexpr, RESTRICT: tl.constexpr,
    BATCH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The i-th BATCH planes: which there are, mu, v, S0, what becomes of them, and its gradients."""
    at, inside = planes_of(i, c, planes.C, planes.N, BATCH)
    s0, s1 = _summed(s, at, inside, planes.C, planes.N, parts, PARTS)
    mean = tl.load(planes.mu + at, mask=inside, other=0.0)
    variance = tl.load(planes.v + at, mask=inside, other=0.0)
    plane = plane_of(mean, variance, parameters, channel, EPS, CENTERING, SCALING, RESTRICT)
    da, dz, dk = _scaling_gradients(s0, s1, plane, parameters, channel, SCALING, RESTRICT)
    return inside, mean, variance, s0, plane, da, dz, dk


@triton.jit
def _statistics_gradients(
    s, planes, layer, c, parts, batches, parameters, channel,
    EPS: tl.constexpr, CENTERING: tl.constexpr, SCALING: tl.constexpr, RESTRICT: tl.constexpr,
    BATCH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The gradients of the batch's Var and E from `origin` on, divided by N: each plane's share."""
    inverse_std = channel.inverse_std
    dmean = tl.zeros(c.shape, planes.mu.dtype.element_ty)
    dvar = tl.zeros(c.shape, planes.mu.dtype.element_ty)
    if layer.running_mean is None:
        dinverse_std = tl.zeros(c.shape, planes.mu.dtype.element_ty)
        for i in range(batches):
            _, _, variance, s0, plane, da, _, dk = _planes(
                s, planes, i, c, parts, parameters, channel,
                EPS, CENTERING, SCALING, RESTRICT, BATCH, PARTS,
            )  # fmt: skip
            through_mean = s0 * plane.a
            through_std = da * plane.restriction * parameters.gamma[None, :]
            if SCALING == "channel_mean":
                through_mean += dk * inverse_std[None, :]
                through_std += dk * plane.deviation
            elif SCALING == "channel_std":
                through_std += dk * variance * inverse_std[None, :] / plane.k
            dmean -= tl.sum(through_mean, axis=0)
            dinverse_std += tl.sum(through_std, axis=0)
        images = tl.full(c.shape, planes.N, dmean.dtype)
        # Var = mean_n v + mean_n deviation^2, whose own mean term cancels.
        dvar = -0.5 * dinverse_std * inverse_std * inverse_std * inverse_std / images
        dmean = dmean / images
    return dvar, dmean


@triton.jit
def _store(values, found, c, C):
    """Write the gradient of a parameter, if somebody wants it."""
    if values is not None:
        tl.store(values + c, found, mask=c < C)


@triton.jit
def _store_parameter_gradients(
    gradients, s, planes, c, parts, batches, parameters, channel, dvar, dmean,
    EPS: tl.constexpr, CENTERING: tl.constexpr, SCALING: tl.constexpr, RESTRICT: tl.constexpr,
    BATCH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the channels' parameters."""
    dtype: tl.constexpr = planes.mu.dtype.element_ty
    to_gamma = tl.zeros(c.shape, dtype)
    to_beta = tl.zeros(c.shape, dtype)
    to_center_weight = tl.zeros(c.shape, dtype)
    to_scale_weight = tl.zeros(c.shape, dtype)
    to_scale_bias = tl.zeros(c.shape, dtype)
    for i in range(batches):
        inside, mean, variance, s0, plane, da, dz, dk = _planes(
            s, planes, i, c, parts, parameters, channel, EPS, CENTERING, SCALING, RESTRICT, BATCH, PARTS
        )
        _, _, dshift = _plane_gradients(
            s0, da, dk, variance, plane, parameters, channel, dvar, dmean, EPS, CENTERING, SCALING
        )
        dshift = tl.where(inside, dshift, 0.0)
        to_gamma += tl.sum(da * plane.restriction, axis=0) * channel.inverse_std
        to_beta += tl.sum(s0, axis=0)
        to_scale_weight += tl.sum(dz * plane.k, axis=0)
        to_scale_bias += tl.sum(dz, axis=0)
        if CENTERING == "channel_mean":
            to_center_weight += tl.sum(dshift * (mean - channel.origin[None, :]), axis=0)
        elif CENTERING == "channel_std":
            to_center_weight += tl.sum(dshift * root(variance + EPS), axis=0)
    _store(gradients.gamma, to_gamma, c, planes.C)
    _store(gradients.beta, to_beta, c, planes.C)
    _store(gradients.center_weight, to_center_weight, c, planes.C)
    _store(gradients.scale_weight, to_scale_weight, c, planes.C)
    _store(gradients.scale_bias, to_scale_bias, c, planes.C)


@triton.jit
def _calibrate(
    gradients, s, planes, layer, parameters, c, parts, batches, writes,
    EPS: tl.constexpr, CENTERING: tl.constexpr, SCALING: tl.constexpr, RESTRICT: tl.constexpr,
    BATCH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What the planes of the channels c share, and what is for Var and E; one program writes the rest."""
    channel, _ = channel_of(planes, layer, parameters.center_weight, c, batches, EPS, CENTERING, BATCH, 1)
    dvar, dmean = _statistics_gradients(
        s, planes, layer, c, parts, batches, parameters, channel,
        EPS, CENTERING, SCALING, RESTRICT, BATCH, PARTS,
    )  # fmt: skip
    if writes:
        _store_parameter_gradients(
            gradients, s, planes, c, parts, batches, parameters, channel, dvar, dmean,
            EPS, CENTERING, SCALING, RESTRICT, BATCH, PARTS,
        )  # fmt: skip
    return channel, dvar, dmean


# ---- the kernels ----


@kernel
def sums_kernel(
    dy, x, mu, s, N, C, M, parts, blocks,
    ALIGN: tl.constexpr, LAST: tl.constexpr,
    IMAGES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """S0 and S1 of every part of every plane, (2, parts, N, C)."""
    dtype: tl.constexpr = mu.dtype.element_ty
    tile = tile_of(tl.program_id(0), N, C, M, parts, blocks, ALIGN, LAST, IMAGES, CHANNELS, BLOCK)
    n, c, C = tile.n, tile.c, tile.C
    at, here = block_of(tile, 0, BLOCK, LAST)
    s0 = tl.load(dy + at, mask=here, other=0.0).to(dtype)
    first = tl.load(x + at, mask=here, other=0.0).to(dtype)
    tile_mu = tl.load(mu + n[:, None] * C + c[None, :], mask=tile.inside, other=0.0)[:, :, None]
    s1 = s0 * (first - tile_mu)
    for k in range(1, blocks):
        at, here = block_of(tile, k, BLOCK, LAST)
        gradient = tl.load(dy + at, mask=here, other=0.0).to(dtype)
        value = tl.load(x + at, mask=here, other=0.0).to(dtype)
        s0 += gradient
        s1 += gradient * (value - tile_mu)
    plane = (tile.part * N + n[:, None]) * C + c[None, :]
    tl.store(s + plane, tl.sum(s0, axis=2), mask=tile.inside)
    tl.store(s + tl.full((), parts, tl.int64) * N * C + plane, tl.sum(s1, axis=2), mask=tile.inside)


@kernel
def calibrate_backward_kernel(
    part_s, s, mu, v, layer, channels, gradients, N, C, M, parts, batches,
    EPS: tl.constexpr, CENTERING: tl.constexpr, SCALING: tl.constexpr, RESTRICT: tl.constexpr,
    CHANNELS: tl.constexpr, BATCH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The gradients of a channel's parameters, what its planes share into `channels`, and S0 and S1."""
    dtype: tl.constexpr = mu.dtype.element_ty
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    planes = Planes(mu, v, N, C, M, 1, M)
    weight = parameter(layer.center_weight, c, C, 0, dtype)
    parameters = parameters_of(layer, weight, c, C, dtype)
    channel, dvar, dmean = _calibrate(
        gradients, part_s, planes, layer, parameters, c, parts, batches, True,
        EPS, CENTERING, SCALING, RESTRICT, BATCH, PARTS,
    )  # fmt: skip
    store_channel(channels, channel, c, C)
    tl.store(channels + 3 * C + c, dvar, mask=c < C)
    tl.store(channels + 4 * C + c, dmean, mask=c < C)
    if PARTS > 1:
        for i in range(batches):
            at, inside = planes_of(i, c, C, N, BATCH)
            s0, s1 = _summed(part_s, at, inside, C, N, parts, PARTS)
            tl.store(s + at, s0, mask=inside)
            tl.store(s + tl.full((), N, tl.int64) * C + at, s1, mask=inside)


@kernel
def transform_backward_kernel(
    dy, x, dx, s, mu, v, layer, channels, gradients, N, C, M, parts, blocks, batches,
    EPS: tl.constexpr, CENTERING: tl.constexpr, SCALING: tl.constexpr, RESTRICT: tl.constexpr,
    ALIGN: tl.constexpr, LAST: tl.constexpr,
    IMAGES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """dX = a dY + e (X - mu) + f."""
    dtype: tl.constexpr = mu.dtype.element_ty
    # No statistic of X is in Y: what X is does not matter, not even where it is NaN.
    PLAIN: tl.constexpr = layer.running_mean is not None and (CENTERING is None and SCALING is None)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    tile = tile_of(program, N, C, M, parts, blocks, ALIGN, LAST, IMAGES, CHANNELS, BLOCK)
    c, C = tile.c, tile.C
    at, here = block_of(tile, 0, BLOCK, LAST)
    gradient = tl.load(dy + at, mask=here, other=0.0).to(dtype)
    if not PLAIN:
        value = tl.load(x + at, mask=here, other=0.0).to(dtype)

    weight = parameter(layer.center_weight, c, C, 0, dtype)
    parameters = parameters_of(layer, weight, c, C, dtype)
    if channels is None:
        planes = Planes(mu, v, N, C, tile.M, 1, tile.M)
        channel, dvar, dmean = _calibrate(
            gradients, s, planes, layer, parameters, c, 1, batches, tl.program_id(0) < tl.cdiv(C, CHANNELS),
            EPS, CENTERING, SCALING, RESTRICT, BATCH, 1,
        )  # fmt: skip
    else:
        channel = stored_channel(channels, c, C)
        dvar = tl.load(channels + 3 * C + c, mask=c < C, other=0.0)
        dmean = tl.load(channels + 4 * C + c, mask=c < C, other=0.0)

    at_plane = tile.n[:, None] * C + c[None, :]
    tile_mu = tl.load(mu + at_plane, mask=tile.inside, other=0.0)
    tile_v = tl.load(v + at_plane, mask=tile.inside, other=0.0)
    plane = plane_of(tile_mu, tile_v, parameters, channel, EPS, CENTERING, SCALING, RESTRICT)
    a = plane.a[:, :, None]
    if PLAIN:
        tl.store(dx + at, gradient * a, mask=here)
        for i in range(1, blocks):
            at, here = block_of(tile, i, BLOCK, LAST)
            gradient = tl.load(dy + at, mask=here, other=0.0).to(dtype)
            tl.store(dx + at, gradient * a, mask=here)
    else:
        s0 = tl.load(s + at_plane, mask=tile.inside, other=0.0)
        s1 = tl.load(s + tl.full((), N, tl.int64) * C + at_plane, mask=tile.inside, other=0.0)
        da, _, dk = _scaling_gradients(s0, s1, plane, parameters, channel, SCALING, RESTRICT)
        dmu, dv, _ = _plane_gradients(
            s0, da, dk, tile_v, plane, parameters, channel, dvar, dmean, EPS, CENTERING, SCALING
        )
        positions = tl.full((1, 1), tile.M, dtype)
        e = (2 * dv / positions)[:, :, None]
        f = (dmu / positions)[:, :, None]
        centre = tile_mu[:, :, None]
        tl.store(dx + at, gradient * a + ((value - centre) * e + f), mask=here)
        for i in range(1, blocks):
            at, here = block_of(tile, i, BLOCK, LAST)
            gradient = tl.load(dy + at, mask=here, other=0.0).to(dtype)
            value = tl.load(x + at, mask=here, other=0.0).to(dtype)
            tl.store(dx + at, gradient * a + ((value - centre) * e + f), mask=here)
