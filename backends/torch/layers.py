"""RBN, IEBN and BNET as PyTorch modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.fx import Proxy
from torch.nn import init
from torch.nn.parameter import Parameter

from rbn.backends.torch import distributed, functional, fused, internals
from rbn_core.config import (
    CALIBRATION_STARTS,
    IEBN_STARTS,
    KNOWN,
    Config,
    check_counter,
    check_eps,
    check_input,
    check_momentum,
    check_options,
    check_shape,
    check_vectors,
    old_value_weight,
    refuse_unknown_options,
)
from rbn_core.errors import RBNTypeError, RBNValueError, RBNWarning
from rbn_core.names import NAMES, RUNNING_STATISTICS
from rbn_core.options import OPTIONS, Statistic

Device: TypeAlias = torch.device | str | int | None

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Setting:
    """What a constructor takes beside the options of `rbn_core.Config`, as `RBN` describes it."""

    momentum: float | None
    device: Device
    dtype: torch.dtype | None
    sync: bool
    process_group: ProcessGroup | None
    fused: bool


class CalibratedNorm(nn.BatchNorm2d):
    """What the three layers share: BatchNorm's parameters and statistics, and the forward pass.

    A `torch.nn.BatchNorm2d`, for any number of spatial axes, so that what updates, freezes or groups the
    BatchNorms of a model does so with these layers. What builds a BatchNorm anew, or folds one, reads its
    `eps`, and would leave the calibration out: here that is an error, and the value is `epsilon`.

    Attributes:
        epsilon: The number that is added to a variance under its root.
        starts: Where the parameters beyond BatchNorm's start.
        stored: The canonical names of the (C,) parameters, and what they are called here; pairs, as not every
            PyTorch exports a module that has a dictionary.
        spatial_dims: How many spatial axes an input must have; any number where `None`.
    """

    # What torch.jit reads of a layer; eps is none of it.
    __constants__ = tuple(name for name in nn.BatchNorm2d.__constants__ if name != "eps")

    starts: ClassVar[Mapping[str, float]] = {}
    stored: ClassVar[tuple[tuple[str, str], ...]]
    spatial_dims: int | None = None

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        own = ("weight", "bias", *cls.starts)
        cls.stored = tuple((canonical, name) for canonical, name in NAMES["torch"].items() if name in own)

    def __init__(self, config: Config, setting: Setting) -> None:
        nn.Module.__init__(self)
        self.num_features = config.num_features
        self.epsilon = config.eps
        self.momentum = setting.momentum
        self.affine = config.gamma
        self.track_running_stats = config.track_running_stats
        self.layer = config.layer
        self.centering = config.centering
        self.scaling = config.scaling
        self.restrict = config.restrict
        self.variance_estimator = config.running_var
        self.sync = setting.sync
        self.process_group = setting.process_group
        self.fused = setting.fused
        device, dtype = setting.device, setting.dtype
        for canonical, name in self.stored:
            parameter = None
            if canonical in config.parameters:
                parameter = Parameter(torch.empty(config.num_features, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        exact = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        for name in RUNNING_STATISTICS:
            statistic = None
            if name in config.statistics:
                counts = name == "num_batches_tracked"
                shape = () if counts else (config.num_features,)
                statistic = torch.empty(shape, device=device, dtype=torch.long if counts else exact)
            self.register_buffer(name, statistic)
        self.reset_parameters()

    @property
    def eps(self) -> float:
        """The epsilon of a plain BatchNorm, to set; the layer's own is read as `epsilon`.

        Raises:
            RBNTypeError: It is read, which is what a tool does that builds or folds a BatchNorm.
        """
        raise RBNTypeError(
            f"{self.layer}: expected a plain BatchNorm where a tool reads eps, got {self.layer}. A tool that "
            "rebuilds or folds a BatchNorm would drop the calibration. Use convert_sync_rbn, freeze, fold or "
            "convert of rbn.backends.torch; the value itself is layer.epsilon."
        )

    @eps.setter
    def eps(self, value: float) -> None:
        self.epsilon = value

    def __dir__(self) -> list[str]:
        """Without `eps`: torch.jit and `inspect` read all of these."""
        return [name for name in super().__dir__() if name != "eps"]

    def __prepare_scriptable__(self) -> None:
        """What `torch.jit.script` asks for first.

        Raises:
            RBNTypeError: Always: its language has not what the layer is written in.
        """
        raise RBNTypeError(
            f"{self.layer}: expected torch.jit.trace or torch.export, got torch.jit.script, which cannot "
            "compile this layer. Use torch.jit.trace(model.eval(), images): what it saves runs without rbn."
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CalibratedNorm:
        """Move or cast the layer, but never its statistics to half precision, which would wear them down."""
        before = {name: self._buffers.get(name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, exact in before.items():
            after = self._buffers.get(name)
            if exact is not None and after is not None and after.dtype in HALVES:
                source = after if exact.is_meta else exact
                self._buffers[name] = source.to(after.device, torch.promote_types(exact.dtype, torch.float32))
        return self

    def reset_running_stats(self) -> None:
        """Start the statistics as BatchNorm does."""
        starts = zip(RUNNING_STATISTICS, (0, 1, 0), strict=True)
        for name, start in starts:
            statistic = self._buffers.get(name)
            if statistic is not None:
                statistic.fill_(start)

    def reset_parameters(self) -> None:
        """Start as plain BatchNorm, but for the constant that the calibration or attention starts with."""
        self.reset_running_stats()
        for name, start in {"weight": 1.0, "bias": 0.0, **self.starts}.items():
            parameter = self._parameters.get(name)
            if parameter is not None:
                init.constant_(parameter, start)

    def forward(self, input: Tensor) -> Tensor:
        """Y, of the shape, dtype and memory format of `input`, (N, C, *spatial)."""
        if type(input) is not Tensor and isinstance(input, Proxy):
            return self._recorded(input)
        return self._normalized(input)

    def _recorded(self, input: Any) -> Any:
        """This layer as one node of a graph of torch.fx, as PyTorch's own layers are."""
        if input.tracer.root is self:
            raise RBNTypeError(
                f"{self.layer}: expected to be traced as a part of a model, got the layer alone. "
                "Put it into a torch.nn.Sequential."
            )
        return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), {})

    def _normalized(self, input: Tensor) -> Tensor:
        parameters, running = self._parameters_by_name(), self._running()
        batch_statistics = self.training or running is None
        tracks = self.training and self.track_running_stats and running is not None
        share = distributed.Share(input, self.process_group) if batch_statistics and self.sync else None
        values = input.numel() // self.num_features if share is None else share.values
        empty = batch_statistics and share is None and values == 0 and input.dim() > 1 and input.shape[0] == 0
        self._check(input, training=batch_statistics and not empty, values=values)
        self._check_options(tracks)
        ordinary = self._check_stored(input, parameters, running, tracks)
        if tracks and ordinary and running is not None and fused.share_memory(running, parameters):
            parameters = {name: value.clone() for name, value in parameters.items()}  # of before the update
        compute: Callable[..., tuple[Tensor, Tensor, Tensor]]
        accumulate = functional.accumulate
        if share is not None:
            compute = partial(functional.rbn, average=share.average)
        elif self.fused and ordinary and fused.takes(input, self.centering, self.scaling, self.restrict):
            compute, accumulate = fused.rbn, fused.accumulate
        else:
            compute = functional.rbn
        y, mean, var = compute(
            input,
            parameters,
            None if batch_statistics else running,
            eps=self.epsilon,
            centering=self.centering,
            scaling=self.scaling,
            restrict=self.restrict,
        )
        y = self.transform(y)
        if tracks and empty:  # such as a head's for images without objects; BatchNorm counts it, too
            self._count()
        elif tracks and running is not None and not self._is_mapped(mean):
            accumulate(
                running,
                mean,
                var,
                self.momentum,
                count=self._count(),
                values=values if self.variance_estimator == "unbiased" else None,
            )
        return y if y.dtype is input.dtype else y.to(input.dtype)

    def transform(self, y: Tensor) -> Tensor:
        """What follows on (N, C) coefficients; nothing but in BNET."""
        return y

    def _parameters_by_name(self) -> dict[str, Tensor]:
        """The parameters that are there, by their canonical names."""
        found = {}
        for canonical, name in self.stored:
            value: Tensor | None = self._parameters.get(name)
            if value is None:  # parametrized and pruned ones are attributes alone
                value = getattr(self, name, None)
            if value is not None:
                found[canonical] = value
        return found

    def _running(self) -> tuple[Tensor, Tensor] | None:
        """E and Var as they are kept; with neither the layer takes the batch's, as BatchNorm does."""
        mean, var = self._buffers.get("running_mean"), self._buffers.get("running_var")
        if mean is None or var is None:
            mean, var = getattr(self, "running_mean", None), getattr(self, "running_var", None)
            if mean is None and var is None:
                return None
            check_vectors(
                {
                    name: None if value is None else (self.num_features,)
                    for name, value in (("running_mean", mean), ("running_var", var))
                },
                self.num_features,
                self.layer,
            )
        return mean, var

    def _check(self, input: Tensor, *, training: bool, values: int | None) -> None:
        check_input(
            input.shape,
            fused.name_of(input.dtype),
            self.num_features,
            training=training,
            values=values,
            spatial_dims=self.spatial_dims,
            layer=self.layer,
        )

    def _check_options(self, tracks: bool) -> None:
        chosen = self.centering, self.scaling, self.restrict, self.variance_estimator
        try:
            known = chosen in KNOWN[self.layer]
        except TypeError:  # what cannot be looked up is no option either
            known = False
        if not known:
            check_options(*chosen, self.layer)
        if type(self.epsilon) is not float:
            check_eps(self.epsilon, self.layer)
        if tracks:
            if type(self.momentum) is not float:
                check_momentum(self.momentum, self.layer)
            check_counter(getattr(self, "num_batches_tracked", None), self.momentum, self.layer)

    def _check_stored(
        self,
        input: Tensor,
        parameters: Mapping[str, Tensor],
        running: tuple[Tensor, Tensor] | None,
        tracks: bool,
    ) -> bool:
        """Refuse what does not fit; whether the rest is of PyTorch's own kinds of tensors."""
        if self.centering is not None and "center_weight" not in parameters:
            check_vectors({"center_weight": None}, self.num_features, self.layer)
        if self.scaling is not None and not ("scale_weight" in parameters and "scale_bias" in parameters):
            missing = "scale_bias" if "scale_weight" in parameters else "scale_weight"
            check_vectors({missing: None}, self.num_features, self.layer)
        ordinary = fused.check_layer(input, parameters, running, self.num_features, self.layer)
        if tracks and running is not None:
            for name, value in zip(("running_mean", "running_var"), running, strict=True):
                if value.dtype in HALVES:
                    raise RBNTypeError(
                        f"{self.layer}: expected {name} in float32 or float64 to train, got {value.dtype}. "
                        "Convert it, for example with layer.float()."
                    )
                if value.stride(0) == 0 and self.num_features > 1:
                    raise RBNValueError(
                        f"{self.layer}: expected {name} with a place for each channel to train, "
                        "got it expanded. Assign its .clone()."
                    )
        return ordinary

    def extra_repr(self) -> str:
        """The options, as `print(model)` shows them."""
        chosen = [name for name in ("centering", "scaling", "restrict") if self.layer in OPTIONS[name].layers]
        return ", ".join(
            (
                f"{self.num_features}, eps={self.epsilon}, momentum={self.momentum}, affine={self.affine}",
                f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}",
                f"running_var={self.variance_estimator!r}, sync={self.sync}",
                *(f"{name}={getattr(self, name)!r}" for name in chosen),
            )
        )

    def _count(self) -> Tensor | None:
        """Count a batch, where batches are counted."""
        counter: Tensor | None = getattr(self, "num_batches_tracked", None)
        if counter is not None:
            counter.add_(1)
        return counter

    def _is_mapped(self, mean: Tensor) -> bool:
        """Whether `torch.vmap` maps over batches, of which the running statistics can take none."""
        if torch.compiler.is_compiling() or not internals.functorch_is_active():
            return False
        if not internals.is_batched(mean) or internals.is_batched(self.running_mean):
            return False
        warnings.warn(
            f"{self.layer}: expected a batch to update running statistics from, got a map over one. "
            "They stay as they are: train without torch.vmap, or stack the statistics, too.",
            RBNWarning,
            stacklevel=2,
        )
        return True


