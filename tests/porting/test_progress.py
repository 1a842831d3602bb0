"""How far a port is, in bytes: what is told of every format, and what the command shows of it."""

import io
import itertools
import json
import re
import time

import ml_dtypes  # noqa: F401  (NumPy then knows bfloat16 by name)
import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console
from typer.testing import CliRunner

from rbn import cli, verification
from rbn.porting import port, stored_arrays
from rbn.transfer import Steps
from rbn_core import RBNError, architectures, counting, weights
from rbn_core.execution import initial_state

READS = {
    "a.safetensors": ["read"],
    "a.msgpack": ["read", "unpacked"],
    "a.ckpt": ["read", "unpacked"],
    "a.pkl": ["checked", "read"],
}
"""What happens to the bytes of a file when it is read."""


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "PIECE", 10_000)
    path = tmp_path / "source.safetensors"
    weights.save(path, {f"layer{i}.weight": np.full((50, 50), i, np.float32) for i in range(40)})
    return path


def told_of(action):
    """What is told while something is done: by what happens to bytes, how many are done, and of how many."""
    told = []
    with counting.telling(lambda *values: told.append(values)):
        action()
    phases = []
    for what, done, total in told:
        if done == 0:
            phases.append((what, [], total))
        assert phases[-1][0] == what
        phases[-1][1].append(done)
        phases[-1] = (what, phases[-1][1], total)
    return phases


@pytest.mark.parametrize("name", READS)
def test_every_step_goes_from_nothing_to_the_size_of_the_file(tmp_path, source, name):
    phases = told_of(lambda: port(source, tmp_path / name))
    assert [what for what, *_ in phases] == ["read", "hashed", "written", *READS[name], "compared"]
    sizes = [source.stat().st_size, 400_000] + [(tmp_path / name).stat().st_size] * (1 + len(READS[name]))
    assert [total for *_, total in phases] == [*sizes, 400_000]
    for what, done, total in phases:
        assert done == sorted(set(done)), what
        assert done[-1] == total
        assert (name.endswith("l") and what == "checked") or len(done) > 20, what


def test_parts_are_parts_of_a_whole(tmp_path, source):
    state = weights.load(source)
    parts = {"a.safetensors": list(state)[:10], "b.safetensors": list(state)[10:]}
    for name, names in parts.items():
        weights.save(tmp_path / name, {each: state[each] for each in names})
    listed = {each: name for name, names in parts.items() for each in names}
    (tmp_path / "a.index.json").write_text(json.dumps({"weight_map": listed}))
    size = sum((tmp_path / name).stat().st_size for name in parts)
    told = []
    with counting.telling(lambda *values: told.append(values)):
        found = stored_arrays(tmp_path / "a.index.json", "torch")
    assert found.keys() == state.keys()
    assert {(what, total) for what, _, total in told} == {("read", size)}
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1] == size


def test_what_fails_does_not_end(tmp_path, source):
    path = tmp_path / "a.pkl"
    port(source, path)
    path.write_bytes(path.read_bytes()[: -len("HCAJSLHD") - 20 - 1])
    told = []
    with counting.telling(lambda *values: told.append(values)), pytest.raises(RBNError, match="cut off"):
        stored_arrays(path, "jittor")
    what, done, total = told[-1]
    assert (what, done < total) == ("read", True)


def test_little_is_told_of_many_bytes_and_nothing_where_nobody_listens():
    told = []
    with counting.telling(lambda *values: told.append(values)), counting.Meter("read", 10**6) as meter:
        for _ in range(10**6):
            meter(1)
    assert len(told) == counting.STEPS + 1
    with counting.Meter("read", 10) as meter:
        meter(10)
    assert len(told) == counting.STEPS + 1


@pytest.fixture
def clock(monkeypatch):
    """The seconds that it is, which stand still."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_lines_where_there_is_no_terminal(clock):
    steps = Steps(Console(file=io.StringIO(), width=120), 4)
    with steps.progress:
        steps.step("reading a.pth (torch)")
        for second in range(16):
            clock[0] = second + 0.5
            steps.bytes("read", second * 10**8, 5 * 10**9)
    assert steps.progress.console.file.getvalue().splitlines() == [
        "step 1 of 4: reading a.pth (torch): 100 of 5000 MB read | about 49 s left",
        "step 1 of 4: reading a.pth (torch): 300 of 5000 MB read | about 47 s left",
        "step 1 of 4: reading a.pth (torch): 700 of 5000 MB read | about 43 s left",
        "step 1 of 4: reading a.pth (torch): 1500 of 5000 MB read | about 35 s left",
    ]


def test_a_bar_on_a_terminal(clock):
    steps = Steps(Console(file=io.StringIO(), force_terminal=True, width=120), 4)
    with steps.progress:
        steps.step("writing [b] (flax)")
        steps.bytes("written", 0, 20 * 10**9)
        clock[0] = 3.0
        steps.bytes("written", 5 * 10**9, 20 * 10**9)
    shown = steps.progress.console.file.getvalue()
    assert "step 1 of 4: writing [b] (flax)" in shown
    assert "━" in shown
    assert "5.0 of 20.0 GB written" in shown
    assert "about 9 s left" in shown


def test_the_command_shows_it_beside_what_it_prints(tmp_path, source, monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))
    done = CliRunner().invoke(cli.app, ["port", str(source), str(tmp_path / "a.ckpt")])
    assert done.exit_code == 0
    assert "MB written" in done.stderr
    assert "MB" not in done.stdout


def test_the_command_counts_its_steps_and_those_that_verify(tmp_path, monkeypatch):
    described = architectures.network("cifar_resnet164", num_classes=3)
    weights.save(tmp_path / "a.safetensors", initial_state(described), network=described)
    seconds = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: 100.0 * next(seconds))
    monkeypatch.setattr(verification, "_logits_in_a_process", lambda *_: np.ones((2, 3)))
    for options, count in (([], 4), (["--verify"], 7)):
        files = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
        done = CliRunner().invoke(cli.app, ["port", *files, *options])
        assert done.exit_code == 0, done.stderr
        told = re.findall(r"^step (\d+) of (\d+): (\w+)", done.stderr, flags=re.MULTILINE)
        steps = dict.fromkeys(told)
        expected = ["reading", "hashing", "writing", "reading", "reading", "running", "running"][:count]
        assert [*steps] == [(str(i), str(count), step) for i, step in enumerate(expected, 1)]


@pytest.mark.parametrize("dtype", weights.DTYPES)
def test_the_library_reads_what_is_written_array_by_array(tmp_path, dtype):
    arrays = {
        "b": np.arange(6).reshape(2, 3).astype(dtype),
        "a": np.ones((), dtype),
        "ä/none": np.zeros((0, 3), dtype),
        "turned": np.arange(6).reshape(2, 3).astype(dtype).T,
        "other": np.ones(3, np.float64),
        "big": np.arange(4).astype(">i2"),
    }
    weights.write_safetensors(tmp_path / "a", arrays, {"format": "pt"})
    found = weights.load(tmp_path / "a")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype.name, found[name].shape) == (array.dtype.name, array.shape)
        np.testing.assert_array_equal(found[name], array)


def test_it_is_what_the_library_writes(tmp_path):
    arrays = {"b.weight": np.ones((2, 3), np.float32), "a": np.array(7), "b.a": np.ones(3, np.float32)}
    weights.write_safetensors(tmp_path / "a", arrays, {"format": "pt"})
    assert (tmp_path / "a").read_bytes() == safetensors.numpy.save(arrays, {"format": "pt"})
