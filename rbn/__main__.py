"""``python -m rbn`` is the ``rbn`` command."""

from rbn.cli import app

app()
