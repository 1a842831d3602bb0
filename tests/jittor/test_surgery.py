"""BatchNorm becomes RBN, IEBN or BNET in any Jittor model, and again BatchNorm."""

import numpy as np
import pytest

from rbn.backends.jittor import BNET, IEBN, RBN, convert, describe, freeze, network, to_numpy

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt
from jittor import Module, nn
from jittor.optim import SGD

from rbn_core import RBNError, RBNTypeError, RBNValueError
from rbn_core.matching import Row

LAYERS = {"rbn": RBN, "iebn": IEBN, "bnet": BNET}


class Model(Module):
    """Norms in a Sequential, as an attribute, and one under two names."""

    def __init__(self):
        self.body = nn.Sequential(nn.Conv(3, 4, 1), nn.BatchNorm(4, eps=0.01, momentum=0.3), nn.ReLU())
        self.norm = nn.BatchNorm(4, affine=False, sync=False)
        self.again = self.body[1]

    def execute(self, x):
        return self.again(self.norm(self.body(x)))


def images(shape=(4, 3, 5, 5), seed=0, dtype="float32"):
    return jt.array(np.random.default_rng(seed).normal(size=shape) + 0.5, dtype=dtype).sync()


def trained():
    """A model whose norms are none that start."""
    model = Model()
    rng = np.random.default_rng(1)
    model.body[1].weight.update(jt.array(rng.normal(1, 0.5, 4).astype("float32")))
    model.body[1].bias.update(jt.array(rng.normal(0, 0.5, 4).astype("float32")))
    for seed in range(3):
        model(images(seed=seed)).sync()
    return model


