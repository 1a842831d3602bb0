"""What looks for BatchNorm in MindSpore and mindcv, with our layers: a test for each row of the page."""

import os
import warnings

os.environ.setdefault("GLOG_v", "4")

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from mindspore.nn.optim.thor import get_layer_counter, get_net_layertype_mask
from mindspore.train import Model

from rbn.backends.mindspore import BNET, IEBN, RBN, convert, freeze, from_numpy, parameter_groups, to_numpy
from rbn_core import RBNValueError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mindcv import models
    from mindcv.models.repvgg import RepVGGBlock
    from mindcv.models.resnet import BasicBlock
    from mindcv.optim import create_optimizer
    from mindcv.optim.optim_factory import init_group_params
    from mindcv.utils import amp
    from mindcv.utils.train_step import TrainStep

NORMS = {"BatchNorm2d": nn.BatchNorm2d, "RBN": RBN, "IEBN": IEBN, "BNET": BNET}
OURS = {"1.center_weight", "1.scale_weight", "1.scale_bias"}
X = Tensor(np.random.default_rng(0).normal(1, 2, (4, 3, 6, 6)).astype(np.float32))


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def small(kind):
    return nn.SequentialCell(
        nn.Conv2d(3, 4, 3, weight_init="normal"),
        kind(4),
        nn.Flatten(),
        nn.Dense(144, 2, weight_init="normal"),
    )


@pytest.mark.meeting(
    "mindcv's mixed precision, O1 to O3",
    "works; BNET at O1 is refused",
    "mindcv.utils.amp.auto_mixed_precision(model, 'O2')",
    packages=("mindcv",),
)
@pytest.mark.parametrize(
    ("name", "level"),
    [(name, level) for name in NORMS for level in ("O1", "O2", "O3") if (name, level) != ("BNET", "O1")],
)
def test_mindcvs_mixed_precision_leaves_the_statistics_in_float32(name, level) -> None:
    model = small(NORMS[name])
    exact = small(NORMS[name]).set_train()
    from_numpy(exact, to_numpy(model))
    due = exact(X).asnumpy()
    norm = model[1]
    amp.auto_mixed_precision(model, level)
    found = model.set_train()(X).astype(ms.float32).asnumpy()
    assert np.abs(found - due).max() <= 5e-3 * np.abs(due).max()
    for key in ("running_mean", "running_var"):
        value, expected = to_numpy(norm)[key], to_numpy(exact[1])[key]
        assert np.abs(value - expected).max() <= 2e-3 * np.abs(expected).max()
    assert norm.moving_mean.dtype == ms.float32


def test_mindcvs_o1_wraps_the_convolution_inside_of_bnet_which_refuses_it() -> None:
    model = small(BNET)
    amp.auto_mixed_precision(model, "O1")
    with pytest.raises(RBNValueError, match=r"expected conv\.weight"):
        model(X)


def decayed(model, build):
    """The names of the parameters that an optimizer changes where every gradient is 0."""
    before = to_numpy(model)
    optimizer = build(model)
    optimizer(tuple(ops.zeros_like(parameter) for parameter in optimizer.parameters))
    return {name for name, value in to_numpy(model).items() if not np.array_equal(value, before[name])}


def filled(kind):
    """A small model without a 0 or 1 that would hide a decay."""
    model = small(kind)
    from_numpy(
        model,
        {name: value + 0.5 if value.ndim else value for name, value in to_numpy(model).items()},
    )
    return model


@pytest.mark.meeting(
    "`weight_decay=` of MindSpore's optimizers",
    "decays w_m, w_v and w_b: use `parameter_groups`",
    "nn.Momentum(parameter_groups(model, 1e-4), 0.1, 0.9)",
)
def test_an_optimizers_own_weight_decay_leaves_gamma_and_beta_alone_and_decays_ours() -> None:
    kernels = {"0.weight", "3.weight", "3.bias"}

    def build(model):
        return nn.Momentum(model.trainable_params(), 1.0, 0.9, weight_decay=0.5)

    assert decayed(filled(nn.BatchNorm2d), build) == kernels
    assert decayed(filled(RBN), build) == kernels | OURS
    assert decayed(filled(BNET), build) == kernels | {"1.conv_weight", "1.conv_bias"}


@pytest.mark.meeting(
    "mindcv's `create_optimizer`",
    "its own filter decays w_m and w_v: use `parameter_groups`",
    "create_optimizer(parameter_groups(model, 1e-4), weight_decay_filter='auto')",
    packages=("mindcv",),
)
def test_mindcvs_groups_decay_ours_too_and_parameter_groups_does_not() -> None:
    groups = init_group_params(filled(RBN).trainable_params(), 0.5, "norm_and_bias", ())
    names = {parameter.name for parameter in groups[0]["params"]}
    assert names == {"0.weight", "3.weight", "1.center_weight", "1.scale_weight"}

    def build(model):
        return create_optimizer(
            parameter_groups(model, 0.5), "momentum", 1.0, weight_decay=0.5, weight_decay_filter="auto"
        )

    assert decayed(filled(RBN), build) == {"0.weight", "3.weight"}


@pytest.mark.meeting(
    "loops over `isinstance(cell, nn.BatchNorm2d)`",
    "find none of the layers: use `freeze`",
    "freeze(model)",
)
def test_a_search_for_the_class_finds_none_of_ours_and_freeze_does() -> None:
    model = small(RBN)
    assert not [cell for _, cell in model.cells_and_names() if isinstance(cell, nn.BatchNorm2d)]
    assert [row.name for row in freeze(model).rows] == ["1"]


