"""What the layers' speed rests on, as counts that do not depend on the machine's mood.

A pass is an operator that reads or writes a tensor of the image's size; what is kept is what the backward
pass will read. No time is measured.
"""

import math

import numpy as np
import pytest

SHAPE = (4, 3, 8, 8)
PLANES = SHAPE[0] * SHAPE[1]


def random(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


class Torch:
    """A form of the layer on one input: its passes in each direction, and what it keeps."""

    def __init__(self, form, memory_format, training):
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        from rbn.benchmarks.in_torch import LAYERS

        class Passes(TorchDispatchMode):
            """Notes the operators that touch an image's values: views do not."""

            def __init__(self):
                super().__init__()
                self.names = []

            def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
                result = operator(*args, **(kwargs or {}))
                tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
                if not operator.is_view and any(t.numel() >= math.prod(SHAPE) for t in tensors):
                    self.names.append(str(operator))
                return result

        layer = LAYERS[form](SHAPE).train(training)
        layout = getattr(torch, memory_format)
        x, dy = (torch.from_numpy(random(seed)).contiguous(memory_format=layout) for seed in range(2))
        x.requires_grad_()
        kept = {}

        def keep(tensor):
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        forward, backward = Passes(), Passes()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), forward:
            y = layer(x)
        with backward:
            torch.autograd.grad(y, [x, *layer.parameters()], dy)
        self.forward, self.backward = forward.names, backward.names
        self.keeps_x = kept.pop(x.data_ptr(), None) == x.numel()
        self.kept = list(kept.values())


FORMATS = ("contiguous_format", "channels_last")


@pytest.mark.framework("torch")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_torch_touches_the_image_once_in_each_direction(memory_format, training):
    found = Torch("RBN", memory_format, training)
    assert found.forward == ["rbn.forward.default"]
    assert found.backward == ["rbn.backward.default"]
    own = Torch("BatchNorm", memory_format, training)
    assert (len(own.forward), len(own.backward)) == (1, 1)


@pytest.mark.framework("torch")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("form", ["BatchNorm", "RBN", "RBN, fused=False"])
def test_torch_keeps_the_image_and_nothing_else_of_its_size(form, memory_format, training):
    found = Torch(form, memory_format, training)
    assert found.keeps_x
    assert max(found.kept) <= PLANES
    assert Torch("equations", memory_format, training).kept.count(math.prod(SHAPE)) >= 1


@pytest.mark.framework("torch")
def test_torch_keeps_only_two_numbers_of_each_plane():
    kept = Torch("RBN", "contiguous_format", True).kept
    assert sum(size > SHAPE[1] for size in kept) == 2


@pytest.mark.framework("torch")
@pytest.mark.parametrize(("training", "backward"), [(True, 10), (False, 6)])
def test_torch_in_its_own_operations(training, backward):
    found = Torch("RBN, fused=False", "contiguous_format", training)
    assert [name.split(".")[1] for name in found.forward] == ["var_mean", "mul", "add"]
    assert len(found.backward) <= backward
    equations = Torch("equations", "contiguous_format", training)
    assert len(equations.forward) >= 8
    assert len(equations.backward) > backward


