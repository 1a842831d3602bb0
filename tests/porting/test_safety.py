"""Damaged and hostile files of every format: one clear error each, and nothing that they ask for happens.

20,000 mutated files of every format, a quarter of an hour:

    RBN_MUTATIONS=20000 pytest tests/porting/test_safety.py -k mutated -s
"""

import io
import json
import os
import pickle
import runpy
import struct
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from rbn.porting import port
from rbn_core import RBNError, weights

MUTATE = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("mutate.py"))))
MUTATIONS = os.environ.get("RBN_MUTATIONS", "2000")
FEW = "200"

FORMATS = [
    pytest.param(name, marks=pytest.mark.framework(framework)) if framework in ("torch", "flax") else name
    for name, (framework, _) in MUTATE.FORMATS.items()
]
"""Reading PyTorch's and Flax's files takes these."""

FILES = [name for name in FORMATS if getattr(name, "values", (name,))[0] != "orbax"]


@pytest.fixture
def make(tmp_path):
    """Make a file of a format; returns its path and the format's framework."""

    def make(name, change=lambda data: data):
        framework, file_name = MUTATE.FORMATS[name]
        path = tmp_path / file_name
        MUTATE.whole(name, path, 0)
        if name != "orbax":
            path.write_bytes(change(path.read_bytes()))
        return path, framework

    return make


def refused(path, framework, text="expected "):
    """Assert that porting a file is one clear error that names it, and leaves nothing."""
    destination = path.with_name("ported.safetensors")
    with pytest.raises(RBNError, match=text) as raised:
        port(path, destination, source_format=framework)
    message = str(raised.value)
    assert len(message) < 2000
    assert ", got " in message
    assert not destination.exists()
    return message


