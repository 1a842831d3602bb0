"""Hold a BatchNorm of examples/strangers to the suite and to its part of docs/findings.md.

python strangers_on_the_page.py SUBJECT runs a few cases of every kind, and the program of each finding, and
compares with the page what was found: the same is wrong, the same is done otherwise, and the programs print
what stands there.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "strangers"
PAGE = ROOT / "docs" / "findings.md"


def part_of(page, name):
    """A BatchNorm's part of the page."""
    heading = f"\n## {name}\n"
    assert page.count(heading) == 1, name
    return page.partition(heading)[2].partition("\n## ")[0]


def told(part, word):
    """What a part of the page says behind a bold word."""
    found = re.findall(rf"^\*\*{word}:\*\* (.*)$", part, re.MULTILINE)
    return [re.sub(r"( \(\d+ cases\))?\.\\?$", "", line) for line in found]


def compare(page, found):
    """What was found stands on the page, and nothing else does."""
    part = part_of(page, found["name"])
    findings = found["findings"]
    wrong = [finding["what"] for finding in findings]
    assert told(part, "Wrong") == wrong
    assert re.findall(r"^Known: (.*)$", part, re.MULTILINE) == [f["known"] for f in findings if f["known"]]
    met = {row["why"] for row in found["rows"] if row["status"] == "expected"}
    assert {finding["what"] for finding in findings if finding["cases"]} <= met
    assert met - {*wrong} == {*told(part, "Otherwise")}
    lacking = {row["why"] for row in found["rows"] if row["status"] in ("absent", "lacks")}
    assert lacking <= {*told(part, "Not run")}


def shows(page, repro):
    """The page shows the program of a finding, and what it prints now."""
    program = (FOLDER / "repros" / repro).read_text("utf-8").rstrip()
    output = run(FOLDER / "repros" / repro).rstrip()
    shown = f"```py\n# examples/strangers/repros/{repro}\n{program}\n```\n\n```text\n{output}\n```"
    assert shown in page, f"{repro} prints\n{output}"


def run(*arguments):
    """What a Python script prints; its traceback is that of an error."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def main(subject):
    """Run a subject and compare."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        run(FOLDER / "findings.py", subject, "--few", "--json", file)
        found = json.loads(file.read_text("utf-8"))
    page = PAGE.read_text("utf-8")
    compare(page, found)
    for finding in found["findings"]:
        shows(page, finding["repro"])


if __name__ == "__main__":
    main(sys.argv[1])
