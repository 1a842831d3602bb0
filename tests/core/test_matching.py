"""What of a state goes where."""

import numpy as np
import pytest

from rbn_core import RBNValueError
from rbn_core.matching import match

SHAPES = {"a.weight": (2, 3), "a.bias": (2,), "n.gamma": (2,), "n.num_batches_tracked": ()}


def state(**changes):
    arrays = {"a.weight": np.ones((2, 3)), "a.bias": np.ones(2), "n.gamma": np.ones(2)}
    arrays |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in arrays.items() if value is not None}


def statuses(found):
    return {row.name: row.status for row in found.rows}


def test_every_array_is_in_the_table():
    taken, found = match(state(n__num_batches_tracked=np.array(3)), SHAPES, transposed={"a.weight"})
    assert taken.keys() == SHAPES.keys()
    assert statuses(found) == dict.fromkeys(SHAPES, "matched") | {"a.weight": "transposed"}
    assert not found.faults


@pytest.mark.parametrize(
    "changes", [{}, {"n__num_batches_tracked": np.array(3), "m__num_batches_tracked": np.array(3)}]
)
def test_a_counter_of_batches_may_lack_and_may_come_alone(changes):
    taken, found = match(state(**changes), SHAPES)
    assert taken.keys() - {"n.num_batches_tracked"} == SHAPES.keys() - {"n.num_batches_tracked"}
    lone = "m.num_batches_tracked" if changes else "n.num_batches_tracked"
    assert statuses(found)[lone] == "no counterpart"


def test_integers_are_taken_where_the_target_has_them():
    shapes, indices = {"table.index": (2,)}, {"table.index": np.array([1, 0])}
    taken, _ = match(indices, shapes, integers={"table.index"})
    np.testing.assert_array_equal(taken["table.index"], [1, 0])
    with pytest.raises(RBNValueError, match=r"table\.index of dtype int64"):
        match(indices, shapes)
    with pytest.raises(RBNValueError, match=r"table\.index of dtype float64"):
        match({"table.index": np.ones(2)}, shapes, integers={"table.index"})


def test_patterns_rename():
    arrays = {f"stem.{name}": value for name, value in state().items()}
    taken, found = match(arrays, SHAPES, rename={r"stem\.(a|n)\.(.*)": r"\1.\2", r"stem\..*": "never"})
    assert taken.keys() == state().keys()
    assert {row.source for row in found.rows if row.status == "renamed"} == arrays.keys()


def test_a_table_reads_as_text():
    _, found = match(state(a__bias=None, b=np.ones(5)), SHAPES, strict=False)
    assert str(found).splitlines() == [
        "matched         a.weight                 (2, 3) float64",
        "missing         a.bias                   (2,)",
        "matched         n.gamma                  (2,) float64",
        "no counterpart  n.num_batches_tracked    ()",
        "unexpected      b                        (5,)",
        "2 matched, 1 missing, 1 no counterpart, 1 unexpected",
    ]


FAULTY = {"a__weight": np.ones((3, 2)), "a__bias": None, "n__gamma": np.array(["x", "y"]), "b": np.ones(5)}


def test_everything_wrong_is_one_error():
    with pytest.raises(RBNValueError) as raised:
        match(state(**FAULTY), SHAPES)
    assert str(raised.value) == (
        "RBN: expected a state of a.weight, a.bias, n.gamma, n.num_batches_tracked, got one with missing "
        "a.bias; unexpected b; a.weight of shape (3, 2) where (2, 3) is needed; n.gamma of dtype <U1. "
        "Nothing was changed; rename what is called otherwise, or pass strict=False to leave it out."
    )


def test_what_is_wrong_is_left_out_when_not_strict():
    taken, found = match(state(**FAULTY), SHAPES, strict=False)
    assert taken == {}
    assert {row.status for row in found.faults} == {"missing", "unexpected", "wrong shape", "wrong dtype"}


def test_two_arrays_cannot_get_one_name():
    with pytest.raises(RBNValueError, match=r"got a\.bias for both a\.weight and a\.bias"):
        match(state(), SHAPES, rename={r"a\.weight": "a.bias"})


def test_a_pattern_that_is_no_regular_expression_is_named():
    with pytest.raises(RBNValueError, match=r"regular expressions, got '\('"):
        match(state(), SHAPES, rename={"(": "x"})
    with pytest.raises(RBNValueError, match=r"regular expressions, got .*invalid group reference"):
        match(state(), SHAPES, rename={"a.*": r"\1"})