@pytest.mark.framework("flax")
@pytest.mark.parametrize("shape", [(8, 14, 14, 32), (32, 28, 28, 16)])
def test_flax_passes_over_the_image_by_xla(shape):
    """By XLA's own count of what the compiled program reads, writes and allocates, in images."""
    import jax
    import jax.numpy as jnp

    from rbn.benchmarks.in_flax import LAYERS, evaluated, trained

    x = jnp.asarray(random(0, shape))

    def counted(form):
        layer = LAYERS[form]()
        variables = layer.init(jax.random.key(0), x, use_running_average=False)
        state = (variables["params"], variables["batch_stats"])
        programs = (trained(layer).lower(*state, x, x), evaluated(layer).lower(*state, x))
        compiled = [program.compile() for program in programs]
        passes = [each.cost_analysis()["bytes accessed"] / x.nbytes for each in compiled]
        calls = [each.as_text().count("custom_call_target") for each in compiled]
        return [*passes, compiled[0].memory_analysis().temp_size_in_bytes / x.nbytes], calls

    own, rbn, plain, equations = map(counted, ("BatchNorm", "RBN", "RBN, fused=False", "equations"))
    small = 0.5  # (N, C) numbers
    assert own == (pytest.approx([11, 2, 0], abs=small), [0, 0])
    # X is read once more: its variance is taken from X - mean, that of BatchNorm from E(X^2) - E(X)^2.
    assert plain == (pytest.approx([12, 3, 0], abs=small), [0, 0])
    assert equations == (pytest.approx([24, 6, 1], abs=small), [0, 0])
    # XLA does not see into the compiled loops, one call in each direction, and has no pass beside them.
    assert rbn == (pytest.approx([0, 0, 0], abs=small), [2, 1])


@pytest.mark.framework("jittor")
def test_jittor_keeps_the_image_and_nothing_else_of_its_size():
    """The graph that is kept from the forward to the backward pass, once Y is there."""
    found = {form: jittor_images(form) for form in ("BatchNorm", "RBN", "RBN, fused=False", "equations")}
    # Beside X: Y and what lies between them, of which Y alone is in memory.
    assert found["RBN"] == found["RBN, fused=False"] == (1, 1)
    assert found["BatchNorm"] == (5, 1)
    assert found["equations"][0] > 5


def jittor_images(form):
    """How many variables of X's size the layer makes, and how many of them have memory, besides X."""
    from rbn.benchmarks.in_jittor import LAYERS  # isort: split
    import jittor as jt  # after the backend

    jt.sync_all()  # computes, and lets go of, what other tests' modules made while they were collected
    jt.gc()
    before = jt.number_of_lived_vars()
    x = jt.array(random(0))
    y = LAYERS[form](SHAPE[1])(x)
    y.sync()
    size = "[" + "".join(f"{extent}," for extent in SHAPE) + "]"
    images = [node for node in jt.dump_all_graphs().nodes_info if node.startswith("Var(") and size in node]
    in_memory = [node for node in images if not node.split(")")[0].endswith(",0")]
    del x, y
    jt.gc()
    assert jt.number_of_lived_vars() == before
    return len(images) - 1, len(in_memory) - 1


@pytest.mark.framework("mindspore")
def test_mindspore_touches_the_image_once_in_each_direction_and_keeps_nothing_else_of_its_size(monkeypatch):
    """In PyNative, where every operator is called from Python."""
    from mindspore import Tensor, ops

    from rbn.backends.mindspore import RBN, fused

    calls, kept = [], []

    class Context:
        """Notes what is kept for the backward pass."""

        def __init__(self, context):
            vars(self)["context"] = context

        def save_for_backward(self, *tensors):
            kept.extend(tensors)
            self.context.save_for_backward(*tensors)

        def __getattr__(self, name):
            return getattr(self.context, name)

        def __setattr__(self, name, value):
            setattr(self.context, name, value)

    for name in ("FORWARD", "PYNATIVE_BACKWARD"):
        run = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *t, name=name, run=run: calls.append(name) or run(*t))
    forward = fused.Eager.forward
    monkeypatch.setattr(
        fused.Eager, "forward", staticmethod(lambda context, *rest: forward(Context(context), *rest))
    )
    layer = RBN(SHAPE[1]).set_train()
    _, pull = ops.vjp(layer, Tensor(random(0)), weights=layer.trainable_params())
    assert calls == ["FORWARD"]
    pull(Tensor(random(1)))
    assert calls == ["FORWARD", "PYNATIVE_BACKWARD"]
    x, *others = kept
    assert x.shape == SHAPE
    assert max(tensor.size for tensor in others) < 2 * PLANES  # the layer's options, too
    assert sum(tensor.size == PLANES for tensor in others) == 2
