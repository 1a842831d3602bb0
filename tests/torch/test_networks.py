"""Networks of the papers in PyTorch, held to NumPy's run of the same description."""

import copy
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from rbn.backends.torch import RBN, Network, describe, from_numpy, network, to_numpy
from rbn_core import RBNValueError, networks
from rbn_core.architectures import ARCHITECTURES
from rbn_core.execution import initial_state, run
from rbn_core.networks import INPUT, Activation, Pooling

NORMS = ["bn", "rbn", "iebn", "bnet"]


def lively_state(description, seed):
    """A state whose calibrations, statistics and depthwise convolutions all show in the result."""
    rng = np.random.default_rng(seed)
    state = initial_state(description, seed)
    for name, array in state.items():
        if array.ndim == 1:
            array += (0.2 * rng.random(array.shape)).astype(array.dtype)
        elif name.endswith("conv_weight"):  # which starts at 0 in networks
            array += rng.normal(0, 1 / 3, array.shape).astype(array.dtype)
        elif array.ndim == 4 and array.shape[1] == 1:
            array *= np.sqrt(len(array))  # the fan-out of a depthwise convolution is that of one channel
    return state


def images(size, batch=2, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, 3, size, size)).astype(np.float32)


def difference(a, b):
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_network_gives_what_numpy_gives(name):
    model = network(name, "rbn").eval()
    state = lively_state(model.description, 1)
    from_numpy(model, state)
    x = images(32)
    expected, _ = run(model.description, state, x)
    with torch.no_grad():
        assert difference(model(torch.from_numpy(x)).numpy(), expected) < 1e-4


@pytest.mark.parametrize("norm", [*NORMS, {"layer": "rbn", "momentum": 0.3, "eps": 1e-3, "stages": [0, 4]}])
def test_training_gives_what_numpy_gives_with_every_layer(norm):
    model = network("resnet18", norm, 7)
    state = lively_state(model.description, 2)
    from_numpy(model, state)
    x = images(32, 4)
    expected, after = run(model.description, state, x, training=True)
    assert difference(model(torch.from_numpy(x)).detach().numpy(), expected) < 1e-4
    for name, array in to_numpy(model).items():
        if "running" in name or "tracked" in name:
            assert difference(array, after[name]) < 1e-4, name
    assert describe(model) == model.description.layers()


def gradient_difference(norm, seed):
    """The largest difference of a gradient in float32 from that in float64, relative to the largest."""
    model = network("resnet18", norm, 10)
    from_numpy(model, lively_state(model.description, seed))
    exact = copy.deepcopy(model).double()
    x = torch.from_numpy(images(64, 4, seed))
    cotangent = torch.from_numpy(np.random.default_rng(seed).normal(size=(4, 10)))
    model(x).backward(cotangent.float())
    exact(x.double()).backward(cotangent)
    pairs = zip(model.parameters(), exact.parameters(), strict=True)
    return max(difference(p.grad.numpy(), q.grad.numpy()) for p, q in pairs)


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_in_training_agree_with_those_in_float64(norm):
    # Where a rectifier's input is 0 within rounding, its slope may differ: not in every draw.
    assert any(gradient_difference(norm, seed) < 1e-4 for seed in range(1, 6))


def torchvisions(convolutions, norms, linear):
    """The names of a torchvision network's `state_dict`."""
    own = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {f"{name}.weight" for name in convolutions} | {f"{linear}.weight", f"{linear}.bias"}
    return names | {f"{name}.{array}" for name in norms for array in own}


def test_names_are_torchvisions_in_resnet50():
    blocks = [(stage, i) for stage, depth in ((1, 3), (2, 4), (3, 6), (4, 3)) for i in range(depth)]
    convolutions = ["conv1", *(f"layer{stage}.0.downsample.0" for stage in (1, 2, 3, 4))]
    norms = ["bn1", *(f"layer{stage}.0.downsample.1" for stage in (1, 2, 3, 4))]
    convolutions += [f"layer{stage}.{i}.conv{k}" for stage, i in blocks for k in (1, 2, 3)]
    norms += [f"layer{stage}.{i}.bn{k}" for stage, i in blocks for k in (1, 2, 3)]
    assert set(network("resnet50").state_dict()) == torchvisions(convolutions, norms, "fc")
    assert len(network("resnet50").state_dict()) == 320