@refuse_unknown_options
class RBN(CalibratedNorm):
    r"""Representative Batch Normalization (Gao et al., CVPR 2021, eq. 12) in place of `torch.nn.BatchNorm*d`.

        X_cm = X + w_m K_m
        X_s  = (X_cm - E(X_cm)) / sqrt(Var(X_cm) + eps)
        Y    = X_s R(w_v K_s + w_b) gamma + beta

    Inputs are (N, C, *spatial) with any number of spatial axes and any memory format, in float64, float32,
    bfloat16 or float16; statistics are taken in at least float32 and the output has the input's dtype.
    In training E and Var are the batch's, in evaluation the running ones; K_m and K_s are always the input's.
    An empty batch passes through and leaves the running statistics alone, as in BatchNorm.

    State: `weight` (gamma), `bias` (beta), `running_mean`, `running_var` and `num_batches_tracked` as in
    BatchNorm, and `center_weight` (w_m, from 0), `scale_weight` (w_v, from 0) and `scale_bias` (w_b, from 1),
    each of shape (C,).

    Args:
        num_features: C, the number of channels.
        eps: epsilon, added to a variance under its root.
        momentum: the weight of the *new* value in the running statistics; `None` averages all batches.
        affine: whether gamma and beta are learned.
        track_running_stats: whether running statistics are kept; without them evaluation uses the batch's.
        device: where the parameters and statistics live.
        dtype: their dtype.
        bias: whether an affine layer has a beta.
        centering: K_m, "channel_mean", "channel_std", "spatial_mean", "spatial_std" or `None`.
        scaling: K_s, the same choice, of X_s.
        restrict: R, "sigmoid" or "hard_sigmoid".
        running_var: the batch variance that is accumulated, "unbiased" or "biased".
        sync: whether E and Var are those of the batches of all processes together.
        process_group: these processes; all by default.
        fused: whether one operator computes the layer where there is one for the device; `False` always takes
            PyTorch's own operations. Synchronised and spatial statistics take them, too.

    Raises:
        RBNError: An option or an input is refused; no statistic has changed then.

    Example:
        >>> import torch
        >>> from rbn.backends.torch import RBN
        >>> layer = RBN(16, scaling="channel_std")
        >>> layer(torch.randn(8, 16, 14, 14)).shape
        torch.Size([8, 16, 14, 14])
        >>> sorted(name for name, _ in layer.named_parameters())
        ['bias', 'center_weight', 'scale_bias', 'scale_weight', 'weight']
    """

    starts = CALIBRATION_STARTS

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        centering: Statistic | None = "channel_mean",
        scaling: Statistic | None = "channel_mean",
        restrict: str = "sigmoid",
        running_var: str = "unbiased",
        sync: bool = False,
        process_group: ProcessGroup | None = None,
        fused: bool = True,
    ) -> None:
        config = Config(
            num_features,
            eps,
            old_value_weight(momentum),
            centering,
            scaling,
            restrict,
            running_var,
            gamma=affine,
            beta=affine and bias,
            track_running_stats=track_running_stats,
        )
        super().__init__(config, Setting(momentum, device, dtype, sync, process_group, fused))


