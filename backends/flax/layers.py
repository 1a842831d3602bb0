"""RBN, IEBN and BNET as linen modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.linen import initializers
from flax.traverse_util import flatten_dict
from flax.typing import Dtype, Initializer
from jax import Array

from rbn.backends.flax import distributed, functional, fused
from rbn_core.config import Config, check_input, config_of, refuse_unknown_options
from rbn_core.names import NAMES
from rbn_core.options import Statistic


class CalibratedNorm(nn.Module):
    """What the three layers share: BatchNorm's options and statistics, and the forward pass.

    Attributes:
        layer: Which of the three it is; the others are described at `RBN`.
    """

    layer: ClassVar[str]

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float | None = 0.9
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    _: KW_ONLY
    running_var: str = "unbiased"
    fused: bool = True

    def __post_init__(self) -> None:
        self.config(num_features=1)
        functional.channel_axis(self.axis, self.layer)
        super().__post_init__()

    @nn.nowrap
    def config(self, num_features: int) -> Config:
        """The layer's options in the project's terms; C is known only once there is an input."""
        return config_of("flax", self, num_features=num_features)

    @nn.nowrap
    def share(self, training: bool) -> distributed.Share:
        """What part of the batch an input is."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool | None = None, *, mask: Any = None) -> Array:
        """Y, of the shape of `x`, (N, *spatial, C).

        Args:
            x: The input; not changed.
            use_running_average: Evaluation (True) or training (False), unless the layer already knows.
            mask: Which values count in the statistics, of a shape that broadcasts to that of x; all of them
                by default. E, Var and the instance statistics are of those alone; a plane that has none
                counts for nothing in E and Var, and its own mean and variance are 0.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        initializing = self.is_initializing()
        training = not use_running_average and not initializing
        config, axis, stored = self._config_for(x), functional.channel_axis(self.axis), self._stored()
        share = distributed.Share(None, None) if initializing else self.share(training)
        values = x.size // config.num_features * share.devices
        check_input(
            x.shape,
            x.dtype.name,
            config.num_features,
            training=training,
            axis=axis,
            values=values,
            spatial_dims=None if config.kernel_size is None else config.spatial_dims,
            layer=config.layer,
        )
        if not initializing:
            fused.check_layer(config, stored)
        parameters = self._parameters(config)
        shape, dtype = (config.num_features,), functional.statistics_dtype(self.param_dtype)
        stored_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, dtype)
        stored_var = self.variable("batch_stats", "var", jnp.ones, shape, dtype)
        running = (jnp.asarray(stored_mean.value), jnp.asarray(stored_var.value))
        if training or initializing:
            tracked = self.variable("batch_stats", "num_batches_tracked", jnp.zeros, (), jnp.int32)
        if not initializing and config.kernel_size is None:
            vectors = (*parameters.values(), *running)
            x = functional.with_a_batch(x, vectors, shared=bool(share.batch))
        y, mean, var = fused.compute(
            x,
            parameters,
            running if use_running_average else None,
            config,
            axis=axis,
            dtype=self.normalized_dtype(x),
            mask=mask,
            share=share,
            in_loops=self.fused,
        )
        if training:
            counts = values if mask is None else share.count(mask, x, axis)
            tracked.value = functional.one_more(tracked.value)
            new = functional.accumulate(
                running,
                mean,
                var,
                None if self.momentum is None else 1.0 - self.momentum,
                count=tracked.value,
                values=counts if self.running_var == "unbiased" else None,
            )
            stored_mean.value, stored_var.value = functional.where_any(counts, new, running)
        return functional.as_output(self.transform(y), x, self.dtype)

    @nn.nowrap
    def normalized_dtype(self, x: Array) -> Dtype | None:
        """The dtype that `transform` is to get, if any is asked for."""
        return self.dtype

    @nn.nowrap
    def transform(self, y: Array) -> Array:
        """What follows on (N, C) coefficients; nothing but in BNET."""
        return y

    @nn.nowrap
    def _stored(self) -> dict[str, Any]:
        """What there is, by canonical names."""
        flat = flatten_dict(
            {name: nn.unbox(self.variables.get(name, {})) for name in ("params", "batch_stats")}, sep="/"
        )
        return {name: flat[own] for name, own in NAMES["flax"].items() if flat.get(own) is not None}

    @nn.nowrap
    def _config_for(self, x: Array) -> Config:
        """With C as stored, on the last axis, unless the input's is stored, too, or nothing is."""
        here = x.shape[functional.channel_axis(self.axis) % x.ndim] if x.ndim else 1
        sizes = [np.shape(array)[-1] for array in self._stored().values() if np.ndim(array)]
        return self.config(sizes[0] if sizes and here not in sizes else here)

    @nn.nowrap
    def _parameters(self, config: Config) -> dict[str, Any]:
        """Those of shape (C,), by canonical names; an option says how each starts."""
        own_names = {canonical: NAMES["flax"][canonical].partition("/")[2] for canonical in config.parameters}
        shape = (config.num_features,)
        return {
            canonical: jnp.asarray(self.param(own, getattr(self, f"{own}_init"), shape, self.param_dtype))
            for canonical, own in own_names.items()
        }


