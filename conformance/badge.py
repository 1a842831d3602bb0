"""The verdict of a run as a small picture for a README, which needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from rbn.conformance.checks import EXPECTED, FAILED, PASSED
from rbn.conformance.readable import readable
from rbn.conformance.runner import Run
from rbn_core.files import replacing

LABEL = "RBN conformance"

COLOURS = {"conforms": "#2c7a3f", "differs": "#b3261e"}
"""Of a verdict; any other is grey."""

CHARACTER = 6.6
"""The width of a character in pixels, about; `textLength` makes the text as wide as its field."""

PICTURE = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20"
role="img" aria-label="{text}">
<title>{text}</title>
<rect width="{width}" height="20" rx="3" fill="#444"/>
<path d="M{left} 0h{rest}a3 3 0 0 1 3 3v14a3 3 0 0 1-3 3h-{rest}z" fill="{colour}"/>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">
<text x="8" y="14" textLength="{label_length}">{label}</text>
<text x="{place}" y="14" textLength="{length}">{message}</text>
</g>
</svg>
"""


def write_badge(path: Path, runs: Sequence[Run]) -> None:
    """Draw the verdict on what was asked for.

    Args:
        path: The SVG file; what is there is replaced.
        runs: What was run. The reference's own run, which is always there, counts if it is the only one.
    """
    verdict, message = summary(runs)
    label_length, length = round(CHARACTER * len(LABEL)), round(CHARACTER * len(message))
    left, right = label_length + 16, length + 16
    text = PICTURE.format(
        width=left + right,
        left=left,
        rest=right - 3,
        colour=COLOURS.get(verdict, "#5f6368"),
        label=LABEL,
        label_length=label_length,
        place=left + 8,
        length=length,
        message=escape(message),
        text=escape(f"{LABEL}: {message}"),
    )
    with replacing(path) as temporary:
        temporary.write_text(readable(text), encoding="utf-8")


def summary(runs: Sequence[Run]) -> tuple[str, str]:
    """The verdict on all runs, and a line that says it.

    >>> from rbn.conformance.runner import Run
    >>> summary([Run("numpy", ("m:A",), (), "done")])
    ('conforms', 'conforms, 0 cases')
    """
    asked = [run for run in runs if run.name != "numpy"] or list(runs)
    statuses = [result.status for run in asked for results in run.results.values() for result in results]
    failed, known = statuses.count(FAILED), statuses.count(EXPECTED)
    ran = statuses.count(PASSED) + failed + known
    verdicts = [run.verdict for run in asked if not run.passed]
    verdict = "differs" if "differs" in verdicts else next(iter(verdicts), "conforms")
    counted = f"{failed} of {ran} cases fail" if failed else f"{ran} case{'' if ran == 1 else 's'}"
    differences = f", {known} known to differ" if known else ""
    return verdict, f"{verdict}, {counted}{differences}"
