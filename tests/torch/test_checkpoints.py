"""PyTorch's files are read whole or refused, whatever is in them."""

import argparse
import datetime
import enum
import io
import json
import os
import pathlib
import pickle
import random
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import OrderedDict, defaultdict

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as distributed

from rbn.backends.torch import BNET, IEBN, RBN, describe, from_numpy, network, to_numpy
from rbn.formats import torch as checkpoints
from rbn_core import RBNError, RBNTypeError, RBNValueError, counting, weights
from rbn_core.names import from_own, to_own

FORMS = {"zip": True, "legacy": False}


@pytest.fixture(params=FORMS)
def save(request, tmp_path):
    """Save in one of PyTorch's two forms, and return the path."""

    def saved(something):
        path = tmp_path / "checkpoint.pth"
        torch.save(something, path, _use_new_zipfile_serialization=FORMS[request.param])
        return path

    return saved


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), RBN(4), BNET(4), IEBN(4))


def same(stored, expected):
    assert stored.keys() == expected.keys()
    for name, value in expected.items():
        value = value.detach().numpy() if isinstance(value, torch.Tensor) else value
        np.testing.assert_array_equal(stored[name], value, err_msg=name)
        assert stored[name].dtype == value.dtype


def test_a_state_dictionary_is_read_in_both_forms(save):
    state = model().state_dict()
    same(checkpoints.read(save(state)), state)


def test_every_plain_dtype_and_layout_is_kept(save):
    names = ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"]
    state = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in names}
    state |= {"transposed": torch.arange(6.0).reshape(2, 3).T, "part": torch.arange(9.0)[2:7:2]}
    state |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(3), "parameter": nn.Parameter(torch.ones(2))}
    path = save(state | {"half": torch.tensor([1.5, -2.0]).bfloat16()})
    stored = checkpoints.read(path)
    np.testing.assert_array_equal(stored["half"], np.array([1.5, -2.0], ml_dtypes.bfloat16))
    assert stored.pop("half").dtype == ml_dtypes.bfloat16
    same(stored, state)
    path.unlink()
    stored["float32"][0, 0] = 7  # a copy, which outlives the file


@pytest.mark.parametrize("key", ["state_dict", "model", "net", "anything"])
def test_the_network_stands_beside_other_entries(save, key):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 4])
    beside = {"epoch": 3, "arch": "x", "best_acc1": 76.1, "args": None, "optimizer": optimizer.state_dict()}
    checkpoint = beside | {key: net.state_dict(), "scheduler": schedule.state_dict()}
    same(checkpoints.read(save(checkpoint)), net.state_dict())
    best = {"best_acc1": torch.tensor(76.1)} if key != "anything" else {}
    same(checkpoints.read(save(checkpoint | best)), net.state_dict())
    same(checkpoints.read(save({"model": {"state_dict": net.state_dict()}})), net.state_dict())


def test_of_several_networks_the_known_one_is_read(save):
    state = model().state_dict()
    other = {"weight": torch.ones(2)}
    same(checkpoints.read(save({"state_dict_ema": other, "state_dict": state})), state)
    with pytest.raises(RBNValueError, match="it holds several networks: generator, critic"):
        checkpoints.read(save({"generator": other, "critic": other}))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_prefix_of_every_name_goes(save, prefix, tmp_path):
    state = model().state_dict()
    prefixed = {prefix + name: value for name, value in state.items()}
    same(checkpoints.read(save(prefixed)), state)
    checkpoints.write(tmp_path / "x.safetensors", {name: value.numpy() for name, value in prefixed.items()})
    same(checkpoints.read(tmp_path / "x.safetensors"), state)
    some = {"module.a": torch.ones(1), "b": torch.ones(1)}
    same(checkpoints.read(save(some)), some)


def published(net):
    """A model's state as the published code of the three papers has it."""
    state = OrderedDict()
    for name, value in net.state_dict().items():
        added = ("center_weight", "scale_weight", "scale_bias")
        if name.endswith(added) or name in ("1.weight", "1.bias", "3.weight", "3.bias"):
            value = value.reshape(1, -1, 1, 1)
        for ours, theirs in (
            ("2.conv", "2.bnconv"),
            ("3.scale_weight", "3.weight_readjust"),
            ("3.scale_bias", "3.bias_readjust"),
        ):
            name = name.replace(ours, theirs)
        state[name] = value
    return state


