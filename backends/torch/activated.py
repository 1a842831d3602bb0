"""RBN, IEBN and BNET with the dropout and the activation behind them, as timm's BatchNormAct2d has them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rbn.backends.torch.layers import BNET, IEBN, RBN, CalibratedNorm, Device


class Activated(CalibratedNorm):
    """What follows the normalization: Y = act(drop(norm(X))).

    Attributes:
        drop: The dropout, or `torch.nn.Identity`.
        act: The activation, or `torch.nn.Identity`.
    """

    drop: nn.Module
    act: nn.Module

    def follow(
        self,
        apply_act: bool,
        act_layer: Callable[..., nn.Module] | None,
        act_kwargs: Mapping[str, Any] | None,
        inplace: bool,
        drop_layer: Callable[[], nn.Module] | None,
    ) -> None:
        """Build the dropout and the activation."""
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = nn.Identity()
        if apply_act and act_layer is not None:
            known = {"inplace": inplace} if "inplace" in inspect.signature(act_layer).parameters else {}
            self.act = act_layer(**known | dict(act_kwargs or {}))

    def _normalized(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super()._normalized(input)))


class RBNAct2d(Activated, RBN):
    """`RBN` with a dropout and an activation, in place of timm's `BatchNormAct2d`.

        Y = act(drop(RBN(X)))

    X and Y are (N, C, H, W), and all dtypes are RBN's. timm takes a function that makes the layer, and leaves
    the activation to it:

        timm.create_model("regnetx_002", norm_layer=lambda channels, **options: RBNAct2d(channels, **options))

    Args:
        num_features: C, the number of channels.
        eps: epsilon, added to a variance under its root.
        momentum: the weight of the *new* value in the running statistics.
        affine: whether gamma and beta are learned.
        track_running_stats: whether running statistics are kept.
        apply_act: whether there is an activation.
        act_layer: what makes it; `None` is none.
        act_kwargs: what that is called with.
        inplace: whether the activation overwrites what the normalization gives, if it can.
        drop_layer: what makes the dropout.
        device: where the parameters and statistics live.
        dtype: their dtype.
        options: RBN's, such as `scaling="channel_std"`.

    Raises:
        RBNError: An option or an input is refused; no statistic has changed then.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: Callable[..., nn.Module] | None = nn.ReLU,
        act_kwargs: Mapping[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        RBN.__init__(self, num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.follow(apply_act, act_layer, act_kwargs, inplace, drop_layer)


class IEBNAct2d(Activated, IEBN):
    """`IEBN` with a dropout and an activation: called as `RBNAct2d`, with IEBN's options."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: Callable[..., nn.Module] | None = nn.ReLU,
        act_kwargs: Mapping[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        IEBN.__init__(
            self, num_features, eps, momentum, affine, track_running_stats, device, dtype, **options
        )
        self.follow(apply_act, act_layer, act_kwargs, inplace, drop_layer)


class BNETAct2d(Activated, BNET):
    """`BNET` with a dropout and an activation: called as `RBNAct2d`, with BNET's options and no `affine`."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: Callable[..., nn.Module] | None = nn.ReLU,
        act_kwargs: Mapping[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        known: dict[str, Any] = {"eps": eps, "momentum": momentum, "device": device, "dtype": dtype}
        BNET.__init__(self, num_features, track_running_stats=track_running_stats, **known, **options)
        self.follow(apply_act, act_layer, act_kwargs, inplace, drop_layer)


ACTIVATED: dict[str, type[Activated]] = {"rbn": RBNAct2d, "iebn": IEBNAct2d, "bnet": BNETAct2d}
"""By the name of the layer inside."""
