"""The fused form in Jittor is the same layer as the plain one."""

import gc
import itertools
import re
from math import prod
from types import SimpleNamespace

import numpy as np
import pytest

from rbn import kernels
from rbn.backends.jittor import BNET, IEBN, RBN, from_numpy, fused, to_numpy
from rbn_core.errors import RBNError

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt
from jittor import nn

pytestmark = pytest.mark.skipif(
    bool(kernels.problem()), reason="the loops were not compiled: no C++ compiler"
)

STATISTICS = (None, "channel_mean", "channel_std")
OPTIONS = [
    {"centering": centering, "scaling": scaling}
    for centering, scaling in itertools.product(STATISTICS, repeat=2)
]
SHAPE = (4, 3, 5, 6)


def image(shape=SHAPE, seed=1, dtype="float64"):
    return jt.array(np.random.default_rng(seed).normal(size=shape) + 3, dtype="float64").cast(dtype).sync()


def pair(make=RBN, dtype="float64", training=True, **options):
    """A layer none of whose numbers is special, and the same in Jittor's own operations."""
    layers = [make(3, **options, fused=choice) for choice in (True, False)]
    rng = np.random.default_rng(0)
    state = {
        name: value if value.dtype.kind == "i" else value + rng.uniform(0.2, 0.8, value.shape)
        for name, value in to_numpy(layers[0]).items()
    }
    for layer in layers:
        getattr(layer, dtype)()
        from_numpy(layer, state)
        if not training:
            layer.eval()
            for value in learned(layer):
                value.start_grad()  # eval() stops them
    return layers


def learned(layer):
    return [value for name, value in layer.named_parameters() if not name.startswith(("running", "num"))]


def numbers(values):
    return [value.float64().numpy() for value in values]


def assert_same(found, expected, **tolerance):
    assert len(found) == len(expected)
    for one, two in zip(numbers(found), numbers(expected), strict=True):
        np.testing.assert_allclose(one, two, **{"rtol": 1e-9, "atol": 1e-10} | tolerance)


def step(layer, x):
    """Y, the gradients and the statistics; the cotangent of Y depends on Y."""
    y = layer(x)
    gradients = jt.grad((y.sqr() + y.sin()).sum(), [x, *learned(layer)])
    return [y, *gradients, layer.running_mean, layer.running_var]


@pytest.fixture
def calls(monkeypatch):
    """What the operators of the fused form get, call by call."""
    found = []
    code = jt.code

    def recorded(shapes, dtypes, inputs, **arguments):
        found.append({"shapes": shapes, **arguments["data"]})
        return code(shapes, dtypes, inputs, **arguments)

    monkeypatch.setattr(jt, "code", recorded)
    return found


@pytest.mark.parametrize("make", [RBN, IEBN, BNET])
def test_one_operator_forward_and_one_backward(make, calls):
    layer, plain = pair(make)
    step(plain, image())
    assert not calls
    step(layer, image())
    functions = [call["function"] for call in calls]
    assert functions == [kernels.library.address(f"rbn_{way}") for way in ("forward", "backward")]


@pytest.mark.parametrize("options", [{"centering": "spatial_mean"}, {"scaling": "spatial_std"}])
def test_spatial_statistics_take_jittors_own_operations(options, calls):
    step(pair(**options)[0], image())
    assert not calls


def test_an_empty_batch_takes_jittors_own_operations(calls):
    layer, _ = pair(training=False)
    assert layer(image((0, 3, 5))).shape == (0, 3, 5)
    assert not calls


def test_without_compiled_loops_the_layers_take_jittors_own_operations(monkeypatch, calls):
    monkeypatch.setattr(kernels, "problem", lambda: "there are none")
    step(pair()[0], image())
    assert not calls


def test_cuda_takes_jittors_own_operations(monkeypatch):
    assert fused.takes(image(), None, None, "sigmoid")
    monkeypatch.setattr(fused, "jt", SimpleNamespace(flags=SimpleNamespace(use_cuda=1)))
    assert not fused.takes(image(), None, None, "sigmoid")


