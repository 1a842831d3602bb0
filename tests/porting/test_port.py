"""`rbn.porting.port` on formats that need no framework, and the `rbn port` command."""

import dataclasses
import json
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

from rbn import cli, porting, verification
from rbn.backends.frameworks import FRAMEWORKS
from rbn.porting import port
from rbn_core import RBNError, RBNTypeError, RBNValueError, weights
from rbn_core.architectures import network
from rbn_core.execution import initial_state
from rbn_core.names import to_layout
from rbn_core.networks import Network
from rbn_core.training import Group, Training


@pytest.fixture
def canonical(tmp_path, small, state):
    path = tmp_path / "small.safetensors"
    weights.save(path, state, layers=small.layers(), network=small)
    return path


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in other.items():
        assert one[name].shape == value.shape, name
        assert one[name].dtype == value.dtype, name
        assert one[name].tobytes() == value.tobytes(), name


def statuses(table):
    return {row.name: row.status for row in table.rows}


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# From format to format


def test_a_network_goes_round_and_comes_back_bit_for_bit(tmp_path, canonical, small, state):
    steps = []
    names = ["small.ckpt", "small.pkl", "ms.safetensors", "back.safetensors"]
    source = canonical
    for name in names:
        options = {"destination_format": "mindspore"} if name.startswith("ms") else {}
        table = port(source, tmp_path / name, progress=steps.append, **options)
        assert set(statuses(table).values()) <= {"matched", "no counterpart"}
        source = tmp_path / name
    plain = {"bn.num_batches_tracked"}  # neither MindSpore's nor Jittor's own BatchNorm counts
    found = weights.read(source)
    expected = {name: value for name, value in state.items() if name not in plain}
    expected = {n: v.astype(np.int32) if n.endswith("tracked") else v for n, v in expected.items()}
    same(found.state, expected)
    assert found.layers == {path: {"kind": layer["kind"]} for path, layer in small.layers().items()}
    assert steps[0] == f"reading {canonical} (canonical)"
    assert any(step.startswith("hashing the arrays of small (1 rbn and 1 bn") for step in steps)
    assert len(steps) % porting.STEPS == 0


