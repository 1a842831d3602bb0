"""Run all tests, as many parts at a time as there are processors: python tools/tests.py [--long].

A part is the tests that need no framework, or those of one framework: Jittor and PyTorch in one process have
crashed. All parts run, even when one fails. The tests of a framework must reach 95 % of the lines of its
backend and its format. Without --long the long searches are left out, and counted. What the parts print goes
to reports/tests/, and to the terminal where one fails.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(".venv", "bin")
LOGS = Path("reports", "tests")
PARTS = ("jittor", "mindspore", "torch", "flax", "none")
"""That of several processes last, so that no processor is idle in the end."""

FOLD = 2
"""Into how many processes the tests without a framework are dealt, whole files each."""

SHOWN = 60
"""The last lines that are shown of a part that fails."""


def commands(part: str, options: list[str]) -> dict[str, list[str | Path]]:
    """What runs one after another for a part, by what it is called when it fails."""
    if part == "none":
        return {"pytest": [BIN / "pytest", "-n", str(FOLD), "--dist", "loadfile", *options]}
    tests = ["pytest", "--framework", part]
    data = f"--data-file=.coverage.{part}"
    lines = f"--include=backends/{part}/*,formats/{part}.py"
    report = ("report", data, lines, "--fail-under=95")
    return {
        " ".join(tests): [BIN / "coverage", "run", data, "-m", *tests, *options],
        f"combining the coverage of {part}": [BIN / "coverage", "combine", "--quiet", data],
        f"coverage of {part}": [BIN / "coverage", *report],
    }


class Part:
    """A part that runs.

    Args:
        name: One of `PARTS`.
        options: For pytest.
    """

    def __init__(self, name: str, options: list[str]) -> None:
        self.name = name
        self.log = LOGS / f"{name}.log"
        self.log.write_text("")
        self.todo = commands(name, options)
        self.failed: list[str] = []
        self.began = time.monotonic()
        self.start()

    def start(self) -> None:
        """Start the next command."""
        self.current = next(iter(self.todo))
        with self.log.open("ab") as log:
            command = self.todo.pop(self.current)
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def runs(self) -> bool:
        """Whether there is more to wait for; starts what comes next."""
        while self.process.poll() is not None:
            if self.process.returncode:
                self.failed.append(self.current)
            if not self.todo:
                return False
            self.start()
        return True

    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text("utf-8", "replace")

    def progress(self) -> str:
        """How far its tests are."""
        found = re.findall(r"\[ *(\d+)%\]", self.text())
        return f"{self.name} {found[-1] if found else 0} %"

    def left_out(self) -> int:
        """How many long searches it left out."""
        return sum(map(int, re.findall(r"^long tests left out: (\d+)", self.text(), re.MULTILINE)))

    def result(self) -> str:
        """What came of it, in a line."""
        text = self.text()
        counts = re.findall(r"^=* ?((?:\d+ \w+(?:, )?)+) in [\d.]+s", text, re.MULTILINE)
        covered = re.findall(r"^TOTAL.* ([\d.]+%)", text, re.MULTILINE)
        details = [*counts[-1:], *(f"{share} of the framework's lines" for share in covered[-1:])]
        return f"{self.name}: {'; '.join(details)}, {time.monotonic() - self.began:.0f} s"


def main(options: list[str]) -> int:
    """Run the parts and return the exit status."""
    long = options == ["--long"]
    on_terminal = sys.stdout.isatty()
    interval = 1.0 if on_terminal else 15.0
    LOGS.mkdir(parents=True, exist_ok=True)
    for stale in Path().glob(".coverage.*"):
        stale.unlink()
    waiting, active, failed, left_out = list(PARTS), [], [], 0
    began = time.monotonic()
    shown = began
    try:
        while waiting or active:
            while waiting and len(active) < (os.cpu_count() or 1):
                options = ["--durations", "20", *([] if long else ["-m", "not long"])]
                active.append(Part(waiting.pop(0), options))
            time.sleep(0.1)
            for part in [part for part in active if not part.runs()]:
                active.remove(part)
                failed += part.failed
                left_out += sum(
                    map(int, re.findall(r"^long tests left out: (\d+)", part.text(), re.MULTILINE))
                )
                if part.failed:
                    print(*part.text().splitlines()[-SHOWN:], f"all of it: {part.log}", sep="\n")
                print(part.result(), flush=True)
            if active and time.monotonic() > shown + interval:
                shown = time.monotonic()
                line = " | ".join(part.progress() for part in active) + f" | {shown - began:.0f} s"
                print(line.ljust(79), end="\r" if on_terminal else "\n", flush=True)
    finally:
        for part in active:
            part.process.terminate()
    print(f"{time.monotonic() - began:.0f} s in all")
    if left_out:
        print(f"left out: {left_out} long searches; make test LONG=1 runs them, too")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
