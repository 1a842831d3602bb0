"""RBN, IEBN and BNET as NNX modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.typing import Dtype, Initializer
from jax import Array

import rbn_core.config
from rbn.backends.flax import distributed, functional, fused
from rbn_core.config import Config, check_counter, check_input, refuse_unknown_options
from rbn_core.errors import RBNValueError
from rbn_core.names import NAMES
from rbn_core.options import Statistic

KERNEL_INIT = initializers.lecun_normal()
"""How Flax's convolutions start."""

CONSTANT = (initializers.zeros, initializers.ones, functional.iebn_bias)
"""How the calibrations start by default."""

PromoteDtype = Callable[..., Any]
"""A function of a tuple of arrays and `dtype=`, as `flax.nnx.nn.dtypes.promote_dtype`."""


@dataclass(frozen=True)
class Setting:
    """What a constructor takes beside the options of `rbn_core.Config`, as `RBN` describes it.

    Args:
        starts: How the (C,) parameters start, by their names here and in the order of their random keys.
        metadata: What their variables say beside their values, by the same names.
    """

    use_running_average: bool | None
    axis: int | Sequence[int]
    dtype: Dtype | None
    param_dtype: Dtype
    axis_name: distributed.AxisName
    axis_index_groups: distributed.IndexGroups
    promote_dtype: PromoteDtype | None
    rngs: nnx.Rngs
    fused: bool
    spatial_axis_name: distributed.AxisName
    starts: Mapping[str, Initializer]
    metadata: Mapping[str, Mapping[str, Any]]


