"""Run a long command with its elapsed time ticking: python elapsed.py LOG COMMAND...

The command's output goes to the end of LOG; its last lines are shown when the command fails.
"""

import subprocess
import sys
import time
from pathlib import Path

TAIL = 30


def main(log: Path, command: list[str]) -> int:
    """Run the command and return its exit status."""
    on_terminal = sys.stdout.isatty()
    interval = 1 if on_terminal else 15
    start = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        while True:
            try:
                status = process.wait(interval)
                break
            except subprocess.TimeoutExpired:
                print(f"    {time.monotonic() - start:.0f} s", end="\r" if on_terminal else "\n", flush=True)
    seconds = time.monotonic() - start
    if status == 0:
        print(f"    done in {seconds:.0f} s", flush=True)
    else:
        tail = log.read_text("utf-8", "replace").splitlines()[-TAIL:]
        print(*tail, f"failed after {seconds:.0f} s, all output is in {log}: {' '.join(command)}", sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
