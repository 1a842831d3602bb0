"""docs/porting.md runs from top to bottom: every block as a program of its own, in one folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "porting.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_page_runs(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for number, (language, block) in enumerate(BLOCKS, 1):
        command = {"python": [sys.executable, "-c", block], "sh": ["sh", "-e", "-c", block]}[language]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"block {number}:\n{block}\n{done.stdout}{done.stderr}"


def test_the_page_shows_every_framework_and_every_command_of_a_port():
    text = "".join(block for _, block in BLOCKS)
    for name in ("torch", "flax", "mindspore", "jittor"):
        assert f"rbn.backends.{name} import" in text
    for option in ("--network", "--map", "--layout", "--verify"):
        assert re.search(rf"^rbn port .*{option}", text, flags=re.MULTILINE)
