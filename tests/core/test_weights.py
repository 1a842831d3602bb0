"""The canonical weight file."""

import dataclasses
import json
import math
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rbn_core import RBN, RBNTypeError, RBNValueError
from rbn_core.architectures import network
from rbn_core.execution import initial_state
from rbn_core.training import Group, Training
from rbn_core.weights import DTYPES, LONGEST_TEXT, load, read, read_safetensors, save

GROUPS = (Group(0.1, 1e-4, ("a",)),)

ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.fixture
def path(tmp_path):
    return tmp_path / "layer.safetensors"


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in other.items():
        assert (one[name].shape, one[name].dtype) == (value.shape, value.dtype), name
        assert one[name].tobytes() == value.tobytes(), name


def by_hand(path, header, data=b"1234"):
    header = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def rewrite(path, **metadata):
    """A file of one array with this metadata."""
    known = {"format": "rbn", "schema": "2", "training": said()}
    save_file({"a": np.ones(2), "training/momentum/a": np.ones(2)}, path, known | metadata)


def said(**changes):
    """An optimizer of metadata, or one with a fault."""
    group = {"learning_rate": 0.1, "weight_decay": 1e-4, "parameters": ["a"]}
    group |= {key: changes.pop(key) for key in group.keys() & changes.keys()}
    known = {"optimizer": "sgd", "step": 1, "decoupled": False, "groups": [group]} | changes
    return json.dumps({key: value for key, value in known.items() if value is not ...})


