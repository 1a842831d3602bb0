"""The loops read and write what they are given and nothing else, as the compiler's own checks see it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


@pytest.mark.skipif(COMPILER is None, reason="there is no g++")
def test_nothing_is_read_or_written_beside_the_arrays(tmp_path):
    flags = ["-std=c++17", "-O1", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source = Path(__file__).with_name("sanitized.cpp")
    program = tmp_path / "sanitized"
    subprocess.run(
        [COMPILER, *flags, "-Wno-psabi", f"-I{ROOT / 'kernels'}", source, "-o", program], check=True
    )
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-5000:]
    found = re.fullmatch(r"(\d+) calls, 0 failed; (\d+) wrong calls, 0 taken\n", ran.stdout)
    assert found, ran.stdout
    assert int(found[1]) >= 9000
    assert int(found[2]) >= 7000
