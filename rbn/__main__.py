"""The `rbn` command, also as ``python -m rbn``."""

import sys
from importlib.util import find_spec

NEEDED = {
    "jinja2": "jinja2",
    "ml_dtypes": "ml_dtypes",
    "PIL": "pillow",
    "rich": "rich",
    "sklearn": "scikit-learn",
    "typer": "typer",
}
"""What the extra `cli` installs: the distribution of each module that the command imports."""


def main() -> None:
    """Run the command, or say what it lacks: the layers need none of it."""
    if absent := [name for module, name in NEEDED.items() if find_spec(module) is None]:
        print(f"rbn: the command needs {', '.join(absent)}: pip install 'rbn[cli]'.", file=sys.stderr)
        sys.exit(2)
    from rbn.cli import app

    app()


if __name__ == "__main__":
    main()
