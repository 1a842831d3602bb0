"""The optimizer of a training checkpoint of Jittor goes along: it holds the network's own arrays."""

import numpy as np
import pytest

from rbn.backends.jittor import BNET, RBN, optimizer_to_numpy

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt
from jittor import nn

from rbn.porting import port
from rbn_core import weights


def model():
    return nn.Sequential(nn.Conv(3, 4, 3), RBN(4), nn.ReLU(), BNET(4), nn.Flatten(), nn.Linear(36, 2))


def in_groups(net):
    """Kernels, and a part of the rest, of which some have options of their own."""
    return [
        {"params": [net[0].weight, net[5].weight], "weight_decay": 0.1},
        {"params": [net[1].center_weight, net[1].weight, net[1].running_mean], "lr": 0.5},
    ]


OPTIMIZERS = {
    "sgd": lambda net: jt.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-4),
    "no momentum": lambda net: jt.optim.SGD(net.parameters(), 0.1),
    "groups": lambda net: jt.optim.SGD(in_groups(net), 0.1, momentum=0.9),
    "adam": lambda net: jt.optim.Adam(net.parameters(), 0.01),
    "adam in groups": lambda net: jt.optim.Adam(
        [{"params": group["params"]} for group in in_groups(net)], 0.01
    ),
}


def train(net, optimizer, steps=2):
    for _ in range(steps):
        optimizer.step((net(jt.randn(4, 3, 5, 5)) ** 2).mean())


def checkpoint(net, optimizer):
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}


def ported(tmp_path, content, **options):
    """What becomes of a checkpoint: the canonical file, and the table's rows by name."""
    jt.save(content, str(tmp_path / "a.pkl"))
    table = port(tmp_path / "a.pkl", tmp_path / "b.safetensors", **options)
    return weights.read(tmp_path / "b.safetensors"), {row.name: row for row in table.rows}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizer_of_a_checkpoint_goes_along(tmp_path, kind):
    net = model()
    optimizer = OPTIMIZERS[kind](net)
    train(net, optimizer)
    found, rows = ported(tmp_path, checkpoint(net, optimizer))
    expected = optimizer_to_numpy(optimizer, net)
    assert (found.training.optimizer, found.training.step) == (expected.optimizer, 2)
    assert set(found.training.groups) == set(expected.groups)
    assert found.training.slots.keys() == expected.slots.keys()
    for slot, arrays in expected.slots.items():
        assert found.training.slots[slot].keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found.training.slots[slot][name], array, err_msg=f"{slot}/{name}")
    assert rows["training"].status == "matched"
    assert "goes along" in rows["optimizer"].detail
    assert "counts no steps" not in rows["optimizer"].detail


def test_whether_the_decay_is_adams_or_adamws_is_not_in_the_file(tmp_path):
    net = model()
    optimizer = jt.optim.AdamW(net.parameters(), 0.01, weight_decay=0.1)
    train(net, optimizer)
    found, rows = ported(tmp_path, checkpoint(net, optimizer))
    assert [group.weight_decay for group in found.training.groups] == [None]
    assert "weight decay 0.1, as the file does not tell Adam's from AdamW's" in rows["optimizer"].detail


def test_what_is_not_certain_stays_behind_and_is_said(tmp_path):
    net = model()
    other = jt.optim.SGD(model().parameters(), 0.1, momentum=0.9)
    another = jt.optim.RMSprop(net.parameters(), 0.1)
    twice = jt.optim.SGD([net[0].weight, net[0].weight], 0.1, momentum=0.9)
    dampened = jt.optim.SGD(net.parameters(), 0.1, momentum=0.9, dampening=0.5)
    for optimizer, reason in (
        (other, "its parameters are not the network's own arrays in the file"),
        (another, "not those of SGD, Adam or AdamW, with alpha"),
        (twice, "a parameter is in it twice"),
        (dampened, "dampening is 0.5"),
    ):
        found, rows = ported(tmp_path, checkpoint(net, optimizer))
        assert found.training is None
        assert rows["optimizer"].detail.startswith("an optimizer's state stays behind: ")
        assert reason in rows["optimizer"].detail


def test_what_is_damaged_stays_behind_and_the_network_goes(tmp_path):
    net = model()
    optimizer = OPTIMIZERS["sgd"](net)
    content = checkpoint(net, optimizer)
    defaults = content["optimizer"]["defaults"]
    group = defaults["param_groups"][0]
    for change, reason in (
        ({"values": group["values"][1:]}, "does not keep an array for every parameter"),
        ({"values": [jt.ones(7)] * len(group["values"])}, "has not the shape (4, 3, 3, 3)"),
        ({"params": [1] * len(group["params"])}, "not the network's own arrays"),
        ({"lr": "fast"}, "lr is no plain finite number"),
    ):
        defaults["param_groups"] = [group | change]
        found, rows = ported(tmp_path, content)
        assert found.training is None
        assert reason in rows["optimizer"].detail
        assert "5.weight" in found.state
    defaults["param_groups"], defaults["n_step"] = [group], "x"
    assert "how many steps" in ported(tmp_path, content)[1]["optimizer"].detail
    defaults["param_groups"] = [group, group]
    assert "a group of it is there twice" in ported(tmp_path, content)[1]["optimizer"].detail
    defaults[7] = 1
    assert "not as Jittor stores one" in ported(tmp_path, content)[1]["optimizer"].detail


def test_pytorchs_files_take_no_optimizer_and_the_table_says_so(tmp_path):
    net = model()
    jt.save(checkpoint(net, OPTIMIZERS["adam"](net)), str(tmp_path / "a.pkl"))
    rows = {row.name: row for row in port(tmp_path / "a.pkl", tmp_path / "b.ckpt").rows}
    assert rows["optimizer"].detail == "an optimizer's state, which only a canonical file takes"