class CalibratedNorm(nnx.Module):
    """What the three layers share: BatchNorm's options and statistics, and the forward pass.

    Attributes:
        spatial_dims: How many spatial axes an input must have; any number where `None`.
    """

    spatial_dims: int | None = None

    def __init__(self, config: Config, setting: Setting) -> None:
        functional.channel_axis(setting.axis, config.layer)
        shape, param_dtype, rngs = (config.num_features,), setting.param_dtype, setting.rngs
        present = {NAMES["flax"][canonical].partition("/")[2] for canonical in config.parameters}
        for name, init in setting.starts.items():
            parameter = None
            if name in present:
                # A constant of ours takes no key: what is built after the layer starts as after a BatchNorm.
                constant = name not in ("scale", "bias") and init in CONSTANT
                key = jax.random.key(0) if constant else rngs.params()
                parameter = nnx.Param(init(key, shape, param_dtype), **setting.metadata.get(name, {}))
            setattr(self, name, nnx.data(parameter))
            setattr(self, f"{name}_init", init)
        self.mean = nnx.BatchStat(jnp.zeros(shape, functional.statistics_dtype(param_dtype)))
        self.var = nnx.BatchStat(jnp.ones(shape, functional.statistics_dtype(param_dtype)))
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.layer = config.layer
        self.num_features = config.num_features
        self.use_scale = config.gamma
        self.use_bias = config.beta
        self.momentum = config.momentum
        self.epsilon = config.eps
        self.centering = config.centering
        self.scaling = config.scaling
        self.restrict = config.restrict
        self.running_var = config.running_var
        self.use_running_average = setting.use_running_average
        self.axis = setting.axis
        self.dtype = setting.dtype
        self.param_dtype = param_dtype
        self.axis_name = setting.axis_name
        self.axis_index_groups = setting.axis_index_groups
        self.spatial_axis_name = setting.spatial_axis_name
        self.promote_dtype = setting.promote_dtype
        self.fused = setting.fused

    def __call__(self, x: Array, use_running_average: bool | None = None, *, mask: Any = None) -> Array:
        """Y, of the shape of `x`, (N, *spatial, C).

        Args:
            x: The input; not changed.
            use_running_average: Evaluation (True) or training (False); `None` as the layer is set.
            mask: Which values count in the statistics, of a shape that broadcasts to that of x; all of them
                by default. E, Var and the instance statistics are of those alone; a plane that has none
                counts for nothing in E and Var, and its own mean and variance are 0.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise RBNValueError(
                f"{self.layer}: expected use_running_average in the call or in the layer, got None in both. "
                "Pass it here, or call train() or eval() before."
            )
        training = not use_running_average
        config, axis = config_of(self), functional.channel_axis(self.axis, self.layer)
        share = distributed.Share(
            self.axis_name if training else None, self.axis_index_groups, self.spatial_axis_name
        )
        values = x.size // self.num_features * share.devices
        check_input(
            x.shape,
            x.dtype.name,
            self.num_features,
            training=training,
            axis=axis,
            values=values,
            spatial_dims=self.spatial_dims,
            layer=self.layer,
        )
        stored = fused.check_layer(config, self._stored())
        parameters = {name: stored[name] for name in config.parameters}
        running = promoted = (stored["running_mean"], stored["running_var"])
        if training:
            check_counter(getattr(self, "num_batches_tracked", None), self.momentum, self.layer)
        if self.promote_dtype is not None:
            x, promoted, parameters = self._promoted(x, running, parameters, self.promote_dtype)
        if config.kernel_size is None:
            vectors = (*parameters.values(), *running)
            x = functional.with_a_batch(x, vectors, shared=bool(share.batch))
        y, mean, var = fused.compute(
            x,
            parameters,
            None if training else promoted,
            config,
            axis=axis,
            dtype=self.normalized_dtype(x),
            mask=mask,
            share=share,
            in_loops=self.fused,
        )
        if training:
            counts = values if mask is None else share.count(mask, x, axis)
            self._accumulate(running, mean, var, counts)
        return functional.as_output(self.transform(y), x, self.dtype)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view(model, use_running_average=...)` calls on a copy of the layer.

        Args:
            use_running_average: Evaluation (True) or training (False).
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def normalized_dtype(self, x: Array) -> Dtype | None:
        """The dtype that `transform` is to get, if any is asked for."""
        return self.dtype

    def transform(self, y: Array) -> Array:
        """What follows on (N, C) coefficients; nothing but in BNET."""
        return y

    def _stored(self) -> dict[str, Any]:
        """What there is, by canonical names."""
        found: dict[str, Any] = {}
        for name, own in NAMES["flax"].items():
            variable: Any = self
            for part in own.split("/")[1:]:
                variable = getattr(variable, part, None)
            if variable is not None:
                found[name] = variable[...]
        return found

    def _accumulate(self, running: tuple[Array, Array], mean: Array, var: Array, counts: Any) -> None:
        """Eq. 3 and one more batch, where batches are counted."""
        counter = getattr(self, "num_batches_tracked", None)
        count = None if counter is None else functional.one_more(counter[...])
        new = functional.accumulate(
            running,
            mean,
            var,
            None if self.momentum is None else 1.0 - self.momentum,
            count=count,
            values=counts if self.running_var == "unbiased" else None,
        )
        mean, var = functional.where_any(counts, new, running)
        for variable, value in ((self.mean, mean), (self.var, var), (counter, count)):
            if variable is not None:
                assign(variable, value)

    def _promoted(
        self,
        x: Array,
        running: tuple[Array, Array],
        parameters: Mapping[str, Array],
        promote: PromoteDtype,
    ) -> tuple[Array, tuple[Array, Array], dict[str, Array]]:
        """x, E and Var and the parameters as a function of BatchNorm's makes its own five of one dtype."""
        five = (x, *running, parameters.get("gamma"), parameters.get("beta"))
        x, mean, var, gamma, beta = promote(five, dtype=self.dtype)
        affine = {"gamma": gamma, "beta": beta}
        changed = {name: value for name, value in affine.items() if value is not None}
        return x, (mean, var), {**parameters, **changed}


def config_of(layer: Any) -> Config:
    """The options of a layer in the project's terms, checked again: they can be assigned; of BatchNorm, too.

    As in BatchNorm, a layer of which gamma or beta is `None` is one without it.

    Raises:
        RBNError: One of them is none.
    """
    affine = (("gamma", "scale"), ("beta", "bias"))
    known: dict[str, Any] = {name: getattr(layer, own, None) is not None for name, own in affine}
    if not isinstance(layer, CalibratedNorm):
        known |= {"centering": None, "scaling": None}
        return Config(layer.num_features, layer.epsilon, layer.momentum, **known)
    if isinstance(layer, BNET):
        known["kernel_size"] = layer.conv.kernel_size[0]
    return rbn_core.config.config_of("flax.nnx", layer, **known)


def assign(variable: Any, value: Array) -> None:
    """A new value in the place of the old one: a NumPy array that lies there is not written into."""
    if hasattr(variable, "set_value"):  # in Flax from 0.12.1 on, where [...] writes into it
        variable.set_value(value)
    else:
        variable[...] = value


