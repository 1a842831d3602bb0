"""The optimizer of a training checkpoint goes along, where it is certain whose its arrays are."""

import argparse

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as distributed

from rbn.backends.torch import BNET, IEBN, RBN, network, optimizer_to_numpy, to_numpy
from rbn.formats import torch as checkpoints
from rbn.porting import port
from rbn_core import weights

ZIPPED = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), RBN(4), nn.ReLU(), BNET(4), IEBN(4), nn.Flatten(), nn.Linear(36, 2)
    return nn.Sequential(*layers)


def by_rank(net):
    """The kernels, and without weight decay and at a tenth of the rate the rest."""
    kernels = [p for p in net.parameters() if p.ndim > 1]
    return [
        {"params": kernels},
        {"params": [p for p in net.parameters() if p.ndim < 2], "lr": 0.005, "weight_decay": 0},
    ]


def head_first(net):
    """What the head alone has the shape of."""
    head = [net[6].weight, net[6].bias]
    return [
        {"params": head, "lr": 0.5},
        {"params": [p for p in net.parameters() if all(p is not h for h in head)]},
    ]


def named(net):
    """Some of the parameters, in no order, under their names."""
    return [{"params": list(net.named_parameters())[:2:-1]}]


OPTIMIZERS = {
    "sgd": lambda net: torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-4),
    "nesterov": lambda net: torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True),
    "no momentum": lambda net: torch.optim.SGD(net.parameters(), np.float64(0.1)),
    "adam": lambda net: torch.optim.Adam(net.parameters(), 0.01, weight_decay=0.1),
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), 0.01),
    "sgd by rank": lambda net: torch.optim.SGD(by_rank(net), 0.1, momentum=0.9, weight_decay=1e-4),
    "adamw by rank": lambda net: torch.optim.AdamW(by_rank(net), 0.01),
    "head first": lambda net: torch.optim.SGD(head_first(net), 0.1, momentum=0.9),
    "named": lambda net: torch.optim.SGD(named(net), 0.1, momentum=0.9),
}


def train(net, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(4, 3, 5, 5)).square().mean().backward()
        optimizer.step()


def checkpoint(net, optimizer, **more):
    """What a training script saves."""
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3])
    content = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}
    return content | {"lr_scheduler": schedule.state_dict(), "args": argparse.Namespace(lr=0.1)} | more


def ported(tmp_path, content, zipped=True, **options):
    """What becomes of a checkpoint: the canonical file, and the table's rows by name."""
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    table = port(tmp_path / "a.pth", tmp_path / "b.safetensors", **options)
    return weights.read(tmp_path / "b.safetensors"), {row.name: row for row in table.rows}


def assert_same(found, expected):
    assert (found.optimizer, found.step, found.decoupled) == (
        expected.optimizer,
        expected.step,
        expected.decoupled,
    )
    assert set(found.groups) == set(expected.groups)
    assert found.slots.keys() == expected.slots.keys()
    for slot, arrays in expected.slots.items():
        assert found.slots[slot].keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found.slots[slot][name], array, err_msg=f"{slot}/{name}")


@ZIPPED
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizer_of_a_checkpoint_goes_along(tmp_path, kind, zipped):
    net = model()
    optimizer = OPTIMIZERS[kind](net)
    train(net, optimizer)
    found, rows = ported(tmp_path, checkpoint(net, optimizer), zipped)
    expected = optimizer_to_numpy(optimizer, net)
    assert_same(found.training, expected)
    np.testing.assert_array_equal(found.state["1.gamma"], to_numpy(net)["1.gamma"])
    assert rows["training"].status == "matched"
    assert rows["optimizer"].status == "left out"
    again = "momentum 0.9" if kind not in ("adam", "adamw", "adamw by rank", "no momentum") else ""
    assert again in rows["optimizer"].detail
    assert ("counts no steps" in rows["optimizer"].detail) == (expected.optimizer == "sgd")
    assert rows["lr_scheduler"].detail.startswith("a dict of ")


def test_a_parameter_without_a_gradient_so_far_has_zeros(tmp_path):
    net = model()
    optimizer = OPTIMIZERS["adam"](net)
    net[0].weight.requires_grad_(False)
    train(net, optimizer)
    found, _ = ported(tmp_path, checkpoint(net, optimizer))
    assert_same(found.training, optimizer_to_numpy(optimizer, net))
    assert not found.training.slots["first_moment"]["0.weight"].any()