class AffineNorm(CalibratedNorm):
    """What RBN and IEBN share: BatchNorm's affine step."""

    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    axis_name: distributed.AxisName = None
    axis_index_groups: distributed.IndexGroups = None
    _: KW_ONLY
    spatial_axis_name: distributed.AxisName = None

    @nn.nowrap
    def share(self, training: bool) -> distributed.Share:
        """What part of the batch an input is: of its planes in evaluation, too."""
        return distributed.Share(
            self.axis_name if training else None, self.axis_index_groups, self.spatial_axis_name
        )


@refuse_unknown_options
class RBN(AffineNorm):
    r"""Representative Batch Normalization (Gao et al., CVPR 2021, eq. 12) in place of `flax.linen.BatchNorm`.

        X_cm = X + w_m K_m
        X_s  = (X_cm - E(X_cm)) / sqrt(Var(X_cm) + eps)
        Y    = X_s R(w_v K_s + w_b) gamma + beta

    Inputs are (N, *spatial, C) with any number of spatial axes, in float64 (where JAX has it enabled),
    float32, bfloat16 or float16; statistics are taken in at least float32. A half-precision input gives an
    output of its own dtype, where BatchNorm promotes it to that of the parameters.
    The batch axis is always there, where BatchNorm and `nn.Conv` can do without it: (H, W, C) is a batch of H
    sequences, and under `vmap` over the input alone an error.
    In training E and Var are the batch's, in evaluation the running ones; K_m and K_s are always the input's.

    Collections: `params` has `scale` (gamma) and `bias` (beta) as in BatchNorm, and `center_weight` (w_m,
    from 0), `scale_weight` (w_v, from 0) and `scale_bias` (w_b, from 1); `batch_stats` has `mean` and `var`
    as in BatchNorm, in at least float32, each of shape (C,), and `num_batches_tracked`, an int32 scalar.
    Initialization fills `batch_stats` and does not update it. Evaluation does without the counter, and
    training starts it at 0 where it is missing, so that BatchNorm's `batch_stats` will do.

    Attributes:
        use_running_average: evaluation (True) or training (False); here or in the call.
        axis: the channel axis, also as a tuple of one; the batch is the first of the others.
        momentum: the weight of the *old* value in the running statistics; `None` averages all batches.
        epsilon: epsilon, added to a variance under its root.
        dtype: the dtype of the output; `None` as said above.
        param_dtype: the dtype of the parameters.
        use_bias: whether there is a beta.
        use_scale: whether there is a gamma.
        bias_init: how beta starts.
        scale_init: how gamma starts.
        centering: K_m, "channel_mean", "channel_std", "spatial_mean", "spatial_std" or `None`.
        scaling: K_s, the same choice, of X_s.
        restrict: R, "sigmoid" or "hard_sigmoid".
        center_weight_init: how w_m starts, where there is a centering; also with `nn.with_partitioning`.
        scale_weight_init: how w_v starts, where there is a scaling.
        scale_bias_init: how w_b starts, where there is a scaling.
        running_var: the batch variance that is accumulated, "unbiased" or "biased" (BatchNorm's in Flax).
        axis_name: the axis of `pmap`, `vmap` or `shard_map` that the batch is spread over, or several; under
            `jit` with a sharded batch the statistics are the whole batch's without it.
        axis_index_groups: the groups of devices along it that share their statistics; all by default.
        spatial_axis_name: the axis of `shard_map` along which devices share every image, or several, in
            evaluation, too. It must be said here and not in `axis_name` alone, as BatchNorm takes it: K_m and
            K_s are of whole images. Under `jit` with sharded images they are so without it.
        fused: whether one custom call computes the layer in a program for one CPU; `False` always takes JAX's
            own operations. Synchronised and spatial statistics take them, too.

    Raises:
        RBNError: An option or an input is refused; no statistic has changed then.

    Example:
        >>> import jax
        >>> from rbn.backends.flax import RBN
        >>> layer, x = RBN(scaling="channel_std"), jax.random.normal(jax.random.key(0), (8, 14, 14, 16))
        >>> variables = layer.init(jax.random.key(1), x, use_running_average=False)
        >>> y, updated = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        >>> y.shape, sorted(variables["params"])
        ((8, 14, 14, 16), ['bias', 'center_weight', 'scale', 'scale_bias', 'scale_weight'])
    """

    layer = "RBN"

    _: KW_ONLY
    centering: Statistic | None = "channel_mean"
    scaling: Statistic | None = "channel_mean"
    restrict: str = "sigmoid"
    center_weight_init: Initializer = initializers.zeros
    scale_weight_init: Initializer = initializers.zeros
    scale_bias_init: Initializer = initializers.ones


