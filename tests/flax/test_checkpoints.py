"""Flax's own files: what comes back, and what damaged and hostile ones do."""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState

from rbn.backends.flax import network
from rbn.backends.flax.nnx import RBN, to_numpy
from rbn.formats import flax as checkpoints
from rbn_core import RBNError, RBNValueError, counting
from rbn_core.execution import initial_state
from rbn_core.names import from_own, to_own


def arrays(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "params/conv1/kernel": rng.normal(size=(3, 3, 3, 8)).astype(np.float32),
        "params/layer1/0/bn1/scale": rng.normal(size=8),
        "params/layer1/0/bn1/half": rng.normal(size=8).astype(ml_dtypes.bfloat16),
        "params/layer1/0/bn1/small": rng.normal(size=(2, 1)).astype(np.float16),
        "batch_stats/layer1/0/bn1/mean": np.zeros(8, np.float32),
        "batch_stats/layer1/0/bn1/num_batches_tracked": np.array(3, np.int32),
    }


def nested(stored: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in stored.items():
        *parts, last = name.split("/")
        inner = tree
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = array
    return tree


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].flags.writeable


def test_how_far_an_orbax_folder_is_is_told_in_bytes(tmp_path: Path) -> None:
    state = {f"params/{i}": np.full((50, 50), i, np.float32) for i in range(40)}
    told: list[tuple[str, int, int]] = []
    with counting.telling(lambda *values: told.append(values)):
        checkpoints.write(tmp_path / "a", state)
        checkpoints.read(tmp_path / "a")
    size = sum(path.stat().st_size for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert [(what, done) for what, done, total in told if done == total] == [
        ("written", size),  # by Orbax, in one go
        ("read", size),
        ("unpacked", size),
    ]
    steps = [done for what, done, _ in told if what == "unpacked"]
    assert len(steps) > 20
    assert steps == sorted(set(steps))


def names(suffix: str) -> str:
    return {"msgpack": "network.msgpack", "orbax": "network"}[suffix]


FORMATS = ["msgpack", "orbax"]
LAYOUTS: list[checkpoints.Layout] = ["linen", "nnx"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_written_is_read(suffix: str, layout: checkpoints.Layout, tmp_path: Path) -> None:
    path = tmp_path / names(suffix)
    checkpoints.write(path, arrays(), layout)
    check_same(checkpoints.read(path), arrays())
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flax_reads_what_is_written(layout: checkpoints.Layout, tmp_path: Path) -> None:
    expected = nested(arrays() if layout == "linen" else {k.split("/", 1)[1]: v for k, v in arrays().items()})
    checkpoints.write(tmp_path / "a.msgpack", arrays(), layout)
    checkpoints.write(tmp_path / "a", arrays(), layout)
    jax.tree.map(
        np.testing.assert_array_equal,
        serialization.msgpack_restore((tmp_path / "a.msgpack").read_bytes()),
        expected,
    )
    with ocp.StandardCheckpointer() as checkpointer:
        jax.tree.map(np.testing.assert_array_equal, checkpointer.restore(tmp_path / "a"), expected)
    with ocp.PyTreeCheckpointer() as checkpointer:
        jax.tree.map(np.testing.assert_array_equal, checkpointer.restore(tmp_path / "a"), expected)


def save(kind: str, path: Path, tree: Any) -> None:
    match kind:
        case "msgpack":
            path.write_bytes(serialization.msgpack_serialize(tree))
        case "bytes of a state":
            path.write_bytes(serialization.to_bytes(tree))
        case "standard":
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(path, jax.tree.map(jnp.asarray, tree))
        case "step of a manager":
            with ocp.CheckpointManager(path.parent / "steps") as manager:
                manager.save(7, args=ocp.args.StandardSave(tree))
            (path.parent / "steps" / "7").rename(path)
        case _:
            options = {"separate files": {"use_ocdbt": False}, "zarr3": {"use_zarr3": True}}[kind]
            with ocp.PyTreeCheckpointer(**options) as checkpointer:
                checkpointer.save(path, tree)


@pytest.mark.parametrize(
    "kind", ["msgpack", "bytes of a state", "standard", "step of a manager", "separate files", "zarr3"]
)
def test_what_flax_writes_is_read(kind: str, tmp_path: Path) -> None:
    stored = {name: array for name, array in arrays().items() if array.dtype != np.float64}
    save(kind, tmp_path / "a", nested(stored))
    check_same(checkpoints.read(tmp_path / "a"), stored)


@pytest.mark.parametrize("kind", ["bytes of a state", "standard"])
def test_the_states_of_nnx_are_told_by_their_leaves(kind: str, tmp_path: Path) -> None:
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), RBN(3, rngs=nnx.Rngs(0)))
    model.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    expected = to_own("flax", to_numpy(model), {"layers.0": "linear", "layers.1": "norm"})
    state = nnx.state(model, nnx.Param, nnx.BatchStat)
    tree = nnx.merge_state(*state)
    save("standard", tmp_path / "wrapped", tree)
    save(kind, tmp_path / "pure", nnx.to_pure_dict(tree))
    for name in ("wrapped", "pure"):
        found = checkpoints.read(tmp_path / name)
        assert found.keys() == expected.keys()
        check_same(found, {key: np.asarray(value, found[key].dtype) for key, value in expected.items()})
    everything = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey)))
    save("msgpack", tmp_path / "everything", serialization.to_state_dict(everything))
    assert checkpoints.read(tmp_path / "everything").keys() == expected.keys()