def test_a_canonical_file_keeps_all_that_it_says(tmp_path, small, state):
    groups = (Group(0.1, 1e-4, ("bn.gamma",)), Group(0.01, 0.0, ("fc.weight", "fc.bias")))
    training = Training("sgd", 9, groups, {"momentum": {"fc.bias": np.ones(5, np.float32)}})
    weights.save(tmp_path / "a.safetensors", state, layers=small.layers(), network=small, training=training)
    table = port(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    found = weights.read(tmp_path / "b.safetensors")
    same(found.state, state)
    same(found.training.slots["momentum"], training.slots["momentum"])
    assert dataclasses.replace(found.training, slots=training.slots) == training
    assert found.layers == json.loads(json.dumps(small.layers()))
    assert found.network.to_json() == small.to_json()
    assert set(statuses(table).values()) == {"matched"}
    told = (
        "sgd at step 9, 2 groups: learning rate 0.1 and weight decay 0.0001 (1), "
        "learning rate 0.01 and weight decay 0 (2)"
    )
    assert (table.rows[-1].name, table.rows[-1].detail) == ("training", told)
    table = port(tmp_path / "a.safetensors", tmp_path / "b.pkl")
    assert table.rows[-1].name == "training"
    assert table.rows[-1].status == "no counterpart"
    assert table.rows[-1].detail == f"{told} stays behind: only a canonical file takes it"


def test_a_file_can_be_ported_onto_itself(tmp_path, canonical, state):
    port(canonical, canonical)
    same(weights.load(canonical), state)


def test_what_is_bfloat16_and_becomes_float32_is_said(tmp_path):
    weights.save(tmp_path / "a.safetensors", {"fc.weight": np.ones((2, 3), ml_dtypes.bfloat16)})
    table = port(tmp_path / "a.safetensors", tmp_path / "a.pkl")
    assert table.rows[0].detail == "(2, 3) bfloat16, stored as float32"
    table = port(tmp_path / "a.safetensors", tmp_path / "a.ckpt")
    assert table.rows[0].detail == "(2, 3) bfloat16"


def test_only_the_frameworks_of_the_formats_are_imported(tmp_path, canonical):
    loaded = f"print(*{{'jax', *{tuple(FRAMEWORKS)}}} & sys.modules.keys())"
    start = "import sys; from rbn.porting import port;"
    for name in ("b.safetensors", "b.msgpack", "b.ckpt", "b.pkl"):
        assert python(f"{start} port({str(canonical)!r}, {str(tmp_path / name)!r}); {loaded}").split() == []
    pth = str(tmp_path / "b.pth")
    for source, destination, needed in ((tmp_path / "b.ckpt", pth, ["torch"]), (pth, tmp_path / "b.pkl", [])):
        assert python(f"{start} port({str(source)!r}, {str(destination)!r}); {loaded}").split() == needed


# Networks


@pytest.mark.parametrize(
    "norm",
    [
        "bn",
        "rbn",
        "iebn",
        {"layer": "bnet", "kernel_size": 5},
        {"layer": "rbn", "stages": (1, 3)},
        {"layer": "rbn", "scaling": None, "stages": (0,)},
        {"layer": "bnet", "stages": (2,)},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["cifar_resnet164", "mobilenet_v2"])
def test_a_network_is_told_by_its_arrays(name, norm):
    described = network(name, norm, 7)
    found = porting.description(name, None, None, initial_state(described))
    assert found.state_shapes() == described.state_shapes()
    assert found.layers() == described.layers()


def test_what_is_told_is_written_down(tmp_path):
    described = network("cifar_resnet164", "rbn", 3)
    weights.save(tmp_path / "a.safetensors", initial_state(described))
    port(tmp_path / "a.safetensors", tmp_path / "a.ckpt", network="cifar_resnet164")
    port(tmp_path / "a.ckpt", tmp_path / "b.safetensors", network="cifar_resnet164")
    found = weights.read(tmp_path / "b.safetensors")
    assert found.network.to_json() == described.to_json()
    assert found.layers == json.loads(json.dumps(described.layers()))


def test_two_layers_beside_batch_norm_have_to_be_said():
    state = initial_state(network("cifar_resnet164", "rbn")) | {"bn1.conv_weight": np.ones((16, 1, 3, 3))}
    with pytest.raises(RBNValueError, match="one layer beside BatchNorm, got bnet and rbn"):
        porting.description("cifar_resnet164", None, None, state)


def test_a_network_that_does_not_fit_is_one_error_and_nothing_is_written(tmp_path):
    weights.save(tmp_path / "a.safetensors", initial_state(network("cifar_resnet164", "rbn")))
    (tmp_path / "a.pkl").write_bytes(b"old")
    with pytest.raises(
        RBNValueError, match=r"expected the arrays of cifar_resnet164_basic .*\n(missing|wrong)"
    ):
        port(tmp_path / "a.safetensors", tmp_path / "a.pkl", network="cifar_resnet164_basic")
    with pytest.raises(RBNValueError, match=r"unexpected +bn1\.center_weight"):
        port(tmp_path / "a.safetensors", tmp_path / "a.pkl", network="cifar_resnet164", norm="bn")
    assert (tmp_path / "a.pkl").read_bytes() == b"old"


def test_a_count_that_a_network_lacks_starts_at_0(tmp_path):
    described = network("cifar_resnet164", "rbn")
    state = initial_state(described)
    lacking = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    weights.save(tmp_path / "a.safetensors", lacking | {"fc.num_batches_tracked": np.array(3)})
    table = port(tmp_path / "a.safetensors", tmp_path / "b.safetensors", network="cifar_resnet164")
    rows = {row.name: row for row in table.rows}
    assert (rows["bn1.num_batches_tracked"].status, rows["bn1.num_batches_tracked"].detail) == (
        "no counterpart",
        "starts at 0",
    )
    assert rows["fc.num_batches_tracked"].detail == "is left out"
    same(weights.load(tmp_path / "b.safetensors"), state)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_counts_are_those_of_the_frameworks_own_layers(small, state, framework):
    kinds = {path: layer["kind"] for path, layer in small.layers().items()}
    state["stem.1.num_batches_tracked"] = np.array(2**40)
    own = porting.own_state(porting.Content(state, kinds, {}), framework)
    counters = {name.replace("/", ".").removeprefix("batch_stats."): value for name, value in own.items()}
    plain = "bn.num_batches_tracked" in counters
    assert plain == (framework == "torch")
    counter = counters["stem.1.num_batches_tracked"]
    assert counter == (2**40 if framework == "torch" else 2**31 - 1)
    assert counter.dtype == ("int64" if framework == "torch" else "int32")


def test_an_inert_layer_of_ours_keeps_its_count(small):
    described = Network(
        "n",
        (
            small.nodes[0],
            type(small.nodes[1])("n", ("stem.0",), 4, "rbn", {"centering": None, "scaling": None}),
        ),
    )
    state, layers = initial_state(described), described.layers()
    content = porting.Content(state, {path: layer["kind"] for path, layer in layers.items()}, layers)
    assert "n.num_batches_tracked" in porting.own_state(content, "jittor")


def test_described_layers_count_beside_a_network(tmp_path):
    """A network that two files share, and a decoder that one has: its kernels lie as the layers say."""
    described = network("resnet18", "bn", 3)
    kernel = np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32)
    state = initial_state(described) | {"up.weight": kernel}
    layers = {"up": {"kind": "transposed_convolution"}}
    weights.save(tmp_path / "a.safetensors", state, layers=layers, network=described)
    content = porting.read(tmp_path / "a.safetensors", "canonical")
    own = porting.own_state(content, "flax")["params/up/kernel"]
    np.testing.assert_array_equal(own, to_layout("flax", "weight", "transposed_convolution", kernel))


# Names


def test_names_change_and_with_them_layers_and_optimizer(tmp_path, small, state):
    old = {f"backbone.{name}": value for name, value in state.items()}
    layers = {f"backbone.{path}": layer for path, layer in small.layers().items()}
    groups = (Group(0.1, 1e-4, ("backbone.fc.weight",)), Group(0.01, None, ("backbone.fc.bias",)))
    training = Training("sgd", 9, groups, {"momentum": {"backbone.fc.bias": np.ones(5)}})
    weights.save(tmp_path / "a.safetensors", old, layers=layers, training=training)
    table = port(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rename={r"backbone\.(.*)": r"\1"})
    found = weights.read(tmp_path / "b.safetensors")
    same(found.state, state)
    assert found.layers == json.loads(json.dumps(small.layers()))
    assert found.training.slots["momentum"].keys() == {"fc.bias"}
    assert found.training.groups == (Group(0.1, 1e-4, ("fc.weight",)), Group(0.01, None, ("fc.bias",)))
    assert {row.status for row in table.rows if row.name != "training"} == {"renamed"}
    assert table.rows[0].source.startswith("backbone.")


def test_what_is_left_out_is_left_out_of_the_training_and_named(tmp_path):
    arrays = {name: np.ones(5) for name in ("a", "b", "c")}
    groups = (Group(0.1, 0.01, ("a", "b")), Group(0.2, 0.0, ("c",)))
    training = Training("adam", 9, groups, {"first_moment": arrays, "second_moment": arrays}, decoupled=True)
    weights.save(tmp_path / "a.safetensors", arrays, training=training)
    # What is called a then was b, whose own place in the training it keeps.
    table = port(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rename={"[ac]": "", "b": "a"})
    found = weights.read(tmp_path / "b.safetensors").training
    assert found.groups == (Group(0.1, 0.01, ("a",)),)
    assert [*found.slots["second_moment"]] == ["a"]
    rows = [(row.name, row.status, row.detail) for row in table.rows if row.name.startswith("training")]
    assert rows == [
        ("training", "matched", "adam at step 9, learning rate 0.1 and weight decay 0.01, decoupled"),
        ("training of a", "left out", "goes with the array"),
        ("training of c", "left out", "goes with the array"),
    ]


def test_what_a_conversion_takes_away_is_left_out_of_the_training(tmp_path):
    described = network("cifar_resnet50", "rbn", 3)
    state = initial_state(described)
    names = ("bn1.gamma", "bn1.center_weight")
    slots = {"momentum": {name: state[name] for name in names}}
    training = Training("sgd", 1, (Group(0.1, 0.0, names),), slots)
    weights.save(tmp_path / "a.safetensors", state, network=described, training=training)
    table = port(tmp_path / "a.safetensors", tmp_path / "b.safetensors", convert="bn")
    found = weights.read(tmp_path / "b.safetensors").training
    assert found.groups == (Group(0.1, 0.0, ("bn1.gamma",)),)
    assert "training of bn1.center_weight" in [row.name for row in table.exceptions]


def test_a_renamed_network_is_held_to_its_description(tmp_path):
    described = network("cifar_resnet164")
    state = initial_state(described)
    weights.save(tmp_path / "a.safetensors", {f"module.{name}": value for name, value in state.items()})
    options = {"network": "cifar_resnet164", "rename": {r"module\.(.*)": r"\1"}}
    table = port(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **options)
    row = next(row for row in table.rows if row.name == "fc.bias")
    assert (row.status, row.source) == ("renamed", "module.fc.bias")
    same(weights.load(tmp_path / "b.safetensors"), state)


def test_what_names_cannot_tell_is_said(tmp_path):
    state = {
        "up1.weight": np.ones((4, 2, 3, 3), np.float32),
        "words.weight": np.ones((10, 4), np.float32),
        "fc.weight": np.ones((10, 4), np.float32),
    }
    weights.save(tmp_path / "a.safetensors", state)
    kinds = {r"up\d": "transposed_convolution", "words": "embedding", r".*s": "norm"}
    port(tmp_path / "a.safetensors", tmp_path / "a.ckpt", kinds=kinds)
    assert porting.stored_arrays(tmp_path / "a.ckpt", "mindspore").keys() == {
        "up1.weight",
        "words.embedding_table",
        "fc.weight",
    }
    port(tmp_path / "a.ckpt", tmp_path / "b.safetensors", kinds={r"up\d": "transposed_convolution"})
    assert weights.read(tmp_path / "b.safetensors").layers == {
        "up1": {"kind": "transposed_convolution"},
        "words": {"kind": "embedding"},
        "fc": {"kind": "linear"},
    }


def test_wrong_names_are_one_error(tmp_path, canonical):
    target = tmp_path / "b.safetensors"
    with pytest.raises(RBNValueError, match=r"a kind to be one of .*, got 'magic'"):
        port(canonical, target, kinds={"fc": "magic"})
    with pytest.raises(RBNValueError, match=r"got 'layer9', which matches none of attention, bn, "):
        port(canonical, target, kinds={"layer9": "linear"})
    with pytest.raises(RBNValueError, match=r"kinds to hold regular expressions, got '\('"):
        port(canonical, target, kinds={"(": "linear"})
    with pytest.raises(RBNValueError, match=r"rename to hold regular expressions, got '\('"):
        port(canonical, target, rename={"(": "linear"})
    with pytest.raises(RBNValueError, match=r"one kind of layer at 'x', got norm and linear"):
        port(canonical, target, rename={r"bn\.(.*)": r"x.\1", r"fc\.(.*)": r"x.fc_\1"})
    assert not target.exists()


def test_names_that_are_one_in_the_target_are_refused(tmp_path):
    state = {"a.gamma": np.ones(2), "a.running_mean": np.ones(2), "a.weight": np.ones(2)}
    weights.save(tmp_path / "a.safetensors", state)
    with pytest.raises(RBNValueError, match="names differ in jittor, too, got 3, of which only 2 do"):
        port(tmp_path / "a.safetensors", tmp_path / "a.pkl")


# Whose a file is, and what it is instead


@pytest.mark.framework("torch")
def test_the_content_tells_and_the_suffix_does_not(tmp_path, canonical):
    for name, framework in (("a.pth", "torch"), ("a.pkl", "jittor"), ("a.ckpt", "mindspore"), ("t", "torch")):
        options = {"destination_format": framework}
        port(canonical, tmp_path / name, **options)
        other = tmp_path / f"{name}.ckpt"
        (tmp_path / name).rename(other)
        table = port(other, tmp_path / "b.safetensors")
        note = f"{other.name} is read as {framework}'s, which its content is; --from mindspore reads it as"
        assert any(text.startswith(note) for text in table.notes) == (framework != "mindspore")
    port(canonical, tmp_path / "pt.safetensors", destination_format="torch")
    port(tmp_path / "pt.safetensors", tmp_path / "c.pkl")
    with pytest.raises(RBNValueError, match="expected a MindSpore checkpoint"):
        port(tmp_path / "a.pth.ckpt", tmp_path / "c.pkl", source_format="mindspore")


def test_a_folder_is_flax_whatever_its_name_ends_in(tmp_path):
    for name in ("run", "run.1"):
        (tmp_path / name).mkdir()
        assert porting.told_format(tmp_path / name, None, writes=True) == "flax"


@pytest.mark.parametrize("options", [{}, {"source_format": "torch"}])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.pth",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a pointer of Git LFS.*git lfs pull",
        ),
        ("a.pth", b"\n<!DOCTYPE html><html>", "a web page"),
        ("a.pth", b"<HTML>", "a web page"),
        ("a.h5", b"\x89HDF\r\n", "an HDF5 file"),
        ("model-00002-of-00003.safetensors", b"x" * 99, r"part 2 of 3 alone. Give the \.index\.json beside"),
    ],
)
def test_what_is_no_weights_is_called_what_it_is(tmp_path, name, content, message, options):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RBNValueError, match=rf"expected .*weights, got .*, which is {message}"):
        port(tmp_path / name, tmp_path / "b.pkl", **options)


