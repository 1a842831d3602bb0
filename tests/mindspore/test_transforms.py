"""`mindspore.vjp`, `vmap`, `jacrev`, `jacfwd` and Hessians, beside what they do with BatchNorm."""

import os

os.environ.setdefault("GLOG_v", "4")

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import rbn_core
from rbn import kernels
from rbn.backends.mindspore import BNET, IEBN, RBN, from_numpy, fused, internals, to_numpy

LAYERS = {"BatchNorm2d": nn.BatchNorm2d, "RBN": RBN, "IEBN": IEBN, "BNET": BNET}
REFERENCES = {"RBN": rbn_core.RBN, "IEBN": rbn_core.IEBN, "BNET": rbn_core.BNET}
rng = np.random.default_rng(0)
X, DY = rng.normal(1, 2, (2, 2, 1, 2, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    internals.end_gradient()  # which an error leaves open


def lively(name, training, **options):
    """A layer in a network, with numbers none of which is special, and the reference with the same."""
    layer = LAYERS[name](1, **options)
    state = {
        key: value if value.ndim == 0 else (value + rng.uniform(0.1, 0.5, value.shape)).astype(np.float32)
        for key, value in to_numpy(layer).items()
    }
    from_numpy(layer, state)
    reference = REFERENCES[name](1) if name in REFERENCES else rbn_core.RBN(1, centering=None, scaling=None)
    reference.load({key: value for key, value in state.items() if key in reference.state()})
    return nn.SequentialCell(layer).set_train(training), reference


def close(found, due):
    assert np.abs(found.asnumpy() - due).max() <= 1e-5 * np.abs(due).max()


@pytest.mark.meeting("`mindspore.vjp`", "works", "y, pull = ms.vjp(net, x)")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_vector_times_the_jacobian(name, training) -> None:
    net, reference = lively(name, training)
    y, pull = ms.vjp(net, Tensor(X))
    close(y, reference.forward(X.astype(np.float64), training=training))
    close(pull(Tensor(DY))[0], reference.backward(DY.astype(np.float64))[0])


@pytest.mark.meeting(
    "`mindspore.vmap` and `mindspore.jacrev` in evaluation",
    "work",
    "ms.vmap(net)(batches)",
)
@pytest.mark.parametrize("name", ["BatchNorm2d", "RBN", pytest.param("BNET", marks=pytest.mark.long)])
def test_vmap_and_jacrev_in_evaluation(name) -> None:
    net, reference = lively(name, False)
    found = ms.vmap(net)(Tensor(np.stack([X, DY])))
    due = [reference.forward(each.astype(np.float64), training=False) for each in (X, DY)]
    close(found, np.stack(due))
    jacobian = ms.jacrev(net)(Tensor(X)).asnumpy()
    reference.forward(X.astype(np.float64), training=False)
    pulled = reference.backward(DY.astype(np.float64))[0]
    found = (jacobian * DY.reshape(*DY.shape, 1, 1, 1, 1)).sum((0, 1, 2, 3))
    assert np.abs(found - pulled).max() <= 1e-5 * np.abs(pulled).max()


@pytest.mark.meeting(
    "`mindspore.vmap` and `mindspore.jacrev` in training",
    "an error of MindSpore, also with BatchNorm: it cannot map an operation that changes a parameter",
    "ms.vmap(net.set_train(False))(batches)",
)
@pytest.mark.parametrize("transform", ["vmap", "jacrev"])
@pytest.mark.parametrize("name", ["BatchNorm2d", "RBN"])
def test_vmap_in_training_is_mindspores_error(name, transform) -> None:
    net, _ = lively(name, True)
    before = to_numpy(net)
    with pytest.raises(ValueError, match=r"[vV]map|source axis"):
        ms.vmap(net)(Tensor(np.stack([X, DY]))) if transform == "vmap" else ms.jacrev(net)(Tensor(X))
    np.testing.assert_equal(to_numpy(net), before)


def loss(net):
    return lambda x: ops.sin(net(x)).sum()


@pytest.mark.meeting(
    "`mindspore.jacfwd` and Hessians in evaluation",
    "an error that says what to do instead, `fused=False`",
    "ms.jacrev(ms.grad(loss))(x)",
)
@pytest.mark.skipif(bool(kernels.problem()), reason="without the compiled loops every layer is plain")
@pytest.mark.parametrize("transform", ["jacfwd", "hessian"])
def test_what_differentiates_twice_names_the_way_out(transform) -> None:
    net, _ = lively("RBN", False)
    assert fused.takes(Tensor(X), "channel_mean", "channel_mean", "sigmoid")
    with pytest.raises(rbn_core.RBNError, match=r"Build the layer with fused=False"):
        ms.jacfwd(net)(Tensor(X)) if transform == "jacfwd" else ms.jacrev(ms.grad(loss(net)))(Tensor(X))


@pytest.mark.long
@pytest.mark.parametrize("transform", ["jacfwd", "hessian"])
def test_the_way_out_gives_the_derivatives_of_finite_differences(transform) -> None:
    net, reference = lively("RBN", False, fused=False)
    step = 1e-5

    def exact(x):
        y = reference.forward(x, training=False)
        return y if transform == "jacfwd" else reference.backward(np.cos(y))[0]

    function = ms.jacfwd(net) if transform == "jacfwd" else ms.jacrev(ms.grad(loss(net)))
    found = (function(Tensor(X)).asnumpy() * DY).sum((4, 5, 6, 7))
    x = X.astype(np.float64)
    due = (exact(x + step * DY) - exact(x - step * DY)) / (2 * step)
    assert np.abs(found - due).max() <= 1e-4 * np.abs(due).max()
