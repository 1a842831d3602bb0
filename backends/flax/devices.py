"""Where JAX can run."""

from __future__ import annotations

import jax


def devices() -> list[str]:
    """The devices of JAX's default backend, as JAX names them."""
    return [str(device) for device in jax.devices()]