def test_half_a_download_is_called_so(tmp_path, canonical):
    canonical.write_bytes(canonical.read_bytes()[:-10])
    with pytest.raises(RBNValueError, match=r"it has \d+ bytes of \d+, as half of a download"):
        port(canonical, tmp_path / "b.pkl")


# The old file stays until the new one is read back


@pytest.mark.parametrize("name", ["b.safetensors", "b.ckpt", "b.pkl", "b.msgpack"])
def test_a_number_goes_everywhere(tmp_path, name):
    state = {"logit_scale": np.array(2.5, np.float32), "fc.weight": np.ones((2, 3), np.float32)}
    weights.save(tmp_path / "a.safetensors", state)
    port(tmp_path / "a.safetensors", tmp_path / name)
    port(tmp_path / name, tmp_path / "c.safetensors")
    same(weights.load(tmp_path / "c.safetensors"), state)


@pytest.mark.parametrize("name", ["b.safetensors", "b.ckpt", "b.pkl"])
def test_what_is_not_read_back_leaves_the_old_file(tmp_path, canonical, monkeypatch, name):
    (tmp_path / name).write_bytes(b"old")
    monkeypatch.setattr(porting, "stored_arrays", lambda path, framework: {})
    with pytest.raises(RBNValueError, match="expected to read back what was written"):
        port(canonical, tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, canonical.name]


