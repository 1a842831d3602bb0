"""A name that leads to no subject is told on one line, with the place in the file of whoever wrote it."""

import sys

import pytest

from rbn.conformance.loading import SubjectError, load
from rbn.conformance.subjects.numpy import NumpyLayer

GOOD = """
from rbn.conformance.subjects.numpy import NumpyLayer
from rbn_core.reference import Layer

subject = NumpyLayer("mine", Layer)
number = 3
"""

BAD = {
    "imports_nothing": (
        "import no_such_package\n",
        "line 1, in <module>: ModuleNotFoundError: No module named",
    ),
    "no_python": ("def broken(:\n", "line 1: SyntaxError: invalid syntax"),
    "leaves": ("\nraise SystemExit('left')\n", "line 2, in <module>: SystemExit: left"),
    "calls_json": ("import json\n\njson.loads('{')\n", "line 3, in <module>: JSONDecodeError: "),
    "has_no_text": (
        "class Mute(Exception):\n    def __str__(self):\n        raise ValueError\n\nraise Mute\n",
        "line 5, in <module>: Mute: (an exception without a text)",
    ),
    "says_much": ("raise ValueError('one\\ntwo \\udcff')\n", "line 1, in <module>: ValueError: one"),
}

CONSTRUCTED = """
from rbn.conformance import Subject


class Fails(Subject):
    def __init__(self):
        float("x")

    def build(self, *_): ...
    def run(self, *_): ...
    def state(self): ...


class Half(Subject):
    def build(self, *_): ...
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def told(reference):
    with pytest.raises(SubjectError) as caught:
        load(reference)
    text = str(caught.value)
    assert text.startswith(f"{reference}: ")
    assert "\n" not in text
    return text.removeprefix(f"{reference}: ")


@pytest.mark.parametrize("reference", ["mine", "mine:", ":subject", ""])
def test_a_name_without_its_two_parts_is_told_the_form(folder, reference):
    assert told(reference).startswith("expected PKG.MODULE:NAME")


def test_a_module_that_is_not_there(folder):
    assert told("nomod:x") == f"there is no module nomod in {folder} or among what is installed."
    assert "there is no module os.nothing" in told("os.nothing:x")


def test_a_file_in_the_place_of_a_module(folder):
    (folder / "mine_file.py").write_text(GOOD)
    assert told("mine_file.py:subject") == "name the module and not its file: mine_file:subject."
    assert "mine_file:subject, in the folder a/b." in told("a/b/mine_file.py:subject")


def test_a_module_without_the_name_says_what_it_has(folder):
    (folder / "mine_good.py").write_text(GOOD)
    assert isinstance(load("mine_good:subject"), NumpyLayer)
    assert told("mine_good:sujet") == "mine_good (mine_good.py) has no sujet. It has mine_good:subject."
    assert told("mine_good:number").endswith("got 3. It has mine_good:subject.")
    assert told("math:pi").endswith("got 3.141592653589793. It has no subject.")


@pytest.mark.parametrize("name", BAD)
def test_an_import_that_fails_says_where_in_whose_file(folder, name):
    text, due = BAD[name]
    (folder / f"mine_{name}.py").write_text(text)
    assert told(f"mine_{name}:subject").startswith(f"mine_{name}.py, {due}")


def test_a_construction_that_fails_says_where(folder):
    (folder / "mine_made.py").write_text(CONSTRUCTED)
    due = "mine_made.py, line 7, in __init__: ValueError: could not convert string to float: 'x'"
    assert told("mine_made:Fails") == due
    assert told("mine_made:Half").startswith(
        "mine_made.py, line 14: TypeError: Can't instantiate abstract class Half"
    )
    assert told("mine_made:missing").endswith("It has mine_made:Fails.")