def test_an_optimizer_that_has_made_no_step_goes_along(tmp_path):
    net = model()
    optimizer = OPTIMIZERS["adamw"](net)
    found, _ = ported(tmp_path, checkpoint(net, optimizer))
    assert_same(found.training, optimizer_to_numpy(optimizer, net))


@pytest.mark.parametrize("kind", ["sgd", "named"])
def test_what_wrappers_put_before_names_goes_from_the_training_too(tmp_path, kind):
    net = model()
    optimizer = OPTIMIZERS[kind](net)
    train(net, optimizer)
    content = checkpoint(net, optimizer)
    content["model"] = {f"module.{name}": value for name, value in net.state_dict().items()}
    assert_same(ported(tmp_path, content)[0].training, optimizer_to_numpy(optimizer, net))


def test_the_published_form_becomes_ours_in_the_training_too(tmp_path):
    """The papers' parameters, and so their momentum, are (1, C, 1, 1)."""
    net = model()
    optimizer = OPTIMIZERS["sgd"](net)
    train(net, optimizer)
    content = checkpoint(net, optimizer)
    expected = optimizer_to_numpy(optimizer, net)
    number = [name for name, _ in net.named_parameters()].index("1.center_weight")
    buffer = content["optimizer"]["state"][number]["momentum_buffer"]
    content["optimizer"]["state"][number]["momentum_buffer"] = buffer.reshape(1, -1, 1, 1)
    content["model"]["1.center_weight"] = content["model"]["1.center_weight"].reshape(1, -1, 1, 1)
    renamed = {"4.scale_weight": "4.weight_readjust", "4.scale_bias": "4.bias_readjust"}
    content["model"] = {renamed.get(name, name): value for name, value in content["model"].items()}
    assert_same(ported(tmp_path, content)[0].training, expected)


def test_the_training_is_under_the_names_of_the_network_and_of_a_map(tmp_path):
    net = network("cifar_resnet50", norm="rbn", num_classes=3)
    optimizer = torch.optim.SGD(by_rank(net), 0.1, momentum=0.9, weight_decay=1e-4)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    content = checkpoint(net, optimizer)
    expected = optimizer_to_numpy(optimizer, net)
    assert_same(ported(tmp_path, content, network="cifar_resnet50")[0].training, expected)
    found, rows = ported(tmp_path, content, rename={r"fc\.bias": "", r"(.*)": r"net.\1"})
    assert rows["training of fc.bias"].status == "left out"
    momentum = found.training.slots["momentum"]
    np.testing.assert_array_equal(momentum["net.conv1.weight"], expected.slots["momentum"]["conv1.weight"])


def test_lightnings_optimizer_goes_along_and_several_do_not(tmp_path):
    net = model()
    optimizer = OPTIMIZERS["adam"](net)
    train(net, optimizer)
    state = {f"model.{name}": value for name, value in net.state_dict().items()}
    content = {"state_dict": state, "pytorch-lightning_version": "2.4", "epoch": 1}
    one = content | {"optimizer_states": [optimizer.state_dict()]}
    found, rows = ported(tmp_path, one)
    assert_same(found.training, optimizer_to_numpy(optimizer, net))
    assert "goes along" in rows["optimizer_states"].detail
    for more in (
        {"optimizer_states": [optimizer.state_dict(), optimizer.state_dict()]},
        one | {"other": {"optimizer": optimizer.state_dict()}},
    ):
        found, rows = ported(tmp_path, content | more)
        assert found.training is None
        assert "one of several" in rows["optimizer_states"].detail


def test_a_file_from_before_adamw_said_its_decay_leaves_it_unknown(tmp_path):
    net = model()
    optimizer = OPTIMIZERS["adamw"](net)
    train(net, optimizer)
    content = checkpoint(net, optimizer)
    for group in content["optimizer"]["param_groups"]:
        del group["decoupled_weight_decay"]
    found, rows = ported(tmp_path, content)
    (group,) = found.training.groups
    assert (group.learning_rate, group.weight_decay) == (0.01, None)
    assert "weight decay 0.01, as the file does not tell Adam's from AdamW's" in rows["optimizer"].detail
    content["optimizer"]["param_groups"][0]["weight_decay"] = 0
    found, rows = ported(tmp_path, content)
    assert found.training.groups[0].weight_decay == 0
    assert "weight decay" not in rows["optimizer"].detail


def frozen(net):
    return torch.optim.SGD(list(net.parameters())[1:], 0.1, momentum=0.9)


def in_overlapping_groups(net):
    gammas = [p for name, p in net.named_parameters() if p.ndim == 1 and name.endswith("weight")]
    others = [p for p in net.parameters() if all(p is not gamma for gamma in gammas)]
    return torch.optim.SGD([{"params": gammas}, {"params": others}], 0.1, momentum=0.9)