def test_published_checkpoints_load_as_they_are(save):
    net = model()
    theirs = published(net)
    assert {"2.bnconv.weight", "3.weight_readjust", "3.bias_readjust"} <= theirs.keys()
    assert theirs["1.center_weight"].shape == (1, 4, 1, 1)
    theirs = {f"module.{name}": value for name, value in theirs.items() if "tracked" not in name}
    path = save({"epoch": 90, "state_dict": theirs})
    state, _ = from_own("torch", checkpoints.read(path))
    other = nn.Sequential(nn.Conv2d(3, 4, 3), RBN(4), BNET(4), IEBN(4))
    from_numpy(other, state)
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("described", [True, False])
def test_the_published_form_is_written(tmp_path, suffix, described):
    net = model()
    path = tmp_path / f"x.{suffix}"
    stored = {name: value.numpy() for name, value in net.state_dict().items()}
    layers = describe(net) if described else None
    checkpoints.write(path, stored, layout="published", layers=layers)
    if suffix == "pth":
        written = torch.load(path, weights_only=True)
        assert list(written) == list(published(net))
        assert all(torch.equal(written[name], value) for name, value in published(net).items())
    same(checkpoints.read(path), stored)


def test_an_rbn_without_centering_is_told_from_an_iebn_by_what_is_said(tmp_path):
    net = nn.Sequential(RBN(3, centering=None), IEBN(3))
    stored = {name: value.numpy() for name, value in net.state_dict().items()}
    checkpoints.write(tmp_path / "x.pth", stored, layout="published", layers=describe(net))
    written = torch.load(tmp_path / "x.pth", weights_only=True)
    assert {"0.scale_weight", "1.weight_readjust"} <= written.keys()


def test_a_users_own_bnconv_keeps_its_name(save):
    state = {"bnconv.weight": torch.ones(2, 2, 3, 3), "neck.bnconv.weight": torch.ones(2, 2, 3, 3)}
    same(checkpoints.read(save(state)), state)
    kept = {"a.scale_weight": torch.ones(2, 3), "b.scale_bias": torch.ones(4)}
    same(checkpoints.read(save(kept)), kept)


