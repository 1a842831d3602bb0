"""Without the names that Jittor does not promise, the layers are still right."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from rbn.backends.jittor import RBN, environment, internals

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt
import jittor_utils

from rbn_core.errors import RBNWarning


@pytest.mark.parametrize("fused", [True, False])
def test_without_the_register_of_mixed_precision_the_layers_are_right_and_warn_once(fused, monkeypatch):
    x = jt.array(np.random.default_rng(0).normal(size=(4, 3, 5, 5)), dtype="float32")

    def step(layer):
        with jt.flag_scope(auto_mixed_precision_level=5):
            y = layer(x)
            gradient = jt.grad(y.float32().sqr().sum(), layer.scale_bias)
        return [value.numpy() for value in (y, gradient, layer.running_var)]

    expected = step(RBN(3, fused=fused))
    without = SimpleNamespace(flags=SimpleNamespace(), flag_scope=jt.flag_scope)  # Jittor itself needs it
    monkeypatch.setitem(sys.modules, "jittor", without)
    internals._warn_of.cache_clear()
    with pytest.warns(RBNWarning, match=r"no jittor\.flags\.amp_reg: gradients are less exact") as warned:
        found, _ = [step(RBN(3, fused=fused)) for _ in range(2)]
    assert len(warned) == 1
    for one, two, digits in zip(found, expected, (2e-6, 2e-3, 2e-6), strict=True):
        np.testing.assert_allclose(one, two, rtol=digits, atol=digits * abs(two).max())


def test_without_its_places_jittor_is_prepared_all_the_same(monkeypatch, tmp_path):
    environ = {"HOME": str(tmp_path)}
    monkeypatch.setattr(environment.os, "environ", environ)
    monkeypatch.delitem(sys.modules, "jittor")
    which = shutil.which
    monkeypatch.setattr(environment.shutil, "which", lambda name: None if name == "nvcc" else which(name))
    monkeypatch.delattr(jittor_utils, "home")
    monkeypatch.setitem(sys.modules, "jittor_utils.install_cuda", None)
    environment.prepare()
    assert environ["use_mkl"] == "0"


def test_without_a_pool_of_compilers_there_is_nothing_to_end(monkeypatch):
    monkeypatch.delattr(jittor_utils, "p", raising=False)
    environment.end_compilers()
