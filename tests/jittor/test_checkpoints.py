"""Jittor's files, read and written without Jittor; what is hostile in them is refused."""

import builtins
import collections
import hashlib
import os
import pickle
import random
import subprocess
import sys
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from rbn.backends.jittor import RBN, from_numpy, to_numpy

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt
from jittor import nn

from rbn.formats import jittor as checkpoints
from rbn_core import RBNError, RBNTypeError, RBNValueError

HEAD = b"\x80\x04"


def some_arrays():
    rng = np.random.default_rng(0)
    return {
        "layer1.0.weight": rng.normal(size=(4, 3, 3, 3)).astype("float32"),
        "layer1.0.bias": np.asfortranarray(rng.normal(size=(2, 3))),
        "bn.running_var": rng.normal(size=5).astype(">f4"),
        "half": np.ones(3, "float16"),
        "empty": np.zeros((0, 3), "float32"),
        "mask": np.array([True, False]),
        "table": np.arange(300, dtype="int64"),
    }


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype.newbyteorder("="), name
        assert value.flags.writeable
        assert value.flags.c_contiguous
        np.testing.assert_array_equal(value, expected[name])


def refuse(path, content):
    """The reason why a file of such content is refused."""
    path.write_bytes(content)
    with pytest.raises(
        RBNValueError, match=r"RBN: expected a Jittor checkpoint, got .*Write it with"
    ) as caught:
        checkpoints.read(path)
    return str(caught.value)


def test_a_file_of_jittors_is_read(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm(3), RBN(3))
    model.save(str(tmp_path / "model.pkl"))
    stored = checkpoints.read(tmp_path / "model.pkl")
    assert list(stored) == list(model.state_dict())
    assert stored["2.num_batches_tracked"].shape == ()
    for name, var in model.state_dict().items():
        np.testing.assert_array_equal(stored[name].reshape(var.shape), var.numpy())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int32", "uint8", "bool"])
def test_jittors_dtypes_are_kept(dtype, tmp_path):
    jt.save({"a": jt.array([0.0, 1.0, 2.5]).cast(dtype)}, str(tmp_path / "a.pkl"))
    read = checkpoints.read(tmp_path / "a.pkl")["a"]
    assert read.dtype.name == dtype
    np.testing.assert_array_equal(
        read.astype("float64"), np.array([0.0, 1.0, 2.5]).astype(dtype).astype("float64")
    )


def test_many_small_variables_are_not_too_many(tmp_path):
    variables = {
        f"layer{i // 40}.{i % 40}.bn.weight": jt.array(np.full(16, i, "float32")) for i in range(2000)
    }
    jt.save(variables, str(tmp_path / "a.pkl"))
    read = checkpoints.read(tmp_path / "a.pkl")
    assert [value[0] for value in read.values()] == list(range(2000))


def test_what_is_written_is_read_by_jittor(tmp_path):
    model, other = (nn.Sequential(nn.Linear(2, 3), RBN(3)) for _ in range(2))
    from_numpy(model, {name: value + 3 for name, value in to_numpy(model).items()})
    stored = {name: var.numpy() for name, var in model.state_dict().items()}
    stored["1.num_batches_tracked"] = stored["1.num_batches_tracked"].reshape(())
    stored["0.bias"] = stored["0.bias"].astype(ml_dtypes.bfloat16)
    path = tmp_path / "model.pkl"
    checkpoints.write(path, stored)
    assert path.read_bytes().endswith(b"HCAJSLHD")
    loaded = jt.load(str(path))
    assert loaded["0.bias"].dtype == "float32"
    other.load(str(path))
    for name, var in other.state_dict().items():
        np.testing.assert_array_equal(var.numpy(), stored[name].astype(str(var.dtype)).reshape(var.shape))
    assert checkpoints.read(path)["1.num_batches_tracked"] == 3


