"""What is left of a normalization in evaluation where its calibration does nothing: one a X + b a channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbn_core import conversion
from rbn_core.config import Config


def plain_affine(config: Config, state: Mapping[str, Any]) -> tuple[NDArray[Any], NDArray[Any]] | str:
    """a and b of Y = a X + b in evaluation, (C,) each in float64; in words why not where there is more.

        a = gamma R(w_b) / sqrt(Var + eps)        b = beta - a E

    That is all where w_m = 0 and w_v = 0, or the calibration is off, and where every tap of BNET's kernels
    but the centre is 0. E and Var are the running ones.

    Args:
        config: The layer's options; BatchNorm's are those without centering and scaling.
        state: Its arrays, under canonical names.
    """
    found = conversion.to_batch_norm(config, state)
    if isinstance(found, str):
        return found
    values = {name: np.asarray(value, np.float64) for name, value in found.items()}
    a = values.get("gamma", np.ones(config.num_features)) / np.sqrt(values["running_var"] + config.eps)
    return a, values.get("beta", 0.0) - a * values["running_mean"]
