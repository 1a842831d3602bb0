"""Whoever knows one backend knows all four: the same files, names and order, and one place for equation 3."""

import ast
from pathlib import Path

import pytest

from rbn.backends.frameworks import FRAMEWORKS

BACKENDS = Path(__file__).parents[2] / "backends"

ROOMS = {
    "activations": ["activations"],
    "devices": ["devices"],
    "distributed": ["Share"],
    "functional": ["batch_average", "rbn", "moments", "calibrate", "affine", "accumulate"],
    "fused": ["check_layer", "takes", "rbn"],
    "internals": [],
    "layers": ["CalibratedNorm", "RBN", "IEBN", "BNET"],
    "networks": ["Network", "network"],
    "optimizers": ["optimizer_to_numpy", "optimizer_from_numpy"],
    "recipes": ["update_rbn", "freeze", "parameter_groups", "fold"],
    "surgery": ["convert"],
    "weights": ["to_numpy", "from_numpy", "describe"],
}
"""The files of every backend, and what each has, in this order."""

OWN = {
    "torch": {"activated", "lazy", "triton"},  # timm's BatchNormAct2d, PyTorch's lazy modules, GPU kernels
    "flax": {"nnx", "places", "uses"},  # the second kind of modules, and variables that modules do not hold
    "mindspore": set(),
    "jittor": {"environment"},  # what has to be set before Jittor is imported
}
"""What a backend has beside these, and why."""

ACCUMULATE = ("running", "mean", "var", "new_weight", "count", "values")
"""The arguments of equation 3, in every backend."""


def definitions(path):
    """The functions and classes of a file, by name."""
    tree = ast.parse(path.read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_backend_has_the_rooms_of_the_others(name):
    found = {path.stem for path in (BACKENDS / name).iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__init__", "__pycache__"} == ROOMS.keys() | OWN[name]
    for room, expected in ROOMS.items():
        names = [each for each in definitions(BACKENDS / name / f"{room}.py") if each in expected]
        assert names == expected, f"{name}/{room}.py"


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_equation_3_has_one_name_and_one_signature(name):
    for path in (BACKENDS / name).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            if (ast.get_docstring(node) or "").startswith("Eq. 3"):
                assert node.name.lstrip("_") == "accumulate", f"{path.name}: {node.name}"
            if node.name == "accumulate":
                arguments = [each.arg for each in (*node.args.args, *node.args.kwonlyargs)]
                assert tuple(arguments) == ACCUMULATE, path


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_backend_exports_what_the_others_do(name):
    files = [BACKENDS / name / "__init__.py"]
    files += [BACKENDS / name / "nnx" / "__init__.py"] if name == "flax" else []
    public = {"RBN", "IEBN", "BNET", "activations", "convert", "describe", "fold", "freeze", "from_numpy"}
    public |= {"network", "Network", "optimizer_from_numpy", "optimizer_to_numpy", "parameter_groups"}
    public |= {"to_numpy", "update_rbn"}
    for path in files:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                missing = public - set(ast.literal_eval(node.value))
                assert not missing - (
                    {"optimizer_from_numpy", "optimizer_to_numpy"} if "nnx" in path.parts else set()
                )
                break
        else:
            raise AssertionError(f"{path} says not what is public")