# What names and shapes do not tell


def test_only_a_running_mean_tells_a_norm(tmp_path):
    state = {
        "act.weight": np.ones(4, np.float32),
        "ln.weight": np.ones((4, 3), np.float32),
        "ln.bias": np.ones((4, 3), np.float32),
        "bn.weight": np.ones(4, np.float32),
        "bn.running_mean": np.ones(4, np.float32),
        "a/b.weight": np.ones((2, 3), np.float32),
        "mask": np.array([0, -np.inf], np.float32),
    }
    porting.format_of("jittor").write(tmp_path / "a.pkl", state)
    table = port(tmp_path / "a.pkl", tmp_path / "b.safetensors")
    found = weights.read(tmp_path / "b.safetensors")
    names = ("act.weight", "ln.weight", "ln.bias", "bn.gamma", "bn.running_mean", "a/b.weight", "mask")
    assert found.state.keys() == set(names)
    kinds = {path: layer["kind"] for path, layer in found.layers.items()}
    assert kinds == {"act": "other", "ln": "other", "bn": "norm", "a/b": "linear", "": "other"}
    rows = {row.name: row.source for row in table.rows}
    assert (rows["bn.gamma"], rows["act.weight"]) == ("bn.weight", "")
    assert table.notes[0] == "taken for normalizations, by their statistics or names: bn"
    assert table.notes[1].startswith("kept under their own names, as neither names nor shapes tell")
    port(tmp_path / "b.safetensors", tmp_path / "c.pkl")
    same(porting.stored_arrays(tmp_path / "c.pkl", "jittor"), state)
    with pytest.raises(RBNValueError, match=r"names without a slash.*got a/b\.weight"):
        port(tmp_path / "a.pkl", tmp_path / "c.msgpack")