@refuse_unknown_options
class IEBN(CalibratedNorm):
    r"""Instance Enhancement Batch Normalization (Liang et al., AAAI 2020) in place of `torch.nn.BatchNorm*d`.

        X_s = (X - E(X)) / sqrt(Var(X) + eps)
        Y   = X_s sigmoid(w_v mean_c(X) + w_b) gamma + beta        mean_c over the positions of one channel

    Inputs, statistics, modes, options and errors are those of `RBN`, without `centering`, `scaling` and
    `restrict`. State: BatchNorm's, and `scale_weight` (w_v, from 0) and `scale_bias` (w_b, from -1), each of
    shape (C,).

    Example:
        >>> import torch
        >>> from rbn.backends.torch import IEBN
        >>> IEBN(16)(torch.randn(8, 16, 14, 14)).shape
        torch.Size([8, 16, 14, 14])
    """

    starts = IEBN_STARTS

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        running_var: str = "unbiased",
        sync: bool = False,
        process_group: ProcessGroup | None = None,
        fused: bool = True,
    ) -> None:
        config = Config.iebn(
            num_features,
            eps=eps,
            momentum=old_value_weight(momentum, "IEBN"),
            running_var=running_var,
            gamma=affine,
            beta=affine and bias,
            track_running_stats=track_running_stats,
        )
        super().__init__(config, Setting(momentum, device, dtype, sync, process_group, fused))


