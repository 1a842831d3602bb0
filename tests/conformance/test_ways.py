"""Every way in which Flax's devices share a batch really spreads it."""

from pathlib import Path

import pytest

from rbn.conformance import runner
from rbn.conformance.cases import WAYS
from rbn.conformance.checks import FAILED
from rbn.conformance.suite import all_cases, select

BY_AXIS = [way for way in WAYS if way != "jit"]
"""All but the one in which an array is whole, wherever it lies."""

ALONE = "behaves like: Every device normalizes with the statistics of its own share; nothing is synchronized."


@pytest.mark.framework("flax")
def test_a_layer_that_shares_nothing_is_caught_in_every_way(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    cases = select(all_cases(), [f"rbn/*/{way}" for way in BY_AXIS])
    # A process of its own: several devices have to be asked for before JAX starts.
    (found,) = runner.run({"alone": ("unshared:Linen", "unshared:NNX")}, cases, lambda runs: None)
    assert found.failure == ""
    for results in found.results.values():
        assert [result.status for result in results] == [FAILED] * len(BY_AXIS)
        said = {result.case.rpartition("/")[2]: (*result.causes, result.message)[0] for result in results}
        # Where JAX can tell that a statistic is one device's own, it says so; where not, the suite does.
        assert "out_axes" in said["vmap"]
        assert "out_specs" in said["shard_map"]
        assert said["pmap"] == said["shard_map_unchecked"] == ALONE
