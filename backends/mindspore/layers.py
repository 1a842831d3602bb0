"""RBN, IEBN and BNET as MindSpore cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Initializer, initializer

from rbn.backends.mindspore import distributed, functional, fused, internals
from rbn_core.config import Config, check_choice, check_input, refuse_unknown_options
from rbn_core.errors import RBNValueError
from rbn_core.options import OPTIONS, Statistic

Start: TypeAlias = Initializer | str | float | Tensor
"""What MindSpore's BatchNorm takes as a parameter's start."""

CASTS = {"fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}
"""The flags of a cell that `to_float` and mixed precision cast, and to what."""


@dataclass(frozen=True)
class Setting:
    """What a constructor takes beside the options of `rbn_core.Config`, as `RBN` describes it.

    Attributes:
        starts: Where the running mean and variance start, and in layers that have them gamma and beta.
    """

    starts: tuple[Start, ...]
    use_batch_statistics: bool | None
    data_format: str
    dtype: Any
    sync: bool
    process_groups: list[list[int]] | None
    fused: bool
    affine: bool = False


class CalibratedNorm(nn.Cell):
    """What the three layers share: BatchNorm's parameters and statistics, and the forward pass.

    No subclass of `nn.BatchNorm2d`: mixed precision, export and evaluation are right without it, and what
    else asks for the class sets gamma and beta or folds, and leaves the calibration out. docs/recipes.md has
    what was measured.

    Attributes:
        spatial_dims: How many spatial axes an input must have; any number where `None`.
    """

    spatial_dims: int | None = None
    number = fused.Number()

    def __init__(self, config: Config, setting: Setting) -> None:
        check_choice("use_batch_statistics", setting.use_batch_statistics, (None, True, False), config.layer)
        check_choice("data_format", setting.data_format, ("NCHW", "NHWC"), config.layer)
        groups = distributed.check_groups(setting.process_groups, config.layer)
        super().__init__()
        self.layer = config.layer
        self.num_features = config.num_features
        self.eps = config.eps
        self.momentum = config.momentum
        self.affine = setting.affine
        self.use_batch_statistics = setting.use_batch_statistics
        self.data_format = setting.data_format
        self.centering = config.centering
        self.scaling = config.scaling
        self.restrict = config.restrict
        self.running_var = config.running_var
        self.sync = setting.sync
        self.process_groups = groups
        self.fused = setting.fused
        self.cast_to: Any = None
        if internals.AS_GIVEN is not None:
            self.mixed_precision_type = internals.AS_GIVEN
        # BatchNorm's names: in a network MindSpore renames the parameters after their attributes.
        kept = functional.at_least_float32(setting.dtype)
        mean, var, *affine = setting.starts
        self.moving_mean = Parameter(
            initializer(mean, config.num_features, kept), name="mean", requires_grad=False
        )
        self.moving_variance = Parameter(
            initializer(var, config.num_features, kept), name="variance", requires_grad=False
        )
        self.num_batches_tracked = Parameter(
            Tensor(0, ms.int32), name="num_batches_tracked", requires_grad=False
        )
        given = dict(zip(("gamma", "beta"), affine, strict=False))
        for name, start in config.parameters.items():
            learned = setting.affine or name not in ("gamma", "beta")
            value = initializer(given.get(name, start), config.num_features, setting.dtype)
            setattr(self, name, Parameter(value, name=name, requires_grad=learned))

    def construct(self, x: Tensor) -> Tensor:
        """Y, of the shape and dtype of `x`; in a network that is cast to a dtype, of that one."""
        batch_statistics = self.training if self.use_batch_statistics is None else self.use_batch_statistics
        fused.check_layer(self.number, batch_statistics)
        channels_last = self.data_format == "NHWC"
        if functional.is_known(x.shape):
            own_values = x.size // self.num_features
            enough = own_values
        else:  # how many there are shows when the graph runs, and then nothing can be refused
            own_values = functional.cast(
                ops.scalar_to_tensor(ops.size(x) // self.num_features), functional.at_least_float32(x.dtype)
            )
            enough = 2
        total, average, empty = own_values, functional.batch_average, False
        group = ""
        if batch_statistics and self.sync:
            group = distributed.own_group(self.process_groups, self.layer)
        if group != "":
            distributed.check_shape(x.shape, self.layer)
            empty = own_values == 0
            share = distributed.Share(own_values, group)
            total = share.values(functional.at_least_float32(x.dtype))
            if ops.isconstant(total):
                enough = int(total)
            elif not empty:  # a graph knows its own share only, and is refused where that is empty
                enough = 2

            def shared_average(values: Tensor) -> Tensor:
                return share.average(values, total)

            average = shared_average

        _check_input(
            x.shape,
            x.dtype,
            self.num_features,
            batch_statistics,
            -1 if channels_last else 1,
            enough,
            self.spatial_dims,
            self.layer,
        )
        dtype = x.dtype if self.cast_to is None else self.cast_to
        if empty:
            y = self._forward(distributed.StandIn(self.num_features)(x), average, total)
            return functional.cast(distributed.Emptied()(y, x), dtype)
        if self.fused and group == "" and fused.takes(x, self.centering, self.scaling, self.restrict):
            return functional.cast(self._forward_fused(x, own_values), dtype)
        y = self._forward(ops.movedim(x, -1, 1) if channels_last else x, average, total)
        return functional.cast(ops.movedim(y, 1, -1) if channels_last else y, dtype)

    def _forward_fused(self, x: Tensor, values: int) -> Tensor:
        """Y of images in the layer's data format; `values` is how many there are behind each statistic."""
        batch_statistics = self.training if self.use_batch_statistics is None else self.use_batch_statistics
        channels_last = self.data_format == "NHWC"
        convolved = self.layer == "BNET"  # half precision is rounded once, after the convolution
        y, mean, var = fused.rbn(
            functional.cast(x, functional.at_least_float32(x.dtype)) if convolved else x,
            self._parameters(),
            None if batch_statistics else (self.moving_mean, self.moving_variance),
            eps=self.eps,
            centering=self.centering,
            scaling=self.scaling,
            restrict=self.restrict,
            channels_last=channels_last,
        )
        if convolved:
            y = functional.differentiable_once(self.transform(ops.movedim(y, -1, 1) if channels_last else y))
            y = ops.movedim(y, 1, -1) if channels_last else y
        if batch_statistics:
            self._accumulate(mean, var, values, fused.counts(self._counter()))
        return y

    def _forward(self, x: Tensor, average: functional.Average, values: int | Tensor) -> Tensor:
        """Y of channels-first images; `values` is how many there are behind each channel's statistic."""
        batch_statistics = self.training if self.use_batch_statistics is None else self.use_batch_statistics
        y, mean, var = functional.rbn(
            x,
            self._parameters(),
            None if batch_statistics else (self.moving_mean, self.moving_variance),
            eps=self.eps,
            centering=self.centering,
            scaling=self.scaling,
            restrict=self.restrict,
            average=average,
        )
        y = functional.differentiable_once(self.transform(y))
        if batch_statistics:
            self._accumulate(mean, var, values, False)
        return y

    def _parameters(self) -> dict[str, Tensor]:
        """The parameters of `functional.rbn`."""
        parameters = {}
        if self.layer != "BNET":
            parameters["gamma"] = self.gamma
            parameters["beta"] = self.beta
        if self.centering is not None:
            parameters["center_weight"] = self.center_weight
        if self.scaling is not None:
            parameters["scale_weight"] = self.scale_weight
            parameters["scale_bias"] = self.scale_bias
        return parameters

    def _accumulate(self, mean: Tensor, var: Tensor, values: int | Tensor, at_once: bool) -> None:
        """Eq. 3, and one batch more; `at_once` in the operator that does both."""
        running = (self.moving_mean, self.moving_variance)
        new_weight = None if self.momentum is None else functional.complement(self.momentum)
        n = values if self.running_var == "unbiased" else None
        counter = self._counter()
        if at_once:
            fused.accumulate(running, mean, var, new_weight, count=counter, values=n)
        else:
            count = None if counter is None else counter + 1
            functional.accumulate(running, mean, var, new_weight, count=count, values=n)
            if count is not None:
                ops.assign(self.num_batches_tracked, count)

    def _counter(self) -> Any:
        """What counts the batches; `None` where nobody does."""
        return getattr(self, "num_batches_tracked", None)

    def transform(self, y: Tensor) -> Tensor:
        """What follows on (N, C) coefficients; nothing but in BNET."""
        return y

    def add_flags(self, **flags: Any) -> nn.Cell:
        """Stay in float32 where `to_float` or mixed precision casts the network, as BatchNorm does at O2.

        In half precision MindSpore would accumulate rounded statistics, and in a graph none at all. In
        PyNative mode nothing is cast inside of the layer, whatever its dtypes are; Y is, as BatchNorm's.
        """
        for flag, dtype in CASTS.items():
            if flags.get(flag):
                self.cast_to = dtype
        if flags.get("fp16") or flags.get("bf16"):
            flags |= {"fp16": False, "bf16": False, "fp32": True}
        super().add_flags(**flags)
        if internals.AS_GIVEN is not None:
            self.mixed_precision_type = internals.AS_GIVEN
        return self

    def extend_repr(self) -> str:
        """The options, as `print(network)` shows them."""
        own = ("use_batch_statistics", "data_format", "sync", *(() if self.layer == "BNET" else ("affine",)))
        names = [option.argument("mindspore") for option in OPTIONS.values() if self.layer in option.layers]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in (*names, *own) if name is not None)