def test_what_is_written_comes_back(tmp_path):
    checkpoints.write(tmp_path / "a.pkl", some_arrays())
    assert_same(checkpoints.read(tmp_path / "a.pkl"), some_arrays())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "wrap", [dict, collections.OrderedDict, lambda arrays: {"model": arrays, "epoch": 3}]
)
def test_plain_pickles_are_read(protocol, wrap, tmp_path):
    content = pickle.dumps(wrap(some_arrays()), protocol)
    (tmp_path / "a.pkl").write_bytes(content)
    assert_same(checkpoints.read(tmp_path / "a.pkl"), some_arrays())


def test_other_values_beside_arrays_are_left_out(tmp_path):
    shared = np.ones(2, ml_dtypes.bfloat16)
    content = {
        "a": shared,
        "b": shared,
        "rate": 0.5,
        "many": 2**40,
        "names": ["x"],
        "none": (),
        "n": np.float64(7),
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, 5))
    read = checkpoints.read(tmp_path / "a.pkl")
    assert read.keys() == {"a", "b", "n"}
    assert read["a"].dtype == ml_dtypes.bfloat16
    assert read["n"] == 7


def test_no_framework_is_needed(tmp_path):
    checkpoints.write(tmp_path / "a.pkl", some_arrays())
    script = """
import sys
from rbn.formats import jittor
jittor.write(sys.argv[1], jittor.read(sys.argv[1]))
assert "jittor" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, tmp_path / "a.pkl"], check=True)
    assert_same(checkpoints.read(tmp_path / "a.pkl"), some_arrays())


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.pkl"
    path.write_bytes(b"old")
    with pytest.raises(RBNTypeError, match=r"expected arrays of bool.*got a of object, b of complex64"):
        checkpoints.write(path, {"a": np.array([None]), "b": np.zeros(1, "complex64"), "c": np.zeros(1)})
    with pytest.raises(RBNError, match="expected layout to be one of 'own', 'published', got 'pkl'"):
        checkpoints.write(path, {}, layout="pkl")
    monkeypatch.setattr(os, "fsync", lambda handle: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoints.write(path, some_arrays())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


class Call:
    """What pickles to a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


CALLS = {
    "system": Call(os.system, ("touch owned",)),
    "eval": Call(builtins.eval, ("open('owned', 'w')",)),
    "getattr": Call(getattr, ("text", "upper")),
    "exec": {"a": np.ones(2), "b": Call(builtins.exec, ("raise SystemExit",))},
    "bytearray": Call(bytearray, (2**40,)),
    "numpy": Call(np.zeros, ((10**12,),)),
    "load": Call(np.load, ("owned", None, True)),
    "partial": Call(collections.deque, ([1],)),
}


