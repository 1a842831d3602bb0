"""RBN, IEBN and BNET with the dropout and the activation behind them, as timm's BatchNormAct2d has them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from rbn.backends.torch.layers import BNET, IEBN, RBN, CalibratedNorm


class Activated(CalibratedNorm):
    """What follows the normalization: Y = act(drop(norm(X))). The class of the norm stands behind this one.

    Args:
        args: The norm's.
        apply_act: Whether there is an activation.
        act_layer: What makes it; `None` is none.
        act_kwargs: What that is called with.
        inplace: Whether the activation overwrites what the normalization gives, if it can.
        drop_layer: What makes the dropout.
        options: The norm's.

    Attributes:
        drop: The dropout, or `torch.nn.Identity`.
        act: The activation, or `torch.nn.Identity`.
    """

    def __init__(
        self,
        *args: Any,
        apply_act: bool = True,
        act_layer: Callable[..., nn.Module] | None = nn.ReLU,
        act_kwargs: Mapping[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.drop: nn.Module = nn.Identity() if drop_layer is None else drop_layer()
        self.act: nn.Module = nn.Identity()
        if apply_act and act_layer is not None:
            known = {"inplace": inplace} if "inplace" in inspect.signature(act_layer).parameters else {}
            self.act = act_layer(**known | dict(act_kwargs or {}))

    def _normalized(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super()._normalized(input)))


class RBNAct2d(Activated, RBN):
    """`RBN` with a dropout and an activation, in place of timm's `BatchNormAct2d`: Y = act(drop(RBN(X))).

    X and Y are (N, C, H, W), and all dtypes are RBN's. It takes RBN's options, and by name those of the
    activation that `BatchNormAct2d` has: `apply_act`, `act_layer`, `act_kwargs`, `inplace`, `drop_layer`.
    timm takes a function that makes the layer, and leaves the activation to it:

        timm.create_model("regnetx_002", norm_layer=lambda channels, **options: RBNAct2d(channels, **options))

    Raises:
        RBNError: An option or an input is refused; no statistic has changed then.
    """


class IEBNAct2d(Activated, IEBN):
    """`IEBN` with a dropout and an activation, as `RBNAct2d`."""


class BNETAct2d(Activated, BNET):
    """`BNET` with a dropout and an activation, as `RBNAct2d`."""


ACTIVATED: dict[str, type[Activated]] = {"rbn": RBNAct2d, "iebn": IEBNAct2d, "bnet": BNETAct2d}
"""By the name of the layer inside."""
