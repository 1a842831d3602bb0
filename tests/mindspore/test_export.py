"""`mindspore.export` writes the layers in MindSpore's own operations: files run without this package."""

import os

os.environ.setdefault("GLOG_v", "4")

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from rbn import kernels
from rbn.backends.mindspore import BNET, IEBN, RBN, from_numpy, to_numpy

LAYERS = {
    "RBN": lambda: RBN(3),
    "channel_std": lambda: RBN(3, centering="channel_std", scaling="channel_std", restrict="hard_sigmoid"),
    "spatial_std": lambda: RBN(3, centering="spatial_std", scaling="spatial_std"),
    "IEBN": lambda: IEBN(3),
    "BNET": lambda: BNET(3),
}
X = Tensor(np.random.default_rng(0).normal(size=(4, 3, 6, 6)).astype(np.float32))


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def network(name):
    """A convolution and an evaluated layer none of whose numbers is special."""
    layer = LAYERS[name]()
    rng = np.random.default_rng(1)
    state = to_numpy(layer)
    from_numpy(
        layer,
        {
            key: value + (rng.uniform(0.1, 0.9, value.shape) if value.ndim else 1)
            for key, value in state.items()
        },
    )
    return nn.SequentialCell(nn.Conv2d(3, 3, 3), layer).set_train(False)


@pytest.mark.parametrize("name", LAYERS)
def test_onnx_is_written_as_of_batch_norm(name, tmp_path) -> None:
    ms.export(network(name), X, file_name="model", file_format="ONNX")
    assert (tmp_path / "model.onnx").stat().st_size > 0


@pytest.mark.parametrize("name", LAYERS)
def test_mindir_gives_the_same_and_names_no_library(name, tmp_path) -> None:
    model = network(name)
    expected = model(X).asnumpy()
    ms.export(model, X, file_name="model", file_format="MINDIR")
    assert b"rbn_mindspore" not in (tmp_path / "model.mindir").read_bytes()
    found = nn.GraphCell(ms.load("model.mindir"))(X).asnumpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_after_an_export_the_layer_takes_the_loops_again(monkeypatch) -> None:
    from rbn.backends.mindspore import fused

    layer = RBN(3)
    ms.export(layer, X, file_name="model", file_format="MINDIR")
    assert fused.takes(X, "channel_mean", "channel_mean", "sigmoid") == (not kernels.problem())