@refuse_unknown_options
class RBN(CalibratedNorm):
    r"""Representative Batch Normalization (Gao et al., CVPR 2021, eq. 12) in place of `nn.BatchNorm*d`.

        X_cm = X + w_m K_m
        X_s  = (X_cm - E(X_cm)) / sqrt(Var(X_cm) + eps)
        Y    = X_s R(w_v K_s + w_b) gamma + beta

    Inputs are (N, C, *spatial), or with `data_format="NHWC"` (N, *spatial, C), with any number of spatial
    axes, in float64, float32, bfloat16 or float16; statistics are taken in at least float32 and the output
    has the input's dtype. In training E and Var are the batch's, in evaluation the running ones; K_m and K_s
    are always the input's. Like every cell the layer starts in evaluation; `set_train()` switches.

    State: `gamma`, `beta`, `moving_mean` and `moving_variance` as in BatchNorm, and `center_weight` (w_m,
    from 0), `scale_weight` (w_v, from 0) and `scale_bias` (w_b, from 1), each of shape (C,), and the int32
    scalar `num_batches_tracked`. Statistics are kept in at least float32.

    Args:
        num_features: C, the number of channels.
        eps: epsilon, added to a variance under its root.
        momentum: the weight of the *old* value in the running statistics; `None` averages all batches.
        affine: whether gamma and beta are learned; they are there and applied either way.
        gamma_init: where gamma starts.
        beta_init: where beta starts.
        moving_mean_init: where the running mean starts.
        moving_var_init: where the running variance starts.
        use_batch_statistics: `True` takes and accumulates the batch's statistics in evaluation too, `False`
            the running ones in training too; `None` follows `set_train`.
        data_format: where the channels are, "NCHW" for axis 1 or "NHWC" for the last.
        dtype: the dtype of the parameters.
        centering: K_m, "channel_mean", "channel_std", "spatial_mean", "spatial_std" or `None`.
        scaling: K_s, the same choice, of X_s.
        restrict: R, "sigmoid" or "hard_sigmoid".
        running_var: the batch variance that is accumulated, "unbiased" or "biased".
        sync: whether E and Var are those of the batches of all processes together. A process without an image
            takes part in PyNative; a graph refuses it.
        process_groups: which processes share, as in `nn.SyncBatchNorm`: lists of the ranks of each group,
            such as [[0, 1], [2, 3]]; all together by default.
        fused: whether one operator computes the layer where there is one for the device; `False` always takes
            MindSpore's own operations. Shared and spatial statistics take them, too.

    Raises:
        RBNError: An option or an input is refused; no statistic has changed then.

    Example:
        >>> from mindspore import ops
        >>> from rbn.backends.mindspore import RBN
        >>> layer = RBN(16, scaling="channel_std").set_train()
        >>> layer(ops.randn(8, 16, 14, 14)).shape
        (8, 16, 14, 14)
        >>> [parameter.name for parameter in layer.trainable_params()]
        ['gamma', 'beta', 'center_weight', 'scale_weight', 'scale_bias']
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.9,
        affine: bool = True,
        gamma_init: Start = "ones",
        beta_init: Start = "zeros",
        moving_mean_init: Start = "zeros",
        moving_var_init: Start = "ones",
        use_batch_statistics: bool | None = None,
        data_format: str = "NCHW",
        dtype: Any = ms.float32,
        *,
        centering: Statistic | None = "channel_mean",
        scaling: Statistic | None = "channel_mean",
        restrict: str = "sigmoid",
        running_var: str = "unbiased",
        sync: bool = False,
        process_groups: list[list[int]] | None = None,
        fused: bool = True,
    ) -> None:
        config = Config(num_features, eps, momentum, centering, scaling, restrict, running_var)
        starts = (moving_mean_init, moving_var_init, gamma_init, beta_init)
        setting = Setting(
            starts, use_batch_statistics, data_format, dtype, sync, process_groups, fused, affine
        )
        super().__init__(config, setting)


@refuse_unknown_options
class IEBN(CalibratedNorm):
    r"""Instance Enhancement Batch Normalization (Liang et al., AAAI 2020) in place of `nn.BatchNorm*d`.

        X_s = (X - E(X)) / sqrt(Var(X) + eps)
        Y   = X_s sigmoid(w_v mean_c(X) + w_b) gamma + beta        mean_c over the positions of one channel

    Inputs, statistics, modes, options and errors are those of `RBN`, without `centering`, `scaling` and
    `restrict`. State: BatchNorm's, `num_batches_tracked`, and `scale_weight` (w_v, from 0) and `scale_bias`
    (w_b, from -1), each of shape (C,).

    Example:
        >>> from mindspore import ops
        >>> from rbn.backends.mindspore import IEBN
        >>> IEBN(16)(ops.randn(8, 16, 14, 14)).shape
        (8, 16, 14, 14)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.9,
        affine: bool = True,
        gamma_init: Start = "ones",
        beta_init: Start = "zeros",
        moving_mean_init: Start = "zeros",
        moving_var_init: Start = "ones",
        use_batch_statistics: bool | None = None,
        data_format: str = "NCHW",
        dtype: Any = ms.float32,
        *,
        running_var: str = "unbiased",
        sync: bool = False,
        process_groups: list[list[int]] | None = None,
        fused: bool = True,
    ) -> None:
        config = Config.iebn(num_features, eps=eps, momentum=momentum, running_var=running_var)
        starts = (moving_mean_init, moving_var_init, gamma_init, beta_init)
        setting = Setting(
            starts, use_batch_statistics, data_format, dtype, sync, process_groups, fused, affine
        )
        super().__init__(config, setting)


