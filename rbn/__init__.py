"""Representative Batch Normalization, IEBN and BNET for four frameworks, held to one NumPy reference.

The layers are in ``rbn.backends.torch``, ``.flax``, ``.mindspore`` and ``.jittor``, the mathematics in
``rbn_core``, and the conformance suite in ``rbn.conformance``. Importing this package imports no framework.
"""

from importlib import metadata
from pathlib import Path

__all__ = ["__version__"]

_checkout = Path(__file__).resolve().parents[1]
_pyproject = _checkout / "pyproject.toml"

if _pyproject.is_file():
    # In a source checkout rbn.backends and rbn.conformance are the top folders beside this one.
    __path__.append(str(_checkout))

try:
    __version__ = metadata.version("rbn")
except metadata.PackageNotFoundError:
    import tomllib

    __version__ = tomllib.loads(_pyproject.read_text("utf-8"))["project"]["version"]