def test_ours_and_the_published_names_together_are_refused(save):
    with pytest.raises(RBNValueError, match="expected a checkpoint of one form"):
        checkpoints.read(save({"scale_weight": torch.ones(2), "weight_readjust": torch.ones(1, 2, 1, 1)}))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_is_written_is_read(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    arrays = {
        "a": np.arange(6.0).reshape(2, 3).T,
        "b": np.array(3),
        "c": np.ones(2, ml_dtypes.bfloat16),
        "d": np.ones((2, 2), np.float16)[::-1],
    }
    arrays["a"].flags.writeable = False
    checkpoints.write(path, arrays)
    same(checkpoints.read(path), arrays)
    if suffix == "pth":
        assert list(torch.load(path, weights_only=True)) == list(arrays)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    checkpoints.write(path, {"a": np.ones(2)})

    def interrupted(tensors, destination):
        destination.write(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.write(path, {"a": np.ones(3)})
    for arrays, layout in (({"a": np.array(["x"])}, "own"), ({"a": np.ones(3)}, "other")):
        with pytest.raises(RBNError):
            checkpoints.write(path, arrays, layout=layout)
    same(checkpoints.read(path), {"a": np.ones(2)})
    assert os.listdir(tmp_path) == ["x.pth"]


def test_a_torchvision_style_resnet50_loads_quickly(tmp_path):
    torch.manual_seed(0)
    source = network("resnet50")
    torch.save({f"module.{name}": value for name, value in source.state_dict().items()}, tmp_path / "x.pth")
    start = time.process_time()
    state, kinds = from_own("torch", checkpoints.read(tmp_path / "x.pth"))
    took = time.process_time() - start
    target = network("resnet50")
    table = from_numpy(target, state, strict=True)
    assert {row.status for row in table.rows} == {"matched"}
    assert all(torch.equal(target.state_dict()[n], v) for n, v in source.state_dict().items())
    assert to_own("torch", to_numpy(source), kinds).keys() == source.state_dict().keys()
    assert took < 5  # 0.2 s on an idle machine


class Config:
    """Somebody's class, which is not made: its `__setstate__` would raise."""

    def __init__(self):
        self.rate = 0.1

    def __setstate__(self, state):
        raise AssertionError


class Mode(enum.Enum):
    """Somebody's enumeration."""

    FAST = 1


BESIDE = {
    "argparse.Namespace": argparse.Namespace(lr=0.1),
    "an array of shape ()": np.float64(0.9),
    "a scalar of numpy.dtype M8": np.datetime64("2020"),
    f"{pathlib.PosixPath.__module__}.PosixPath": pathlib.PosixPath("/somewhere"),
    "datetime.datetime": datetime.datetime(2020, 1, 1),
    "builtins.set": {1, 2},
    "a dict of 1": defaultdict(list, a=[1]),
    "a dict of 2": {("a", 1): 2, Mode.FAST: 3},
    f"{__name__}.Config": Config(),
    f"{__name__}.Mode": Mode.FAST,
    "torch.float32": torch.float32,
    "torch._utils._rebuild_sparse_tensor": torch.ones(2).to_sparse(),
    "torch.nn.modules.linear.Linear": nn.Linear(2, 2),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("what", BESIDE)
def test_objects_beside_the_network_are_named_and_not_made(what, zipped, tmp_path):
    content = {"state_dict": {"a": torch.ones(2)}, "beside": BESIDE[what]}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    told = []
    same(
        checkpoints.read(tmp_path / "x.pth", note=lambda *entry: told.append(entry)),
        {"a": np.ones(2, np.float32)},
    )
    assert told == [("beside", what)]


def test_a_key_chooses_among_networks(tmp_path):
    ema = {"module.a": torch.zeros(2)}
    torch.save({"state_dict": {"a": torch.ones(2)}, "state_dict_ema": ema}, tmp_path / "x.pth")
    told = []
    found = checkpoints.read(tmp_path / "x.pth", "state_dict_ema", lambda *entry: told.append(entry))
    same(found, {"a": np.zeros(2, np.float32)})
    assert [name for name, _ in told] == ["state_dict", "module.*"]
    with pytest.raises(RBNValueError, match="nothing is called 'teacher' in it; there are state_dict"):
        checkpoints.read(tmp_path / "x.pth", "teacher")


def test_what_lightning_and_averaged_models_put_before_names_goes(tmp_path):
    state = {f"model.{name}": value for name, value in nn.Linear(2, 2).state_dict().items()}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.4"}, tmp_path / "x.ckpt")
    told = []
    found = checkpoints.read(tmp_path / "x.ckpt", note=lambda *entry: told.append(entry))
    assert found.keys() == {"weight", "bias"}
    assert told[-1] == ("model.*", "what stands before every name")
    more = {"state_dict": state | {"loss.weight": torch.ones(1)}, "pytorch-lightning_version": "2.4"}
    torch.save(more, tmp_path / "x.ckpt")
    assert checkpoints.read(tmp_path / "x.ckpt").keys() == more["state_dict"].keys()
    torch.save(torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)).state_dict(), tmp_path / "x.pth")
    assert checkpoints.read(tmp_path / "x.pth").keys() == {"weight", "bias"}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_index_of_hugging_face_is_read_with_its_parts(suffix, tmp_path):
    state = nn.Sequential(nn.Conv2d(1, 2, 1), RBN(2)).state_dict()
    parts = [dict(list(state.items())[:3]), dict(list(state.items())[3:])]
    places = {}
    for number, part in enumerate(parts):
        name = f"model-{number}{suffix}"
        if suffix == ".bin":
            torch.save(part, tmp_path / name)
        else:
            checkpoints.write(tmp_path / name, {key: value.numpy() for key, value in part.items()})
        places |= dict.fromkeys(part, name)
    index = tmp_path / "model.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for path in (index, tmp_path):
        same(checkpoints.read(path), {key: value.numpy() for key, value in state.items()})
    for wrong, message in (
        ({"a": "../outside.bin"}, "which is no file beside it"),
        ({"a": "absent.bin"}, "whose part absent.bin is not there"),
        ({"a": f"model-0{suffix}"}, "lacks a"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(RBNValueError, match=message):
            checkpoints.read(index)


def test_how_far_it_is_is_told_in_bytes(tmp_path, save):
    state = {str(i): np.full((50, 50), i, np.float32) for i in range(40)}
    told = []
    with counting.telling(lambda *values: told.append(values)):
        checkpoints.write(tmp_path / "written.pth", state)
        path = save({name: torch.from_numpy(value) for name, value in state.items()})
        checkpoints.read(path)
    ends = {what: done for what, done, total in told if done == total}
    reads = ["checked", "read"] if zipfile.is_zipfile(path) else ["read"]
    assert list(ends) == ["written", *reads]
    assert ends == {"written": (tmp_path / "written.pth").stat().st_size} | dict.fromkeys(
        reads, path.stat().st_size
    )
    for what in ends:
        steps = [done for each, done, _ in told if each == what]
        assert len(steps) > 20
        assert steps == sorted(set(steps))


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of a single process
def test_how_far_a_distributed_checkpoint_is_is_told_in_bytes(tmp_path):
    state = {str(i): torch.full((50, 50), float(i)) for i in range(40)}
    distributed.save(state, checkpoint_id=tmp_path / "flat")
    told = []
    with counting.telling(lambda *values: told.append(values)):
        checkpoints.read(tmp_path / "flat")
    size = sum(path.stat().st_size for path in (tmp_path / "flat").glob("*.distcp"))
    steps = [done for _, done, _ in told]
    assert {(what, total) for what, _, total in told} == {("read", size)}
    assert len(steps) > 20
    assert steps == sorted(set(steps))
    assert steps[-1] == size


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of a single process
def test_a_distributed_checkpoint_is_read(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 2, 1), RBN(2))
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    distributed.save({"model": net.state_dict(), "epoch": 3}, checkpoint_id=tmp_path / "nested")
    distributed.save(net.state_dict(), checkpoint_id=tmp_path / "flat")
    told = []
    same(checkpoints.read(tmp_path / "nested", note=lambda *entry: told.append(entry)), state)
    assert told == [("epoch", "torch.distributed.checkpoint.metadata.BytesStorageMetadata")]
    same(checkpoints.read(tmp_path / "flat"), state)
    (part,) = (tmp_path / "flat").glob("*.distcp")
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(RBNValueError, match="its zip is truncated"):
        checkpoints.read(tmp_path / "flat")
    part.unlink()
    part.symlink_to(tmp_path / "nested" / part.name)
    with pytest.raises(RBNValueError, match="which is no file in it"):
        checkpoints.read(tmp_path / "flat")


def test_safetensors_say_whose_they_are(tmp_path):
    checkpoints.write(tmp_path / "x.safetensors", {"a": np.ones(2)})
    assert weights.read_metadata(tmp_path / "x.safetensors") == {"format": "pt"}


def test_reading_needs_no_pytorch(tmp_path):
    torch.save({"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2, 3).T}, tmp_path / "x.pth")
    script = """
import sys
sys.modules["torch"] = None
from rbn.formats import torch
print({name: (array.shape, array.dtype.name) for name, array in torch.read(sys.argv[1]).items()})
"""
    command = [sys.executable, "-c", script, tmp_path / "x.pth"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "{'a': ((2,), 'bfloat16'), 'b': ((3, 2), 'float32')}"


class Reduced:
    """Something that a pickle calls."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def archive(path, contents, *storages, compression=zipfile.ZIP_STORED, more=()):
    """A zip as torch.save writes it, with this pickle and these storages."""
    with zipfile.ZipFile(path, "w", compression) as opened:
        opened.writestr("archive/data.pkl", contents)
        opened.writestr("archive/byteorder", "little")
        for key, storage in enumerate(storages):
            opened.writestr(f"archive/data/{key}", storage)
        opened.writestr("archive/version", "3\n")
        for name, content in more:
            opened.writestr(name, content)
    return path


class Pickler(pickle.Pickler):
    """Writes a `Storage` as torch.save does."""

    def persistent_id(self, item):
        return item.reduced if isinstance(item, Storage) else None


class Storage(Reduced):
    pass


def pickled(something):
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(something)
    return buffer.getvalue()


def storage(count=4, kind=torch.FloatStorage, key="0", location="cpu"):
    made = Storage(None)
    made.reduced = ("storage", kind, key, location, count)
    return made


def tensor(size=(4,), stride=(1,), offset=0, count=4, **options):
    rebuild = torch._utils._rebuild_tensor_v2
    return Reduced(rebuild, storage(count, **options), offset, size, stride, False, OrderedDict())


def test_the_hand_made_archive_is_a_checkpoint(tmp_path):
    as_python_2_wrote_it = Reduced(OrderedDict, [["a", tensor()]])
    for something in ({"a": tensor()}, as_python_2_wrote_it):
        path = archive(tmp_path / "x.pt", pickled(something), np.arange(4, dtype=np.float32).tobytes())
        same(checkpoints.read(path), {"a": np.arange(4, dtype=np.float32)})


HUGE = 2**40
NESTED = b"\x80\x02})" + b"\x85" * 30_000 + b"Ns."
HOSTILE = {
    "code": (Reduced(os.system, "touch stolen"), "it holds posix.system, which can run code"),
    "code in an entry": (
        {"a": tensor(), "b": Reduced(exec, "1 / 0")},
        "it holds builtins.exec, which can run code",
    ),
    "a module": (nn.Linear(2, 2), "it holds no dictionary but torch.nn.modules.linear.Linear"),
    "memory": ({"a": Reduced(bytearray, HUGE)}, "it holds no arrays"),
    "a tensor's memory": ({"a": Reduced(torch.Tensor, HUGE)}, "'a' is no plain array but torch.Tensor"),
    "a storage that is too short": ({"a": tensor((HUGE,), count=HUGE)}, "storage '0' is not as long"),
    "a storage that is not there": ({"a": tensor(key="1")}, "storage '1' is not as long"),
    "a storage that is too long": ({"a": tensor((3,), count=3)}, "storage '0' is not as long"),
    "two lengths": ({"a": tensor(), "b": tensor(count=5)}, "it says two things of storage '0'"),
    "two dtypes": ({"a": tensor(), "b": tensor(kind=torch.IntStorage)}, "it says two things of storage '0'"),
    "a tensor that is too large": ({"a": tensor((HUGE,))}, "beyond its storage"),
    "a step that is too large": ({"a": tensor((2,), (4,))}, "beyond its storage"),
    "an offset that is too large": ({"a": tensor((2,), offset=3)}, "beyond its storage"),
    "an offset of nothing": ({"a": tensor((0,), offset=HUGE)}, "beyond its storage"),
    "a negative offset": ({"a": tensor(offset=-1)}, "with a negative size"),
    "a negative step": ({"a": tensor((2,), (-1,), 1)}, "with a negative size"),
    "a size that is no number": ({"a": tensor(("4",))}, "with a negative size"),
    "sizes without steps": ({"a": tensor((2, 2), (1,))}, "without a storage or a shape"),
    "too many axes": ({"a": tensor((1,) * 100, (1,) * 100)}, "without a storage or a shape"),
    "one number as a trillion": ({"a": tensor((HUGE,), (0,))}, f"its tensors have {4 * HUGE} bytes"),
    "a sparse tensor": (
        {"a": torch.ones(2).to_sparse()},
        "'a' is no plain array but torch._utils._rebuild_sparse",
    ),
    "another device": ({"a": tensor(location=3)}, "a storage of an unknown kind, without a name"),
    "complex numbers": (
        {"a": tensor(kind=torch.ComplexFloatStorage)},
        "'a' is no plain array but torch.Tensor of torch.Complex",
    ),
    "a key that is no name": ({3: tensor()}, "it holds an array under 3, which is no name"),
    "a list": ([tensor()], "it holds no dictionary but a list of"),
    "a list in the dictionary": ({"a": tensor(), "b": [tensor()]}, "'b' is no plain array but a list of 1"),
    "no tensors": ({"a": 3}, "it holds no arrays"),
    "attributes": (Reduced(nn.Parameter, 3), "it holds no dictionary but torch.nn.parameter.Parameter"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    something, message = HOSTILE[name]
    path = archive(tmp_path / "x.pt", pickled(something), bytes(16))
    with pytest.raises(
        RBNValueError, match="RBN: expected a PyTorch checkpoint of plain tensors, got "
    ) as raised:
        checkpoints.read(path)
    assert message in str(raised.value)
    assert "save the network alone: torch.save(model.state_dict(), path)." in str(raised.value)
    assert os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (NESTED, "longer than its arrays need"),
        (b"\x80\x02]" + b"]a" * 9_000 + b".", "it holds no dictionary but a list of"),
        (b"\x80\x02" + b"]" * 200_000 + b".", "longer than its arrays need"),
        (b"\x80\x02" + b"(" * 200_000 + b".", "longer than its arrays need"),
        (b"\x80\x02X\xff\xff\xff\xffabc.", "it is cut off"),
        (
            b"\x80\x02N\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
            "it is cut off",
        ),  # BYTEARRAY8, which PyTorch lacks
        (b"\x80\x02Nr\xff\xff\xff\xff.", "its notes are out of order"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "it holds no arrays"),  # a dictionary inside of itself
        (
            b"\x80\x02ccollections\nOrderedDict\n)R}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00bNub.",
            "it holds no arrays",
        ),
        (b"\x80\x02ccollections\nCounter\n]N\x85aR.", "it calls something without arguments"),
        (b"", "it is cut off"),
        (b"\x80\x02}(K\x01NK\x01Nu.", "'1' comes twice"),
        (b"\x80\x02}K\x01NsK\x01Ns.", "'1' comes twice"),
        (b"\x80\x02ccollections\nOrderedDict\n](K\x01N\x86K\x01N\x86e\x85R.", "'1' comes twice"),
        (b"\x80\x02]K\x01Ns.", "it puts into what is no dictionary"),
    ],
)
def test_hostile_opcodes_are_refused(contents, message, tmp_path):
    path = archive(tmp_path / "x.pt", contents)
    start = time.process_time()
    with pytest.raises(RBNValueError, match="expected a PyTorch checkpoint of plain tensors") as raised:
        checkpoints.read(path)
    assert message in str(raised.value)
    assert time.process_time() - start < 5


def test_dictionaries_that_share_dictionaries_are_looked_at_once(tmp_path):
    inner = {str(i): None for i in range(1200)}
    middle = {str(i): inner for i in range(1200)}
    path = archive(tmp_path / "x.pt", pickled({str(i): middle for i in range(1200)}))
    start = time.process_time()
    with pytest.raises(RBNValueError, match="it holds no arrays"):
        checkpoints.read(path)
    assert time.process_time() - start < 10


def test_hostile_archives_are_refused(tmp_path):
    good, data = pickled({"a": tensor()}), bytes(16)
    path = tmp_path / "x.pt"
    expect = {
        "its zip is compressed": lambda: archive(path, good, bytes(10**7), compression=zipfile.ZIP_DEFLATED),
        "it is a TorchScript archive": lambda: archive(
            path, good, data, more=[("archive/constants.pkl", b"")]
        ),
        "two entries of one name": lambda: archive(path, good, data, more=[("archive/DATA.pkl", b"")]),
        "no item named 'archive/data.pkl'": lambda: path.write_bytes(
            archive(path, good, data).read_bytes().replace(b"data.pkl", b"date.pkl")
        ),
        "more entries than": lambda: archive(path, good, data, more=[(f"{i}", b"") for i in range(5000)]),
        "claims more than the file holds": lambda: overlapping(path, good, data),
        "gives an entry two lengths": lambda: path.write_bytes(stretched(archive(path, good, data))),
        "its zip is truncated": lambda: path.write_bytes(archive(path, good, data).read_bytes() + b" "),
        "Bad CRC-32": lambda: path.write_bytes(
            archive(path, good, data).read_bytes().replace(data, b"\1" * 16, 1)
        ),
        "is behind something else": lambda: path.write_bytes(
            b"PK\3\4" + archive(path, good, data).read_bytes()
        ),
    }
    for message, make in expect.items():
        make()
        with pytest.raises(RBNValueError, match="expected a PyTorch checkpoint of plain tensors") as raised:
            checkpoints.read(path)
        assert message in str(raised.value), (message, str(raised.value))


def stretched(path):
    """An archive whose directory says that its first entry takes 16 MiB, for which a reader makes room."""
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02") + 20
    content[at : at + 4] = (1 << 24).to_bytes(4, "little")
    return bytes(content)


def overlapping(path, contents, data):
    """An archive whose directory has one entry's contents under many names."""
    archive(path, contents, data, more=[("archive/data/big", bytes(10_000))])
    with zipfile.ZipFile(path, "a") as opened:
        big = opened.getinfo("archive/data/big")
        for i in range(20):
            info = zipfile.ZipInfo(f"archive/data/big{i}")
            info.file_size = info.compress_size = big.file_size
            info.CRC, info.header_offset = big.CRC, big.header_offset
            opened.filelist.append(info)
        opened._didModify = True


def test_the_legacy_forms_storages_are_held_against_the_file(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    count = whole.index(b"K\x04", whole.index(b"cpu"))
    cases = {
        "is not as long as it should be": [
            whole[:-1],
            whole[:-24] + (2**60).to_bytes(8, "little") + whole[-16:],
            whole[:count] + b"J\xff\xff\xff\x7f" + whole[count + 2 :],
        ],
        "a storage of an unknown kind, without a name or a size": [
            whole[:count] + b"J\xff\xff\xff\xff" + whole[count + 2 :]
        ],
        "are not those of its tensors": [whole.replace(b"]q\x00X", b"]q\x00NaX")],
        "no file of torch.save": [b"", b"\x80\x02K\x01.", b"PK", whole[1:], b"{}", bytes(100)],
    }
    for message, files in cases.items():
        for content in files:
            path.write_bytes(content)
            with pytest.raises(RBNValueError, match="expected a PyTorch checkpoint") as raised:
                checkpoints.read(path)
            assert message in str(raised.value)


def test_the_tar_form_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    with tarfile.open(path, "w") as opened:
        opened.addfile(tarfile.TarInfo("../storages"))
    with pytest.raises(RBNValueError, match=r"no file of torch\.save"):
        checkpoints.read(path)


def test_a_safetensors_file_that_is_damaged_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    for content in (b"\xff" * 7 + b"\x7f{}", b"\x10\0\0\0\0\0\0\0{", (2**50).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(RBNValueError, match="expected a safetensors file"):
            checkpoints.read(path)


def test_what_is_no_file_is_refused(tmp_path):
    for path, message in (
        (tmp_path / "x.pth", r"expected a PyTorch checkpoint, got .*, which is no file"),
        (tmp_path, r"which has 0 files that end in \.index\.json, and no \.metadata"),
    ):
        with pytest.raises(RBNValueError, match=message):
            checkpoints.read(path)


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(4)}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    same(checkpoints.read(tmp_path / "x.pth"), {"a": np.ones(4, np.float32)})


@pytest.mark.parametrize("form", ["zip", "zip without checksums", "legacy", "safetensors"])
def test_damaged_files_are_read_or_are_one_error(form, tmp_path):
    path = tmp_path / "x.pth"
    state = {"state_dict": nn.Sequential(nn.Conv2d(1, 2, 1), RBN(2)).state_dict(), "epoch": 3}
    torch.serialization.set_crc32_options(form == "zip")
    try:
        torch.save(state, path, _use_new_zipfile_serialization=form != "legacy")
    finally:
        torch.serialization.set_crc32_options(True)
    if form == "safetensors":
        checkpoints.write(tmp_path / "x.safetensors", checkpoints.read(path))
        path = tmp_path / "x.safetensors"
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(500):
        path.write_bytes(damaged(whole, rng))
        try:
            checkpoints.read(path)
        except RBNValueError:
            refused += 1
    assert refused > 200


def damaged(whole, rng):
    """A file with some bytes gone, changed, copied or inserted."""
    content, at = bytearray(whole), rng.randrange(len(whole))
    match rng.randrange(4):
        case 0:
            return content[:at]
        case 1:
            for _ in range(rng.choice((1, 1, 3, 30))):
                content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        case 2:
            other, length = rng.randrange(len(whole)), rng.choice((1, 2, 4, 8, 30))
            content[at : at + length] = content[other : other + length]
        case 3:
            content[at : at + rng.choice((0, 4, 8))] = rng.choice(
                (b"\xff" * 4, b"\xff" * 7 + b"\x7f", b"\0\1")
            )
    return content


def test_the_layout_is_own_or_published(tmp_path):
    with pytest.raises(RBNValueError, match="expected layout to be one of 'own', 'published', got 'theirs'"):
        checkpoints.write(tmp_path / "x.pth", {}, layout="theirs")
    with pytest.raises(RBNTypeError):
        checkpoints.write(tmp_path / "x.pth", {}, layout=None)