def test_what_the_loops_do_not_know_is_not_theirs():
    for choice in [("typo", None, "sigmoid"), (None, "typo", "sigmoid"), (None, None, "typo")]:
        assert not fused.takes(image(), *choice)


@pytest.mark.parametrize("wrong", [{"gamma": (2,)}, {"gamma": (0,)}, {"beta": (3, 2)}])
def test_the_loops_refuse_what_does_not_fit_and_the_process_goes_on(wrong):
    parameters = {name: jt.ones(wrong.get(name, (3,))) for name in ("gamma", "beta")}
    options = {"eps": 1e-5, "centering": None, "scaling": None, "restrict": "sigmoid"}
    with pytest.raises(RuntimeError, match=f"expected {next(iter(wrong))} to be 3 numbers of float32, got"):
        fused.rbn(image(dtype="float32"), parameters, None, **options)[0].sync()
    jt.sync_all(True)
    layer, plain = pair()
    assert_same(step(layer, image()), step(plain, image()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_results_with_all_statistics(options, training):
    layer, plain = pair(training=training, **options)
    assert_same(step(layer, image()), step(plain, image()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (RBN, {"restrict": "hard_sigmoid"}),
        (RBN, {"affine": False}),
        (RBN, {"affine": False, "centering": None, "scaling": None}),
        (RBN, {"eps": 0.5, "momentum": None, "running_var": "biased"}),
        (IEBN, {}),
        (IEBN, {"affine": False}),
        (BNET, {}),
    ],
)
def test_the_same_results_with_all_layers(make, options, training):
    layer, plain = pair(make, training=training, **options)
    assert_same(step(layer, image()), step(plain, image()))


@pytest.mark.parametrize("shape", [(4, 3), (1, 3, 7), (2, 3, 4, 1), (2, 3, 2, 3, 4), (2, 3, 70, 90)])
def test_the_same_results_on_all_shapes(shape):
    layer, plain = pair()
    found, expected = step(layer, image(shape)), step(plain, image(shape))
    assert found[0].shape == found[1].shape == list(shape)
    assert_same(found, expected)


# One binary digit less than bfloat16 has: Jittor converts to it by cutting off.
@pytest.mark.parametrize(("dtype", "digits"), [("float32", 18), ("float16", 10), ("bfloat16", 6)])
@pytest.mark.parametrize("make", [RBN, IEBN, BNET])
def test_the_same_results_and_dtypes_in_all_dtypes(make, dtype, digits):
    def given(layer, x):
        y = layer(x)
        loss = (y.float32() * image(seed=2, dtype="float32")).sum()
        return [y, *jt.grad(loss, [x, *learned(layer)]), layer.running_mean, layer.running_var]

    layer, plain = pair(make, dtype="float32")
    found, expected = given(layer, image(dtype=dtype)), given(plain, image(dtype=dtype))
    assert [value.dtype for value in found] == [value.dtype for value in expected]
    for one, two in zip(numbers(found), numbers(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=0.5**digits, atol=0.5**digits * abs(two).max())


def test_parameters_of_other_dtypes_than_the_images():
    layer, plain = pair(dtype="float16")
    found, expected = step(layer, image(dtype="float32")), step(plain, image(dtype="float32"))
    assert [value.dtype for value in found] == [value.dtype for value in expected]
    assert_same(found, expected, rtol=2e-3, atol=2e-3)
    layer, plain = pair(dtype="float64")
    assert_same(
        step(layer, image(dtype="float32")), step(plain, image(dtype="float32")), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("of", ["x", "weight", "both"])
def test_gradients_of_gradients_are_refused_with_the_way_out(of):
    def second(layer, x):
        inputs = {"x": [x], "weight": [layer.weight], "both": [x, layer.weight]}[of]
        gradients = jt.grad(layer(x).sin().sum(), inputs)
        return jt.grad(sum(g.sqr().sum() for g in gradients), inputs)

    layer, plain = pair()
    with pytest.raises(RBNError, match=r"a first gradient of the fused form(.|\n)*fused=False"):
        second(layer, image())
    assert abs(second(plain, image())[0].numpy()).max() > 1e-3
    assert_same(step(layer, image()), step(plain, image()))  # and it goes on


def test_the_gradient_of_the_input_is_left_out_where_it_has_none(calls):
    def frozen(layer, x):
        layer.center_weight.stop_grad()
        return jt.grad(layer(x).sqr().sum(), [value for value in learned(layer) if not value.is_stop_grad()])

    layer, plain = pair()
    found = frozen(layer, image().stop_grad())
    assert len(found) == 4
    assert_same(found, frozen(plain, image().stop_grad()))
    assert calls[1]["shapes"][0] == (1, 1, 1)
    assert calls[1]["wanted"] == 0b110110  # of x, gamma, beta, center_weight, scale_weight, scale_bias


def test_evaluation_before_a_training_step_keeps_its_gradient():
    def late(layer, x):
        layer.is_train = False
        y = layer(x)
        layer.is_train = True
        layer(image(seed=5)).sync()  # changes the running statistics that y was asked for with
        return [y, *jt.grad(y.sqr().sum(), [x, *learned(layer)])]

    layer, plain = pair()
    assert_same(late(layer, image()), late(plain, image()))


def held():
    """How many values lie at each address that a variable of the graph has."""
    gc.collect()
    found = {}
    for info in jt.dump_all_graphs().nodes_info:
        if match := re.fullmatch(r"Var\(.*,(\w+)\)\[(.*)\]", info):
            found[match[1]] = prod(int(size) for size in match[2].split(",") if size)
    found.pop("0", None)  # not computed, or not there any more
    return found


def test_a_parameter_that_is_updated_before_the_backward_pass_keeps_its_gradient():
    def late(layer, x):
        y = layer(x).sqr().sum()
        weight = layer.weight.clone()
        layer.weight.update(layer.weight * 2)
        return [weight, *jt.grad(y, [x])]

    layer, plain = pair()
    assert_same(late(layer, image()), late(plain, image()))


def test_of_the_image_only_x_is_kept_for_the_backward_pass():
    shape = (4, 3, 20, 30)
    layer, _ = pair(dtype="float32")
    x = image(shape, dtype="float32")
    before = set(held())
    inside = x + 1
    y = layer(inside)
    jt.sync([y, *layer.state_dict().values()])
    jt.sync_all(True)
    del inside
    sizes = sorted(size for address, size in held().items() if address not in before)
    assert sizes[-2:] == [prod(shape)] * 2  # x + 1, which the backward pass needs, and Y
    assert sizes[-3] == prod(shape[:2])  # a plane's mean and variance
    assert y.shape == shape


def test_a_network_that_is_trained_grows_no_graph():
    net = nn.Sequential(nn.Conv(3, 3, 3), RBN(3), nn.ReLU(), nn.Conv(3, 3, 3), IEBN(3), BNET(3))
    optimizer = nn.SGD(net.parameters(), 0.1)
    lived = []
    for seed in range(6):
        optimizer.step(net(image((2, 3, 8, 8), seed, "float32")).sqr().sum())
        lived.append((jt.liveness_info()["lived_ops"], jt.liveness_info()["lived_vars"]))
    assert lived[-1] == lived[2]


def test_one_compiled_operator_serves_all_layers_and_shapes():
    results = []
    for shape in ((2, 3), (4, 3, 5), (2, 3, 4, 5)):
        for make, options in ((RBN, {}), (RBN, {"affine": False, "scaling": None}), (IEBN, {}), (BNET, {})):
            if make is BNET and len(shape) != 4:
                continue
            for training in (True, False):
                results += step(pair(make, training=training, **options)[0], image(shape))
    with jt.profile_scope() as report:
        jt.sync(results)
    assert len([row for row in report if row[0].startswith("code")]) == 2
