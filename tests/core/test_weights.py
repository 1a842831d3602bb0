"""The canonical weight file."""

import numpy as np
import pytest

from rbn_core import RBN, RBNValueError
from rbn_core.weights import load, save


def test_a_state_survives_the_file(tmp_path):
    layer = RBN(3)
    layer.forward(np.random.default_rng(0).normal(size=(4, 3, 2, 2)), training=True)
    save(tmp_path / "layer.safetensors", layer.state())
    read = load(tmp_path / "layer.safetensors")
    assert read.keys() == layer.state().keys()
    for name, value in layer.state().items():
        np.testing.assert_array_equal(read[name], value)
        assert (read[name].shape, read[name].dtype) == (value.shape, value.dtype)


def test_an_array_that_lies_crosswise_in_memory_survives_too(tmp_path):
    value = np.arange(6.0).reshape(2, 3).T
    save(tmp_path / "value.safetensors", {"value": value})
    np.testing.assert_array_equal(load(tmp_path / "value.safetensors")["value"], value)


def test_a_file_that_is_no_safetensors_file_is_one_clear_error(tmp_path):
    path = tmp_path / "layer.safetensors"
    path.write_bytes(b"not a weight file")
    with pytest.raises(RBNValueError, match=r"expected a safetensors file, got .*layer\.safetensors"):
        load(path)
