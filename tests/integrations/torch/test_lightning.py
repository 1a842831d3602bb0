"""Lightning's own callbacks, and two of its processes: `lightning_worker.py`."""

import copy
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

WORKER = Path(__file__).with_name("lightning_worker.py")
LAYERS = pytest.mark.parametrize("layer", ["RBN", "IEBN", "BNET", "BatchNorm"])


@pytest.fixture(scope="module")
def worker(library):
    library("lightning")
    return runpy.run_path(str(WORKER))


@pytest.mark.meeting(
    "Lightning's `StochasticWeightAveraging`",
    "works",
    "Trainer(callbacks=[StochasticWeightAveraging(swa_lrs=0.05)])",
    packages=("lightning",),
)
@LAYERS
def test_averaged_weights_get_statistics_of_their_own(layer, worker, library):
    model = worker["Model"](layer)
    model.net[:2].requires_grad_(False)  # so that the norm's statistics are the same whenever they are taken
    for parameter in model.net[1].parameters():
        parameter.add_(torch.randn_like(parameter) / 3)
    callbacks = library("lightning.pytorch.callbacks")
    averaging = callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)
    norm = model.net[1]
    worker["trainer"](max_epochs=4, devices=1, callbacks=[averaging]).fit(model, worker["loader"](6))
    expected = copy.deepcopy(model.net)
    torch.optim.swa_utils.update_bn(worker["loader"](6), expected)
    torch.testing.assert_close(norm.running_mean, expected[1].running_mean)
    torch.testing.assert_close(norm.running_var, expected[1].running_var)
    assert (norm.num_batches_tracked, norm.momentum) == (2, 0.1)


@pytest.mark.meeting(
    "Lightning's `BaseFinetuning`",
    "works; with `train_bn=True` BNET's convolution is frozen, too",
    "BaseFinetuning.freeze(backbone, train_bn=False)",
    packages=("lightning",),
)
@LAYERS
@pytest.mark.parametrize("train_bn", [False, True])
def test_a_backbone_is_frozen_and_freed(layer, train_bn, worker, library):
    seen = {}

    class Finetuning(library("lightning.pytorch.callbacks").BaseFinetuning):
        def freeze_before_training(self, model):
            self.freeze(model.net[:2], train_bn=train_bn)

        def finetune_function(self, model, epoch, optimizer):
            norm = model.net[1]
            seen[epoch] = norm.running_mean.clone(), {p.requires_grad for p in norm.parameters()}
            if epoch == 2:
                self.unfreeze_and_add_param_group(model.net[:2], optimizer, lr=0.1, train_bn=not train_bn)

    model = worker["Model"](layer)
    model.configure_optimizers = lambda: torch.optim.SGD(model.net[4].parameters(), 0.1)
    worker["trainer"](max_epochs=4, devices=1, callbacks=[Finetuning()]).fit(model, worker["loader"](6))
    assert seen[0][1] == {train_bn and layer != "BNET"}
    assert torch.equal(seen[2][0], seen[0][0]) != train_bn
    assert not torch.equal(seen[3][0], seen[2][0])
    if not train_bn:
        assert seen[3][1] == {True}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A function that gives what the two processes have written of a way."""
    folder = tmp_path_factory.mktemp("lightning")
    done = subprocess.run([sys.executable, WORKER, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return lambda way: [torch.load(folder / f"{way}-{rank}.pt", weights_only=True) for rank in range(2)]


def whole_batch(worker, layer):
    """The same training in one process, which sees the whole batch."""
    net = worker["Model"](layer).net
    optimizer = torch.optim.SGD(net.parameters(), worker["RATE"])
    for _ in range(2):
        loss = nn.functional.cross_entropy(net(worker["IMAGES"]), worker["LABELS"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.state_dict()


@pytest.mark.meeting(
    "Lightning with two processes",
    "works with `convert_sync_rbn`, also on CPUs",
    "Trainer(devices=2, strategy='ddp').fit(convert_sync_rbn(model), loader)",
    packages=("lightning",),
)
@pytest.mark.parametrize("layer", ["RBN", "BNET"])
def test_two_processes_train_as_one_does_with_the_whole_batch(layer, worker, two_processes):
    expected = whole_batch(worker, layer)
    for state in two_processes(f"ours-{layer}"):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.allclose(expected["1.running_mean"], torch.zeros(4))


def test_two_processes_that_share_nothing_differ(worker, two_processes):
    """So the test above would see it."""
    found = [state["1.running_mean"] for state in two_processes("alone-RBN")]
    assert not torch.allclose(found[0], whole_batch(worker, "RBN")["1.running_mean"], rtol=1e-2)
    assert not torch.allclose(*found, rtol=1e-2)


@pytest.mark.meeting(
    "Lightning's `sync_batchnorm=True`",
    "an error that names `convert_sync_rbn`; with BatchNorm PyTorch refuses CPUs",
    "Trainer(devices=2, strategy='ddp', sync_batchnorm=True)",
    packages=("lightning",),
)
@pytest.mark.parametrize("layer", ["RBN", "BatchNorm"])
def test_the_flag_of_lightning_is_refused(layer, two_processes):
    said = {
        "RBN": "RBNTypeError: RBN: expected a plain BatchNorm where a tool reads eps",
        "BatchNorm": "ValueError: SyncBatchNorm layers only work with GPU modules",
    }[layer]
    for text in two_processes(f"flag-{layer}"):
        assert text.startswith(said)
        assert ("convert_sync_rbn" in text) == (layer == "RBN")
