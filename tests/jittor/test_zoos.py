"""jittor.models has our names; files of PyTorch's zoos come over: names, and results."""

import numpy as np
import pytest

from rbn.backends.jittor import from_numpy, network, to_numpy

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt
from jittor import models


@pytest.mark.meeting(
    "`jittor.models`",
    "the same logits with ported weights",
    "rbn port resnet18.pth resnet18.pkl",
)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_jittors_models_have_our_names_and_results(name):
    theirs, ours = getattr(models, name)(), network(name)
    rng = np.random.default_rng(0)
    state = to_numpy(theirs)
    for key, value in state.items():
        if value.ndim == 1:
            state[key] = (np.abs(value) + rng.uniform(0.05, 0.2, value.shape)).astype(np.float32)
    assert not from_numpy(theirs, state).faults
    assert not from_numpy(ours, state).faults
    x = jt.array(rng.normal(size=(2, 3, 64, 64)).astype(np.float32))
    theirs.eval()
    ours.eval()
    expected, found = theirs(x).numpy(), ours(x).numpy()
    difference = np.max(np.abs(found - expected)) / np.max(np.abs(expected))
    print(f"jittor.models.{name}: {difference:.1e} of the largest")
    assert difference < 1e-5


def test_files_of_pytorchs_zoos(zoo_model, tmp_path):
    path = tmp_path / "ours.pkl"
    zoo_model.port(path)
    ours = network(zoo_model.network)
    ours.load(str(path))
    ours.eval()
    zoo_model.check(ours(jt.array(zoo_model.images)).numpy())
    ours.save(str(path))
    zoo_model.check_back(path)
