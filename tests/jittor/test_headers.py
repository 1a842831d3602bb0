"""The suite's operators are compiled with headers that the compiler has read once."""

import subprocess

import numpy as np

import rbn.backends.jittor  # noqa: F401 # it prepares what Jittor reads at its import
from rbn.conformance.subjects.jittor_headers import precompile, without_linking

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt


def test_the_compiler_takes_the_headers_as_jittor_calls_it(tmp_path):
    header = precompile()
    source = tmp_path / "an_operator.cc"
    source.write_text('#include "ops/binary_op.h"\n#include "var.h"\nint main() {}\n')
    flags = without_linking(jt.flags.cc_flags)
    assert flags[-2:] == ["-include", str(header)]
    flags += ["-g", "-S", "-Winvalid-pch", "-Werror=invalid-pch", "-H"]
    done = subprocess.run(
        [jt.flags.cc_path, *flags, source, "-o", tmp_path / "an_operator.s"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"! {header}.gch" in done.stderr  # so it says what it has taken
    assert "binary_op.h" not in done.stderr


def test_asked_for_twice_they_are_included_once():
    header = precompile()
    assert precompile() == header
    assert jt.flags.cc_flags.count(str(header)) == 1


def test_what_is_compiled_so_computes_the_same():
    x = np.random.default_rng(0).normal(size=(3, 5)).astype("float32")
    found = (jt.array(x) * 3.25 - jt.array(x).exp()).sum(0).numpy()
    np.testing.assert_allclose(found, (x * np.float32(3.25) - np.exp(x)).sum(0), rtol=1e-5, atol=1e-6)
