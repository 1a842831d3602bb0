"""Pickles as data: what is known is made, what is not is named, and what runs something is refused."""

import collections
import enum
import os
import pickle
import subprocess

import numpy as np
import pytest

from rbn_core.pickles import Machine, Unknown, check_call, check_name, chosen, said, without_prefix


def read(value, protocol=4):
    return Machine(memoryview(pickle.dumps(value, protocol))).run()


class Mode(enum.Enum):
    """An enumeration of somebody's."""

    FAST = 1


class Thing:
    """A class of somebody's, which must not be made here."""

    def __init__(self):
        self.value = 3

    def __setstate__(self, state):
        raise AssertionError


class Call:
    """What pickles to a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_come_as_they_are(protocol):
    value = {"a": [1, -2, 2**80, 1.5, True, None, "ä"], "b": (), "c": (1, 2, 3, 4), 5: {}, "d": 2**40}
    assert read(value, protocol) == value
    assert read(collections.OrderedDict(a=1), protocol) == {"a": 1}
    assert read(collections.defaultdict(list, a=1), protocol) == {"a": 1}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_are_named_and_never_made(protocol):
    found = read({"thing": Thing(), "mode": Mode.FAST, "set": {1, 2}, "class": Thing, ("a", 1): 2}, protocol)
    name = f"{__name__}.Thing"
    assert all(isinstance(found[key], Unknown) for key in ("thing", "mode", "set", "class"))
    assert (found["thing"].name, found["thing"].state) == (name, {"value": 3})
    assert said(found["mode"]) == f"{__name__}.Mode"
    assert said(found["class"]) == name
    assert sum(isinstance(key, Unknown) for key in found) == 1  # the tuple


HOSTILE = {
    "os": Call(os.system, ("touch owned",)),
    "subprocess": Call(subprocess.Popen, ("touch owned",)),
    "a class of it": subprocess.Popen,
    "eval": Call(eval, ("1",)),
    "a function of NumPy": Call(np.loadtxt, ("owned",)),
    "a function of somebody's": Call(read, (1,)),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", HOSTILE)
def test_what_runs_something_is_refused(name, protocol):
    with pytest.raises(ValueError, match=r"which can run code|which is no class"):
        read({"state_dict": {}, "hooks": HOSTILE[name]}, protocol)


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "nt.system", "sys.modules", "builtins.exec", "builtins.__import__", "torch.os.system"),
        *("shutil.rmtree", "socket.socket", "ctypes.CDLL", "importlib.import_module", "runpy.run_path"),
        *("types.FunctionType", "types.CodeType", "io.open", "code.InteractiveInterpreter", "pickle.loads"),
        *(
            "operator.methodcaller",
            "somebody.Thing.__globals__",
            "webbrowser.open",
            "multiprocessing.Process",
        ),
    ],
)
def test_names_that_lead_to_running_are_refused(name):
    with pytest.raises(ValueError, match="which can run code"):
        check_name(name)


@pytest.mark.parametrize(
    "name", ["torch.load", "numpy.load", "builtins.print", "functools.reduce", "re.compile"]
)
def test_functions_are_not_called(name):
    with pytest.raises(ValueError, match="which is no class"):
        check_call(name)


def test_an_attribute_of_a_class_is_a_name_too():
    """As protocol 2 has the name of a class inside of another."""

    def attribute(parent, name):
        program = b"\x80\x02c__builtin__\ngetattr\nc%sX%c\0\0\0%s\x86R." % (parent, len(name), name)
        return Machine(memoryview(program)).run()

    assert attribute(b"somebody\nOuter\n", b"Inner").name == "somebody.Outer.Inner"
    with pytest.raises(ValueError, match="which can run code"):
        attribute(b"somebody\nOuter\n", b"__globals__")
    with pytest.raises(ValueError, match="not put together"):
        attribute(b"collections\nOrderedDict\n", b"fromkeys")


# The network of a checkpoint


def is_array(value):
    return isinstance(value, np.ndarray)


A, B = {"a": np.ones(1)}, {"a": np.zeros(1)}


def test_what_is_beside_the_network_is_told():
    told = []
    loaded = {"state_dict": A, "state_dict_ema": B, "epoch": 3, "args": Unknown("argparse.Namespace", ())}
    assert chosen(loaded, is_array, None, lambda *entry: told.append(entry)) == A
    assert told == [
        ("state_dict_ema", "1 arrays; take them with --key state_dict_ema"),
        ("epoch", "3"),
        ("args", "argparse.Namespace"),
    ]


@pytest.mark.parametrize(
    ("loaded", "key"),
    [
        ({"state_dict": A, "state_dict_ema": B}, "state_dict_ema"),
        ({"student": A, "teacher": B}, "teacher"),
        ({"student": A, "teacher": {"model": B, "epoch": 3}}, "teacher"),
        ({"nets": {"netG": A, "netD": B}}, "nets.netD"),
        ({"netG.a": A["a"], "netD.a": B["a"]}, "netD"),
        ({"model": {"student.a": A["a"], "teacher.a": B["a"]}}, "teacher"),
    ],
)
def test_a_key_chooses(loaded, key):
    told = []
    assert chosen(loaded, is_array, key, lambda *entry: told.append(entry)) == B
    assert "student" in dict(told) or len(told) == 1 or key.startswith("nets")


def test_without_a_key_one_of_several_is_not_guessed():
    with pytest.raises(ValueError, match="several networks: netG, netD; choose one with --key"):
        chosen({"netG": A, "netD": B}, is_array)
    with pytest.raises(ValueError, match="nothing is called 'netX' in it; there are netG"):
        chosen({"netG": A, "epoch": 3}, is_array, "netX")


def test_weights_that_cannot_be_read_are_not_left_out():
    for lost in (Unknown("torch._utils._rebuild_sparse_tensor", ()), [np.ones(1)]):
        with pytest.raises(ValueError, match="'b' is no plain array but"):
            chosen({"a": np.ones(1), "b": lost}, is_array)


def test_a_prefix_goes_if_everything_has_it():
    told = []
    state = {"module._orig_mod.a": 1, "module._orig_mod.b": 2}
    assert without_prefix(state, note=lambda *entry: told.append(entry)) == {"a": 1, "b": 2}
    assert [name for name, _ in told] == ["module.*", "_orig_mod.*"]
    assert without_prefix({"module.a": 1, "b": 2}) == {"module.a": 1, "b": 2}
