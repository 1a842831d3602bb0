"""The subjects that the suite ships: one for each backend, and the reference in two passes."""
