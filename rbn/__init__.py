"""Representative Batch Normalization, IEBN and BNET for four frameworks, held to one NumPy reference.

The layers are in ``rbn.backends.torch``, ``.flax``, ``.mindspore`` and ``.jittor``, the mathematics in
``rbn_core``, and the conformance suite in ``rbn.conformance``. Importing this package imports no framework.
"""

import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

__all__ = ["__version__"]

_checkout = Path(__file__).resolve().parents[1]
_pyproject = _checkout / "pyproject.toml"


class _TopFolders:
    """Finds rbn.backends and others of a source checkout, which are top folders there."""

    FOLDERS = ("backends", "benchmarks", "conformance", "formats", "kernels", "training")

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, folder = name.rpartition(".")
        if package != "rbn" or folder not in cls.FOLDERS:
            return None
        return PathFinder.find_spec(name, [str(_checkout)])


if _pyproject.is_file():
    sys.meta_path.insert(0, _TopFolders)  # before the finder of another checkout that is installed

try:
    __version__ = metadata.version("rbn")
except metadata.PackageNotFoundError:
    import tomllib

    __version__ = tomllib.loads(_pyproject.read_text("utf-8"))["project"]["version"]