def assert_same(actual, expected):
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("to", LAYERS)
def test_every_batch_norm_is_replaced_and_keeps_what_it_has(to):
    model = trained()
    model.norm.is_train = False
    before = to_numpy(model)
    table = convert(model, to)
    new = LAYERS[to].__name__
    assert table.rows == tuple(
        Row(path, "replaced", "BatchNorm", new) for path in ("body.1", "norm", "again")
    )
    assert {type(module).__name__ for module in model.modules()} >= {"Model", "Sequential", "Conv", new}
    assert model.body[1] is model.again
    assert (model.again.epsilon, model.again.momentum, model.again.sync) == (0.01, 0.3, True)
    assert (model.norm.epsilon, model.norm.momentum, model.norm.sync) == (1e-5, 0.1, False)
    assert (model.again.is_train, model.norm.is_train) == (True, False)
    assert model.norm.affine is False
    after = to_numpy(model)
    kept = {name for name in before if to != "bnet" or not name.endswith(("gamma", "beta"))}
    assert kept <= after.keys()
    for name in kept:
        np.testing.assert_array_equal(after[name], before[name])
    assert describe(model)["norm"]["layer"] == new
    model(images()).sync()
    assert to_numpy(model)["again.num_batches_tracked"] == 2  # it is used twice
    assert to_numpy(model)["norm.num_batches_tracked"] == 0


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("to", LAYERS)
def test_what_is_preserved_gives_the_same(to, train):
    model = trained()
    model.norm = nn.BatchNorm(4)
    model.train() if train else model.eval()
    x = images(seed=9)
    expected = model(x).numpy()
    convert(model, to, preserve=True)
    np.testing.assert_allclose(model(x).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_preserved_is_kept():
    model = trained()
    table = convert(model, "rbn", preserve=True)
    assert [(row.name, row.status) for row in table.rows] == [
        ("body.1", "replaced"),
        ("norm", "kept"),
        ("again", "replaced"),
    ]
    assert "no gamma" in str(table)
    assert type(model.norm) is nn.BatchNorm


def test_options_and_places_are_chosen():
    model = trained()
    with pytest.raises(RBNValueError, match=r"got 'no', which matches none of these 3: body.1, norm, again"):
        convert(model, where="no")
    assert str(convert(model, "bn")) == "0 replaced: there is no RBN, IEBN or BNET"
    table = convert(model, where=r"nor.", scaling="channel_std", running_var="biased")
    assert [row.name for row in table.rows] == ["norm"]
    assert type(model.again) is nn.BatchNorm
    assert (model.norm.scaling, model.norm.variance_estimator) == ("channel_std", "biased")
    # A layer under two names goes with either of them.
    table = convert(model, "bnet", where="again", kernel_size=5)
    assert [row.name for row in table.rows] == ["body.1", "again"]
    assert model.body[1] is model.again
    assert tuple(model.again.conv.weight.shape) == (4, 1, 5, 5)


@pytest.mark.parametrize("to", LAYERS)
def test_a_preserved_layer_becomes_a_batch_norm_again(to):
    model = trained()
    before = to_numpy(model)
    convert(model, to, preserve=True, where="body.*|again")
    table = convert(model, "bn")
    assert {(row.status, row.source, row.detail) for row in table.rows} == {
        ("replaced", LAYERS[to].__name__, "BatchNorm")
    }
    after = to_numpy(model)
    assert after.keys() == before.keys()
    for name, value in after.items():
        np.testing.assert_allclose(value, before[name], rtol=1e-6)
    assert type(model.again) is nn.BatchNorm
    assert model.again is model.body[1]


def test_a_calibration_that_is_not_inert_is_kept():
    model = nn.Sequential(
        *(make(2) for make in (RBN, IEBN, BNET)), RBN(2, momentum=None), RBN(2, affine=False)
    )
    model[0].center_weight.update(jt.array([0.0, 0.5]))
    model[1].scale_weight.update(jt.array([0.0, -0.25]))
    layers = [model[i] for i in range(5)]
    x = images((4, 2, 5, 5))
    expected = model[4](x)
    table = convert(model, "bn")
    assert [(row.name, row.status) for row in table.rows] == [
        *((str(i), "kept") for i in range(4)),
        ("4", "replaced"),
    ]
    reasons = [row.detail for row in table.rows]
    assert "center_weight is not 0 everywhere (largest 0.5)" in reasons[0]
    assert "scale_weight is not 0 everywhere" in reasons[1]
    assert "conv_weight is not 0 beside its centre" in reasons[2]
    assert "momentum=None" in reasons[3]
    assert [model[i] for i in range(4)] == layers[:4]
    model[4].running_mean.update(jt.zeros(2))
    assert model[4].affine
    assert_same(model[4](x), expected)


def test_an_optimizer_goes_on_with_the_variables_it_has():
    model = trained()
    optimizer = SGD(model.parameters(), 0.1)
    known = {id(var) for group in optimizer.param_groups for var in group["params"]}
    convert(model, preserve=True)
    before = to_numpy(model)
    assert {id(model.again.weight), id(model.again.bias), id(model.again.running_var)} <= known
    optimizer.step(model(images()).sqr().sum())
    assert (to_numpy(model)["again.gamma"] != before["again.gamma"]).all()
    assert model.again.running_mean.is_stop_grad()


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_the_dtype_is_kept(dtype):
    model = Model()
    getattr(model, dtype)()
    for to in ("rbn", "bnet"):
        convert(model, to, preserve=to == "bnet")
        for name, var in model.again.state_dict().items():
            assert var.dtype == ("int32" if name == "num_batches_tracked" else dtype), name
        if to == "rbn":
            convert(model, "bn")
            assert {str(var.dtype) for var in model.again.state_dict().values()} == {dtype}


def test_hooks_go_on():
    model = trained()
    seen = []
    model.again.register_forward_hook(lambda module, args, result: seen.append((type(module), "after")))
    model.again.register_pre_forward_hook(lambda module, args: seen.append((type(module), "before")))
    convert(model)
    model(images())
    assert seen == [(RBN, "before"), (RBN, "after")] * 2
    model.again.remove_forward_hook()
    model.again.remove_pre_forward_hook()
    model(images())
    assert len(seen) == 4


def trainable(model):
    return {name for name, var in model.named_parameters() if not var.is_stop_grad()}


@pytest.mark.parametrize("to", LAYERS)
def test_what_is_frozen_stays_frozen(to):
    model = trained()
    model.again.weight.stop_grad()
    convert(model, to, preserve=True, where="again")
    weight, bias = (
        ("body.1.conv.weight", "body.1.conv.bias") if to == "bnet" else ("body.1.weight", "body.1.bias")
    )
    assert weight not in trainable(model)
    assert bias in trainable(model)
    convert(model, "bn")
    assert "body.1.weight" not in trainable(model)
    assert "body.1.bias" in trainable(model)


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("to", LAYERS)
def test_what_a_conversion_adds_is_learned_if_a_parameter_before_was(to, evaluates):
    model = nn.Sequential(nn.BatchNorm(3), nn.BatchNorm(3), nn.BatchNorm(3, affine=False))
    for parameter in (model[0].weight, model[0].bias, model[1].weight):
        parameter.stop_grad()
    if evaluates:
        model.eval()
    name = to.upper()
    details = [row.detail for row in convert(model, to).rows]
    assert details == [f"{name}, not learned, as the layer before", name, name]
    model.eval()
    model.train()
    learned = trainable(model)
    assert not {own for own in learned if own.startswith("0.")}
    added = {"conv.bias"} if to == "bnet" else {"scale_weight", "scale_bias"}
    assert {f"{path}.{own}" for path in (1, 2) for own in added} <= learned


@pytest.mark.parametrize("to", LAYERS)
def test_a_layer_that_freeze_froze_stays_frozen(to):
    model = nn.Sequential(nn.BatchNorm(3), nn.Conv(3, 3, 1))
    freeze(model)
    assert [row.detail for row in convert(model, to).rows] == [f"{to.upper()}, frozen"]
    model.train()
    before = to_numpy(model)
    model(images())
    assert not {own for own in trainable(model) if own.startswith("0.")}
    np.testing.assert_equal(to_numpy(model), before)


def test_the_table_says_what_was_looked_at():
    model = nn.Sequential(nn.BatchNorm(3), nn.Sequential(nn.BatchNorm(3)))
    assert str(convert(nn.Sequential(nn.ReLU()))) == "0 replaced: there is no BatchNorm"
    for nowhere in (nn.Sequential(nn.ReLU()), model):
        with pytest.raises(RBNError, match="expected where to match the whole path of a layer, got 'x'"):
            convert(nowhere, where="x")
    assert str(convert(model, where="0")).endswith("1 replaced")
    assert str(convert(model)).endswith("1 replaced")
    assert str(convert(model)) == "0 replaced: there is no BatchNorm"


def test_a_layer_without_gradients_stays_without():
    model = trained()
    model.again.requires_grad_(False)
    convert(model)
    slope = jt.grad(model(images()).sqr().sum(), model.body[0].weight)
    np.testing.assert_array_equal(slope.numpy(), np.zeros(slope.shape))


@pytest.mark.parametrize("to", LAYERS)
def test_a_model_converted_in_evaluation_trains_afterwards(to):
    model, fresh = trained().eval(), trained()
    convert(model, to)
    convert(fresh, to)
    assert not model.again.is_training()
    assert not {"body.1.bias", "body.1.conv.bias"} & trainable(model)
    assert trainable(model.train()) == trainable(fresh)
    convert(model.eval(), "bn")
    convert(fresh, "bn")
    assert trainable(model.train()) == trainable(fresh)


def test_a_class_of_its_own_and_a_layer_with_more_are_kept():
    class Own(nn.BatchNorm):
        pass

    model = nn.Sequential(Own(2), nn.BatchNorm(2), nn.BatchNorm(2))
    model[1].extra = jt.zeros(2)
    model[2].inner = nn.Linear(1, 1)
    table = convert(model)
    assert [(row.status, row.source, row.detail) for row in table.rows] == [
        ("kept", "Own", "is a class of its own"),
        *[("kept", "BatchNorm", "has more variables or modules than a BatchNorm")] * 2,
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"to": "ln"}, RBNValueError, "convert: expected to to be one of 'bn', 'rbn'"),
        ({"where": "("}, RBNValueError, "convert: expected where to be a regular expression"),
        ({"where": 3}, RBNTypeError, "convert: expected where to be a regular expression"),
        ({"scaling": "mean"}, RBNValueError, "expected scaling to be one of"),
        ({"scalling": None}, RBNTypeError, "Did you mean 'scaling'"),
        ({"eps": 0.1}, RBNTypeError, "expected options that the layer before has not, got eps"),
        ({"to": "bnet", "kernel_size": 4}, RBNValueError, "expected an odd kernel_size"),
        ({"to": "bn", "scaling": None}, RBNTypeError, "expected no option for 'bn', got scaling"),
    ],
)
def test_what_is_refused_changes_nothing(arguments, error, message):
    model = Model()
    layers = [model.norm, model.again]
    with pytest.raises(error, match=message):
        convert(model, **arguments)
    assert [model.norm, model.again] == layers
    with pytest.raises(RBNError):
        convert(nn.Linear(1, 1), **arguments)


def test_a_layer_alone_cannot_be_replaced():
    with pytest.raises(RBNTypeError, match="expected a model with layers inside, got a BatchNorm itself"):
        convert(nn.BatchNorm(2))
    with pytest.raises(RBNTypeError, match="got a RBN itself"):
        convert(RBN(2), "bn")
    assert convert(nn.Linear(1, 1)).rows == ()


def test_a_network_of_ours_is_converted():
    model = network("resnet18", "bn", 2)
    table = convert(model, where=r"layer4\..*")
    assert len(table.rows) == 5
    assert describe(model).keys() == describe(network("resnet18", "rbn", 2)).keys()
    assert isinstance(model.state_dict()["layer4.1.bn2.center_weight"], jt.Var)
    assert str(table).endswith("5 replaced")
