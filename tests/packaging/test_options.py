"""The table of options in the documentation is that of the code."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_table_of_the_code():
    spec = importlib.util.spec_from_file_location("options_tool", ROOT / "tools" / "options.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    page = tool.PAGE.read_text()
    assert tool.BEGIN in page
    assert tool.written(page) == page, "run tools/options.py"
    assert tool.written(page.replace("| `restrict` |", "| `restriction` |")) == page