def test_names_are_torchvisions_in_mobilenet_v2():
    convolutions = ["features.0.0", "features.1.conv.0.0", "features.1.conv.1", "features.18.0"]
    norms = ["features.0.1", "features.1.conv.0.1", "features.1.conv.2", "features.18.1"]
    for i in range(2, 18):
        convolutions += [f"features.{i}.conv.{part}" for part in ("0.0", "1.0", "2")]
        norms += [f"features.{i}.conv.{part}" for part in ("0.1", "1.1", "3")]
    assert set(network("mobilenet_v2").state_dict()) == torchvisions(convolutions, norms, "classifier.1")


def test_weights_start_as_he_et_al_start_them():
    torch.manual_seed(0)
    model = network("resnet18", "rbn")
    kernel = model.get_parameter("layer2.0.conv1.weight")
    bound = 512**-0.5
    kernel = kernel.detach()
    assert float(kernel.std()) == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert float(kernel.mean()) == pytest.approx(0, abs=1e-3)
    assert float(model.fc.weight.detach().abs().max()) == pytest.approx(bound, rel=1e-3)
    assert float(model.fc.bias.detach().abs().max()) == pytest.approx(bound, rel=0.02)
    for name, array in to_numpy(model.bn1).items():
        assert array.mean() == {"gamma": 1, "running_var": 1, "scale_bias": 1}.get(name, 0)
    torch.manual_seed(0)
    again = network("resnet18", "rbn").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_plain_batch_norm_is_pytorchs_own_and_the_others_are_ours():
    model = network("resnet18", {"layer": "rbn", "stages": (1,), "momentum": 0.8, "scaling": None}, 5)
    assert type(model.bn1) is nn.BatchNorm2d
    assert (model.bn1.eps, model.bn1.momentum) == (1e-5, pytest.approx(0.1))
    layer = model.get_submodule("layer1.0.bn1")
    assert type(layer) is RBN
    assert (layer.momentum, layer.scaling) == (pytest.approx(0.2), None)
    assert model.fc.out_features == 5
    assert network("resnet18", {"layer": "rbn", "momentum": None}).bn1.momentum is None


def test_options_that_pytorch_lacks_are_refused():
    with pytest.raises(RBNValueError, match="expected running_var 'unbiased' of PyTorch's own"):
        network("resnet18", {"layer": "bn", "running_var": "biased"})
    with pytest.raises(
        RBNValueError, match="RBN: expected beta=False beside gamma=False, as the layers of PyTorch have it"
    ):
        network("resnet18", {"layer": "rbn", "gamma": False})
    assert network("resnet18", {"layer": "rbn", "gamma": False, "beta": False}).bn1.weight is None


def test_the_input_stays_and_its_memory_format_may_be_any():
    model = network("resnet18", "rbn", 4).eval()
    x = torch.from_numpy(images(32))
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(
            model(x.to(memory_format=torch.channels_last)), model(x), rtol=1e-4, atol=1e-5
        )
    assert torch.equal(x, before)


def test_a_result_is_let_go_after_its_last_use():
    model = network("resnet18", "rbn", 4).eval()
    first, alive = [], []
    model.conv1.register_forward_hook(lambda *_: first.append(weakref.ref(_[2])))
    model.fc.register_forward_pre_hook(lambda *_: alive.append(first[0]() is not None))
    with torch.no_grad():
        model(torch.from_numpy(images(32)))
    assert alive == [False]


def test_rectifiers_and_poolings_without_layers():
    first = Activation("a", (INPUT,), 1.5)
    for kind, size in (("max", None), ("average", None), ("max", 3), ("average", 3)):
        described = networks.Network("x", (first, Pooling("p", ("a",), kind, size, 2, 1 if size else 0)))
        expected, _ = run(described, {}, images(5))
        y = Network(described)(torch.from_numpy(images(5)))
        np.testing.assert_allclose(y.numpy(), expected, rtol=1e-6)


def test_a_network_compiles_into_one_graph():
    model = network("resnet18", "rbn", 10)
    other = copy.deepcopy(model)
    x = torch.from_numpy(images(32))
    compiled = torch.compile(other, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    # Eq. 3 in PyTorch's operators and in the loops: at most a rounding apart in each of its two operations.
    epsilon = torch.finfo(torch.float32).eps
    torch.testing.assert_close(other.bn1.running_var, model.bn1.running_var, rtol=2 * epsilon, atol=0)


def test_a_network_survives_a_copy_and_a_pickle(tmp_path):
    model = network("resnet18", "rbn", 4).eval()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.from_numpy(images(16))
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert loaded.description == model.description
