"""What recipes that look for BatchNorm do, with Jittor models."""

import copy
import inspect
import pickle

import numpy as np
import pytest

from rbn.backends.jittor import (
    BNET,
    IEBN,
    RBN,
    fold,
    freeze,
    parameter_groups,
    to_numpy,
    update_rbn,
)

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt
from jittor import nn
from jittor.models import densenet, res2net

from rbn_core import RBNTypeError, RBNValueError


class Net(nn.Module):
    """Every layer behind a convolution, and a BatchNorm behind a linear layer."""

    def __init__(self):
        super().__init__()
        norms = [nn.BatchNorm(3), RBN(3), IEBN(3), BNET(3)]
        self.body = nn.Sequential(
            *(
                each
                for i, norm in enumerate(norms)
                for each in (nn.Conv(3, 3, 3, padding=1, bias=bool(i % 2)), norm)
            )
        )
        self.head, self.last = nn.Linear(3, 5), nn.BatchNorm(5)
        rng = np.random.default_rng(0)
        for var in self.parameters():
            if var.dtype.is_float():
                var.update(jt.array(rng.uniform(0.5, 1, var.shape), dtype="float32"))

    def execute(self, x):
        return self.last(self.head(self.body(x).mean((2, 3))))


def image(seed=0, offset=0.0):
    return jt.array(np.random.default_rng(seed).normal(size=(4, 3, 6, 6)) + offset, dtype="float32").sync()


def inert():
    model = Net()
    for weight in (model.body[3].center_weight, model.body[3].scale_weight, model.body[5].scale_weight):
        weight.update(jt.zeros(3))
    kernel = np.zeros((3, 1, 3, 3), np.float32)
    kernel[:, 0, 1, 1] = 0.7
    model.body[7].conv.weight.update(jt.array(kernel))
    model.eval()
    return model


def close(actual, expected, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance)


def test_statistics_taken_anew_are_the_mean_over_batches():
    model, batches = Net(), [image(0), image(1, 1.0)]
    each = []
    for batch in batches:
        alone = copy.deepcopy(model)
        for norm in (*(alone.body[i] for i in (1, 3, 5, 7)), alone.last):
            norm.momentum = 1.0
        alone(batch)
        each.append(to_numpy(alone))
    model.eval()
    before = to_numpy(model)
    update_rbn(model, [(batch, "label") for batch in batches])
    for name, value in to_numpy(model).items():
        if name.endswith("num_batches_tracked"):
            assert value == 2
        elif "running" in name:
            close(value, (each[0][name] + each[1][name]) / 2)
        else:
            close(value, before[name], 0)
    assert not model.body[3].is_train
    assert (model.body[1].momentum, model.body[3].momentum) == (0.1, 0.1)
    with pytest.raises(RBNValueError, match="got 0 batches"):
        update_rbn(model, [])
    with pytest.raises(
        RBNValueError, match="update_rbn: expected RBN, IEBN, BNET or BatchNorm layers, got none"
    ):
        update_rbn(model.head, [batches[0]])
    with pytest.raises(RBNTypeError, match="expected a Jittor module"):
        freeze([model])


def test_a_frozen_model_evaluates_and_keeps_its_parameters():
    model, x = Net(), image()
    model.eval()
    due, before = model(x).numpy(), to_numpy(model)
    model.train()
    assert len(freeze(model).rows) == len(freeze(model).rows) == 5
    model.eval()
    model.train()
    close(model(x).numpy(), due, 1e-6)
    assert isinstance(model.body[3], RBN)
    optimizer = jt.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)
    optimizer.step(jt.sin(model(x)).sum())
    for name, value in to_numpy(model).items():
        moved = bool(np.any(value != before[name]))
        assert moved == name.startswith(("body.0", "body.2", "body.4", "body.6", "head")), name
    with pytest.raises(RBNValueError, match="0 layers"):
        update_rbn(model, [x])


def test_a_frozen_model_is_copied_and_pickled_as_one():
    model, x = Net(), image()
    freeze(model)
    model.train()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again.eval()
        again.train()
        close(again(x).numpy(), model(x).numpy(), 1e-6)
        close(again.body[3].running_mean.numpy(), model.body[3].running_mean.numpy(), 0)
        assert type(again.body[3]) is type(model.body[3])
        assert isinstance(again.body[3], RBN)
        assert [row.name for row in freeze(again).rows] == [row.name for row in freeze(model).rows]
        norms = (1, 3, 5, 7)
        assert all(parameter.is_stop_grad() for i in norms for parameter in again.body[i].parameters())


def test_statistics_stay_after_an_error():
    model = Net()
    model.body[3].eval()
    before = to_numpy(model)
    with pytest.raises(Exception, match="stop here"):
        update_rbn(model, failing(image()))
    np.testing.assert_equal(to_numpy(model), before)
    assert (model.body[1].momentum, model.body[3].momentum) == (0.1, 0.1)
    assert (model.body[1].is_train, model.body[3].is_train) == (True, False)


