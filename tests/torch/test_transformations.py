"""What PyTorch does to modules beside calling them, by the measure of `torch.nn.BatchNorm2d`."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, functionalize, grad, stack_module_state, vmap

from rbn.backends.torch import BNET, IEBN, RBN
from rbn.backends.torch.internals import NAMES
from rbn_core import RBNTypeError
from rbn_core.errors import RBNWarning

LAYERS = pytest.mark.parametrize(
    ("make", "options"),
    [(RBN, {}), (RBN, {"fused": False}), (RBN, {"momentum": None}), (IEBN, {}), (BNET, {})],
    ids=["RBN", "plain", "average", "IEBN", "BNET"],
)


def layer_of(make=RBN, **options):
    torch.manual_seed(0)
    layer = make(8, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) / 3)
    return layer


def images(*shape):
    return torch.randn(*(shape or (4, 8, 6, 5)), generator=torch.Generator().manual_seed(1))


def assert_same_state(layer, other):
    for name, value in other.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, msg=name)


@LAYERS
def test_a_layer_is_built_and_called_among_fake_tensors(make, options):
    with FakeTensorMode():
        layer = make(8, **options)
        assert layer(torch.randn(4, 8, 6, 5)).shape == (4, 8, 6, 5)
        half = make(8, dtype=torch.float16, **options)
        assert half.running_mean.dtype == torch.float32


@LAYERS
def test_functionalize_updates_the_layers_own_statistics(make, options):
    layer, other = layer_of(make, **options), layer_of(make, **options)
    for _ in range(2):
        torch.testing.assert_close(functionalize(layer)(images()), other(images()))
    assert_same_state(layer, other)


@LAYERS
def test_functionalize_updates_statistics_that_are_arguments(make, options):
    layer, other = layer_of(make, **options), layer_of(make, **options)
    state = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    y = functionalize(lambda state, x: functional_call(layer, state, (x,)))(state, images())
    torch.testing.assert_close(y, other(images()))
    torch.testing.assert_close(state, dict(other.state_dict()))


@pytest.mark.meeting(
    "`torch.func.vmap` over `torch.func.grad`",
    "works",
    "vmap(grad(loss), in_dims=(None, 0))(parameters, images)",
)
@LAYERS
def test_per_sample_gradients_of_a_training_layer(make, options):
    layer, other, x = layer_of(make, **options), layer_of(make, **options), images()
    before = copy.deepcopy(layer)

    def loss(parameters, image):
        return functional_call(layer, parameters, (image[None],)).pow(3).sum()

    with pytest.warns(
        RBNWarning, match="expected a batch to update running statistics from, got a map over one"
    ):
        found = vmap(grad(loss), in_dims=(None, 0))(dict(layer.named_parameters()), x)
    assert_same_state(layer, before)
    for n, image in enumerate(x):
        other.zero_grad()
        other(image[None]).pow(3).sum().backward()
        for name, parameter in other.named_parameters():
            torch.testing.assert_close(found[name][n], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch maps lerp_ one by one
@LAYERS
def test_an_ensemble_trains_with_statistics_of_its_own(make, options):
    layers = [layer_of(make, **options) for _ in range(3)]
    for scale, layer in enumerate(layers):
        with torch.no_grad():
            next(layer.parameters()).add_(scale)
    parameters, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")
    x = images()
    y = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(y, torch.stack([layer(x) for layer in layers]))
    for name, value in buffers.items():
        torch.testing.assert_close(value, torch.stack([layer.state_dict()[name] for layer in layers]))


@pytest.mark.meeting(
    "`torch.export`, saved and loaded",
    "works, also in training",
    "torch.export.save(torch.export.export(model, (images,)), 'model.pt2')",
)
@LAYERS
def test_an_exported_training_program_is_saved_loaded_and_trains(make, options):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), layer_of(make, **options))
    other = copy.deepcopy(model)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (images(),)), file)
    file.seek(0)
    program = torch.export.load(file)
    assert not any("rbn" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    trained = program.module()
    torch.testing.assert_close(trained(images()), other(images()))
    assert_same_state(trained, other)


@pytest.mark.meeting(
    "`torch.fx.symbolic_trace`",
    "works: one node for a layer",
    "torch.fx.symbolic_trace(model)",
)
@LAYERS
def test_torch_fx_sees_one_node(make, options):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Sequential(layer_of(make, **options)), nn.ReLU())
    for training in (True, False):
        graph = torch.fx.symbolic_trace(model.train(training))
        assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1.0", "2"]
        assert torch.equal(graph(images()), copy.deepcopy(model)(images()))
        graph.recompile()


def test_torch_fx_of_a_layer_alone_is_an_error():
    with pytest.raises(
        RBNTypeError, match="RBN: expected to be traced as a part of a model, got the layer alone"
    ):
        torch.fx.symbolic_trace(RBN(8))


@pytest.mark.meeting(
    "`torch.jit.trace`",
    "works, and loads where `rbn` is not installed",
    "torch.jit.trace(model.eval(), images)",
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the checks of shapes are not in the program
@LAYERS
def test_a_traced_model_runs_where_the_package_is_not(make, options, tmp_path):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), layer_of(make, **options)).eval()
    x = images(2, 8, 7, 9)
    torch.jit.save(torch.jit.trace(model, images()), tmp_path / "model.pt")
    torch.save((x, model(x)), tmp_path / "expected.pt")
    program = (
        "import sys, torch; x, y = torch.load(sys.argv[2]); "
        "torch.testing.assert_close(torch.jit.load(sys.argv[1])(x), y); assert 'rbn' not in sys.modules"
    )
    arguments = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        program,
        tmp_path / "model.pt",
        tmp_path / "expected.pt",
    ]
    subprocess.run(arguments, check=True)


def slices(rank):
    form = torch.channels_last if rank == 4 else torch.channels_last_3d
    image = images(4, 8, *(6, 5, 3)[: rank - 2])
    wide = images(4, 16, *(6, 5, 3)[: rank - 2])
    last, wide_last = image.to(memory_format=form), wide.to(memory_format=form)
    return {
        "as it is": image,
        "channels last": last,
        "channels of channels last": wide_last[:, 4:12],
        "every second channel": wide_last[:, ::2],
        "rows of channels last": last[:, :, 1:4],
        "columns of channels last": last[:, :, :, 1:4],
        "images of channels last": last[::2],
        "one image of channels last": wide_last[:1, :8],
        "one column of channels last": last[:, :, :, :1],
        "channels": wide[:, :8],
        "rows": image[:, :, ::2],
        "images": image[::2],
        "turned": image.transpose(2, 3),
        "turned channels last": last.transpose(2, 3),
        "the same image": image[:1].expand(4, *image.shape[1:]),
        "the same channel": image[:, :1].expand(image.shape),
        "the same row": image[:, :, :1].expand(image.shape),
        "images and channels swapped": images(8, 4, *(6, 5, 3)[: rank - 2]).transpose(0, 1),
    }


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rank", [4, 5])
@pytest.mark.parametrize("name", slices(4))
def test_the_output_lies_as_batch_norms(name, rank, fused):
    x = slices(rank)[name]
    norm, layer = (nn.BatchNorm2d if rank == 4 else nn.BatchNorm3d)(8), layer_of(fused=fused)
    same = layer_of(fused=False)
    for training in (True, False):
        expected, y = norm.train(training)(x), layer.train(training)(x)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, same.train(training)(x.contiguous()))


@pytest.mark.meeting(
    "`torch.utils.checkpoint` under autocast",
    "works",
    "checkpoint(block, images, use_reentrant=False)",
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_in_a_checkpointed_block_under_autocast(dtype, reentrant):
    block, same = nn.Sequential(nn.Conv2d(8, 8, 1), layer_of()), None
    same = copy.deepcopy(block)
    x, z = images().requires_grad_(), images().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
        expected = same(z)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    y.float().pow(3).sum().backward(), expected.float().pow(3).sum().backward()
    assert torch.equal(x.grad, z.grad)


def test_batch_norms_of_before_the_counter_load():
    norm = nn.BatchNorm2d(8)
    norm(images())
    state = norm.state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    for layer in (RBN(8), RBN(8, device="meta")):
        result = layer.load_state_dict(state, strict=False, assign=True)
        assert result.missing_keys == ["center_weight", "scale_weight", "scale_bias"]
        assert torch.equal(layer.running_var, norm.running_var)
        assert layer.num_batches_tracked == 0
    state._metadata[""]["version"] = 2
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        RBN(8, centering=None, scaling=None).load_state_dict(state)


REMOVED = """
import operator, sys, warnings
import torch
where, _, last = sys.argv[1].rpartition(".")
owner = operator.attrgetter(where)(torch) if where else torch
there = getattr(owner, last)
delattr(owner, last)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    from rbn.backends.torch import RBN
setattr(owner, last, there)  # PyTorch itself needs some of them
told = [str(each.message) for each in told if each.category.__name__ == "RBNWarning"]
assert len(told) == 1 and f"expected torch.{sys.argv[1]}, which PyTorch" in told[0], told
x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
found = []
for fused in (True, False):
    torch.manual_seed(0)
    layer, z = RBN(8, fused=fused, dtype=torch.float64), x.clone().requires_grad_()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    y = layer(z)
    y.pow(3).sum().backward()
    evaluated = layer.eval()(x)
    with torch.no_grad():
        found.append((y.detach(), z.grad, evaluated.detach(), layer(x), layer.running_var, layer.weight.grad))
torch.testing.assert_close(found[0], found[1])
"""


@pytest.mark.parametrize("name", NAMES)
def test_without_a_private_name_of_pytorch_the_layers_stay_right(name):
    ran = subprocess.run([sys.executable, "-c", REMOVED, name], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
