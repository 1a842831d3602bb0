"""The Triton kernels compute the layers, in Triton's interpreter, and compile for a GPU, without one."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rbn.backends.torch.fused import Options, Vectors

CASES = Path(__file__).with_name("interpreted.py")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.timeout(1800)  # minutes, beside the other tests
def test_the_kernels_conform_in_tritons_interpreter(pytestconfig):
    command = [sys.executable, "-m", "pytest", "--framework", "torch", "-q", CASES]
    command += ["-m", pytestconfig.option.markexpr]  # with the long searches where this runs with them
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=1700
    )
    assert run.returncode == 0, run.stdout + run.stderr


POINTERS = {"float32": "*fp32", "float64": "*fp64", "float16": "*fp16", "bfloat16": "*bf16"}
"""How Triton writes the type of a tensor's address."""

H200 = ("cuda", 90, 32)
MULTIPROCESSORS = 132


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """The launches of what a test calls: kernel, warps and arguments."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # or it may take what it compiled before
    from rbn.backends.torch.triton import launch

    launches = []
    monkeypatch.setattr(
        launch, "_launch", lambda _, kernel, programs, warps, *given: launches.append((kernel, warps, given))
    )
    monkeypatch.setattr(launch, "processors", lambda device: MULTIPROCESSORS)
    return launches


def source(kernel, arguments):
    """A kernel with the types of its arguments, and the values of those that its compiler knows."""
    from triton.compiler import ASTSource

    constants = {}

    def kind(value, path, known=False):
        if known or value is None:
            constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return type(value)(*(kind(each, (*path, place)) for place, each in enumerate(value)))
        return POINTERS[str(value.dtype).removeprefix("torch.")] if isinstance(value, torch.Tensor) else "i32"

    pairs = enumerate(zip(kernel.params, arguments, strict=True))
    signature = {
        parameter.name: kind(value, (place,), parameter.is_constexpr) for place, (parameter, value) in pairs
    }
    return ASTSource(kernel, signature, constants)


@pytest.mark.parametrize(
    ("shape", "dtype", "last", "running", "affine", "options"),
    [
        ((8, 64, 8, 8), "float32", False, False, True, ("channel_mean", "channel_std", "sigmoid")),
        ((2, 3, 300, 300), "bfloat16", False, False, True, ("channel_std", "channel_mean", "sigmoid")),
        ((5, 33, 5), "float64", True, True, True, ("channel_mean", "input_mean", "hard_sigmoid")),
        ((4, 24, 9, 9), "float16", True, True, False, (None, None, "sigmoid")),
    ],
)
def test_the_kernels_compile_for_a_gpu(launched, shape, dtype, last, running, affine, options):
    import triton
    from triton.backends.compiler import GPUTarget

    from rbn.backends.torch.triton import launch

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if not bundled.exists() and shutil.which("ptxas") is None:
        pytest.skip("this Triton comes without ptxas, which makes a GPU's instructions")

    x = torch.ones(shape, dtype=getattr(torch, dtype))
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    there = (affine, affine, options[0], *[options[1]] * 2, running, running)
    numbers = torch.ones(shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    layer = Vectors(*(numbers if each else None for each in there)), Options(1e-5, *options)
    _, mu, v, _, _ = launch.forward(x, *layer)
    launch.backward(x, x, mu, v, *layer, needs_dx=True)

    for kernel, warps, arguments in launched:
        given = {"num_warps": warps, **launch.COMPILER}
        compiled = triton.compile(source(kernel, arguments), target=GPUTarget(*H200), options=given)
        assert compiled.asm["cubin"], kernel.__name__