REASONS = {
    "system": "it holds posix.system, which can run code",
    "eval": "it holds builtins.eval, which can run code",
    "getattr": "not put together",
    "exec": "it holds builtins.exec, which can run code",
    "bytearray": "no dictionary but builtins.bytearray",
    "numpy": "it calls numpy.zeros, which is no class",
    "load": "it calls numpy.load, which is no class",
    "partial": "no dictionary but collections.deque",
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", CALLS)
def test_no_call_is_made(name, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reason = refuse(tmp_path / "a.pkl", pickle.dumps(CALLS[name], protocol))
    # NumPy says where it was defined, and in protocol 2 bytearray and deque have other arguments.
    assert REASONS[name] in reason.replace("numpy.core.multiarray.", "numpy.")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pkl"]


def array(value=None):
    """The pickle of an array, without its head and its end."""
    return pickle.dumps(np.ones(3, "float32") if value is None else value, 4)[11:-1]


def entry(value):
    """A dictionary with an array under "a"."""
    return HEAD + b"}\x8c\x01a" + value + b"s."


def reshaped(shape):
    return entry(array().replace(b"K\x03\x85", shape))


def of_dtype(code):
    return entry(array().replace(b"\x8c\x02f4", b"\x8c" + bytes([len(code)]) + code))


DAMAGED = {
    "empty": (b"", "cut off"),
    "head": (HEAD, "cut off"),
    "text": (b"(dp0\n.", "no pickle of the protocols 2 to 5"),
    "later protocol": (b"\x80\x09.", "no pickle of the protocols"),
    "none": (HEAD + b"N.", "no dictionary"),
    "nothing": (HEAD + b"}.", "no arrays"),
    "numbers": (HEAD + b"}\x8c\x01aK\x05s.", "no arrays"),
    "unfilled": (entry(array()[: array().index(b"(")]), "'a' is no plain array but an array"),
    "remains": (entry(array()) + b"x", "goes on after its end"),
    "left over": (HEAD + b"N}.", "ends too early"),
    "no values": (HEAD + b"}s.", "lacks its values"),
    "below the mark": (HEAD + b"}\x8c\x01aN(s.", "lacks its values"),
    "no mark": (HEAD + b"}u.", "lacks its mark"),
    "odd": (HEAD + b"}(\x8c\x01au.", "into what is no dictionary"),
    "no dictionary": (HEAD + b"](K\x01K\x01u.", "into what is no dictionary"),
    "no list": (HEAD + b"}Na.", "to what is no list"),
    "twice": (HEAD + b"}\x8c\x01a" + array() + b"s\x8c\x01a" + array() + b"s.", "'a' comes twice"),
    "key": (HEAD + b"}NNs.", "no arrays"),
    "endless key": (
        HEAD + b")\x940" + b"".join(b"h%ch%c\x86\x940" % (i, i) for i in range(80)) + b"}h\x50Ns.",
        "no arrays",
    ),
    "memo": (HEAD + b"h\x07.", "refers to what has not come"),
    "memo far away": (HEAD + b"Nr\xff\xff\xff\xff.", "notes are out of order"),
    "instruction": (HEAD + b"c" + b"i" * 50, "a name has no end"),
    "instance": (HEAD + b"\x81.", "lacks its values"),
    "persistent": (HEAD + b"Pabc\n.", "do not need the instruction b'P'"),
    "extension": (HEAD + b"\x82\x01.", "do not need the instruction"),
    "name": (HEAD + b"NN\x93.", "a name is no text"),
    "letters": (HEAD + b"\x8c\x01\xff.", "can't decode byte"),
    "announced": (HEAD + b"\x8e" + b"\xff" * 7 + b"\x7f", "cut off"),
    "a terabyte": (HEAD + b"\x8e" + (2**40).to_bytes(8, "little") + b"x", "cut off"),
    "shape": (
        reshaped(b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85"),
        "not as many as its shape says",
    ),
    "negative shape": (reshaped(b"J\xff\xff\xff\xffJ\xfd\xff\xff\xff\x86"), "shape is none"),
    "half a shape": (reshaped(b"G\x40\x08" + b"\0" * 6 + b"\x85"), "shape is none"),
    "list": (reshaped(b"]K\x03a"), "shape is none"),
    "axes": (reshaped(b"(" + b"K\x01" * 70 + b"K\x03t"), "maximum supported dimension"),
    "overflow": (
        entry(
            array(np.zeros((0, 2), "float32")).replace(
                b"K\x00K\x02", b"K\x00\x8a\x08" + b"\xff" * 7 + b"\x7f"
            )
        ),
        "too big|too large",
    ),
    "object": (entry(array(np.array([1, None], object))), "no plain array but an array"),
    "object code": (of_dtype(b"O8"), "no plain array but an array"),
    "long dtype": (of_dtype(b"V" + b"9" * 18), "no plain array but an array"),
    "fields": (of_dtype(b"f4,f4"), "no plain array but an array"),
    "text array": (entry(array(np.array(["abc"]))), "no plain array but an array"),
    "complex": (entry(array(np.zeros(2, complex))), "no plain array but an array"),
    "dtype state": (entry(array().replace(b"\x8c\x01<", b"\x8c\x01?")), "not put together"),
    "filled twice": (entry(array() + b"K\x01\x85b"), "not put together"),
    "called": (HEAD + b"}N\x85R.", "calls what is no class"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_refused(name, tmp_path):
    content, reason = DAMAGED[name]
    assert any(part in refuse(tmp_path / "a.pkl", content) for part in reason.split("|"))


def test_a_file_that_is_not_there_is_one_clear_error(tmp_path):
    for path in (tmp_path / "no.pkl", tmp_path):
        with pytest.raises(RBNValueError, match="which is no file"):
            checkpoints.read(path)


def test_a_checksum_is_compared(tmp_path):
    checkpoints.write(tmp_path / "a.pkl", some_arrays())
    content = bytearray((tmp_path / "a.pkl").read_bytes())
    content[len(content) // 2] ^= 1
    assert "its checksum is that of other data" in refuse(tmp_path / "a.pkl", bytes(content))
    assert "its checksum" in refuse(tmp_path / "a.pkl", b"HCAJSLHD")


BOMBS = {
    "dictionaries": b"}",
    "marks": b"N(",
    "tuples": b"\x85",
    "lists": b"]a",
    "nothings": b"Na",
    "notes": b"\x94",
    "texts": b"\x8c\x02ab",
    "wide texts": b"\x8c\x07aaa\xf0\x9f\x98\x80",
    "bytes": b"C\x02ab",
    "views": b"C\xc9" + b"a" * 201,
    "numbers": b"Jaaaa",
    "frames": b"\x95" + b"\0" * 8,
}
START = {"tuples": b"N", "lists": b"]", "nothings": b"]", "notes": b"N"}


def test_values_that_are_there_once_are_not_multiplied(tmp_path):
    kind, arguments, state = np.zeros(5_000, "uint8").__reduce__()
    arrays = {str(i): Call(kind, arguments, state) for i in range(100)}  # the state's bytes are one object
    assert "it has more values than bytes" in refuse(tmp_path / "a.pkl", pickle.dumps(arrays, 4))


@pytest.mark.parametrize("name", BOMBS)
def test_no_file_takes_ten_times_its_size(name, tmp_path):
    content = HEAD + START.get(name, b"") + BOMBS[name] * (600_000 // len(BOMBS[name]))
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(RBNValueError, match="expected a Jittor checkpoint"):
        checkpoints.read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * len(content)


def mutated(content, rng):
    """The file with some of its bytes changed, moved, added or gone."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(len(content))
        match rng.randrange(6):
            case 0 | 1:
                content[at] = rng.randrange(256)
            case 2:
                content[at] = rng.choice(b"}])(.\x94\x85\x86\x87\x8e\x8d\x96NRbhsute\x95")
            case 3:
                del content[at : at + rng.randrange(1, 9)]
            case 4:
                content[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 5:
                del content[max(1, at) :]
        content = content or bytearray(HEAD)
    return bytes(content)


def test_two_thousand_mutated_files_give_arrays_or_one_clear_error(tmp_path):
    path = tmp_path / "a.pkl"
    nn.Sequential(nn.Linear(2, 3), RBN(3)).save(str(path))
    sources = [path.read_bytes()[:-28], *(pickle.dumps(some_arrays(), protocol) for protocol in (2, 4, 5))]
    rng = random.Random(0)
    read = slowest = longest = 0
    for i in range(2000):
        content = mutated(sources[i % 4], rng)
        if i % 3 == 0:
            content += hashlib.sha1(content).digest() + b"HCAJSLHD"
        path.write_bytes(content)
        start = time.process_time()
        try:
            read += bool(checkpoints.read(path))
        except RBNValueError as error:
            longest = max(longest, len(str(error)))
        slowest = max(slowest, time.process_time() - start)
    assert 100 < read < 1000
    assert slowest < 0.1
    assert longest < 1000