@pytest.mark.parametrize("name", ["bn.running_mean", "act.weight", "fc.bias"])
def test_infinity_in_weights_is_refused_by_the_name_in_the_file(tmp_path, name):
    state = {
        "bn.weight": np.ones(4),
        "bn.running_mean": np.zeros(4),
        "act.weight": np.ones(4),
        "fc.bias": np.ones(4),
    }
    state[name] = np.array([1, -np.inf, np.nan, 0])
    porting.format_of("jittor").write(tmp_path / "a.pkl", state)
    with pytest.raises(RBNValueError, match=rf"NaN or infinity in {name} \(2 of 4\)"):
        port(tmp_path / "a.pkl", tmp_path / "b.safetensors")
    state[name] = np.ones(4)
    state["bn.weight"] = np.array([1, np.nan, 0, 0])
    porting.format_of("jittor").write(tmp_path / "a.pkl", state)
    with pytest.raises(RBNValueError, match=r"NaN or infinity in bn\.weight \(1 of 4\)"):
        port(tmp_path / "a.pkl", tmp_path / "b.safetensors")


def test_bfloat16_is_read_where_nothing_has_imported_it(tmp_path):
    path = tmp_path / "a.safetensors"
    weights.save(path, {"fc.weight": np.ones((2, 3), ml_dtypes.bfloat16)})
    code = f"from rbn_core import weights; print(weights.load({str(path)!r})['fc.weight'].dtype)"
    assert python(code).strip() == "bfloat16"
    code = f"import sys; sys.modules['ml_dtypes'] = None; from rbn_core import weights\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "expected the package ml_dtypes" in done.stderr