def test_a_state_survives_the_file(path):
    layer = RBN(3)
    layer.forward(np.random.default_rng(0).normal(size=(4, 3, 2, 2)), training=True)
    save(path, layer.state())
    same(load(path), layer.state())
    assert (read(path).layers, read(path).network, read(path).training) == ({}, None, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_survives(path, dtype):
    state = {
        "scalar": np.array(1, dtype),
        "none": np.zeros((0, 3), dtype),
        "some": np.arange(6).reshape(2, 3).astype(dtype),
    }
    save(path, state)
    same(load(path), state)


def test_bits_survive(path):
    state = {
        "odd": np.array([np.nan, np.inf, -0.0, 1e-45], np.float32),
        "é 漢.x": np.ones(1, ml_dtypes.bfloat16),
    }
    save(path, state)
    same(load(path), state)


def test_an_array_that_lies_crosswise_in_memory_survives_too(path):
    value = np.arange(6.0).reshape(2, 3).T
    save(path, {"value": value, "big": np.arange(3, dtype=">f8")})
    np.testing.assert_array_equal(load(path)["value"], value)
    np.testing.assert_array_equal(load(path)["big"], [0, 1, 2])


def test_all_that_is_known_survives(path):
    described = network("cifar_resnet164", {"layer": "rbn", "stages": (1, 3), "scaling": "channel_std"}, 7)
    state = initial_state(described)
    slots = {
        slot: {name: np.full_like(state[name], i) for name in ("conv1.weight", "fc.bias")}
        for i, slot in enumerate(("first_moment", "second_moment"))
    }
    groups = (
        Group(np.float32(0.5), 0.01, ("conv1.weight",)),
        Group(0.25, 0, ("bn1.gamma", "fc.bias")),
        Group(1, None, ("fc.weight",)),
    )
    training = Training("adam", np.int64(12), groups, slots, decoupled=True)
    save(path, state, layers=described.layers(), network=described, training=training)
    found = read(path)
    same(found.state, state)
    assert found.layers == json.loads(json.dumps(described.layers()))
    assert found.network.to_json() == described.to_json()
    assert dataclasses.replace(found.training, slots=slots) == training
    assert found.training.slots.keys() == slots.keys()
    for slot in slots:
        same(found.training.slots[slot], slots[slot])


def test_an_optimizer_without_arrays_survives(path):
    save(path, {"a": np.ones(1)}, training=Training("sgd", 3, GROUPS))
    assert read(path).training == Training("sgd", 3, GROUPS)


def test_a_file_of_anyone_is_read(path):
    save_file({"a.weight": np.ones(3)}, path)
    same(load(path), {"a.weight": np.ones(3)})
    save_file({"a.weight": np.ones(3)}, path, {"format": "pt", "layers": "no JSON"})
    assert read(path).layers == {}
    same(read_safetensors(path)[0], {"a.weight": np.ones(3)})


def test_the_given_arrays_are_not_changed(path):
    state = {"a": np.arange(3, dtype=">f4")}
    save(path, state, training=Training("sgd", 0, GROUPS, {"momentum": {"a": np.ones(3)}}))
    assert state.keys() == {"a"}
    assert state["a"].dtype == np.dtype(">f4")


@pytest.mark.parametrize(
    "value",
    [np.array(["x"]), np.array([None]), np.ones(1, complex), np.ones(1, np.longdouble), np.zeros(2, "f4,i4")],
)
def test_what_cannot_be_stored_is_named_and_the_old_file_stays(path, value):
    save(path, {"a": np.ones(2)})
    with pytest.raises(RBNTypeError, match=r"expected arrays of bool, .* float64, got b of "):
        save(path, {"a": np.zeros(2), "b": value})
    same(load(path), {"a": np.ones(2)})


@pytest.mark.parametrize("name", ["__metadata__", "training/momentum/a"])
def test_names_of_the_files_own_are_refused(path, name):
    with pytest.raises(RBNValueError, match=f"does not need itself, got '{name}'"):
        save(path, {name: np.ones(2)})
    assert not path.exists()


HEADERS = {
    "no safetensors file": b"not a weight file",
    "empty": b"",
    "a length and no header": struct.pack("<Q", 8),
    "a header longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "a header longer than anything": struct.pack("<Q", 2**64 - 1) + b"{}",
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_file_that_is_no_safetensors_file_is_one_clear_error(path, content):
    path.write_bytes(content)
    with pytest.raises(RBNValueError, match=r"expected a safetensors file, got .*layer\.safetensors"):
        load(path)


HOSTILE = {
    "deep": '{"a":' + "[" * 100_000,
    "two arrays of one name": f'{{"a":{ONE},"a":{ONE}}}',
    "two texts of one name": f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{ONE}}}',
    "an array of no file's size": ONE.join(['{"a":', "}"]).replace("[1]", "[18446744073709551615,2]"),
    "a shape that is not the data's": ONE.join(['{"a":', "}"]).replace("[1]", "[2]"),
    "data beyond the file": ONE.join(['{"a":', "}"]).replace("[0,4]", "[4,8]"),
    "two arrays in one place": f'{{"a":{ONE},"b":{ONE}}}',
    "an array between no offsets": ONE.join(['{"a":', "}"]).replace("[0,4]", "[]"),
    "an array between one offset": ONE.join(['{"a":', "}"]).replace("[0,4]", "[4]"),
    "an unknown dtype": ONE.join(['{"a":', "}"]).replace("F32", "F31"),
    "a dtype of no NumPy": '{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}',
    "too many axes": ONE.join(['{"a":', "}"]).replace("[1]", f"[{','.join('1' * 70)}]"),
    "half a character": '{"a\\ud800":' + ONE + "}",
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_one_clear_error(path, header):
    by_hand(path, header)
    with pytest.raises(RBNValueError, match=r"expected a safetensors file, got .*layer\.safetensors \("):
        load(path)


def test_what_is_there_twice_is_named(path):
    by_hand(path, HOSTILE["two arrays of one name"])
    with pytest.raises(RBNValueError, match=r"\('a' is there twice\)"):
        load(path)


def test_every_cut_file_is_one_clear_error(path):
    described = network("resnet18", "rbn", 2)
    state = {name: value for name, value in initial_state(described).items() if name.startswith("bn1")}
    training = Training("sgd", 1, (Group(0.1, 0.0, tuple(state)),), {"momentum": state})
    save(path, state, layers=described.layers(), training=training)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(RBNValueError, match="expected a safetensors file"):
            load(path)


OLD = '{"optimizer": "sgd", "step": 1, "learning_rate": 0.1}'
"""An optimizer as schema 1 has it."""

METADATA = {
    "a later schema": {"schema": "3"},
    "layers that are no JSON": {"layers": "{"},
    "deep layers": {"layers": "[" * 100_000},
    "layers that are no object": {"layers": "[1]"},
    "a layer that is none": {"layers": '{"a": 1}'},
    "a layer without a kind": {"layers": '{"a": {}}'},
    "an unknown kind": {"layers": '{"a": {"kind": "magic"}}'},
    "long layers": {"layers": json.dumps({"a": {"kind": "norm", "more": "x" * LONGEST_TEXT}})},
    "a network that is none": {"network": "3"},
    "a network of nothing": {"network": "{}"},
    "an optimizer that is none": {"training": "3"},
    "an optimizer with more": {"training": said(x=1)},
    "an optimizer with less": {"training": said(groups=...)},
    "an optimizer without a name": {"training": said(optimizer=3)},
    "a step before the first": {"training": said(step=-1)},
    "half a step": {"training": said(step=0.5)},
    "no learning rate": {"training": said(learning_rate=math.nan)},
    "a text for a rate": {"training": said(learning_rate="0.1")},
    "a truth for a rate": {"training": said(learning_rate=True)},
    "a rate that no float holds": {"training": said(learning_rate=10**400)},
    "an infinite decay": {"training": said(weight_decay=math.inf)},
    "a text for a decay": {"training": said(weight_decay="0")},
    "a decay decoupled by a number": {"training": said(decoupled=1)},
    "groups that are none": {"training": said(groups=3)},
    "a group that is none": {"training": said(groups=[3])},
    "a group with less": {"training": said(groups=[{"learning_rate": 0.1}])},
    "a text for parameters": {"training": said(parameters="a")},
    "parameters that are no texts": {"training": said(parameters=[["a"]])},
    "a parameter twice": {"training": said(parameters=["a", "a"])},
    "a parameter that is not there": {"training": said(parameters=["a", "b"])},
    "an array of a parameter in no group": {"training": said(parameters=[])},
    "groups in schema 1": {"schema": "1"},
    "one rate in schema 2": {"training": OLD},
    "an optimizer that lacks": {"training": "null"},
}


@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA)
def test_damaged_metadata_is_one_clear_error(path, metadata):
    rewrite(path)
    assert read(path).training.slots["momentum"].keys() == {"a"}
    rewrite(path, **metadata)
    later = metadata.get("schema") == "3"
    expected = r"of schema 1 or 2, got schema '3'" if later else r"with whole metadata, got .*\("
    with pytest.raises(RBNValueError, match=expected):
        read(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kernel_size", "3"),
        ("groups", 0),
        ("groups", None),
        ("out_channels", -1),
        ("out_channels", 2.5),
        ("inputs", [["input"]]),
        ("inputs", 3),
        ("name", ["a"]),
        ("op", "exec"),
        ("op", ["norm"]),
    ],
)
def test_a_network_that_cannot_be_is_one_clear_error(path, key, value):
    described = json.loads(network("resnet18", "rbn").to_json())
    described["nodes"][0][key] = value
    rewrite(path, network=json.dumps(described))
    with pytest.raises(RBNValueError, match="with whole metadata"):
        read(path)


