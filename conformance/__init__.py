"""The suite that holds implementations to the NumPy reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rbn.conformance.checks import ConformanceError, Result, check
    from rbn.conformance.pytest_plugin import parametrize_with_checks
    from rbn.conformance.subject import Outcome, Subject
    from rbn.conformance.suite import all_cases, quick_cases, select

_HOMES = {
    "ConformanceError": "checks",
    "Outcome": "subject",
    "Result": "checks",
    "Subject": "subject",
    "all_cases": "suite",
    "check": "checks",
    "parametrize_with_checks": "pytest_plugin",
    "quick_cases": "suite",
    "select": "suite",
}

__all__ = [
    "ConformanceError",
    "Outcome",
    "Result",
    "Subject",
    "all_cases",
    "check",
    "parametrize_with_checks",
    "quick_cases",
    "select",
]


def __getattr__(name: str) -> Any:
    """Import on first use: pytest loads this package's plugin into sessions that never use it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
