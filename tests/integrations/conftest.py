"""The libraries, and what docs/libraries.md says of them. `make integrations` runs this folder."""

import importlib
import warnings
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "libraries.md"


def pytest_collection_modifyitems(items):
    """What libraries warn of among themselves is no matter here; what we warn of is an error."""
    for item in items:
        mark = pytest.mark.filterwarnings("ignore", "error::rbn_core.errors.RBNWarning")
        item.add_marker(mark, append=False)


@pytest.fixture(scope="session")
def library():
    """A function that imports a module of a library, whatever that warns of."""

    def library(name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)

    return library


@pytest.fixture(scope="session")
def block():
    """A function that runs the block below a heading of the page, and returns what it has defined."""

    def block(heading):
        section = PAGE.read_text("utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        code = section.partition("```python\n")[2].partition("```\n")[0]
        defined = {"__name__": f"{PAGE.name}:{heading}"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(code, PAGE.name, "exec"), defined)
        return defined

    return block