@pytest.mark.parametrize(
    "options", [{"eps": -1}, {"magic": 1}, [1], {"centering": ["x"]}, {"num_features": 3}]
)
def test_a_norm_that_cannot_be_is_one_clear_error(path, options):
    described = json.loads(network("resnet18", "rbn").to_json())
    described["nodes"][1]["options"] = options
    rewrite(path, network=json.dumps(described))
    with pytest.raises(RBNValueError, match="with whole metadata"):
        read(path)


def test_a_file_of_schema_1_has_one_rate_and_an_unknown_decay(path):
    rewrite(path, schema="1", training=OLD)
    training = read(path).training
    assert training == Training("sgd", 1, (Group(0.1, None, ("a",)),), training.slots)
    arrays = {"a": np.ones(2), "a.running_mean": np.ones(2), "a.num_batches_tracked": np.ones(2, np.int64)}
    save_file(arrays, path, {"format": "rbn", "schema": "1", "training": OLD})
    assert read(path).training == Training("sgd", 1, (Group(0.1, None, ("a",)),))
    save(path, arrays, training=read(path).training)
    assert read(path).training == Training("sgd", 1, (Group(0.1, None, ("a",)),))


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (Training("sgd", -1, GROUPS), "got a step of -1"),
        (Training("sgd", 1, 0.1), "got groups of 0.1"),
        (Training("sgd", 1, (Group(math.nan, 0.0, ("a",)),)), "got a learning rate of nan"),
        (Training("sgd", 1, (Group(0.1, math.inf, ("a",)),)), "got a weight decay of inf"),
        (Training("sgd", 1, (Group(0.1, 0.0, "a"),)), "got parameters of 'a'"),
        (Training("sgd", 1, GROUPS * 2), "got a twice in the groups"),
        (
            Training("sgd", 1, GROUPS, {"momentum": {"b": np.ones(1)}}),
            "got momentum/b of no group",
        ),
        (
            Training("sgd", 1, (Group(0.1, 0.0, ("a", "b")),)),
            "got that of b, which is not there",
        ),
    ],
)
def test_a_training_that_could_not_be_read_is_not_written(path, training, message):
    with pytest.raises(RBNValueError, match=message):
        save(path, {"a": np.ones(1)}, training=training)
    assert not path.exists()


def test_an_array_of_no_slot_or_no_parameter_is_refused(path):
    save_file({"training/momentum": np.ones(1)}, path, {"format": "rbn", "schema": "1"})
    with pytest.raises(RBNValueError, match="without an optimizer"):
        read(path)
    save_file({"training/momentum": np.ones(1)}, path, {"format": "rbn", "schema": "1", "training": OLD})
    with pytest.raises(RBNValueError, match="training/momentum of no parameter"):
        read(path)


def test_what_is_no_file_is_said(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(RBNValueError, match="which is no file"):
            load(path)


def test_what_a_run_needs_goes_along(path):
    run = {"step": 3, "preset": {"norm": {"layer": "rbn"}}, "best": 0.1}
    save(path, {"gamma": np.ones(2)}, run=run)
    assert read(path).run == run
    save(path, {"gamma": np.ones(2)})
    assert read(path).run is None


def test_a_run_that_is_no_object_is_refused(path):
    save(path, {"gamma": np.ones(2)}, run=[1])
    with pytest.raises(RBNValueError, match=r"its run is '\[1\]', and no object"):
        read(path)