def backwards(net):
    return torch.optim.SGD(list(net.parameters())[::-1], 0.1, momentum=0.9)


def groups_backwards(net):
    first, second = by_rank(net)
    return torch.optim.SGD([{"params": first["params"][::-1]}, second], 0.1, momentum=0.9)


LEFT_OUT = {
    "another optimizer": (lambda net: torch.optim.RMSprop(net.parameters(), 0.01), "with alpha, centered"),
    "one like Adam": (
        lambda net: torch.optim.RAdam(net.parameters(), 0.01),
        "not those of SGD, Adam or AdamW",
    ),
    "amsgrad": (
        lambda net: torch.optim.Adam(net.parameters(), 0.01, amsgrad=True),
        "amsgrad is True: it goes by",
    ),
    "dampening": (
        lambda net: torch.optim.SGD(net.parameters(), 0.1, 0.9, dampening=0.5),
        "dampening is 0.5: its",
    ),
    "a tensor": (lambda net: torch.optim.Adam(net.parameters(), torch.tensor(0.1)), "its lr is no plain"),
    "frozen": (frozen, "it trains 14 arrays, and the network has 15 to train"),
    "overlapping": (in_overlapping_groups, r"several of its groups have parameters of the shape \(4,\)"),
    "backwards": (backwards, r"what it keeps for 0.weight has the shape \(2,\) and not \(4, 3, 3, 3\)"),
    "a group backwards": (groups_backwards, "not those of the network, in their order"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_not_certain_stays_behind_and_is_said(tmp_path, case):
    build, reason = LEFT_OUT[case]
    net = model()
    optimizer = build(net)
    train(net, optimizer)
    found, rows = ported(tmp_path, checkpoint(net, optimizer))
    assert found.training is None
    assert "training" not in rows
    assert rows["optimizer"].status == "left out"
    with pytest.raises(AssertionError, match=f"an optimizer's state stays behind: .*{reason}"):
        raise AssertionError(rows["optimizer"].detail)


def test_a_decay_that_is_no_sgds_stays_behind(tmp_path):
    net = model()
    optimizer = OPTIMIZERS["sgd"](net)
    content = checkpoint(net, optimizer)
    content["optimizer"]["param_groups"][0]["decoupled_weight_decay"] = True
    found, rows = ported(tmp_path, content)
    assert found.training is None
    assert "decoupled, as that of SGD is not" in rows["optimizer"].detail


def test_groups_that_nothing_tells_apart_stay_behind(tmp_path):
    net = model()
    found, rows = ported(tmp_path, checkpoint(net, OPTIMIZERS["sgd by rank"](net)))
    assert found.training is None
    assert "keeps nothing yet" in rows["optimizer"].detail


def change(entry, place, value):
    *outer, last = place
    for key in outer:
        entry = entry[key]
    if value is None:
        del entry[last]
    else:
        entry[last] = value


DAMAGED = {
    "steps that differ": (("state", 3, "step"), torch.tensor(9.0), "differ in their steps, 2, 9"),
    "no step": (("state", 3, "step"), None, "does not keep all that Adam does"),
    "half a step": (("state", 3, "step"), 1.5, "differ in their steps, 1.5, 2"),
    "a step of several": (("state", 3, "step"), torch.ones(2), "as step"),
    "another shape": (("state", 3, "exp_avg"), torch.ones(3, 3), "several shapes"),
    "no moment": (("state", 3, "exp_avg"), None, "does not keep all that Adam does"),
    "a text": (("state", 3, "exp_avg"), "x", "it keeps 'x' as exp_avg"),
    "a number": (("state", 3, "exp_avg"), 0.5, "it keeps 0.5 as exp_avg"),
    "something more": (("state", 3, "more"), torch.ones(3), "it keeps more, which"),
    "no groups": (("param_groups",), [], "no groups of parameters"),
    "no parameters": (("param_groups", 0, "params"), 3, "a group of it has no parameters"),
    "no state": (("state",), [1], "not as PyTorch stores one"),
    "an infinite rate": (("param_groups", 0, "lr"), float("inf"), "lr is no plain finite number"),
    "a huge rate": (("param_groups", 0, "lr"), 10**400, "lr is no plain finite number"),
    "a rate that is a text": (("param_groups", 0, "lr"), "0.1", "lr is no plain finite number"),
    "an option": (("param_groups", 0, "trust"), 0.1, "with trust"),
    "a nameless option": (("param_groups", 0, 7), 0.1, "an option of it has no name"),
    "a number twice": (("param_groups", 0, "params"), [0] * 15, "no numbers of their own"),
    "another number": (("param_groups", 0, "params"), list(range(1, 16)), "in none of its groups"),
    "names of others": (
        ("param_groups", 0, "param_names"),
        ["x"] * 15,
        "it trains 'x', which the network has not",
    ),
    "too few names": (("param_groups", 0, "param_names"), ["0.weight"], "does not name all"),
    "a name twice": (("param_groups", 0, "param_names"), ["0.bias"] * 15, "in it twice"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_optimizer_stays_behind_and_the_network_goes(tmp_path, case):
    place, value, reason = DAMAGED[case]
    net = model()
    optimizer = OPTIMIZERS["adam"](net)
    train(net, optimizer)
    content = checkpoint(net, optimizer)
    change(content["optimizer"], place, value)
    found, rows = ported(tmp_path, content)
    assert found.training is None
    assert reason in rows["optimizer"].detail
    assert len(rows["optimizer"].detail) < 400
    np.testing.assert_array_equal(found.state["1.gamma"], to_numpy(net)["1.gamma"])


def test_it_is_of_the_network_that_is_taken_without_a_key(tmp_path):
    net = model()
    optimizer = OPTIMIZERS["sgd"](net)
    train(net, optimizer)
    content = checkpoint(net, optimizer, model_ema={n: v.clone() for n, v in net.state_dict().items()})
    for key in (None, "model"):
        found, _ = ported(tmp_path, content, key=key)
        assert_same(found.training, optimizer_to_numpy(optimizer, net))
    found, rows = ported(tmp_path, content, key="model_ema")
    assert found.training is None
    assert "nothing tells whether it has trained the network" in rows["optimizer"].detail
    content["model"] = torch.optim.swa_utils.AveragedModel(net).state_dict()
    found, rows = ported(tmp_path, content)
    assert found.training is None
    assert "an average" in rows["optimizer"].detail


def test_what_has_two_names_has_one_place_in_the_training(tmp_path):
    net = model()
    net.append(net[6])
    optimizer = OPTIMIZERS["sgd"](net)
    net[:7](torch.randn(4, 3, 5, 5)).square().mean().backward()
    optimizer.step()
    found, _ = ported(tmp_path, checkpoint(net, optimizer))
    assert_same(found.training, optimizer_to_numpy(optimizer, net))


@pytest.mark.parametrize("name", ["b.pth", "b.msgpack", "b.ckpt", "b.pkl"])
def test_other_formats_take_no_optimizer_and_the_table_says_so(tmp_path, name):
    net = model()
    optimizer = OPTIMIZERS["sgd"](net)
    train(net, optimizer)
    torch.save(checkpoint(net, optimizer), tmp_path / "a.pth")
    rows = {row.name: row for row in port(tmp_path / "a.pth", tmp_path / name).rows}
    assert rows["optimizer"].detail == "an optimizer's state, which only a canonical file takes"
    port(tmp_path / "a.pth", tmp_path / "a.safetensors")
    rows = {row.name: row for row in port(tmp_path / "a.safetensors", tmp_path / name).rows}
    assert rows["training"].status == "no counterpart"
    assert rows["training"].detail.endswith("stays behind: only a canonical file takes it")


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of a single process
def test_of_a_distributed_checkpoint_the_table_says_that_it_stays_behind(tmp_path):
    net = model()
    optimizer = OPTIMIZERS["sgd"](net)
    train(net, optimizer)
    content = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    distributed.save(content, checkpoint_id=tmp_path / "a")
    table = port(tmp_path / "a", tmp_path / "b.safetensors")
    (row,) = (row for row in table.rows if row.name.startswith("optimizer"))
    assert row.detail == "an optimizer's state stays behind: it is not read from a distributed checkpoint"


def test_without_being_asked_for_nothing_of_an_optimizer_is_read(tmp_path, monkeypatch):
    net = model()
    optimizer = OPTIMIZERS["adam"](net)
    train(net, optimizer)
    torch.save(checkpoint(net, optimizer), tmp_path / "a.pth")
    read = []
    array = checkpoints._array
    monkeypatch.setattr(checkpoints, "_array", lambda *given: read.append(1) or array(*given))
    checkpoints.read(tmp_path / "a.pth")
    assert len(read) == len(net.state_dict())
    read.clear()
    checkpoints.read_trained(tmp_path / "a.pth")
    assert len(read) == len(net.state_dict()) + 3 * 15
