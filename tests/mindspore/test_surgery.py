"""BatchNorm to RBN, IEBN and BNET and back, in any MindSpore model."""

import os

os.environ.setdefault("GLOG_v", "4")

import re

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, mint, nn, ops

from rbn.backends.mindspore import (
    BNET,
    IEBN,
    RBN,
    convert,
    describe,
    from_numpy,
    network,
    optimizer_from_numpy,
    optimizer_to_numpy,
    to_numpy,
)
from rbn.backends.mindspore.weights import stored
from rbn_core import RBNError, RBNTypeError, RBNValueError
from rbn_core.matching import Row

rng = np.random.default_rng(0)
CLASSES = {"rbn": RBN, "iebn": IEBN, "bnet": BNET}


class Block(nn.Cell):
    """A convolution and its normalization, beside the input."""

    def __init__(self, norm):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.bn1 = norm

    def construct(self, x):
        return ops.relu(self.bn1(self.conv(x))) + x


class Net(nn.Cell):
    """BatchNorms in a cell, in a sequence, in a list, and one under two names."""

    def __init__(self):
        super().__init__()
        self.stem = nn.SequentialCell(nn.BatchNorm2d(3, eps=0.01, momentum=0.7), nn.ReLU())
        self.blocks = nn.CellList([Block(nn.BatchNorm2d(3)), Block(nn.BatchNorm2d(3, affine=False))])
        self.head = self.again = nn.BatchNorm2d(3, use_batch_statistics=False)

    def construct(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.again(self.head(x))


PATHS = ["stem.0", "blocks.0.bn1", "blocks.1.bn1", "head", "again"]


def images(*shape):
    return Tensor(rng.normal(1, 2, shape or (4, 3, 6, 6)).astype(np.float32))


def lively(net):
    """The network with weights and statistics as training leaves them."""
    state = to_numpy(net)
    for name, value in state.items():
        state[name] = (
            value if value.ndim > 1 or "num" in name else (value + 0.5 * rng.random(value.shape)).astype("f4")
        )
    state |= {name.replace("head", "again"): value for name, value in state.items() if "head" in name}
    from_numpy(net, state)
    return net


def assert_close(actual, expected, tolerance=1e-5):
    actual, expected = (value.asnumpy() for value in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("to", CLASSES)
def test_every_batch_norm_is_replaced_with_what_it_has(to):
    net = lively(Net())
    net.blocks[0].set_train()
    before = to_numpy(net)
    table = convert(net, to)
    name = CLASSES[to].__name__
    details = dict.fromkeys(PATHS, name) | {"blocks.1.bn1": f"{name}, not learned, as the layer before"}
    assert list(table.rows) == [Row(path, "replaced", "BatchNorm2d", details[path]) for path in PATHS]
    layers = [net.stem[0], net.blocks[0].bn1, net.blocks[1].bn1, net.head]
    assert all(type(layer) is CLASSES[to] for layer in layers)
    assert net.again is net.head
    assert [layer.training for layer in layers] == [False, True, False, False]
    assert (layers[0].eps, layers[0].momentum) == (0.01, 0.7)
    assert [layer.use_batch_statistics for layer in layers] == [None, None, None, False]
    after = to_numpy(net)
    kept = before.keys() & after.keys()
    assert {"stem.0.running_mean", "blocks.1.bn1.running_var", "head.running_mean"} < kept
    assert ("stem.0.gamma" in kept) == (to != "bnet")
    for array in kept:
        np.testing.assert_array_equal(after[array], before[array])
    frozen = {
        p.name
        for p in net.get_parameters()
        if not p.requires_grad and "moving" not in p.name and "num" not in p.name
    }
    assert frozen == {p.name for p in net.blocks[1].bn1.get_parameters()} - {
        f"blocks.1.bn1.{name}" for name in ("moving_mean", "moving_variance", "num_batches_tracked")
    }


@pytest.mark.parametrize("to", CLASSES)
def test_what_a_conversion_adds_is_learned_if_a_parameter_before_was(to):
    model = nn.SequentialCell(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    for parameter in model[0].get_parameters():
        parameter.requires_grad = False
    model[1].gamma.requires_grad = False
    name = to.upper()
    details = [row.detail for row in convert(model, to).rows]
    assert details == [f"{name}, not learned, as the layer before", name]
    assert not model[0].trainable_params()
    learned = {parameter.name for parameter in model[1].trainable_params()}
    assert ({"1.conv.bias"} if to == "bnet" else {"1.scale_weight", "1.scale_bias"}) <= learned


def test_the_table_says_what_was_looked_at():
    model = nn.SequentialCell(nn.BatchNorm2d(3), nn.SequentialCell(nn.BatchNorm2d(3)))
    assert str(convert(nn.SequentialCell(nn.ReLU()))) == "0 replaced: there is no BatchNorm"
    for nowhere in (nn.SequentialCell(nn.ReLU()), model):
        with pytest.raises(RBNError, match="expected where to match the whole path of a layer, got 'x'"):
            convert(nowhere, where="x")
    assert str(convert(model, where="0")).endswith("1 replaced")
    assert str(convert(model)).endswith("1 replaced")
    assert str(convert(model)) == "0 replaced: there is no BatchNorm"


@pytest.mark.parametrize("to", CLASSES)
@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
def test_preserving_it_gives_what_it_gave_in_both_modes(to, train):
    net, x = lively(Net()).set_train(train), images()
    compiled = ms.jit(net)
    expected = net(x)
    compiled(x)
    state = to_numpy(net)
    table = convert(net, to, preserve=True)
    assert {row.status for row in table.rows} == {"replaced"}
    assert_close(net(x), expected)
    if train:  # where every run changes the statistics
        return
    assert_close(ms.jit(net)(x), expected)
    assert_close(compiled(x), expected)
    from_numpy(
        net,
        {name: value for name, value in state.items() if "running" in name or "conv" in name},
        strict=False,
    )
    changed = {name: value + 1 for name, value in to_numpy(net).items() if name == "stem.0.running_mean"}
    from_numpy(net, changed, strict=False)
    assert_close(compiled(x), net(x))
    assert np.abs((net(x) - expected).asnumpy()).max() > 0.01


def test_without_preserving_it_starts_as_the_layers_do():
    net = convert_and_get(nn.BatchNorm2d(3), "rbn", scaling="channel_std", centering=None)
    assert (net.scaling, net.centering) == ("channel_std", None)
    assert describe(nn.SequentialCell(net))["0"]["scaling"] == "channel_std"
    np.testing.assert_array_equal(net.gamma.asnumpy(), 1)
    np.testing.assert_array_equal(net.scale_bias.asnumpy(), 1)
    assert convert_and_get(nn.BatchNorm2d(3), "bnet", kernel_size=5).conv.weight.shape == (3, 1, 5, 5)


def convert_and_get(layer, to, **options):
    net = nn.SequentialCell(layer)
    convert(net, to, **options)
    return net[0]


def test_a_compiled_network_runs_the_new_layers():
    net, x = lively(Net()), images()
    compiled = ms.jit(net)

    def around(x):
        return net(x)

    function = ms.jit(around)
    old = compiled(x), function(x)
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        net(x)
        convert(net, "rbn")
        graph = net(x)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    for result in (compiled(x), function(x), graph):
        assert_close(result, net(x))
        assert np.abs((result - old[0]).asnumpy()).max() > 0.01


@pytest.mark.parametrize("where", [r"blocks\..*", "head"])
def test_where_chooses_by_whole_paths(where):
    net = Net()
    rows = convert(net, where=where).rows
    assert [row.name for row in rows] == (["head", "again"] if where == "head" else PATHS[1:3])
    assert sum(isinstance(cell, RBN) for _, cell in net.cells_and_names()) == (1 if where == "head" else 2)
    assert type(net.stem[0]) is nn.BatchNorm2d


def test_where_that_matches_nothing_is_an_error_and_a_model_without_any_says_so():
    net = Net()
    for to, where in (("rbn", "bn1"), ("bn", "head")):
        with pytest.raises(RBNValueError, match=f"got '{where}', which matches none"):
            convert(net, to, where=where)
    assert type(net.stem[0]) is nn.BatchNorm2d
    assert str(convert(nn.SequentialCell(nn.ReLU()))) == "0 replaced: there is no BatchNorm"
    assert str(convert(net, "bn")) == "0 replaced: there is no RBN, IEBN or BNET"


def test_names_follow_so_that_checkpoints_and_optimizers_work(tmp_path):
    net = nn.SequentialCell(nn.BatchNorm3d(3), Net())
    inner = net[1]
    convert(inner)  # whose paths are not the names in the network around it
    convert(net)
    names = [p.name for p in net.get_parameters()]
    assert len(set(names)) == len(names)
    assert {
        "0.gamma",
        "0.center_weight",
        "1.stem.0.gamma",
        "1.stem.0.scale_bias",
        "1.blocks.0.bn1.beta",
    } < set(names)
    assert not any("bn2d" in name for name in names)
    assert list(net.parameters_dict()) == names
    lively(net)
    ms.save_checkpoint(net, str(tmp_path / "net.ckpt"))
    other = nn.SequentialCell(nn.BatchNorm3d(3), Net())
    convert(other)
    assert ms.load_param_into_net(other, ms.load_checkpoint(str(tmp_path / "net.ckpt"))) == ([], [])
    for name, value in to_numpy(other).items():
        np.testing.assert_array_equal(value, to_numpy(net)[name])
    optimizer = nn.Momentum(net.trainable_params(), 0.1, 0.9)
    optimizer_from_numpy(optimizer, net, optimizer_to_numpy(optimizer, net))


def test_parameters_stay_the_same_objects_for_an_optimizer_that_has_them():
    net = nn.SequentialCell(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3))
    optimizer = nn.SGD(net.trainable_params(), 0.1)
    gamma, mean = net[0].gamma, net[0].moving_mean
    convert(net)
    assert net[0].gamma is gamma
    assert net[0].moving_mean is mean
    before = net[0].gamma.asnumpy().copy()
    optimizer(tuple(ops.ones_like(p) for p in optimizer.parameters))
    np.testing.assert_allclose(net[0].gamma.asnumpy(), before - 0.1, rtol=1e-6)


def test_one_training_step_after_conversion_is_the_same_in_both_modes():
    results = []
    state = to_numpy(lively(nn.SequentialCell(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    x = images()
    for compile_ in (lambda f: f, ms.jit):
        net = nn.SequentialCell(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).set_train()
        from_numpy(net, state)
        convert(net, "rbn", preserve=True)

        def loss(x):
            return (net(x) ** 3).mean()  # noqa: B023 - called in this turn

        value, gradients = compile_(ms.value_and_grad(loss, None, net.trainable_params()))(x)
        results.append([value, *gradients, *net.get_parameters()])
        assert len(gradients) == 6
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-4)


def test_hooks_go_on_and_can_be_removed():
    net, calls = nn.SequentialCell(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), []
    norm, x = net[1], images()

    def forward(cell, inputs, output):
        calls.append(("forward", type(cell)))

    def forward_pre(cell, inputs):
        calls.append(("forward_pre", type(cell)))

    def backward(cell, gradients, outputs):
        calls.append(("backward", type(cell)))

    def backward_pre(cell, gradients):
        calls.append(("backward_pre", type(cell)))

    handles = [
        norm.register_forward_hook(forward),
        norm.register_forward_pre_hook(forward_pre),
        norm.register_backward_hook(backward),
        norm.register_backward_pre_hook(backward_pre),
    ]
    convert(net)
    step = ms.grad(lambda x: net(x).sum())
    step(x)
    names = ["forward_pre", "forward", "backward_pre", "backward"]
    assert calls == [(name, RBN) for name in names]
    for handle in handles:
        handle.remove()
    step(x)
    assert len(calls) == 4


def test_flags_of_mixed_precision_are_kept():
    net = nn.SequentialCell(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).to_float(ms.float16)
    net[1].to_float(ms.float32).add_flags(mine=7)
    convert(net)
    assert net(images()).dtype == ms.float32
    assert [net[0].get_flags()[name] for name in ("fp16", "fp32")] == [False, True]  # as every layer of ours
    assert net[1].mine == 7
    wrapped = ms.amp.auto_mixed_precision(nn.SequentialCell(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), "O2")
    assert [row.name for row in convert(wrapped).rows] == ["1"]
    assert wrapped(images()).dtype == ms.float32
    assert [path for path, layer in describe(wrapped).items() if "scaling" in layer] == ["1"]


@pytest.mark.parametrize("dtype", [ms.float16, ms.float32])
def test_dtypes_are_kept_and_statistics_are_at_least_float32(dtype):
    norm = nn.BatchNorm2d(3, dtype=dtype, moving_var_init=0.5)
    layer = convert_and_get(norm, "rbn")
    assert (layer.gamma.dtype, layer.center_weight.dtype) == (dtype, dtype)
    assert layer.moving_variance.dtype == ms.float32
    np.testing.assert_array_equal(layer.moving_variance.asnumpy(), 0.5)


RANKS = {1: (6, 3, 5), 2: (6, 3, 4, 4), 3: (4, 3, 2, 3, 4)}
NN = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MINT = {1: mint.nn.BatchNorm1d, 2: mint.nn.BatchNorm2d, 3: mint.nn.BatchNorm3d}


@pytest.mark.parametrize("to", CLASSES)
@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_goes_there_and_back(rank, to):
    net, x = lively(nn.SequentialCell(NN[rank](3))), images(*RANKS[rank])
    expected = net(x)
    kind, layer = NN[rank].__name__, CLASSES[to].__name__
    assert convert(net, to, preserve=True).rows == (Row("0", "replaced", kind, layer),)
    assert_close(net(x), expected)
    assert convert(net, "bn").rows == (Row("0", "replaced", layer, kind),)
    assert type(net[0]) is NN[rank]
    assert_close(net(x), expected)


@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("rank", RANKS)
def test_mints_batch_norm_is_replaced_too(rank, tracks):
    # No CPU runs it: it is held to that of `nn` with the same state.
    net = lively(nn.SequentialCell(MINT[rank](3, momentum=0.4, track_running_stats=tracks)))
    same = nn.SequentialCell(NN[rank](3, momentum=0.6, use_batch_statistics=None if tracks else True))
    from_numpy(same, to_numpy(net), strict=False)
    x = images(*RANKS[rank])
    expected = same(x)
    assert convert(net, "rbn", preserve=True).rows == (Row("0", "replaced", NN[rank].__name__, "RBN"),)
    assert_close(net(x), expected)
    assert_close(net.set_train()(x), same.set_train()(x))
    assert_close(net[0].moving_variance, getattr(same[0], "bn2d", same[0]).moving_variance)
    convert(net, "bn")
    assert type(net[0]) is NN[rank]


def test_momentum_of_none_and_absent_gamma_of_mint_are_kept():
    layer = convert_and_get(mint.nn.BatchNorm2d(3, momentum=None, affine=False), "rbn")
    assert layer.momentum is None
    assert not layer.gamma.requires_grad


def test_a_mode_that_was_set_by_hand_is_kept():
    norm = nn.BatchNorm2d(3)
    norm.training = True
    assert convert_and_get(norm, "rbn").training


def test_synchronization_is_kept():
    net, x = nn.SequentialCell(nn.SyncBatchNorm(3)), images()
    expected = lively(net)(x)
    convert(net, preserve=True)
    assert (net[0].sync, net[0].process_groups) == (True, None)
    assert_close(net(x), expected)
    convert(net, "bn")
    assert type(net[0]) is nn.SyncBatchNorm
    assert_close(net(x), expected)


def test_options_go_there_and_back():
    net = Net()
    convert(net), convert(net, "bn")
    assert [type(layer) for layer in (net.stem[0], net.head)] == [nn.BatchNorm2d] * 2
    assert net.again is net.head
    assert (net.stem[0].eps, net.stem[0].momentum) == (0.01, pytest.approx(0.3))
    assert [layer.use_batch_statistics for layer in (net.stem[0], net.head)] == [None, False]


def test_training_goes_on_with_the_same_statistics_after_going_there_and_back():
    net, x = nn.SequentialCell(nn.BatchNorm2d(3, momentum=0.3)).set_train(), images()
    other = nn.SequentialCell(nn.BatchNorm2d(3, momentum=0.3)).set_train()
    convert(other)
    other(x), net(x)
    convert(other, "bn")
    other(x), net(x)
    assert_close(other[0].moving_variance, net[0].moving_variance)
    assert other[0].training


def test_layers_whose_calibration_is_not_inert_are_kept_with_the_reason():
    net = nn.SequentialCell(RBN(3), RBN(3), BNET(3), IEBN(3, momentum=None), RBN(3, running_var="biased"))
    net.append(RBN(3, dtype=ms.float64))
    net.append(nn.BatchNorm2d(3))
    from_numpy(net, {"1.center_weight": np.array([0, 0.25, 0])}, strict=False)
    rows = convert(net, "bn").rows
    assert [(row.name, row.status, row.source) for row in rows] == [
        ("0", "replaced", "RBN"),
        ("1", "kept", "RBN"),
        ("2", "kept", "BNET"),
        ("3", "kept", "IEBN"),
        ("4", "kept", "RBN"),
        ("5", "kept", "RBN"),
    ]
    reasons = ["center_weight is not 0 .*0.25", "conv_weight is not 0", "momentum=None", "biased", "Float64"]
    for row, reason in zip(rows[1:], reasons, strict=True):
        assert re.search(reason, row.detail), row.detail
    assert type(net[0]) is nn.BatchNorm2d
    np.testing.assert_allclose(net[0].gamma.asnumpy(), 1 / (1 + np.exp(-1)), rtol=1e-6)


def test_a_network_of_ours_goes_to_batch_norm():
    net, x = (
        lively(network("resnet18", {"layer": "rbn", "centering": None, "stages": [0]}, 4)),
        images(2, 3, 32, 32),
    )
    state = {"bn1.scale_weight": np.zeros(64)}
    from_numpy(net, state, strict=False)
    expected = net(x)
    assert [row.status for row in convert(net, "bn").rows] == ["replaced"]
    assert_close(net(x), expected, 1e-4)
    assert describe(net)["bn1"] == {"kind": "norm"}


def test_the_rank_of_layers_that_never_were_batch_norm_can_be_said():
    net = nn.SequentialCell(RBN(3), BNET(3, spatial_dims=1))
    from_numpy(net, {"1.conv_weight": np.array([[[0.0, 1.0, 0.0]]] * 3)}, strict=False)
    convert(net, "bn", spatial_dims=3)
    assert [type(net[0]), type(net[1])] == [nn.BatchNorm3d, nn.BatchNorm1d]


class Own(nn.BatchNorm2d):
    """A BatchNorm of a user's own."""

    def construct(self, x):
        return super().construct(x) + 1


def test_what_cannot_be_replaced_is_kept_with_the_reason():
    more = nn.BatchNorm2d(3)
    more.extra = Parameter(Tensor([1.0]), name="extra")
    net = nn.SequentialCell(Own(3), more, mint.nn.SyncBatchNorm(3))
    assert convert(net, preserve=True).rows == (
        Row("0", "kept", "Own", "is a class of its own"),
        Row("1", "kept", "BatchNorm2d", "has more parameters or cells than a BatchNorm"),
        Row(
            "2", "kept", "SyncBatchNorm", "synchronizes a group of processes that is known by its name alone"
        ),
    )
    assert type(net[0]) is Own


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("ln",), {}, RBNValueError, "convert: expected to to be one of 'bn', 'rbn'"),
        ((), {"where": "("}, RBNValueError, "convert: expected where to be a regular expression"),
        (
            ("rbn",),
            {"kernel_size": 3},
            RBNTypeError,
            "RBN: expected an option of this layer, got 'kernel_size'",
        ),
        (("rbn",), {"scaling": "mean"}, RBNValueError, "RBN: expected scaling to be one of"),
        (("bnet",), {"kernel_size": 4}, RBNValueError, "BNET: expected an odd kernel_size"),
        (("rbn",), {"eps": 0.1}, RBNTypeError, "options that the layer before has not, got eps"),
        (("bn",), {"scaling": None}, RBNTypeError, "no option but spatial_dims for 'bn', got scaling"),
        (("bn",), {"spatial_dims": 4}, RBNTypeError, "expected spatial_dims to be one of 1, 2, 3"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_changes(arguments, options, error, message):
    net = Net()
    with pytest.raises(error, match=message):
        convert(net, *arguments, **options)
    assert issubclass(error, RBNError)
    assert type(net.head) is nn.BatchNorm2d


@pytest.mark.parametrize(
    ("model", "to"), [(nn.BatchNorm2d(3), "rbn"), (nn.BatchNorm3d(3), "iebn"), (RBN(3), "bn")]
)
def test_a_layer_alone_cannot_be_replaced_in_place(model, to):
    with pytest.raises(RBNTypeError, match=f"got a {type(model).__name__} itself, .* nn.SequentialCell"):
        convert(model, to)


def test_stored_parameters_of_a_converted_layer_are_all_there():
    layer = convert_and_get(nn.BatchNorm3d(3), "rbn")
    assert stored(layer).keys() == stored(RBN(3)).keys()
    assert len(layer.trainable_params()) == 5
