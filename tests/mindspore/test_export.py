"""`mindspore.export` writes the layers in MindSpore's own operations: files run without this package."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("GLOG_v", "4")

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import rbn
from rbn import kernels
from rbn.backends.mindspore import BNET, IEBN, RBN, from_numpy, to_numpy

LAYERS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(3),
    "RBN": lambda: RBN(3),
    "plain": lambda: RBN(3, fused=False),
    "channel_std": lambda: RBN(3, centering="channel_std", scaling="channel_std", restrict="hard_sigmoid"),
    "spatial_std": lambda: RBN(3, centering="spatial_std", scaling="spatial_std"),
    "IEBN": lambda: IEBN(3),
    "BNET": lambda: BNET(3),
}
ms.set_seed(0)
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


def run(script, tmp_path):
    """Run a program in a process of its own, from the folder with the files."""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


RUN_MINDIR = """
import pathlib, sys
import mindspore as ms, numpy as np
from mindspore import Tensor, nn
for path in sorted(pathlib.Path().glob("*.mindir")):
    stored = np.load(path.with_suffix(".npz"))
    network = nn.GraphCell(ms.load(str(path)))
    for images in (4, 2) if path.stem.endswith("open") else (4,):
        y = network(Tensor(stored["x"][:images])).asnumpy()
        np.testing.assert_allclose(y, stored["y"][:images], rtol=1e-5, atol=1e-6, err_msg=path.stem)
assert "rbn" not in sys.modules
"""


@pytest.mark.meeting(
    "MINDIR",
    "works, also with an open batch, and loads where `rbn` is not installed",
    "ms.export(net, images, file_name='net', file_format='MINDIR')",
)
def test_mindir_runs_in_a_process_without_this_package_and_names_nothing_here(tmp_path) -> None:
    open_batch = Tensor(shape=[None, 3, 6, 6], dtype=ms.float32)
    for name in LAYERS:
        model = network(name)
        # For one of them there is a graph with the loops already.
        y = (ms.jit(model) if name == "RBN" else model)(X).asnumpy()
        is_open = name in ("BatchNorm2d", "RBN", "BNET")
        file_name = f"{name}-open" if is_open else name
        ms.export(model, open_batch if is_open else X, file_name=file_name, file_format="MINDIR")
        np.savez(tmp_path / f"{file_name}.npz", x=X.asnumpy(), y=y)
        written = (tmp_path / f"{file_name}.mindir").read_bytes()
        for there in ("rbn_mindspore", ".so", sys.prefix, Path(rbn.__file__).parents[1], Path.home()):
            assert str(there).encode() not in written, name
    run(RUN_MINDIR, tmp_path)


RUN_ONNX = """
import pathlib
import numpy as np, onnxruntime
for path in sorted(pathlib.Path().glob("*.onnx")):
    stored = np.load(path.with_suffix(".npz"))
    session = onnxruntime.InferenceSession(str(path))
    (y,) = session.run(None, {session.get_inputs()[0].name: stored["x"]})
    assert np.abs(y - stored["y"]).max() <= 1e-6 * np.abs(stored["y"]).max(), path.stem
"""


@pytest.mark.meeting(
    "ONNX, run in onnxruntime",
    "works",
    "ms.export(net, images, file_name='net', file_format='ONNX')",
    packages=("onnxruntime",),
)
def test_onnx_is_written_as_of_batch_norm_and_runs(tmp_path) -> None:
    for name in LAYERS:
        model = network(name)
        ms.export(model, X, file_name=name, file_format="ONNX")
        assert (tmp_path / f"{name}.onnx").stat().st_size > 0
        np.savez(tmp_path / f"{name}.npz", x=X.asnumpy(), y=model(X).asnumpy())
    if importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("written, and not run: onnxruntime is not installed")
    run(RUN_ONNX, tmp_path)


@pytest.mark.meeting(
    "ONNX with an open batch",
    "MindSpore refuses it, also for BatchNorm",
    "ms.export(net, ms.Tensor(shape=[None, 3, 8, 8], dtype=ms.float32), file_name='net', file_format='ONNX')",
)
def test_onnx_of_an_open_batch_is_refused_by_mindspore_as_of_batch_norm() -> None:
    open_batch = Tensor(shape=[None, 3, 6, 6], dtype=ms.float32)
    for name in ("BatchNorm2d", "RBN"):
        with pytest.raises(ValueError, match="not support dynamic shape"):
            ms.export(network(name), open_batch, file_name=name, file_format="ONNX")


def test_after_an_export_the_layer_takes_the_loops_again(monkeypatch) -> None:
    from rbn.backends.mindspore import fused

    layer = RBN(3)
    ms.export(layer, X, file_name="model", file_format="MINDIR")
    assert fused.takes(X, "channel_mean", "channel_mean", "sigmoid") == (not kernels.problem())
