"""The files that a run is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from rbn.conformance.badge import write_badge
from rbn.conformance.journal import SUFFIX
from rbn.conformance.junit import write_junit
from rbn.conformance.page import PAGE, write_page
from rbn.conformance.report import write_json
from rbn.conformance.runner import Run
from rbn_core.errors import RBNValueError


@dataclass(frozen=True)
class Reports:
    """Which reports go where.

    Attributes:
        json: The file with every result.
        junit: The same as JUnit XML.
        badge: The picture with the verdict.
        html: The folder of the page.
    """

    json: Path | None
    junit: Path | None
    badge: Path | None
    html: Path | None

    @property
    def paths(self) -> list[Path]:
        """The files to write."""
        page = None if self.html is None else self.html / PAGE
        return [path for path in (self.json, self.junit, page, self.badge) if path is not None]

    @property
    def journal(self) -> Path | None:
        """Where the results are kept until the reports are written: beside the first of them."""
        return next((path.with_name(path.name + SUFFIX) for path in self.paths), None)

    def prepare(self) -> None:
        """Make the folders, so that no run is lost because its report cannot be written.

        Raises:
            RBNValueError: A folder cannot be made, or a file is a folder.
        """
        for path in self.paths:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RBNValueError(f"expected a folder to write {path} into, got: {error}.") from None
            if path.is_dir():
                raise RBNValueError(f"expected a file to write, got {path}, which is a folder.")

    def write(self, runs: Sequence[Run], command: str, console: Console) -> None:
        """Write all of them."""
        if self.json is not None:
            write_json(self.json, runs)
        if self.junit is not None:
            write_junit(self.junit, runs, command)
        if self.badge is not None:
            write_badge(self.badge, runs)
        if self.html is not None:
            write_page(self.html, runs, command, console)