def failing(x):
    yield x
    raise RuntimeError("stop here")


@pytest.mark.meeting(
    "`weight_decay` of Jittor's optimizers",
    "works with `parameter_groups`",
    "jt.optim.SGD(parameter_groups(model, 1e-4), 0.1)",
)
def test_only_kernels_decay():
    model = Net()
    before = to_numpy(model)
    groups = parameter_groups(model, 0.5)
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    names = {id(var): name for name, var in model.named_parameters()}
    listed = [{names[id(var)] for var in group["params"]} for group in groups]
    assert listed[0] == {f"body.{i}.weight" for i in (0, 2, 4, 6)} | {"head.weight"}
    assert {"body.3.scale_bias", "body.7.conv.weight", "head.bias"} <= listed[1]
    optimizer = jt.optim.SGD(groups, 0.1)
    model.eval()
    model.train()
    optimizer.step(model(image()).sum() * 0)
    after = to_numpy(model)
    parameters = {name for group in listed for name in group}
    moved = {name for name in parameters & after.keys() if np.any(after[name] != before[name])}
    assert moved == listed[0]
    jt.optim.SGD(model.parameters(), 0.1, weight_decay=0.5).step(model(image()).sum() * 0)
    assert np.any(to_numpy(model)["body.3.scale_bias"] != after["body.3.scale_bias"])


def test_folding_leaves_what_a_model_gives():
    model, x = inert(), image()
    before = to_numpy(model)
    folded, table = fold(model, x)
    assert [row.status for row in table.rows] == ["folded"] * 5, str(table)
    close(folded(x).numpy(), model(x).numpy())
    for name, value in to_numpy(model).items():
        close(value, before[name], 0)
    assert type(model.body[3]) is RBN
    assert not [name for name in to_numpy(folded) if "running" in name]


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.behind, self.one, self.other = (nn.BatchNorm(3) for _ in range(4))
        self.residual, self.shared = nn.Conv(3, 3, 1), nn.Conv(3, 3, 1)

    def execute(self, x):
        x = nn.relu(self.first(x))
        y = self.residual(x)
        x = self.behind(y) * y
        y = self.shared(x)
        return self.one(y) * self.other(y)


def test_folding_keeps_what_is_not_only_behind_one_convolution_and_refuses_what_is_calibrated():
    model, x = Branching(), image()
    folded, table = fold(model, x)
    assert {row.name: row.detail for row in table.rows} == {
        "first": "no convolution or linear layer before it",
        "behind": "its input is used elsewhere, too",
        "one": "its input is used elsewhere, too",
        "other": "its input is used elsewhere, too",
    }
    model.eval()
    close(folded(x).numpy(), model(x).numpy(), 1e-6)
    calibrated = Net()
    with pytest.raises(RBNValueError, match=r"got 3 that are not: body\.3, body\.5, body\.7"):
        fold(calibrated, x)


@pytest.mark.meeting(
    "loops over `isinstance(m, nn.BatchNorm)`",
    "works",
    "[m.eval() for m in model.modules() if isinstance(m, nn.BatchNorm)]",
)
@pytest.mark.parametrize("kind", [RBN, IEBN, BNET])
def test_a_loop_over_batch_norms_finds_the_layers(kind):
    model = nn.Sequential(nn.Conv(3, 4, 3), kind(4))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm):
            module.eval()
    assert all(parameter.is_stop_grad() for parameter in model[1].parameters())
    before = model[1].running_mean.numpy()
    model(image()).sync()
    assert (model[1].running_mean.numpy() == before).all()


@pytest.mark.meeting(
    "code that rebuilds or folds a BatchNorm",
    "an error that says what to do instead",
    "layer.eps",
)
@pytest.mark.parametrize("kind", [RBN, IEBN, BNET])
def test_what_rebuilds_or_folds_a_batch_norm_is_refused(kind):
    layer = kind(4)
    assert "eps=1e-05" in layer.extra_repr()
    layer.eps = 0.5
    assert layer.epsilon == 0.5
    with pytest.raises(RBNTypeError, match=r"where a tool reads eps, got .*layer\.epsilon"):
        layer.weight / jt.sqrt(layer.running_var + layer.eps)


def test_jittors_own_models_start_what_they_find_where_the_layers_start():
    for layer in (RBN(3), IEBN(3)):
        assert (layer.weight.numpy() == 1).all()
        assert (layer.bias.numpy() == 0).all()
    for models in (densenet, res2net):
        text = inspect.getsource(models)
        lines = text.splitlines()
        at = next(i for i, line in enumerate(lines) if "isinstance(m, nn.BatchNorm" in line)
        assert "init.constant_(m.weight" in lines[at + 1]
        assert "init.constant_(m.bias" in lines[at + 2]
