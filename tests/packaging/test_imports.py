"""Import names: from a wheel, an editable install and a bare checkout, and none imports a framework."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from rbn.backends.frameworks import FRAMEWORKS
from rbn.kernels.library import INSTRUCTIONS

ROOT = Path(__file__).resolve().parents[2]
SITE_PACKAGES = sysconfig.get_path("purelib")
NAMES = [
    "rbn",
    "rbn_core",
    "rbn.backends",
    "rbn.backends.frameworks",
    "rbn.conformance",
    "rbn.kernels",
    "rbn.benchmarks",
    "rbn.training",
]
FOLDERS = {
    "rbn": "rbn",
    "rbn_core": "rbn_core",
    "rbn.backends": "backends",
    "rbn.conformance": "conformance",
    "rbn.formats": "formats",
    "rbn.kernels": "kernels",
    "rbn.benchmarks": "benchmarks",
    "rbn.training": "training",
}

# Prints where each module came from. site is left out (-S), and with it the editable install's finder; what
# the modules themselves need (NumPy) still comes from site-packages, at the end of the path.
WHERE = """
import importlib, json, sys
path, site_packages, *names = sys.argv[1:]
sys.path[:0] = [path]
sys.path.append(site_packages)
print(json.dumps({name: importlib.import_module(name).__file__ for name in names}))
"""

LOOPS = """
import json, sys
path, site_packages = sys.argv[1:]
sys.path[:0] = [path]
sys.path.append(site_packages)
from rbn import kernels
problem = kernels.problem()
print(json.dumps([problem, None if problem else kernels.instructions()]))
"""

CASE = "rbn/train/offset0/2x5x7x7/float32"


def python(*arguments, **options):
    process = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def files_imported_from(path, tmp_path):
    output = python("-I", "-S", "-c", WHERE, path, SITE_PACKAGES, *FOLDERS, cwd=tmp_path)
    return {name: Path(file) for name, file in json.loads(output).items()}


def loops_of(path, tmp_path):
    """Why the loops cannot be used, and which instructions they use."""
    return json.loads(python("-I", "-S", "-c", LOOPS, path, SITE_PACKAGES, cwd=tmp_path))


def version_imported_from(path, tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import rbn; print(rbn.__version__)"
    return python("-I", "-S", "-c", code, path, cwd=tmp_path).strip()


def copy_of_the_tree(target):
    for folder in FOLDERS.values():
        shutil.copytree(
            ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so", "results")
        )
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, target)
    return target


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tree without what an installation or a build leaves there."""
    return copy_of_the_tree(tmp_path_factory.mktemp("checkout"))