@pytest.mark.parametrize("suffix", FORMATS)
def test_of_a_train_state_the_variables_are_read(suffix: str, tmp_path: Path) -> None:
    class State(TrainState):
        batch_stats: Any

    stored = {
        "params/dense/kernel": np.ones((2, 3), np.float32),
        "batch_stats/bn/mean": np.ones(3, np.float32),
    }
    tree = nested(stored)
    state = State.create(apply_fn=None, tx=optax.adam(1e-3), **tree)
    path = tmp_path / "a"
    if suffix == "msgpack":
        path.write_bytes(serialization.to_bytes(state))
    else:
        save("standard", path, serialization.to_state_dict(state))
    check_same(checkpoints.read(path), stored)


def test_a_network_moves_through_files(tmp_path: Path) -> None:
    description = network("cifar_resnet164", "rbn").description
    kinds = {path: layer["kind"] for path, layer in description.layers().items()}
    state = initial_state(description)
    for name in ("a.msgpack", "a"):
        checkpoints.write(tmp_path / name, to_own("flax", state, kinds))
        found, told = from_own("flax", checkpoints.read(tmp_path / name))
        assert told == kinds
        check_same(found, state)


def test_large_arrays_are_read_from_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)
    monkeypatch.setattr(checkpoints, "LARGEST", 100)
    checkpoints.write(tmp_path / "a.msgpack", arrays())
    assert b"__msgpack_chunked_array__" in (tmp_path / "a.msgpack").read_bytes()
    flax = serialization.msgpack_restore((tmp_path / "a.msgpack").read_bytes())
    jax.tree.map(np.testing.assert_array_equal, flax, nested(arrays()))
    check_same(checkpoints.read(tmp_path / "a.msgpack"), arrays())
    (tmp_path / "b.msgpack").write_bytes(serialization.msgpack_serialize(nested(arrays())))
    check_same(checkpoints.read(tmp_path / "b.msgpack"), arrays())