@refuse_unknown_options
class RBN(CalibratedNorm):
    r"""Representative Batch Normalization (Gao et al., CVPR 2021, eq. 12) in place of `flax.nnx.BatchNorm`.

        X_cm = X + w_m K_m
        X_s  = (X_cm - E(X_cm)) / sqrt(Var(X_cm) + eps)
        Y    = X_s R(w_v K_s + w_b) gamma + beta

    Inputs are (N, *spatial, C) with any number of spatial axes, in float64 (where JAX has it enabled),
    float32, bfloat16 or float16; statistics are taken in at least float32. A half-precision input gives an
    output of its own dtype, where BatchNorm promotes it to that of the parameters.
    The batch axis is always there, where BatchNorm and `nn.Conv` can do without it: (H, W, C) is a batch of H
    sequences, and under `vmap` over the input alone an error.
    In training E and Var are the batch's, in evaluation the running ones; K_m and K_s are always the input's.

    State: `scale` (gamma) and `bias` (beta) as in BatchNorm, and `center_weight` (w_m, from 0),
    `scale_weight` (w_v, from 0) and `scale_bias` (w_b, from 1) are each an `nnx.Param` of shape (C,); `mean`
    and `var` as in BatchNorm, in at least float32, and the int32 scalar `num_batches_tracked` are each an
    `nnx.BatchStat`.

    Args:
        num_features: C, the number of channels.
        use_running_average: evaluation (True) or training (False); `train()` and `eval()` set it.
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
        center_weight_init: how w_m starts, where there is a centering; also with `nnx.with_partitioning`.
        scale_weight_init: how w_v starts, where there is a scaling.
        scale_bias_init: how w_b starts, where there is a scaling.
        running_var: the batch variance that is accumulated, "unbiased" or "biased" (BatchNorm's in Flax).
        axis_name: the axis of `pmap`, `vmap` or `shard_map` that the batch is spread over, or several; under
            `jit` with a sharded batch the statistics are the whole batch's without it.
        axis_index_groups: the groups of devices along it that share their statistics; all by default.
        spatial_axis_name: the axis of `shard_map` along which devices share every image, or several, in
            evaluation, too. It must be said here and not in `axis_name` alone, as BatchNorm takes it: K_m and
            K_s are of whole images. Under `jit` with sharded images they are so without it.
        promote_dtype: a function of the input, E, Var, gamma and beta, as BatchNorm's, that makes them of one
            dtype; `None` keeps the dtypes as said above.
        rngs: the random keys that the initializers draw from.
        bias_metadata: what the `nnx.Param` of beta says beside its value.
        scale_metadata: what that of gamma says.
        fused: whether one custom call computes the layer in a program for one CPU; `False` always takes JAX's
            own operations. Synchronised and spatial statistics take them, too.

    Raises:
        RBNError: An option or an input is refused; no statistic has changed then.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from rbn.backends.flax.nnx import RBN
        >>> layer = RBN(16, scaling="channel_std", rngs=nnx.Rngs(0))
        >>> layer(jax.random.normal(jax.random.key(0), (8, 14, 14, 16))).shape
        (8, 14, 14, 16)
        >>> sorted(nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
        ['bias', 'center_weight', 'scale', 'scale_bias', 'scale_weight']
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: float | None = 0.9,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        centering: Statistic | None = "channel_mean",
        scaling: Statistic | None = "channel_mean",
        restrict: str = "sigmoid",
        center_weight_init: Initializer = initializers.zeros,
        scale_weight_init: Initializer = initializers.zeros,
        scale_bias_init: Initializer = initializers.ones,
        running_var: str = "unbiased",
        axis_name: distributed.AxisName = None,
        axis_index_groups: distributed.IndexGroups = None,
        spatial_axis_name: distributed.AxisName = None,
        promote_dtype: PromoteDtype | None = None,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        fused: bool = True,
    ) -> None:
        config = Config(
            num_features,
            epsilon,
            momentum,
            centering,
            scaling,
            restrict,
            running_var,
            gamma=use_scale,
            beta=use_bias,
        )
        setting = Setting(
            use_running_average,
            axis,
            dtype,
            param_dtype,
            axis_name,
            axis_index_groups,
            promote_dtype,
            rngs,
            fused,
            spatial_axis_name,
            {
                "scale": scale_init,
                "bias": bias_init,
                "center_weight": center_weight_init,
                "scale_weight": scale_weight_init,
                "scale_bias": scale_bias_init,
            },
            {"scale": scale_metadata, "bias": bias_metadata},
        )
        super().__init__(config, setting)


@refuse_unknown_options
class IEBN(CalibratedNorm):
    r"""Instance Enhancement Batch Normalization (Liang et al., AAAI 2020) in place of `flax.nnx.BatchNorm`.

        X_s = (X - E(X)) / sqrt(Var(X) + eps)
        Y   = X_s sigmoid(w_v mean_c(X) + w_b) gamma + beta        mean_c over the positions of one channel

    Inputs, statistics, modes, options and errors are those of `RBN`, without `centering`, `scaling`,
    `restrict` and `center_weight_init`. State: BatchNorm's and the counter, and `scale_weight` (w_v, from 0)
    and `scale_bias` (w_b, from -1), each an `nnx.Param` of shape (C,).

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from rbn.backends.flax.nnx import IEBN
        >>> IEBN(16, rngs=nnx.Rngs(0))(jax.random.normal(jax.random.key(0), (8, 14, 14, 16))).shape
        (8, 14, 14, 16)
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: float | None = 0.9,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        scale_weight_init: Initializer = initializers.zeros,
        scale_bias_init: Initializer = functional.iebn_bias,
        running_var: str = "unbiased",
        axis_name: distributed.AxisName = None,
        axis_index_groups: distributed.IndexGroups = None,
        spatial_axis_name: distributed.AxisName = None,
        promote_dtype: PromoteDtype | None = None,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        fused: bool = True,
    ) -> None:
        config = Config.iebn(
            num_features,
            eps=epsilon,
            momentum=momentum,
            running_var=running_var,
            gamma=use_scale,
            beta=use_bias,
        )
        setting = Setting(
            use_running_average,
            axis,
            dtype,
            param_dtype,
            axis_name,
            axis_index_groups,
            promote_dtype,
            rngs,
            fused,
            spatial_axis_name,
            {
                "scale": scale_init,
                "bias": bias_init,
                "scale_weight": scale_weight_init,
                "scale_bias": scale_bias_init,
            },
            {"scale": scale_metadata, "bias": bias_metadata},
        )
        super().__init__(config, setting)