# Every format


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mutations", [FEW, pytest.param(MUTATIONS, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", MUTATE.FORMATS)
def test_mutated_files_are_read_or_refused(name, mutations, tmp_path):
    """In a process of its own: a crash is its exit status."""
    script = Path(__file__).with_name("mutate.py")
    command = [sys.executable, "-W", "error", script, name, mutations, "0", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_anywhere_is_refused_or_holds_less(make, name):
    path, framework = make(name)
    data = path.read_bytes()
    whole = port(path, path.with_name("whole.safetensors"), source_format=framework)
    refusals = 0
    for length in range(0, len(data), 10):
        path.write_bytes(data[:length])
        try:
            found = port(path, path.with_name("less.safetensors"), source_format=framework)
        except RBNError:
            refusals += 1
        else:  # a MindSpore checkpoint may end behind any array, and a pickle before its sum
            assert {row.name for row in found.rows} <= {row.name for row in whole.rows}
    assert refusals >= 0.9 * len(range(0, len(data), 10))


@pytest.mark.parametrize("name", FILES)
def test_an_empty_file_is_refused(make, name):
    refused(*make(name, lambda data: b""))


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_such_file_at_all_is_refused(make, name):
    refused(*make(name, lambda data: b"\x00" * 1000))
    refused(*make(name, lambda data: b"<!DOCTYPE html>" * 100))


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_that_are_not_finite_are_refused(make, monkeypatch, name):
    monkeypatch.setitem(
        MUTATE.whole.__globals__, "example", lambda seed: {"fc.weight": np.array([[1, np.nan]], np.float32)}
    )
    message = refused(*make(name))
    own = "params/fc/weight" if name in ("msgpack", "orbax") else "fc.weight"  # as the file has it
    assert f"NaN or infinity in {own} (1 of 2)" in message


@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_numbers_are_not_taken_for_infinite(make, monkeypatch, name):
    largest = np.full((1, 2), np.finfo(np.float32).max)
    monkeypatch.setitem(MUTATE.whole.__globals__, "example", lambda seed: {"fc.weight": largest})
    path, framework = make(name)
    port(path, path.with_name("ported.safetensors"), source_format=framework)
    np.testing.assert_array_equal(weights.load(path.with_name("ported.safetensors"))["fc.weight"], largest)


# Safetensors, canonical and of a framework


HEADERS = {
    "longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "longer than anything": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a hundred megabytes": struct.pack("<Q", 100_000_000) + b"{" + b" " * 1000,
    "deep": struct.pack("<Q", 100_005) + b'{"a":' + b"[" * 100_000,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize(
    "name", ["canonical", pytest.param("torch_safetensors", marks=pytest.mark.framework("torch"))]
)
def test_a_hostile_header_is_refused(make, name, header):
    refused(*make(name, lambda data: header))


@pytest.mark.parametrize(
    "name", ["canonical", pytest.param("torch_safetensors", marks=pytest.mark.framework("torch"))]
)
def test_an_array_that_is_there_twice_is_refused(make, name):
    one = '"conv.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f"{{{one},{one}}}".encode()
    message = refused(*make(name, lambda data: struct.pack("<Q", len(header)) + header + b"1234"))
    assert "'conv.weight' is there twice" in message


def test_a_deep_description_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    for key in ("layers", "network", "training"):
        save_file({"a": np.ones(2)}, path, {"format": "rbn", "schema": "1", key: '{"a":' + "[" * 100_000})
        refused(path, None, "with whole metadata")


def test_numbers_of_no_known_kind_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    header = b'{"a":{"dtype":"F8_E5M2","shape":[4],"data_offsets":[0,4]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    refused(path, "canonical")
    save_file({"a": np.ones(2, np.complex64)}, path)
    refused(path, "canonical", "expected arrays of bool, .*got a of complex64")


# Pickles


class Hostile:
    """An object whose pickle runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_a_command_is_refused_and_runs_nothing(tmp_path, protocol):
    path, marker = tmp_path / "a.pkl", tmp_path / "marker"
    for content in (Hostile(marker), {"a.weight": np.ones(2), "b": Hostile(marker)}, [Hostile(marker)]):
        path.write_bytes(pickle.dumps(content, protocol))
        refused(path, "jittor")
        assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # the file does what it is said to


def test_a_pickle_that_never_ends_is_refused(tmp_path):
    path = tmp_path / "a.pkl"
    doubling = b"\x80\x04]\x94" + b"".join(b"h" + bytes([i]) + b"\x94h\x00a" for i in range(100)) + b"."
    for data in (
        doubling,
        b"\x80\x04" + b"]" * 500_000 + b"a" * 499_999 + b".",
        b"\x80\x04\x8e" + b"\xff" * 8,
    ):
        path.write_bytes(data)
        refused(path, "jittor")


@pytest.mark.framework("torch")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_that_runs_a_command_is_refused_and_runs_nothing(tmp_path, zipped):
    import torch

    path, marker = tmp_path / "a.pth", tmp_path / "marker"
    state = {"a.weight": torch.ones(2), "b": Hostile(marker)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    refused(path, "torch")
    path.write_bytes(pickle.dumps(state))
    refused(path, "torch")
    assert not marker.exists()
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    torch.load(path, weights_only=False)
    assert marker.exists()


# Zips


def zipped(entries, **options):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", **options) as opened:
        for name, content in entries.items():
            opened.writestr(name, content)
    return made.getvalue()


@pytest.mark.framework("torch")
def test_nothing_of_a_zip_gets_out_of_it(make, tmp_path):
    path, framework = make("pth")
    with zipfile.ZipFile(path) as opened:
        entries = {name: opened.read(name) for name in opened.namelist()}
    outside = tmp_path.parent / "outside"
    for name in ("../outside", str(outside), "a/../../outside"):
        path.write_bytes(zipped(entries | {name: b"x" * 100}))
        with suppress(RBNError):
            port(path, tmp_path / "b.safetensors", source_format=framework)
        assert not outside.exists()


@pytest.mark.framework("torch")
def test_a_zip_bomb_is_refused(make):
    path, framework = make("pth")
    with zipfile.ZipFile(path) as opened:
        entries = {name: opened.read(name) for name in opened.namelist()}
    first = next(name for name in entries if name.endswith("data/0"))
    entries[first] = b"\0" * 200_000_000
    path.write_bytes(zipped(entries, compression=zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 1_000_000
    refused(path, framework)


# MindSpore and Flax


def message(number, content):
    """A field of a protobuf message."""
    length = bytearray()
    size = len(content)
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content


def test_a_checkpoint_of_a_hostile_mindspore_is_refused(tmp_path):
    path = tmp_path / "a.ckpt"

    def value(dims, kind=b"Float32", content=b"1234", name=b"fc.weight"):
        tensor = b"".join(b"\x08" + bytes(dim) for dim in dims) + message(2, kind) + message(3, content)
        return message(1, message(1, name) + message(2, tensor))

    path.write_bytes(value([[1]]))
    port(path, tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").unlink()
    path.rename(tmp_path / "ported.safetensors")
    (tmp_path / "ported.safetensors").unlink()
    huge = b"\xff" * 8 + b"\x7f"
    for data in (
        value([huge]),
        value([[2]]),
        value([[1]], kind=b"Object"),
        value([[1]], kind=b"Float64"),
        value([[1]]) * 2 + value([[1]], name=b"b") + value([[1]]),
        value([[1]], name=b"\xff"),
        b"\x0a" + huge + b"1234",
        b"\x0a\x02" * 50_000,
    ):
        path.write_bytes(data)
        refused(path, "mindspore")


@pytest.mark.framework("flax")
def test_a_hostile_msgpack_is_refused(tmp_path):
    import msgpack

    path = tmp_path / "a.msgpack"

    def array(shape, dtype="float32", data=b"12341234"):
        return msgpack.packb(
            {"params": {"fc": {"bias": msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))}}}
        )

    path.write_bytes(array([2]))
    port(path, tmp_path / "b.safetensors")
    path.with_name("b.safetensors").unlink()
    twice = b"\x82\xa1a" + msgpack.packb(1) + b"\xa1a" + msgpack.packb(2)
    for data in (
        array([2**40]),
        array([-2]),
        array([3]),
        array([1], "object"),
        array([1], "<U2"),
        b"\x91" * 100_000 + b"\x00",
        b"\x81\xa1a" * 100_000,
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        twice,
        msgpack.packb({"params": msgpack.ExtType(42, b"x")}),
    ):
        path.write_bytes(data)
        refused(path, "flax")


@pytest.mark.framework("flax")
def test_a_damaged_orbax_folder_is_refused(make, tmp_path):
    path, framework = make("orbax")
    whole = MUTATE.contents(path)
    (tmp_path / "secret").write_bytes(b"secret")
    needed = [name for name in whole if "metadata" not in name.lower()]
    for name in needed:
        MUTATE.remove(path)
        MUTATE.put(path, {other: content for other, content in whole.items() if other != name})
        if name == "manifest.ocdbt" or name.startswith("d/"):
            refused(path, framework)
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).symlink_to(tmp_path / "secret")
        refused(path, framework)
    MUTATE.remove(path)
    path.mkdir()
    refused(path, framework)
    MUTATE.put(path, whole | {"_METADATA": b'{"tree_metadata":' + b"[" * 100_000})
    refused(path, framework)
    described = json.loads(whole["_METADATA"])
    for entry in described["tree_metadata"].values():
        entry["key_metadata"][-1]["key"] = "../../secret"
    MUTATE.put(path, whole | {"_METADATA": json.dumps(described).encode()})
    refused(path, framework)


# Memory


BOMBS = {
    "canonical": lambda n: save_bomb("layers", '{"a":[' + "[]," * (n // 3)),
    "ckpt": lambda n: b"\x0a\x00" * (n // 2),
    "pkl": lambda n: b"\x80\x04" + b"}" * n,
    "pth": lambda n: zipped(
        {"a/data.pkl": b"\x80\x02" + b"}" * n, "a/version": b"3\n"}, compression=zipfile.ZIP_STORED
    ),
    "msgpack": lambda n: b"\xdd" + struct.pack(">I", n) + b"\x80" * n,
}


def save_bomb(key, text):
    from safetensors.numpy import save

    return save({"a": np.ones(2)}, {"format": "rbn", "schema": "1", key: text})


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_of_little_things_takes_no_more_than_ten_times_its_size(make_plain, name):
    path, framework = make_plain(name, BOMBS[name](4_000_000))
    code = (
        "import sys\n"
        "from mutate import memory\n"
        "from rbn import porting\n"
        "from rbn_core import RBNError\n"
        "path, framework = sys.argv[1:]\n"
        "if framework != 'canonical': porting.format_of(framework)\n"
        "before = memory('VmHWM')\n"
        "try: porting.read(__import__('pathlib').Path(path), framework)\n"
        "except RBNError: print(memory('VmHWM') - before)\n"
    )
    here = Path(__file__).parent  # where mutate.py is
    command = [sys.executable, "-c", code, path, framework]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert done.stdout, done.stderr
    assert int(done.stdout) <= MUTATE.MOST * path.stat().st_size + MUTATE.ANYWAY


@pytest.fixture
def make_plain(tmp_path):
    def make(name, data):
        framework, file_name = MUTATE.FORMATS[name]
        (tmp_path / file_name).write_bytes(data)
        return tmp_path / file_name, framework

    return make
