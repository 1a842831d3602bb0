"""Run a program where torchvision's own operators load: python with_operators.py FOLDER PROGRAM ARGUMENTS."""

import os
import runpy
import sys
from pathlib import Path

import detection


def main(folder, program, *arguments):
    own = Path(folder, os.environ.get("RANK", "0"))
    own.mkdir(parents=True, exist_ok=True)
    detection.load_operators(own)
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