@refuse_unknown_options
class BNET(CalibratedNorm):
    r"""BatchNorm with an enhanced linear transformation (Xu et al., 2020): its affine step is a convolution.

        X_s = (X - E(X)) / sqrt(Var(X) + eps)
        Y   = depthwise convolution of X_s, zero padded, plus a bias

    Inputs, statistics, modes, options and errors are those of `RBN`, with the kernel's number of spatial axes
    and without `affine`, `bias`, `centering`, `scaling` and `restrict`. State: BatchNorm's running
    statistics, and `conv`, a depthwise `torch.nn.Conv*d` that starts as PyTorch starts it.
    `convert(model, "bnet", preserve=True)` makes BNETs that equal a model's BatchNorms.

    Args:
        kernel_size: the extent of the kernel along every axis; odd.
        spatial_dims: the number of spatial axes, 1, 2 or 3.

    Example:
        >>> import torch
        >>> from rbn.backends.torch import BNET
        >>> BNET(16, kernel_size=5)(torch.randn(8, 16, 14, 14)).shape
        torch.Size([8, 16, 14, 14])
    """

    def __init__(
        self,
        num_features: int,
        kernel_size: int = 3,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        spatial_dims: int = 2,
        running_var: str = "unbiased",
        sync: bool = False,
        process_group: ProcessGroup | None = None,
        fused: bool = True,
    ) -> None:
        config = Config.bnet(
            num_features,
            kernel_size,
            spatial_dims,
            eps=eps,
            momentum=old_value_weight(momentum, "BNET"),
            running_var=running_var,
            track_running_stats=track_running_stats,
        )
        super().__init__(config, Setting(momentum, device, dtype, sync, process_group, fused))
        self.spatial_dims = spatial_dims
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial_dims - 1](
            num_features,
            num_features,
            kernel_size,
            padding=kernel_size // 2,
            groups=num_features,
            device=device,
            dtype=dtype,
        )

    def _normalized(self, input: Tensor) -> Tensor:
        """Half precision is rounded once, after the convolution."""
        wide = input.float() if input.dtype in HALVES else input
        return super()._normalized(wide).to(input.dtype)

    def _check_stored(self, input: Tensor, *others: Any) -> bool:
        convolution = {"conv.weight": self.conv.weight, "conv.bias": self.conv.bias}
        due = (self.num_features, 1, *self.conv.kernel_size), (self.num_features,)
        for (name, value), shape in zip(convolution.items(), due, strict=True):
            check_shape(name, None if value is None else value.shape, shape, self.layer)
            fused.check_kind(name, value, input, self.layer)
        if self.conv.weight.dtype != self.conv.bias.dtype:
            raise RBNTypeError(
                f"{self.layer}: expected conv.weight and conv.bias in one dtype, got {self.conv.weight.dtype}"
                f" and {self.conv.bias.dtype}. Convert one, for example with layer.conv.float()."
            )
        return super()._check_stored(input, *others)

    def reset_parameters(self) -> None:
        """Start the statistics as BatchNorm and the convolution as PyTorch does."""
        super().reset_parameters()
        if hasattr(self, "conv"):
            self.conv.reset_parameters()

    def transform(self, y: Tensor) -> Tensor:
        """The convolution in the place of BatchNorm's affine step."""
        return self.conv(y.to(self.conv.weight.dtype))
