"""`mindspore.jvp`, a gradient of a gradient inside, takes MindSpore's own operations by itself."""

import os

os.environ.setdefault("GLOG_v", "4")

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import rbn_core
from rbn import kernels
from rbn.backends.mindspore import BNET, IEBN, RBN, from_numpy, fused, to_numpy

LAYERS = {"RBN": (RBN, rbn_core.RBN), "IEBN": (IEBN, rbn_core.IEBN), "BNET": (BNET, rbn_core.BNET)}
rng = np.random.default_rng(0)
X, DIRECTION = rng.normal(1, 2, (2, 4, 3, 5, 5)).astype(np.float32)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.meeting(
    "`mindspore.jvp`",
    "works",
    "ms.jvp(net, x, v)",
)
@pytest.mark.parametrize(("name", "training"), [("RBN", True), ("IEBN", False), ("BNET", True)])
def test_the_directional_derivative_is_that_of_finite_differences(name, training) -> None:
    kind, reference_kind = LAYERS[name]
    layer, reference = kind(3).set_train(training), reference_kind(3)
    state = {
        key: value if value.ndim == 0 else (value + rng.uniform(0.1, 0.5, value.shape)).astype(np.float32)
        for key, value in to_numpy(layer).items()
    }
    from_numpy(layer, state)
    y, found = ms.jvp(nn.SequentialCell(layer).set_train(training), Tensor(X), Tensor(DIRECTION))

    def exact(step):
        reference.load(state)
        return reference.forward(X.astype(np.float64) + step * DIRECTION, training=training)

    due = (exact(1e-5) - exact(-1e-5)) / 2e-5
    assert np.abs(y.asnumpy() - exact(0)).max() <= 1e-5 * np.abs(exact(0)).max()
    assert np.abs(found.asnumpy() - due).max() <= 1e-5 * np.abs(due).max()
    assert fused.takes(Tensor(X), "channel_mean", "channel_mean", "sigmoid") == (not kernels.problem())
