"""MindSpore's checkpoint files, written and read without MindSpore, and held to it."""

import os

os.environ.setdefault("GLOG_v", "4")

import contextlib
import random
import stat
import subprocess
import sys
import time
import tracemalloc

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from mindspore.train.checkpoint_pb2 import Checkpoint

from rbn.backends.mindspore import RBN
from rbn.formats import mindspore as checkpoints
from rbn.formats.mindspore import read, write
from rbn_core import RBNError, RBNValueError
from rbn_core.weights import read_safetensors

rng = np.random.default_rng(0)

ARRAYS = {
    "layer1.0.conv1.weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
    "layer1.0.bn1.moving_mean": rng.normal(size=3).astype(np.float64),
    "half": rng.normal(size=(2, 3)).astype(np.float16),
    "brain": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
    "count": np.array(7, np.int32),
    "flag": np.array([True, False]),
    **{
        f"of {dtype}": np.arange(3).astype(dtype)
        for dtype in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
    },
}


def assert_equal(arrays, expected):
    assert list(arrays) == list(expected)
    for name, array in arrays.items():
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape), name
        np.testing.assert_array_equal(array, expected[name])


def parameter(array):
    brain = array.dtype == ml_dtypes.bfloat16
    return Parameter(Tensor(array.astype(np.float32), ms.bfloat16) if brain else Tensor(array))


def saved(path, arrays, **options):
    """What MindSpore writes."""
    listed = [{"name": name, "data": parameter(array)} for name, array in arrays.items()]
    ms.save_checkpoint(listed, str(path), **options)
    return path


def value(tag=b"a", dims=(2,), kind=b"Float32", content=bytes(8)):
    """One value of a checkpoint, by hand."""
    tensor = b"".join(b"\x08" + checkpoints._number(extent) for extent in dims)
    tensor += checkpoints._field(2, kind) + checkpoints._field(3, content)
    return checkpoints._field(1, checkpoints._field(1, tag) + checkpoints._field(2, tensor))


def test_what_is_written_is_what_mindspore_writes(tmp_path):
    write(tmp_path / "ours.ckpt", ARRAYS)
    saved(tmp_path / "theirs.ckpt", ARRAYS)
    assert (tmp_path / "ours.ckpt").read_bytes() == (tmp_path / "theirs.ckpt").read_bytes()
    assert_equal(read(tmp_path / "theirs.ckpt"), ARRAYS)
    assert stat.S_IMODE((tmp_path / "ours.ckpt").stat().st_mode) & stat.S_IWUSR


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_mindspore_loads_what_is_written(tmp_path, suffix):
    write(tmp_path / f"x.{suffix}", ARRAYS)
    loaded = ms.load_checkpoint(str(tmp_path / f"x.{suffix}"), format=suffix)
    assert suffix == "ckpt" or read_safetensors(tmp_path / "x.safetensors")[1] == {"format": "ms"}
    assert loaded.keys() == ARRAYS.keys()
    for name, tensor in loaded.items():
        brain = tensor.dtype == ms.bfloat16
        array = tensor.astype(ms.float32).asnumpy() if brain else tensor.asnumpy()
        np.testing.assert_array_equal(array, ARRAYS[name].astype(np.float32) if brain else ARRAYS[name])
        assert tuple(tensor.shape) == ARRAYS[name].shape


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("crc_check", [False, True])
def test_what_mindspore_saves_is_read(tmp_path, suffix, crc_check):
    without = "brain" if crc_check and suffix == "safetensors" else ""  # which MindSpore itself fails on
    expected = {name: array for name, array in ARRAYS.items() if name != without}
    arrays = read(saved(tmp_path / f"x.{suffix}", expected, format=suffix, crc_check=crc_check))
    assert len(arrays) == len(expected)
    assert_equal({name: arrays[name] for name in expected}, expected)


def test_the_layout_may_differ_from_the_suffix(tmp_path):
    write(tmp_path / "x.ckpt", ARRAYS, "safetensors")
    (tmp_path / "x.ckpt").rename(tmp_path / "x.safetensors")
    assert read(tmp_path / "x.safetensors").keys() == ARRAYS.keys()
    with pytest.raises(RBNValueError, match="write: expected layout to be one of 'ckpt', 'safetensors'"):
        write(tmp_path / "x.ckpt", ARRAYS, "linen")