def test_what_is_left_out_is_a_row_and_a_key_chooses(tmp_path):
    content = {"net": {"a": np.ones(2)}, "ema": {"a": np.zeros(2)}, "epoch": 3}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    table = port(tmp_path / "a.pkl", tmp_path / "b.safetensors")
    left = [(row.name, row.status, row.detail) for row in table.rows[1:]]
    assert left == [("ema", "left out", "1 arrays; take them with --key ema"), ("epoch", "left out", "3")]
    port(tmp_path / "a.pkl", tmp_path / "b.safetensors", key="ema")
    same(weights.load(tmp_path / "b.safetensors"), {"a": np.zeros(2)})
    state = {"teacher.a": np.zeros(2), "student.a": np.ones(2)}
    porting.format_of("mindspore").write(tmp_path / "a.ckpt", state)
    port(tmp_path / "a.ckpt", tmp_path / "b.safetensors", key="teacher")
    same(weights.load(tmp_path / "b.safetensors"), {"a": np.zeros(2)})
    with pytest.raises(RBNValueError, match="--key with a framework's file"):
        port(tmp_path / "b.safetensors", tmp_path / "c.pkl", key="teacher")


# What is refused


def test_weights_that_are_not_finite_are_named(tmp_path, state):
    state["fc.bias"][1] = np.nan
    state["body.bias"] = np.full(6, np.inf, ml_dtypes.bfloat16)
    weights.save(tmp_path / "a.safetensors", state)
    with pytest.raises(RBNValueError, match=r"NaN or infinity in body\.bias \(6 of 6\), fc\.bias \(1 of 5\)"):
        port(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("source", "destination", "options", "text"),
    [
        ("absent.pth", "b.pkl", {}, r"expected a file to read, got .*absent\.pth"),
        (
            "small.safetensors",
            "b.zip",
            {},
            r"one of \.pth, .*, got b\.zip\. Say whose format it is with --to",
        ),
        (
            "small.safetensors",
            "b.pkl",
            {"source_format": "caffe"},
            "--from to be one of 'canonical', 'torch', .* got 'caffe'",
        ),
        (
            "small.safetensors",
            "b.pkl",
            {"destination_format": "x"},
            "--to to be one of 'canonical', 'torch', .* got 'x'",
        ),
        (
            "small.safetensors",
            "b.pkl",
            {"layout": "nnx"},
            "port to jittor: expected --layout to be one of 'own', 'published', got 'nnx'",
        ),
        ("small.safetensors", "b.pth", {"layout": "nnx"}, "port to torch: .* 'own', 'published', got 'nnx'"),
        ("small.safetensors", "absent/b.pkl", {}, "expected a folder to write b.pkl into"),
        (
            "small.safetensors",
            ".",
            {"destination_format": "jittor"},
            "expected to write a file, got the folder",
        ),
        ("small.safetensors", "b.pkl", {"norm": "rbn"}, "expected --network where --norm"),
        ("small.safetensors", "b.pkl", {"network": "resnet19"}, "got 'resnet19'"),
        ("anyones.safetensors", "b.pkl", {}, "that says whose it is, got .*Say it with --from"),
        ("small.safetensors", "b.pkl", {"source_format": "jittor"}, "expected a Jittor checkpoint"),
        ("empty.safetensors", "b.pkl", {"source_format": "canonical"}, "expected arrays, got none"),
        (
            ".",
            "b.pkl",
            {"source_format": "mindspore"},
            r"expected a .*, got .* \(Is a directory\)|which is no file",
        ),
    ],
)
def test_each_is_one_clear_error(tmp_path, canonical, source, destination, options, text):
    from safetensors.numpy import save_file

    save_file({"a.weight": np.ones(2)}, tmp_path / "anyones.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(RBNError, match=text):
        port(tmp_path / source, tmp_path / destination, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_framework_that_is_not_installed_is_named(tmp_path, canonical, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if there were none
    with pytest.raises(RBNValueError, match=r"expected torch for its own format.*pip install 'rbn\[torch\]'"):
        port(canonical, tmp_path / "b.pth")


@pytest.mark.parametrize("damage", ["value", "shape", "name"])
def test_what_is_not_read_back_as_written_is_found(tmp_path, canonical, monkeypatch, damage):
    read = porting.stored_arrays

    def damaged(path, framework):
        found = read(path, framework)
        if path == canonical:
            return found
        if damage == "value":
            found["fc.bias"] = found["fc.bias"] + np.float32(1e-6)
        elif damage == "shape":
            found["fc.bias"] = found["fc.bias"][None]
        else:
            found["more"] = found["fc.bias"]
        return found

    monkeypatch.setattr(porting, "stored_arrays", damaged)
    wrong = "more" if damage == "name" else r"fc\.bias"
    with pytest.raises(RBNValueError, match=rf"expected to read back what was written, .*pkl: {wrong}\. "):
        port(canonical, tmp_path / "b.pkl")


# The map file and --norm


def test_a_map_file_is_read(tmp_path):
    path = tmp_path / "map.toml"
    path.write_text("[rename]\n'a\\.(.*)' = 'b.\\1'\n[kinds]\n'up\\d' = 'transposed_convolution'\n")
    assert porting.read_map(path) == ({r"a\.(.*)": r"b.\1"}, {r"up\d": "transposed_convolution"})
    path.write_text("")
    assert porting.read_map(path) == ({}, {})


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("[rename", RBNValueError, "a map in TOML"),
        ("\xff", RBNValueError, "a map in TOML"),
        ("a = " + "[" * 5000, RBNValueError, "a map in TOML"),
        ("[renames]\n", RBNValueError, r"the tables \[rename\] and \[kinds\] in .*, got renames"),
        ("rename = 3\n", RBNTypeError, "tables of 'PATTERN' = 'TEXT'"),
        ("[rename]\na.b = 'c'\n", RBNTypeError, "Quote each pattern"),
        ("[kinds]\na = 3\n", RBNTypeError, "tables of 'PATTERN' = 'TEXT'"),
    ],
)
def test_a_map_that_is_none_is_one_clear_error(tmp_path, text, error, message):
    path = tmp_path / "map.toml"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(error, match=message):
        porting.read_map(path)
    with pytest.raises(RBNValueError, match="that can be read"):
        porting.read_map(tmp_path / "absent.toml")


def test_norm_is_a_name_or_json():
    assert porting.parse_norm("rbn") == "rbn"
    assert porting.parse_norm(' {"layer": "rbn", "stages": [1]}') == {"layer": "rbn", "stages": [1]}
    with pytest.raises(RBNValueError, match="a name or JSON"):
        porting.parse_norm("{layer: rbn}")


# The command


def call(*arguments):
    return CliRunner().invoke(cli.app, ["port", *map(str, arguments)])


def test_the_command_prints_the_table(tmp_path, canonical):
    done = call(canonical, tmp_path / "b.pkl", "--all")
    assert done.exit_code == 0, done.output
    for text in ("stem.1.center_weight", "(4,) float32", "matched", "1 no counterpart"):
        assert text in done.output
    assert (tmp_path / "b.pkl").exists()


def test_the_command_prints_a_summary_and_the_exceptions(tmp_path, canonical):
    done = call(canonical, tmp_path / "b.pkl")
    assert "stem.1.center_weight" not in done.output
    assert "bn.num_batches_tracked" in done.output  # which Jittor's BatchNorm has not
    assert "matched, 1 no counterpart; --all shows every one" in done.output


def test_the_command_takes_every_option(tmp_path, state):
    described = network("cifar_resnet164", {"layer": "rbn", "stages": [1]}, 3)
    old = {f"net.{name}": value for name, value in initial_state(described).items()}
    weights.save(tmp_path / "a.bin", old)
    (tmp_path / "map.toml").write_text("[rename]\n'net\\.(.*)' = '\\1'\n")
    norm = '{"layer": "rbn", "stages": [1]}'
    options = [
        "--network",
        "cifar_resnet164",
        "--norm",
        norm,
        "--num-classes",
        3,
        "--map",
        tmp_path / "map.toml",
    ]
    done = call(tmp_path / "a.bin", tmp_path / "b.bin", "--from", "canonical", "--to", "mindspore", *options)
    assert done.exit_code == 0, done.output
    assert "renamed" in done.output
    assert "layer1.0.bn1.gamma" in porting.stored_arrays(tmp_path / "b.bin", "mindspore")


def test_the_command_says_what_is_wrong_in_one_message(tmp_path, canonical):
    canonical.write_bytes(canonical.read_bytes()[:100])
    done = call(canonical, tmp_path / "b.pkl")
    assert done.exit_code == 2
    assert "expected a safetensors file" in done.output
    assert "Traceback" not in done.output
    assert call(canonical).exit_code == 2


@pytest.mark.parametrize(
    ("relative", "status", "text"), [(1e-7, 0, "rounding"), (1e-2, 1, "NOT"), (np.nan, 1, "NOT")]
)
def test_verification_decides_the_exit_status(tmp_path, canonical, monkeypatch, relative, status, text):
    found = verification.Difference("canonical", "jittor", 1.5, relative)
    monkeypatch.setattr(verification, "verify", lambda *paths, **options: found)
    done = call(canonical, tmp_path / "b.pkl", "--verify")
    assert done.exit_code == status
    assert text in done.output


# Verification, where NumPy runs both


def test_the_same_network_differs_by_nothing(tmp_path, canonical):
    port(canonical, tmp_path / "b.safetensors")
    found = verification.verify(canonical, tmp_path / "b.safetensors")
    assert (found.largest, found.relative, found.allowed) == (0, 0, True)


def test_another_network_differs(tmp_path, canonical, small, state):
    state["fc.bias"] += 1
    weights.save(tmp_path / "b.safetensors", state, layers=small.layers(), network=small)
    found = verification.verify(canonical, tmp_path / "b.safetensors")
    assert found.largest == pytest.approx(1, rel=1e-4)
    assert not found.allowed


def test_what_cannot_be_verified_is_said(tmp_path, state):
    weights.save(tmp_path / "a.safetensors", state)
    with pytest.raises(RBNValueError, match="expected a network to verify"):
        verification.verify(tmp_path / "a.safetensors", tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("key", "value"), [("padding", 10**9), ("stride", 0), ("padding", -200), ("padding", 0.5)]
)
def test_a_network_that_no_machine_could_run_is_refused(tmp_path, canonical, small, state, key, value):
    described = json.loads(small.to_json())
    described["nodes"][0][key] = value
    weights.save(tmp_path / "a.safetensors", state, network=Network.from_json(json.dumps(described)))
    with pytest.raises(RBNValueError, match="a network that runs on images of 224 pixels, got small"):
        verification.verify(tmp_path / "a.safetensors", tmp_path / "a.safetensors")


def test_where_a_training_run_was_stays_in_its_file(tmp_path):
    described = network("cifar_resnet20", "rbn")
    state = initial_state(described)
    weights.save(tmp_path / "a.safetensors", state, network=described, run={"step": 3})
    table = port(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert any("rbn train --resume takes that file itself" in note for note in table.notes)
    assert weights.read(tmp_path / "b.safetensors").run is None
