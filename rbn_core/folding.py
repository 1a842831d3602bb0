"""What is left of a normalization in evaluation where its calibration does nothing: one a X + b a channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbn_core import conversion
from rbn_core.config import Config


def plain_gamma_beta(config: Config, state: Mapping[str, Any]) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """gamma and beta of the BatchNorm that gives what a layer gives, (C,) each; `None` where there is none.

    There is one where w_m = 0 and w_v = 0, or the calibration is off, and where every tap of BNET's kernels
    but the centre is 0. R(w_b) of eq. 9 is a constant then, and a part of gamma.

    Args:
        config: The layer's options; BatchNorm's are those without centering and scaling.
        state: Its arrays, under canonical names.
    """
    found = conversion.to_batch_norm(config, state)
    if isinstance(found, str):
        return None
    ones = np.ones(config.num_features)
    return np.asarray(found.get("gamma", ones), np.float64), np.asarray(
        found.get("beta", 0 * ones), np.float64
    )


def plain_affine(config: Config, state: Mapping[str, Any]) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """a and b of Y = a X + b in evaluation, (C,) each in float64; `None` as in `plain_gamma_beta`.

    a = gamma / sqrt(Var + eps) and b = beta - a E, of the running E and Var.
    """
    plain = plain_gamma_beta(config, state)
    if plain is None:
        return None
    a = plain[0] / np.sqrt(np.asarray(state["running_var"], np.float64) + config.eps)
    return a, plain[1] - a * np.asarray(state["running_mean"], np.float64)