def test_texts_and_numbers_beside_the_weights(tmp_path):
    ms.save_checkpoint(
        nn.Dense(2, 3), str(tmp_path / "x.ckpt"), append_dict={"epoch": 3, "lr": 0.1, "note": "good"}
    )
    arrays = read(tmp_path / "x.ckpt")
    assert arrays.keys() == {"weight", "bias", "epoch", "lr"}
    assert (arrays["epoch"], arrays["lr"]) == (3, np.float32(0.1))


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), RBN(3)], ids=["BatchNorm2d", "RBN"])
def test_a_layer_alone_has_the_names_that_it_has_in_a_network(tmp_path, layer):
    ms.save_checkpoint(layer, str(tmp_path / "x.ckpt"))
    arrays = read(tmp_path / "x.ckpt")
    assert {"gamma", "beta", "moving_mean", "moving_variance"} <= arrays.keys()
    write(tmp_path / "again.ckpt", arrays)
    assert ms.load_checkpoint(str(tmp_path / "again.ckpt")).keys() == {p.name for p in layer.get_parameters()}


def test_a_scalar_may_have_the_extent_0(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(value(dims=(0,), content=np.float32(1.5).tobytes()))
    assert_equal(read(tmp_path / "x.ckpt"), {"a": np.array(1.5, np.float32)})
    assert ms.load_checkpoint(str(tmp_path / "x.ckpt"))["a"].asnumpy().shape == ()


def test_large_arrays_come_in_slices(tmp_path, monkeypatch):
    import mindspore.train.serialization as serialization

    arrays = {"a": rng.normal(size=(7, 300)).astype(np.float32), "b": np.arange(3)}
    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)
    monkeypatch.setattr(checkpoints, "SLICE", 1024)
    saved(tmp_path / "theirs.ckpt", arrays)
    write(tmp_path / "ours.ckpt", arrays)
    message = Checkpoint()
    message.ParseFromString((tmp_path / "theirs.ckpt").read_bytes())
    assert [entry.tag for entry in message.value] == ["a"] * 9 + ["b"]
    assert (tmp_path / "ours.ckpt").read_bytes() == (tmp_path / "theirs.ckpt").read_bytes()
    assert_equal(read(tmp_path / "theirs.ckpt"), arrays)


def test_arrays_of_any_layout_are_written(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.arange(3, dtype=">i4"), "c": np.arange(9.0)[::3]}
    write(tmp_path / "x.ckpt", arrays)
    read_back = read(tmp_path / "x.ckpt")
    for name, array in arrays.items():
        np.testing.assert_array_equal(read_back[name], array)
    read_back["a"][:] = 0  # it can be written to


@pytest.mark.parametrize(
    ("array", "got"),
    [(np.zeros(2, np.complex64), "complex64"), (np.array(["x"]), "<U1"), (np.zeros((0, 3)), r"\(0, 3\)")],
)
def test_what_a_checkpoint_cannot_hold_is_refused(tmp_path, array, got):
    (tmp_path / "x.ckpt").write_bytes(b"old")
    with pytest.raises(RBNError, match=f"expected arrays of .* got a of .*{got}"):
        write(tmp_path / "x.ckpt", {"a": array})
    assert (tmp_path / "x.ckpt").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


