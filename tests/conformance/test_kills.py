"""The shipped table of what each case rejects is the one that the mutants give."""

import json
import math
from importlib.resources import files

import pytest

from rbn.conformance.cases import LARGE, parse
from rbn.conformance.comparison import deviations, worst_of_each
from rbn.conformance.kills import TABLE, kills, main, shipped_kills, shipped_table, table_text
from rbn.conformance.mutants import MUTANTS
from rbn.conformance.suite import all_cases

REDO = "python -m rbn.conformance.kills writes the table anew"
SAMPLE = all_cases()[::80]


def test_the_table_has_every_mutant_and_every_case_that_is_not_large():
    content = json.loads((files("rbn.conformance") / TABLE).read_text())
    assert content["mutants"] == [mutant.name for mutant in MUTANTS], REDO
    due = [case.id for case in all_cases() if math.prod(case.shape) <= LARGE]
    assert list(content["cases"]) == due, REDO


def wrong_entries(cases):
    """Where the table differs from what the mutants give, but for what is at the edge of its tolerance.

    Its ratio is a mistake's, and moves by the rounding of a sum, which another processor may order otherwise.
    """
    mutants = {mutant.name: mutant for mutant in MUTANTS}
    for case, names in kills(cases):
        for name in {*names} ^ {*shipped_table()[case.id]}:
            found = worst_of_each(deviations(mutants[name].subject(), case.generic))
            if not 0.8 < max(deviation.ratio for deviation in found) < 1.25:
                yield case.id, name


def test_the_table_holds_for_some_cases():
    assert list(wrong_entries(SAMPLE)) == [], REDO


def test_a_wrong_entry_is_found(monkeypatch):
    case = parse("bn/train/offset0/8x3/float32")
    assert list(wrong_entries([case])) == []
    table = dict(shipped_table())
    monkeypatch.setitem(globals(), "shipped_table", lambda: table | {case.id: table[case.id][1:]})
    assert list(wrong_entries([case])) == [(case.id, table[case.id][0])]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_table_holds_for_all_cases():
    assert list(wrong_entries(all_cases())) == [], REDO


def test_other_numbers_count_as_the_suites_and_other_cases_do_not():
    seventh, mine = parse("bn/train/offset0/8x3/float32/seed=7"), parse("bn/train/offset0/5x3/float32")
    assert dict(shipped_kills([seventh, mine])) == {seventh: shipped_table()["bn/train/offset0/8x3/float32"]}


def test_one_command_writes_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr("rbn.conformance.kills.all_cases", lambda: SAMPLE[:2])
    main([str(tmp_path / "table.json")])
    assert (tmp_path / "table.json").read_text() == table_text(shipped_kills(SAMPLE[:2]))
