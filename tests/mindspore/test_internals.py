"""Without a private name of MindSpore's the layers are still right, and one warning says what is lost."""

import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
import importlib, os, warnings
from types import SimpleNamespace
os.environ.setdefault("GLOG_v", "4")
import mindspore as ms, numpy as np
from mindspore import Tensor, nn

module, name = {where!r}.rsplit(".", 1)
found = importlib.import_module
marks = type(nn.Cell().to_float(ms.float32).mixed_precision_type)
not_set = marks.NOTSET


def lacking(wanted, *package):
    # MindSpore itself goes on with the name.
    there = found(wanted, *package)
    if wanted != module:
        return there
    return SimpleNamespace(**{{key: value for key, value in vars(there).items() if key != name}})


importlib.import_module = lacking
if name == "NOTSET":
    del marks.NOTSET
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    from rbn.backends.mindspore import RBN, fused, from_numpy, to_numpy
importlib.import_module = found
marks.NOTSET = not_set
import rbn_core

told = [str(warning.message) for warning in seen if issubclass(warning.category, rbn_core.RBNWarning)]
assert len(told) == 1, told
assert {told!r} in told[0], told

rng = np.random.default_rng(0)
x, dy = (rng.normal(1, 1, (4, 3, 5, 5)).astype(np.float16) for _ in range(2))
for form in (True, False):
    for half in (False, True):
        layer, reference = RBN(3, fused=form).set_train(), rbn_core.RBN(3)
        state = {{
            key: value if value.ndim == 0 else (value + rng.uniform(0.1, 0.9, 3)).astype(np.float16)
            for key, value in to_numpy(layer).items()
        }}
        from_numpy(layer, state)
        reference.load(state)
        weights = layer.trainable_params()
        network = nn.SequentialCell(layer)
        if half:
            network.to_float(ms.float16)

        def loss(x):
            y = network(x)
            return (y.astype(ms.float32) * Tensor(dy).astype(ms.float32)).sum(), y

        (_, y), (dx, gradients) = ms.value_and_grad(loss, 0, weights, has_aux=True)(
            Tensor(x) if half else Tensor(x).astype(ms.float32)
        )
        due_y = reference.forward(x, training=True)
        due_dx, due = reference.backward(dy)
        near = 2e-3 if half else 1e-5
        for found, expected in ((y, due_y), (dx, due_dx)):
            found = found.astype(ms.float32).asnumpy()
            assert np.abs(found - expected).max() <= near * np.abs(expected).max()
        for weight, gradient in zip(weights, gradients, strict=True):
            expected = due[weight.name.rpartition(".")[2]]
            assert np.abs(gradient.asnumpy() - expected).max() <= 1e-5 * np.abs(expected).max(), weight.name
        for key, value in reference.state().items():
            np.testing.assert_allclose(to_numpy(layer)[key], value, rtol=1e-5, atol=1e-6)
print("right")
"""


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("mindspore.common._Function", "keep Y beside X"),
        ("mindspore.common._no_grad", "no weights can be loaded"),
        ("mindspore.common.api._pynative_executor", "in the suite is refused"),
        ("mindspore.ops.composite.base._pynative_forward_run", "no longer refused"),
        ("mindspore.ops.signature", "in several operations"),
        ("mindspore.MixedPrecisionType.NOTSET", "compute half precision in float32"),
    ],
)
def test_a_name_that_is_gone_costs_time_and_no_number(where, told, tmp_path) -> None:
    script = textwrap.dedent(SCRIPT).format(where=where, told=told)
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.stdout.strip().endswith("right"), run.stdout + run.stderr