HOSTILE = {
    "empty": (b"", "it is empty"),
    "text": (b"hello, this is no checkpoint", "."),
    "zip": (b"PK\x03\x04" + bytes(100), "."),
    "pickle": (b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.", "."),
    "truncated": (value()[:-3], "ends early"),
    "in a number": (value() + b"\x0a", "ends early"),
    "absurd length": (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "ends early"),
    "endless number": (b"\x0a" + b"\xff" * 50, "ends early"),
    "nested groups": (b"\x0b" * 100_000, "something else"),
    "nested messages": (b"\x0a\x80\x7f" * 30_000, "ends early|something else|field"),
    "absurd shape": (value(dims=(2**40, 2**40)), r"8 bytes, which are no Float32 of shape"),
    "negative extent": (value(dims=(2**64 - 2,)), "8 bytes, which are no Float32"),
    "nothing by much": (value(dims=(0, 2**62, 2**62), content=b""), "no proper shape"),
    "many axes": (value(dims=(1,) * 40, content=bytes(4)), "4 bytes, which are no Float32"),
    "too few bytes": (value(dims=(3,)), r"8 bytes, which are no Float32 of shape \(3,\)"),
    "too many bytes": (value(dims=(1,)), r"8 bytes, which are no Float32 of shape \(1,\)"),
    "unknown type": (value(kind=b"Float99"), "of type 'Float99', not one of Bool"),
    "type of another": (value(kind=b"Int4", content=bytes(1)), "of type 'Int4'"),
    "no boolean": (value(kind=b"Bool", content=b"\x01\x02"), "neither true nor false"),
    "name twice": (value() + value(b"b") + value(), "'a' comes twice"),
    "name twice in a row": (value() + value(), "16 bytes, which are no Float32"),
    "two shapes": (value() + value(dims=(1,)), "'a' comes twice"),
    "no text": (value(b"\xff\xfe"), "a name is no text"),
    "no tensor": (checkpoints._field(1, checkpoints._field(1, b"a")), "a tensor missing"),
    "two names": (checkpoints._field(1, checkpoints._field(1, b"a") * 2), "missing, too many"),
    "a number for a name": (checkpoints._field(1, b"\x08\x01"), "missing, too many"),
    "a number for a value": (b"\x08\x01", "a number stands for a message"),
    "a map": (checkpoints._field(1, checkpoints._field(1, b"a") + checkpoints._field(3, b"")), "a field 3"),
    "another field": (checkpoints._field(9, b"a"), "no field 9"),
    "wrong checksum": (value() + b"crc_num" + bytes(10), "checksum is that of other data"),
    "encrypted": (b"\xd8\x5e\x3a\x7f" + bytes(100), "it is encrypted"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_or_hostile_file_is_one_clear_error(tmp_path, name):
    content, reason = HOSTILE[name]
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(
        RBNValueError, match=f"expected a MindSpore checkpoint, got .*x.ckpt .*{reason}"
    ) as caught:
        read(tmp_path / "x.ckpt")
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


def test_numbers_without_an_end_take_no_time(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"\x0a" + b"\xff" * 1_000_000)
    start = time.process_time()
    with pytest.raises(RBNValueError, match="ends early"):
        read(tmp_path / "x.ckpt")
    assert time.process_time() - start < 1


def test_a_key_hides_a_file(tmp_path):
    with pytest.raises(RBNValueError, match="it is encrypted: load it with its key"):
        read(saved(tmp_path / "x.ckpt", ARRAYS, enc_key=b"0123456789ABCDEF"))


def test_a_damaged_safetensors_file_is_one_clear_error(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(RBNValueError, match="expected a safetensors file"):
        read(tmp_path / "x.safetensors")


def mutated(content):
    """The file with a few changes that damaged disks, transfers and attackers make."""
    content = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 5])):
        at = random.randrange(len(content))
        match random.randrange(5):
            case 0:
                content[at] ^= 1 << random.randrange(8)
            case 1:
                content[at] = random.randrange(256)
            case 2:
                content = content[:at] or bytearray(b"\n")
            case 3:
                content[at:at] = random.randbytes(random.randrange(1, 12))
            case 4:
                content[at:at] = content[random.randrange(len(content)) :][:50]
    return bytes(content)


def test_mutated_files_are_read_or_refused(tmp_path):
    random.seed(0)
    saved(tmp_path / "x.ckpt", ARRAYS)
    saved(tmp_path / "y.ckpt", ARRAYS, crc_check=True)
    originals = [(tmp_path / name).read_bytes() for name in ("x.ckpt", "y.ckpt")]
    refused = 0
    for _ in range(2000):
        (tmp_path / "z.ckpt").write_bytes(mutated(random.choice(originals)))
        try:
            read(tmp_path / "z.ckpt")
        except RBNValueError:
            refused += 1
    assert 1000 < refused < 2000


@pytest.mark.parametrize(
    "content",
    [
        checkpoints._field(1, b"") * 100_000,
        value(dims=(), content=b"") * 20_000,
        value(dims=(1,) * 100_000),
        b"\x0a\x80\x7f" * 100_000,
        b"".join(value(b"%06d" % i, (2,)) for i in range(20_000)),
        value(dims=(250_000,), content=bytes(1_000_000)),
    ],
    ids=["empty values", "empty slices", "a long shape", "nested", "small arrays", "a large array"],
)
def test_reading_takes_at_most_ten_times_the_file(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    tracemalloc.start()
    with contextlib.suppress(RBNValueError):
        read(tmp_path / "x.ckpt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(content)


ALONE = """
import sys
import numpy as np
from rbn.formats import mindspore

assert "mindspore" not in sys.modules
mindspore.write(sys.argv[1], {"a": np.zeros(3)})
print(mindspore.read(sys.argv[1]), flush=True)
while True:
    mindspore.write(sys.argv[1], {"a": np.ones(1_000_000)})
"""


def test_without_mindspore_and_killed_while_writing_it_leaves_the_old_file_or_the_new(tmp_path):
    path = tmp_path / "x.ckpt"
    command = [sys.executable, "-c", ALONE, path]
    for pause in (0.0, 0.003, 0.011, 0.029):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"{'a': array([0., 0., 0.])}\n"
            time.sleep(pause)
            process.kill()
        assert read(path)["a"].shape in ((3,), (1_000_000,))