@refuse_unknown_options
class IEBN(AffineNorm):
    r"""Instance Enhancement Batch Normalization (Liang et al., AAAI 2020) in place of `flax.linen.BatchNorm`.

        X_s = (X - E(X)) / sqrt(Var(X) + eps)
        Y   = X_s sigmoid(w_v mean_c(X) + w_b) gamma + beta        mean_c over the positions of one channel

    Inputs, statistics, modes, options and errors are those of `RBN`, without `centering`, `scaling`,
    `restrict` and `center_weight_init`. Collections: BatchNorm's and the counter, and in `params`
    `scale_weight` (w_v, from 0) and `scale_bias` (w_b, from -1), each of shape (C,).

    Example:
        >>> import jax
        >>> from rbn.backends.flax import IEBN
        >>> x = jax.random.normal(jax.random.key(0), (8, 14, 14, 16))
        >>> IEBN().init_with_output(jax.random.key(1), x, use_running_average=True)[0].shape
        (8, 14, 14, 16)
    """

    layer = "IEBN"

    _: KW_ONLY
    scale_weight_init: Initializer = initializers.zeros
    scale_bias_init: Initializer = functional.iebn_bias


@refuse_unknown_options
class BNET(CalibratedNorm):
    r"""BatchNorm with an enhanced linear transformation (Xu et al., 2020): its affine step is a convolution.

        X_s = (X - E(X)) / sqrt(Var(X) + eps)
        Y   = depthwise convolution of X_s, zero padded, plus a bias

    Inputs, statistics, modes, options and errors are those of `RBN`, with the kernel's number of spatial axes
    and without `use_bias`, `use_scale`, `scale_init`, `centering`, `scaling`, `restrict`, the calibration's
    initializers and `spatial_axis_name`. Collections: BatchNorm's `batch_stats` and the counter, and `params`
    has `conv`, those of a depthwise `flax.linen.Conv` that starts as Flax starts it.
    `convert(model, variables, "bnet", preserve=True)` makes BNETs that equal a model's BatchNorms.

    Attributes:
        kernel_size: the extent of the kernel along every axis; odd.
        spatial_dims: the number of spatial axes, 1, 2 or 3.
        kernel_init: how the kernel starts.
        bias_init: how the bias starts.

    Example:
        >>> import jax
        >>> from rbn.backends.flax import BNET
        >>> x = jax.random.normal(jax.random.key(0), (8, 14, 14, 16))
        >>> BNET(kernel_size=5).init_with_output(jax.random.key(1), x, use_running_average=True)[0].shape
        (8, 14, 14, 16)
    """

    layer = "BNET"

    _: KW_ONLY
    kernel_size: int = 3
    spatial_dims: int = 2
    kernel_init: Initializer = initializers.lecun_normal()
    bias_init: Initializer = initializers.zeros
    axis_name: distributed.AxisName = None
    axis_index_groups: distributed.IndexGroups = None

    @nn.nowrap
    def share(self, training: bool) -> distributed.Share:
        """What part of the batch an input is."""
        return distributed.Share(self.axis_name if training else None, self.axis_index_groups)

    @nn.nowrap
    def normalized_dtype(self, x: Array) -> Dtype:
        """At least float32: half precision is rounded once, after the convolution."""
        return functional.widest(x.dtype if self.dtype is None else self.dtype, jnp.float32)

    @nn.nowrap
    def transform(self, y: Array) -> Array:
        """The convolution in the place of BatchNorm's affine step."""
        axis = functional.channel_axis(self.axis)
        channels = y.shape[axis]
        conv = nn.Conv(
            channels,
            (self.kernel_size,) * self.spatial_dims,
            feature_group_count=channels,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name="conv",
        )
        return functional.channels_last(conv, y, axis)
