"""The page of integrations says what the marked tests say, and nothing else."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def integrations(monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("integrations", ROOT / "tools" / "integrations.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "integrations", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_every_row_is_a_marked_test_and_every_marked_test_a_row(integrations):
    page = (ROOT / "docs" / "integrations.md").read_text("utf-8")
    for framework, title in integrations.TITLES.items():
        part = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
        rows = re.findall(r"^\| (.*) \| (.*) \| `(.*)` \| (.*) \|$", part, re.MULTILINE)
        marked = integrations.meetings(framework).values()
        assert [row[:3] for row in rows] == [(m.name, m.shows, m.example) for m in marked]
        for (*_, versions), meeting in zip(rows, marked, strict=True):
            assert re.findall(r"(\S+) \d[\w.+]*", versions) == [
                *integrations.PACKAGES.get(framework, (framework,)),
                *meeting.packages,
            ]