@refuse_unknown_options
class BNET(CalibratedNorm):
    r"""BatchNorm with an enhanced linear transformation (Xu et al., 2020): its affine step is a convolution.

        X_s = (X - E(X)) / sqrt(Var(X) + eps)
        Y   = depthwise convolution of X_s, zero padded, plus a bias

    Inputs, statistics, modes, options and errors are those of `RBN`, with the kernel's number of spatial axes
    and without `use_bias`, `use_scale`, `scale_init`, `centering`, `scaling`, `restrict`, the calibration's
    initializers, `spatial_axis_name` and metadata. State: BatchNorm's statistics and the counter, and `conv`,
    a depthwise `nnx.Conv` that starts as Flax starts it.
    `convert(model, "bnet", preserve=True)` makes BNETs that equal a model's BatchNorms.

    Args:
        kernel_size: the extent of the kernel along every axis; odd.
        spatial_dims: the number of spatial axes, 1, 2 or 3.
        kernel_init: how the kernel starts.
        bias_init: how the bias starts.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from rbn.backends.flax.nnx import BNET
        >>> layer = BNET(16, kernel_size=5, rngs=nnx.Rngs(0))
        >>> layer(jax.random.normal(jax.random.key(0), (8, 14, 14, 16))).shape
        (8, 14, 14, 16)
    """

    def __init__(
        self,
        num_features: int,
        kernel_size: int = 3,
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: float | None = 0.9,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        spatial_dims: int = 2,
        kernel_init: Initializer = KERNEL_INIT,
        bias_init: Initializer = initializers.zeros,
        running_var: str = "unbiased",
        axis_name: distributed.AxisName = None,
        axis_index_groups: distributed.IndexGroups = None,
        promote_dtype: PromoteDtype | None = None,
        rngs: nnx.Rngs,
        fused: bool = True,
    ) -> None:
        config = Config.bnet(
            num_features,
            kernel_size,
            spatial_dims,
            eps=epsilon,
            momentum=momentum,
            running_var=running_var,
        )
        setting = Setting(
            use_running_average,
            axis,
            dtype,
            param_dtype,
            axis_name,
            axis_index_groups,
            promote_dtype,
            rngs,
            fused,
            spatial_axis_name=None,
            starts={},
            metadata={},
        )
        super().__init__(config, setting)
        self.spatial_dims = spatial_dims
        self.conv = nnx.Conv(
            num_features,
            num_features,
            (kernel_size,) * spatial_dims,
            feature_group_count=num_features,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )

    def normalized_dtype(self, x: Array) -> Dtype:
        """At least float32: half precision is rounded once, after the convolution."""
        return functional.widest(x.dtype if self.dtype is None else self.dtype, jnp.float32)

    def transform(self, y: Array) -> Array:
        """The convolution in the place of BatchNorm's affine step."""
        return functional.channels_last(self.conv, y, functional.channel_axis(self.axis))
