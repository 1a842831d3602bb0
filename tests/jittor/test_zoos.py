"""torchvision's names are those of jittor.models: networks of one load the other's weights without a map."""

import numpy as np
import pytest

from rbn.backends.jittor import from_numpy, network, to_numpy

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt
from jittor import models


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
    assert np.max(np.abs(found - expected)) < 1e-5 * np.max(np.abs(expected))