def test_mindcvs_repvgg_folds_no_layer_of_ours() -> None:
    block = RepVGGBlock(4, 4, 3, padding=1)
    convert(block, "rbn")
    assert isinstance(block.rbr_identity, RBN)
    with pytest.raises(AssertionError):
        block._fuse_bn_tensor(block.rbr_identity)
    for norm in ("rbn", "bn"):  # BatchNorm's is not folded either, in this version of mindcv
        block = RepVGGBlock(4, 4, 3, padding=1)
        if norm == "rbn":
            convert(block, "rbn")
        with pytest.raises(AttributeError, match="'conv'"):
            block.switch_to_deploy()


@pytest.mark.meeting(
    "`Model.eval`",
    "works",
    "Model(network, loss, metrics={'accuracy'}).eval(dataset)",
)
def test_model_eval_evaluates_and_leaves_the_statistics_alone() -> None:
    net = small(RBN)
    data = ms.dataset.NumpySlicesDataset((X.asnumpy(), np.zeros(4, np.int32)), shuffle=False).batch(4)
    before = to_numpy(net)
    due = nn.CrossEntropyLoss()(net.set_train(False)(X), Tensor(np.zeros(4, np.int32))).asnumpy()
    net.set_train()
    model = Model(net, nn.CrossEntropyLoss(), metrics={"loss": nn.Loss()})
    np.testing.assert_allclose(model.eval(data, dataset_sink_mode=False)["loss"], due, rtol=1e-5)
    np.testing.assert_equal(to_numpy(net), before)


def test_thor_counts_batch_norms_and_none_of_ours() -> None:
    batch_norm = 5
    assert batch_norm in get_net_layertype_mask(nn.SequentialCell(nn.BatchNorm2d(4)))
    assert get_net_layertype_mask(nn.SequentialCell(RBN(4))) == []


def averaging(net):
    """Mindcv's training step, which also averages everything that the network stores."""
    loss = nn.WithLossCell(net, nn.CrossEntropyLoss())
    optimizer = nn.Momentum(net.trainable_params(), 0.1, 0.9)
    return TrainStep(loss, optimizer, scale_sense=nn.FixedLossScaleUpdateCell(1.0), ema=True)


def test_mindcvs_average_of_the_weights_refuses_the_counter_and_takes_a_layer_without() -> None:
    with pytest.raises(TypeError, match="Int32"):
        averaging(small(RBN)).ema_update()
    for kind in (nn.BatchNorm2d, RBN):
        net = small(kind).set_train()
        if kind is RBN:
            del net[1].num_batches_tracked
        step = averaging(net)
        net[1].moving_mean.set_data(ops.ones(4))
        net(X)
        step.ema_update()  # of the whole step one operator needs an Ascend
        mean = net[1].moving_mean.asnumpy()
        average = {parameter.name: parameter.asnumpy() for parameter in step.ema_weight}
        (found,) = (value for name, value in average.items() if name.endswith("1.moving_mean"))
        decay = 0.9999 * (1 - np.exp(-1 / 2000))
        np.testing.assert_allclose(found, (1 - decay) * mean, rtol=1e-4, atol=1e-6)


@pytest.mark.meeting(
    "mindcv's ResNets with `norm=`",
    "work",
    "mindcv.models.ResNet(BasicBlock, [2, 2, 2, 2], norm=RBN)",
    packages=("mindcv",),
)
@pytest.mark.parametrize("kind", [RBN, IEBN, BNET])
def test_mindcvs_resnets_are_built_with_the_layers(kind) -> None:
    model = models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5, norm=kind).set_train()
    layers = [cell for _, cell in model.cells_and_names() if type(cell) is kind]
    assert len(layers) == 12
    assert np.isfinite(model(ops.randn(2, 3, 32, 32)).asnumpy()).all()
    assert {int(layer.num_batches_tracked.asnumpy()) for layer in layers} == {1}


def test_thor_takes_the_parameters_of_ours_for_those_of_other_layers() -> None:
    def behind(kind):
        """What the layer is taken for whose weight is behind the norm."""
        net = nn.SequentialCell(nn.Conv2d(3, 4, 3), kind(4), nn.Conv2d(4, 4, 3), nn.Dense(4, 2))
        mask, counter = get_net_layertype_mask(net), 0
        parameters = net.trainable_params()
        for i, parameter in enumerate(parameters):
            if parameter.name == "2.weight":
                return counter
            counter = (
                get_layer_counter(mask[counter], counter, parameters, i) if counter < len(mask) else counter
            )
        raise AssertionError

    assert behind(nn.BatchNorm2d) == 2
    assert behind(RBN) == 3  # and there are 3


@pytest.mark.meeting(
    "mindcv's ResNet and MobileNet v2",
    "works with `convert`",
    "convert(mindcv.models.resnet18())",
    packages=("mindcv",),
)
@pytest.mark.parametrize(("name", "count"), [("resnet18", 20), ("mobilenet_v2_100", 52)])
def test_mindcvs_models_are_converted_whole(name, count) -> None:
    model = getattr(models, name)()
    table = convert(model)
    assert str(table).endswith(f"{count} replaced")
    assert str(convert(model)) == "0 replaced: there is no BatchNorm"
    assert not [cell for _, cell in model.cells_and_names() if isinstance(cell, nn.BatchNorm2d)]