@refuse_unknown_options
class BNET(CalibratedNorm):
    r"""BatchNorm with an enhanced linear transformation (Xu et al., 2020): its affine step is a convolution.

        X_s = (X - E(X)) / sqrt(Var(X) + eps)
        Y   = depthwise convolution of X_s, zero padded, plus a bias

    Inputs, statistics, modes, options and errors are those of `RBN`, with the kernel's number of spatial axes
    and without `affine`, `gamma_init`, `beta_init`, `centering`, `scaling` and `restrict`. State: BatchNorm's
    running statistics, `num_batches_tracked`, and `conv`, a depthwise `nn.Conv*d` that starts as MindSpore
    starts it. MindSpore's convolutions refuse float64, and on a CPU bfloat16; there the same parameters are
    applied in operations that it has. `convert(model, "bnet", preserve=True)` makes BNETs that equal a
    model's BatchNorms.

    Args:
        kernel_size: the extent of the kernel along every axis; odd.
        spatial_dims: the number of spatial axes, 1, 2 or 3.

    Example:
        >>> from mindspore import ops
        >>> from rbn.backends.mindspore import BNET
        >>> BNET(16, kernel_size=5)(ops.randn(8, 16, 14, 14)).shape
        (8, 16, 14, 14)
    """

    def __init__(
        self,
        num_features: int,
        kernel_size: int = 3,
        eps: float = 1e-5,
        momentum: float | None = 0.9,
        moving_mean_init: Start = "zeros",
        moving_var_init: Start = "ones",
        use_batch_statistics: bool | None = None,
        data_format: str = "NCHW",
        dtype: Any = ms.float32,
        *,
        spatial_dims: int = 2,
        running_var: str = "unbiased",
        sync: bool = False,
        process_groups: list[list[int]] | None = None,
        fused: bool = True,
    ) -> None:
        config = Config.bnet(
            num_features, kernel_size, spatial_dims, eps=eps, momentum=momentum, running_var=running_var
        )
        starts = (moving_mean_init, moving_var_init)
        setting = Setting(starts, use_batch_statistics, data_format, dtype, sync, process_groups, fused)
        super().__init__(config, setting)
        self.spatial_dims = spatial_dims
        self.kernel_size = kernel_size
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial_dims - 1](
            num_features,
            num_features,
            kernel_size,
            pad_mode="pad",
            padding=kernel_size // 2,
            group=num_features,
            has_bias=True,
            dtype=dtype,
        )

    def transform(self, y: Tensor) -> Tensor:
        """The convolution in the place of BatchNorm's affine step."""
        stored = self.conv.weight.dtype
        if y.dtype == ms.float32 and stored in (ms.float32, ms.float16) and stored == self.conv.bias.dtype:
            return self.conv(functional.cast(y, stored))
        return functional.depthwise(y, self.conv.weight, self.conv.bias, self.kernel_size)


@ops.constexpr
def _check_input(
    shape: tuple[int, ...],
    dtype: Any,
    num_features: int,
    training: bool,
    axis: int,
    values: int,
    spatial_dims: int | None,
    layer: str,
) -> None:
    """Run `check_input` while a graph is compiled, when shapes are known; in PyNative on every call.

    Raises:
        RBNError: As of `check_input`; or a graph is compiled for any number of axes or of channels, which
            nothing could check, and one channel would be taken for all.
    """
    if shape is None or None in shape[axis:][:1]:
        raise RBNValueError(
            f"{layer}: expected the number of axes and of channels to be known in a graph, got shape "
            f"{shape}. Leave only other extents open: "
            f"set_inputs(Tensor(shape=[None, {num_features}, None, None], dtype=mindspore.float32))."
        )
    check_input(
        shape,
        str(dtype).lower(),
        num_features,
        training=training,
        axis=axis,
        values=values,
        spatial_dims=spatial_dims,
        layer=layer,
    )
