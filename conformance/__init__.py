"""The conformance suite: cases, tolerances and a runner that hold any implementation to the reference."""
