"""Statistics of a batch that is spread over devices equal the whole batch's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rbn.backends.flax as rbn_flax
from rbn.backends.flax import RBN
from rbn_core import RBNValueError

WAYS = ("vmap", "pmap", "shard_map(check_vma=True)", "shard_map(check_vma=False)", "jit", "groups", "images")

Deviations = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def deviations() -> Deviations:
    """Measured in a process of its own: the number of devices is fixed when JAX starts."""
    script = Path(__file__).with_name("four_devices.py")
    forced = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    finished = subprocess.run(
        [sys.executable, str(script)], env=os.environ | forced, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", WAYS)
def test_four_devices_equal_the_whole_batch(way: str, deviations: Deviations) -> None:
    measured = {name: found for name, found in deviations.items() if name.split()[0] == way}
    assert len(measured) == (1 if way in ("groups", "images") else 12)
    for name, found in measured.items():
        # Parts of images give means of means of means: 16 eps, as the suite allows near the mean.
        bound = 16 * np.finfo(np.float32).eps if way == "images" else 1e-6
        assert max(found.values()) < bound, (name, found)


def test_evaluation_and_initialization_need_no_axis() -> None:
    x = jnp.ones((1, 3))
    layer, module = RBN(axis_name="batch"), rbn_flax.nnx.RBN(3, axis_name="batch", rngs=nnx.Rngs(0))
    variables = layer.init(jax.random.key(0), x, use_running_average=False)
    assert layer.apply(variables, x, use_running_average=True).shape == x.shape
    assert module(x, use_running_average=True).shape == x.shape
    rows = RBN(axis_name="batch", spatial_axis_name="rows")
    assert rows.init(jax.random.key(0), x, use_running_average=False).keys() == variables.keys()
    with pytest.raises(
        NameError, match="rows"
    ):  # in evaluation a part of an image does not pass for all of it
        rows.apply(variables, x, use_running_average=True)


def test_one_value_in_all_is_refused() -> None:
    module = rbn_flax.nnx.RBN(3, axis_name="batch", rngs=nnx.Rngs(0))
    with pytest.raises(RBNValueError, match="more than one value per channel"):
        jax.vmap(lambda x: nnx.clone(module)(x), axis_name="batch")(jnp.ones((1, 1, 3)))
