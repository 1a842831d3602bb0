"""Print what some extras of pyproject.toml need, for pip: python requirements.py EXTRA..."""

import re
import sys
import tomllib
from pathlib import Path


def needed(extras: list[str]) -> list[str]:
    """The requirements of the project with these extras, and with those that they name."""
    project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
    found = list(project["dependencies"])
    for extra in extras:
        for requirement in project["optional-dependencies"][extra]:
            own = re.fullmatch(r"rbn\[(.*)\]", requirement)
            found += needed(own[1].split(",")) if own else [requirement]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    print(*needed(sys.argv[1:]), sep="\n")