def install(folder, **environment):
    """Build a wheel of the tree and install it; returns where it is installed."""
    source = copy_of_the_tree(folder / "source")
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    building = ("--no-build-isolation", "--wheel-dir", folder, source)
    python("-m", "pip", "wheel", *options, *building, env=os.environ | environment)
    (wheel,) = folder.glob("rbn-*.whl")
    python("-m", "pip", "install", *options, "--target", folder / "target", wheel)
    return folder / "target"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that a wheel of the tree is installed in.

    The compiler does not optimize, which would take it a minute: `make setup` has it do so.
    """
    folder = tmp_path_factory.mktemp("wheel")
    compiler = folder / "compiler"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')  # the last option counts
    compiler.chmod(0o755)
    return install(folder, CXX=str(compiler))


@pytest.fixture(scope="module")
def installed_without_a_compiler(tmp_path_factory):
    """The same, from a machine without a C++ compiler."""
    return install(tmp_path_factory.mktemp("wheel"), CC="no_such_compiler", CXX="no_such_compiler")


@pytest.mark.parametrize("name", NAMES)
def test_imports_no_framework(name):
    code = f"import sys, {name}; print(*sys.modules)"
    modules = set(python("-c", code).split())
    assert name in modules
    assert not modules & {*FRAMEWORKS, "jax", "jaxlib"}


def test_from_a_wheel(installed, tmp_path):
    files = files_imported_from(installed, tmp_path)
    assert files == {name: installed.joinpath(*name.split("."), "__init__.py") for name in FOLDERS}
    assert version_imported_from(installed, tmp_path) == metadata.version("rbn")


def test_a_wheel_holds_every_file(checkout, installed):
    for name, folder in FOLDERS.items():
        package = installed.joinpath(*name.split("."))
        files = {
            file.relative_to(checkout / folder)
            for file in (checkout / folder).rglob("*")
            if file.is_file() and (file.suffix not in (".cpp", ".h") or file.name == "rbn_kernels.h")
        }
        assert {file for file in files if not (package / file).is_file()} == set()


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
def test_the_loops_are_compiled_from_a_wheel(installed, tmp_path):
    problem, instructions = loops_of(installed, tmp_path)
    assert problem == ""
    assert instructions in INSTRUCTIONS


def test_an_installation_without_a_compiler_has_no_loops(installed_without_a_compiler, tmp_path):
    assert list(installed_without_a_compiler.rglob("*.so")) == []
    problem, _ = loops_of(installed_without_a_compiler, tmp_path)
    assert problem == "the loops were not compiled: install g++ and install rbn again"


@pytest.mark.framework(*FRAMEWORKS)
def test_layers_run_without_the_loops(installed_without_a_compiler, tmp_path, request):
    name = request.config.option.framework
    environment = os.environ | {"PYTHONPATH": str(installed_without_a_compiler)}
    where = "import rbn.kernels; print(rbn.kernels.__file__)"
    file = Path(python("-P", "-c", where, cwd=tmp_path, env=environment).strip())
    assert file.is_relative_to(installed_without_a_compiler)
    python("-P", "-m", "rbn", "conform", name, "--only", CASE, cwd=tmp_path, env=environment)


def test_from_a_bare_checkout(checkout, tmp_path):
    files = files_imported_from(checkout, tmp_path)
    assert files == {name: checkout / folder / "__init__.py" for name, folder in FOLDERS.items()}
    # No site-packages here: the version comes from pyproject.toml.
    assert version_imported_from(checkout, tmp_path) == metadata.version("rbn")


def test_a_checkout_has_no_other_modules_under_our_name(checkout, tmp_path):
    """`rbn.rbn_core` would be a second `rbn_core`, with a second class of every error."""
    code = (
        "import sys\n"
        "from importlib.util import find_spec\n"
        "import rbn\n"
        "print([name for name in sys.argv[1:] if find_spec('rbn.' + name)])"
    )
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    names = ["rbn_core", "rbn", "tools", "tests", "docs", "setup", "backends"]
    assert python("-P", "-c", code, *names, cwd=tmp_path, env=environment).strip() == "['backends']"


def test_from_the_editable_install(tmp_path):
    code = (
        "import json, sys\n"
        "from importlib import import_module\n"
        "print(json.dumps({name: import_module(name).__file__ for name in sys.argv[1:]}))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    files = json.loads(python("-P", "-c", code, *FOLDERS, cwd=tmp_path, env=environment))
    assert files == {name: str(ROOT / folder / "__init__.py") for name, folder in FOLDERS.items()}


OTHER_CHECKOUT = """
import importlib.util, sys, types

class Other:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "rbn.backends":
            return importlib.util.spec_from_loader(name, loader=None, origin="another checkout")

sys.meta_path.insert(0, Other)
import rbn, rbn.backends
print(rbn.__file__, rbn.backends.__file__, sep="\\n")
"""


def test_a_checkout_takes_its_own_folders_and_not_those_of_another_that_is_installed():
    done = subprocess.run([sys.executable, "-c", OTHER_CHECKOUT], capture_output=True, text=True, cwd=ROOT)
    package, backends = map(Path, done.stdout.split())
    assert package.parents[1] == backends.parents[1]