# Writing in one step


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.msgpack"
    checkpoints.write(path, arrays())
    before = path.read_bytes()

    def interrupted(file: Any, tree: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_write_msgpack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.write(path, arrays(1))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    checkpoints.write(path, arrays(1))
    check_same(checkpoints.read(path), arrays(1))


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Path, target: Path) -> None:
        assert not target.exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.write(tmp_path / "a", arrays())
    assert list(tmp_path.iterdir()) == []
    checkpoints.write(tmp_path / "a", arrays())
    with pytest.raises(RBNValueError, match="expected the name of a new folder"):
        checkpoints.write(tmp_path / "a", arrays(1))
    check_same(checkpoints.read(tmp_path / "a"), arrays())
    with pytest.raises(RBNValueError, match="expected a folder to write b into"):
        checkpoints.write(tmp_path / "none" / "b", arrays())


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    one = np.ones(1)
    with pytest.raises(RBNError, match="expected layout to be one of 'linen', 'nnx', got 'torch'"):
        checkpoints.write(tmp_path / "a", arrays(), "torch")  # type: ignore[arg-type]
    with pytest.raises(RBNValueError, match="expected names that differ behind their collections"):
        checkpoints.write(tmp_path / "a", {"params/a/x": one, "batch_stats/a/x": one}, "nnx")
    with pytest.raises(RBNValueError, match="expected no array to be a folder of others, got 'params/a/x'"):
        checkpoints.write(tmp_path / "a", {"params/a": one, "params/a/x": one})
    empty = {"params/a": np.ones((2, 0), np.float32)}
    with pytest.raises(RBNValueError, match=r"expected arrays that hold something.*got params/a without"):
        checkpoints.write(tmp_path / "a", empty)
    assert list(tmp_path.iterdir()) == []
    checkpoints.write(tmp_path / "a.msgpack", empty)
    check_same(checkpoints.read(tmp_path / "a.msgpack"), empty)


# Damaged and hostile files

WHOLE = serialization.msgpack_serialize(nested({"params/a/kernel": np.ones((2, 3), np.float32)}))


def text(name: str) -> bytes:
    return serialization.msgpack_serialize(name)


def array_of(shape: bytes, dtype: bytes, content: bytes) -> bytes:
    """A map with one array in "params/a", from the parts of its extension."""
    inner = b"\x93" + shape + text(dtype.decode()) + b"\xc6" + struct.pack(">I", len(content)) + content
    return (
        b"\x81"
        + text("params")
        + b"\x81"
        + text("a")
        + b"\xc9"
        + struct.pack(">I", len(inner))
        + b"\x01"
        + inner
    )


