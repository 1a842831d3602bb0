"""Which rename table makes a state another network's: said where nearly all would match."""

import numpy as np
import pytest

from rbn_core import RBNValueError
from rbn_core.architectures import network
from rbn_core.matching import match
from rbn_core.renaming import as_toml, suggested

TARGET = network("resnet18").state_shapes()

FORMS = {
    "a prefix": (lambda name: f"model.{name}", {r"model\.(.*)": r"\1"}),
    "two prefixes": (lambda name: f"module.encoder.{name}", {r"module\.encoder\.(.*)": r"\1"}),
    "a part": (
        lambda name: name.replace(".downsample.", ".shortcut."),
        {r"(.*?)\.shortcut\.(.*)": r"\1.downsample.\2"},
    ),
    "a part too many": (
        lambda name: name.replace(".conv1.", ".body.conv1."),
        {r"(.*?)\.body\.(.*)": r"\1.\2"},
    ),
    "another head": (lambda name: name.replace("fc.", "head."), {r"head\.(.*)": r"fc.\1"}),
    "both": (
        lambda name: f"net.{name}".replace(".bn2.", ".norm."),
        {r"net\.(.*?)\.norm\.(.*)": r"\1.bn2.\2", r"net\.(.*)": r"\1"},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_table_makes_everything_match(form):
    rename, expected = FORMS[form]
    state = {
        rename(name): np.zeros(shape, np.int64 if not shape else np.float32) for name, shape in TARGET.items()
    }
    table = suggested({name: array.shape for name, array in state.items()}, TARGET)
    assert table == expected
    _, found = match(state, TARGET, rename=table)
    assert not found.faults


def test_what_is_beside_is_dropped():
    state = {f"backbone.{name}": shape for name, shape in TARGET.items()}
    table = suggested(state | {"neck.0.weight": (2, 2), "anchors": (3,)}, TARGET)
    assert table == {r"backbone\.(.*)": r"\1", r"(neck|anchors)(\..*)?": ""}
    assert as_toml(table).splitlines() == [
        "[rename]",
        r"'backbone\.(.*)' = '\1'",
        r"'(neck|anchors)(\..*)?' = ''",
    ]


def test_the_other_way_a_prefix_is_added():
    target = {f"encoder.{name}": shape for name, shape in TARGET.items()}
    assert suggested(TARGET, target) == {"(.*)": r"encoder.\1"}


@pytest.mark.parametrize("other", ["resnet50", "mobilenet_v2"])
def test_another_network_is_no_renaming(other):
    assert suggested(network(other).state_shapes(), TARGET) == {}


def test_the_error_of_a_mismatch_says_it_and_is_short():
    state = {f"model.{name}": np.zeros(shape) for name, shape in network("resnet50").state_shapes().items()}
    with pytest.raises(
        RBNValueError, match=r"nearly all match with rename=\{'model\\\\\.\(\.\*\)'"
    ) as raised:
        match(state, network("resnet50").state_shapes())
    assert len(str(raised.value)) < 2000
    assert "more missing" in str(raised.value)
    assert "more unexpected" in str(raised.value)


def test_an_empty_name_leaves_out():
    state = {"a": np.ones(2), "b.c": np.ones(3)}
    taken, found = match(state, {"a": (2,)}, rename={r"b\..*": ""})
    assert taken.keys() == {"a"}
    assert [(row.name, row.status) for row in found.rows] == [("b.c", "left out"), ("a", "matched")]
