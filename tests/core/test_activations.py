"""The first layer whose activations part."""

import numpy as np
import pytest

from rbn_core import RBNValueError
from rbn_core.activations import OUTPUT, Observed, compare

RNG = np.random.default_rng(0)
A, B, C = (RNG.normal(size=(2, 3, 5, 4)).astype(np.float32) for _ in range(3))


def layers(*, relu=B, conv=C, into=B):
    return {
        "conv1": Observed("Conv2d", A, relu),
        "layer1.conv": Observed("Conv2d", into, conv),
        OUTPUT: Observed("Net", A, conv),
    }


def test_networks_that_agree_do_not_part():
    found = compare(lambda x: layers(), lambda x: layers(conv=C * np.float32(1 + 1e-6)), A)
    assert found.layer is None
    assert found.allowed
    assert found.compared == 3
    assert "none of 3 layers part" in str(found)


def test_the_first_layer_that_parts_is_named_with_its_causes():
    found = compare(layers(), layers(relu=2 * B, conv=3 * C))
    assert (found.layer, found.before) == ("conv1", False)
    assert found.largest == pytest.approx(2 * np.abs(C).max())
    assert found.relative == pytest.approx(2)
    assert not found.allowed
    assert "padding" in found.causes
    assert "the first part at 'conv1' (1.0e+00 of the largest" in str(found)


def test_what_differs_before_a_layer_is_no_layer():
    found = compare(layers(), layers(into=2 * B, conv=2 * C))
    assert (found.layer, found.before) == ("layer1.conv", True)
    assert "pooling" in found.causes
    assert "the first part before 'layer1.conv'" in str(found)


def test_channels_may_be_last():
    last = {
        path: Observed("Conv", None, np.moveaxis(layer.output, 1, -1)) for path, layer in layers().items()
    }
    assert compare(layers(), last).layer is None
    assert compare(last, layers()).layer is None
    assert compare(layers(), last | {"conv1": Observed("Conv", None, A)}).layer == "conv1"


def test_layers_are_paired_by_names_or_else_in_order():
    other = {f"cells.{i}": layer for i, layer in enumerate(list(layers().values())[:2])}
    other = {"cells.x": Observed("Cast", None, np.ones(3))} | other | {OUTPUT: layers()[OUTPUT]}
    assert compare(layers(), other).compared == 3
    renamed = compare(
        layers(), other | {"cells.1": Observed("Conv2d", B, A)}, rename={"layer1.conv": "cells.1"}
    )
    assert renamed.layer == "layer1.conv"


def test_another_shape_parts_and_another_result_is_refused():
    found = compare(layers(), layers(relu=B[:, :, :4]))
    assert (found.layer, found.detail) == ("conv1", "shapes (2, 3, 5, 4) and (2, 3, 4, 4)")
    with pytest.raises(RBNValueError, match="expected results of one shape"):
        compare(layers(), layers(conv=C[:1]))
    with pytest.raises(RBNValueError, match="expected what a backend's `activations` returns"):
        compare(layers(), {"conv1": layers()["conv1"]})


def test_what_is_not_finite_in_one_alone_parts():
    assert compare(layers(), layers(relu=np.full_like(B, np.nan))).layer == "conv1"