HOSTILE = {
    "empty": (b"", "ends too early"),
    "random": (random.Random(0).randbytes(200), ""),
    "text": (b"not a checkpoint", ""),
    "no names": (b"\x80", "without any array"),
    "an array alone": (serialization.msgpack_serialize(np.ones(2)), "no msgpack of names and arrays"),
    "more behind": (WHOLE + b"\0", "1 bytes behind its end"),
    "a name twice": (b"\x82" + (text("params") + b"\x80") * 2, "params twice"),
    "a name that is a number": (b"\x81\x05\x80", "where a name belongs"),
    "a slash in a name": (WHOLE.replace(b"kernel", b"ker/el"), "a slash in the name"),
    "no text": (WHOLE.replace(b"kernel", b"ker\xff\xffl"), "utf-8"),
    "deep": ((b"\x81" + text("a")) * 100_000 + b"\x80", "more than 100 levels"),
    "lists in lists": (b"\x81" + text("a") + b"\xdd\xff\xff\xff\xff" * 500, "with a list"),
    "many names": (
        b"\xdf" + struct.pack(">I", 20_000) + b"".join(text(f"{i:x}") + b"\xc0" for i in range(20_000)),
        "far more names",
    ),
    "an absurd number of names": (b"\xdf\xff\xff\xff\xff", "ends too early"),
    "an absurd length": (b"\x81" + text("params") + b"\xc9\xff\xff\xff\xff\x01", "ends too early"),
    "a pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "behind its end"),
    "objects": (array_of(b"\x91\x01", b"object", b"\0" * 8), "dtype 'object'"),
    "another dtype": (array_of(b"\x91\x01", b"complex64", b"\0" * 8), "dtype 'complex64'"),
    "records": (array_of(b"\x91\x01", b"f4,f4", b"\0" * 8), "dtype 'f4,f4'"),
    "too large a shape": (array_of(b"\x92\xce\xff\xff\xff\xff\x02", b"float32", b"\0" * 8), "8 bytes for an"),
    "zeros of a large shape": (array_of(b"\x92\x00\xce\xff\xff\xff\xff", b"float32", b""), None),
    "an infinite shape": (array_of(b"\x91\xcb\x7f\xf0\0\0\0\0\0\0", b"float32", b""), "a number belongs"),
    "a negative shape": (array_of(b"\x92\xff\xff", b"float32", b"\0" * 4), "4 bytes for an array"),
    "a long shape": (array_of(b"\xdc\xff\xff" + b"\x01" * 65535, b"float32", b"\0" * 4), "without a shape"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_msgpack_file_is_one_clear_error(name: str, tmp_path: Path) -> None:
    content, reason = HOSTILE[name]
    path = tmp_path / "a.msgpack"
    path.write_bytes(content)
    if reason is None:
        assert checkpoints.read(path)["params/a"].size == 0
        return
    with pytest.raises(RBNValueError, match=rf"expected a whole checkpoint of Flax.*{reason}.*Save it again"):
        checkpoints.read(path)


def test_reading_and_writing_msgpack_does_without_jax(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "a.msgpack", arrays())
    code = (
        "import sys\n"
        "from rbn.formats import flax\n"
        f"flax.write({str(tmp_path / 'b.msgpack')!r}, flax.read({str(tmp_path / 'a.msgpack')!r}))\n"
        "assert 'jax' not in sys.modules and 'flax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    check_same(checkpoints.read(tmp_path / "b.msgpack"), arrays())


def test_every_truncated_msgpack_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.msgpack"
    for length in range(len(WHOLE)):
        path.write_bytes(WHOLE[:length])
        with pytest.raises(RBNValueError, match="expected a whole checkpoint"):
            checkpoints.read(path)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(RBNValueError, match="which is not there"):
        checkpoints.read(tmp_path / "nothing")
    with pytest.raises(RBNValueError, match="0 folders with a _METADATA"):
        checkpoints.read(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Orbax folder with a file for every array."""
    path = tmp_path_factory.mktemp("orbax") / "a"
    save("separate files", path, nested(arrays()))
    check_same(checkpoints.read(path), arrays())
    return path


KERNEL = "params.conv1.kernel"


def frame(blocks: int, size: int, declared: int | None = None) -> bytes:
    """A Zstandard frame of so many blocks that repeat one byte."""
    header = b"\xe0" + struct.pack("<Q", declared) if declared is not None else b"\x00\x58"
    block = [struct.pack("<I", size << 3 | 1 << 1 | (i == blocks - 1))[:3] + b"\0" for i in range(blocks)]
    return b"\x28\xb5\x2f\xfd" + header + b"".join(block)


def metadata(change: Any) -> Any:
    def apply(path: Path) -> None:
        described = json.loads((path / "_METADATA").read_text())
        change(described)
        (path / "_METADATA").write_text(json.dumps(described))

    return apply


def zarray(**changes: Any) -> Any:
    def apply(path: Path) -> None:
        declared = json.loads((path / KERNEL / ".zarray").read_text())
        (path / KERNEL / ".zarray").write_text(json.dumps(declared | changes))

    return apply


def rename_kernel(*keys: str) -> Any:
    def change(described: Any) -> None:
        entry = described["tree_metadata"]["('params', 'conv1', 'kernel')"]
        entry["key_metadata"] = [{"key": key, "key_type": 2} for key in keys]

    return metadata(change)


def replaced(name: str, content: bytes) -> Any:
    def apply(path: Path) -> None:
        (path / name).write_bytes(content)

    return apply


def linked(path: Path) -> None:
    (path / KERNEL / "0.0.0.0").unlink()
    (path / KERNEL / "0.0.0.0").symlink_to("/etc/passwd")


def linked_folder(path: Path) -> None:
    shutil.rmtree(path / KERNEL)
    (path / KERNEL).symlink_to(path / "params.layer1.0.bn1.scale")


LARGE = [1 << 20, 1 << 20]
ORBAX_HOSTILE = {
    "a link": (linked, "neither a file nor a folder"),
    "a linked folder": (linked_folder, "neither a file nor a folder"),
    "a pipe": (lambda path: os.mkfifo(path / "pipe"), "neither a file nor a folder"),
    "a way up": (rename_kernel("..", "..", "etc", "passwd"), ""),
    "a way up in one": (rename_kernel("../a/params.conv1.kernel"), ""),
    "an absolute name": (rename_kernel("/etc/passwd"), ""),
    "an address": (rename_kernel("file:///etc/passwd"), ""),
    "a name with a slash": (rename_kernel("params", "conv1", "kernel/"), ""),
    "another array": (rename_kernel("params", "none"), "without the array params.none"),
    "a name twice": (
        rename_kernel("params", "layer1", "0", "bn1", "scale"),
        "params/layer1/0/bn1/scale twice",
    ),
    "no metadata": (lambda path: (path / "_METADATA").unlink(), "0 folders with a _METADATA"),
    "half of the metadata": (replaced("_METADATA", b'{"tree_metadata": {'), ""),
    "other metadata": (replaced("_METADATA", b"[1, 2]"), ""),
    "metadata in binary": (replaced("_METADATA", b"\xff\xfe\0"), ""),
    "deep metadata": (replaced("_METADATA", b"[" * 200_000), ""),
    "large metadata": (
        replaced("_METADATA", b"[" + b"[]," * 1_000_000 + b"[]]"),
        "_METADATA has 3000004 bytes",
    ),
    "a key twice": (replaced("_METADATA", b'{"tree_metadata": {}, "tree_metadata": {}}'), "has a name twice"),
    "no arrays": (replaced("_METADATA", b'{"tree_metadata": {}}'), "without any array"),
    "a part missing": (lambda path: (path / KERNEL / "0.0.0.0").unlink(), ""),
    "a part truncated": (replaced(f"{KERNEL}/0.0.0.0", b"\x28\xb5\x2f\xfd"), ""),
    "a part in pieces": (replaced(f"{KERNEL}/0.0.0.0", random.Random(0).randbytes(800)), ""),
    "a part in compressed zeros": (replaced(f"{KERNEL}/0.0.0.0", frame(500, 1 << 17)), "when decompressed"),
    "a part with a false length": (replaced(f"{KERNEL}/0.0.0.0", frame(1, 10, 1 << 62)), ""),
    "a bomb elsewhere": (replaced("d", b"\0" + frame(64, 1 << 17, 1 << 23)), "when decompressed"),
    "a large shape": (zarray(shape=LARGE, chunks=LARGE), "more than its size allows"),
    "a large shape in small parts": (zarray(shape=LARGE, chunks=[1, 1]), "more than its size allows"),
    "many small parts": (zarray(shape=[1_000_000], chunks=[1]), "more than its size allows"),
    "an absurd shape": (zarray(shape=[1 << 62], chunks=[1 << 62]), ""),
    "large parts": (zarray(chunks=[3, 3, 3, 1 << 30]), "with parts of shape"),
    "a negative shape": (zarray(shape=[-3, 3, 3, 8]), ""),
    "another dtype": (zarray(dtype="<c8"), "dtype complex64"),
    "records": (zarray(dtype=[["a", "<f2"], ["b", "<f2"]]), ""),
    "another code": (zarray(compressor={"id": "blosc", "cname": "lz4"}), "encoded by blosc"),
    "a filter": (zarray(filters=[{"id": "delta"}]), ""),
    "no zarr": (replaced(f"{KERNEL}/.zarray", b"\0"), ""),
    "deep zarr": (replaced(f"{KERNEL}/.zarray", b'{"a":' * 9_000), ""),
}


@pytest.mark.parametrize("name", ORBAX_HOSTILE)
def test_a_hostile_orbax_folder_is_one_clear_error(name: str, folder: Path, tmp_path: Path) -> None:
    damage, reason = ORBAX_HOSTILE[name]
    path = tmp_path / "a"
    shutil.copytree(folder, path)
    damage(path)
    with pytest.raises(
        RBNValueError, match=rf"(?s)expected a whole checkpoint of Flax.*{reason}.*Save it again"
    ):
        checkpoints.read(path)


def test_a_bomb_in_a_compressed_store_is_refused(tmp_path: Path) -> None:
    """A value that is stored inside of a compressed list of values, where no file shows it."""
    import tensorstore

    save("standard", tmp_path / "a", nested({"params/a": np.ones((1 << 10, 1 << 10), np.float32)}))
    shutil.rmtree(tmp_path / "a" / "ocdbt.process_0")
    shutil.rmtree(tmp_path / "a" / "d")
    (tmp_path / "a" / "manifest.ocdbt").unlink()
    spec = {"driver": "ocdbt", "base": f"file://{tmp_path}/a/", "config": {"max_inline_value_bytes": 1 << 20}}
    store = tensorstore.KvStore.open(spec).result()
    declared = {"chunks": [1 << 10] * 2, "shape": [1 << 10] * 2, "dtype": "<f4", "compressor": {"id": "zstd"}}
    declared |= {"fill_value": None, "filters": None, "order": "C", "zarr_format": 2}
    store.write("params.a/.zarray", json.dumps(declared).encode()).result()
    store.write("params.a/0.0", frame(5_000, 1 << 17)).result()
    with pytest.raises(RBNValueError, match="far larger when decompressed"):
        checkpoints.read(tmp_path / "a")


def test_the_size_of_a_compressed_frame_is_bounded_from_its_blocks() -> None:
    import tensorstore

    context = tensorstore.Context()
    memory = tensorstore.KvStore.open("memory://", context=context).result()
    for content in (
        np.zeros(300_000, np.uint8),
        np.random.default_rng(0).integers(0, 256, 300_000, np.uint8),
    ):
        spec = {
            "driver": "zarr",
            "kvstore": "memory://",
            "metadata": {
                "compressor": {"id": "zstd"},
                "dtype": "|u1",
                "shape": [300_000],
                "chunks": [300_000],
            },
        }
        opened = tensorstore.open(spec, create=True, delete_existing=True, context=context).result()
        opened.write(content).result()
        stored = memory.read("0").result().value
        assert 300_000 <= sum(checkpoints._unpacked(stored)) <= 300_000 + (1 << 17)
    assert list(checkpoints._unpacked(frame(3, 1000))) == [3000]
    assert list(checkpoints._unpacked(frame(3, 1000) + frame(1, 7, 5))) == [3000, 5]
    assert list(checkpoints._unpacked(b"\x28\xb5\x2f\xfd")) == []


def mutated(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(changed) or 1)
        match rng.randrange(5):
            case 0:
                changed[at : at + 1] = rng.randbytes(1)
            case 1:
                del changed[at:]
            case 2:
                del changed[at : at + rng.randrange(30)]
            case 3:
                changed[at:at] = rng.randbytes(rng.randrange(30))
            case _:
                changed[at : at + 4] = rng.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0" * 4))
    return bytes(changed)


@pytest.mark.parametrize("suffix", FORMATS)
def test_mutated_files_are_read_or_refused(suffix: str, tmp_path: Path) -> None:
    rng = random.Random(suffix)
    path = tmp_path / names(suffix)
    checkpoints.write(path, arrays())
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    refused = 0
    for _ in range(300):
        file = rng.choice(files)
        whole = file.read_bytes()
        file.write_bytes(mutated(whole, rng))
        try:
            checkpoints.read(path)
        except RBNValueError:
            refused += 1
        file.write_bytes(whole)
    assert refused > 50
    check_same(checkpoints.read(path), arrays())
