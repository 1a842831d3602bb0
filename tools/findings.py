"""Write docs/findings.md from what the suite finds in other BatchNorms: python tools/findings.py.

Each is held to the suite in a process of its own, and what shows a finding without this project is run, too.
Nothing is written unless all of them ran, and differ where they are declared to and nowhere else. Equinox,
Haiku and Keras are in an environment of their own, .venv-integrations, or in the one whose Python `--other`
names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

FOLDER, PAGE = Path("examples", "strangers"), Path("docs", "findings.md")
OTHER = Path(".venv-integrations", "bin", "python")

HEAD = """# What other BatchNorms do

The conformance suite was run on the BatchNorms of other projects. This page says what is wrong with them, by
how much, and gives the shortest program that shows it without this project. `python tools/findings.py` runs
all of it and writes this page. This command runs one of them:

    python examples/strangers/findings.py torch_batch_norm:subject

*Wrong* means one of these: a result loses digits that its type has; a NaN is lost or made; the layer trains
on one value per channel; a refused batch leaves a trace; or the framework's own documentation says something
else. *Otherwise* means that the layer does it in another way, which is not wrong. Neither list has the value
that the momentum weighs, nor the variance that is accumulated: a subject says which, and the suite expects
it. Errors are in units of the tolerance; a right layer has at most 1 ([how it is
derived](conformance.md#tolerances)). The cases are those of BatchNorm without mixed precision and without
spoilt states, and a few with large numbers in float16.
"""


@dataclass(frozen=True)
class Stranger:
    """Somebody's BatchNorm.

    Attributes:
        subject: "module:name" in examples/strangers/.
        packages: The distributions that it is made of.
        other: Whether they are in the other environment.
        environment: Variables that it needs.
    """

    subject: str
    packages: tuple[str, ...]
    other: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


STRANGERS = (
    Stranger("torch_batch_norm:subject", ("torch",)),
    Stranger("torch_sync_batch_norm:subject", ("torch",)),
    Stranger("torchvision_frozen:subject", ("torchvision", "torch")),
    Stranger("timm_batch_norm_act:subject", ("timm", "torch")),
    Stranger("flax_batch_norm:subject", ("flax", "jax")),
    Stranger("flax_batch_norm:nnx_subject", ("flax", "jax")),
    Stranger("equinox_batch_norm:subject", ("equinox", "jax"), other=True),
    Stranger("haiku_batch_norm:subject", ("dm-haiku", "jax"), other=True),
    *(
        Stranger("keras_batch_norm:subject", ("keras", package), True, {"KERAS_BACKEND": backend})
        for backend, package in (("tensorflow", "tensorflow-cpu"), ("jax", "jax"), ("torch", "torch"))
    ),
    Stranger("mindspore_batch_norm:subject", ("mindspore",)),
    Stranger("mint_batch_norm:subject", ("mindspore",)),
    # Its kernels for CUDA and oneDNN are left out, as in the project's own backend.
    Stranger("jittor_batch_norm:subject", ("jittor",), environment={"nvcc_path": "", "use_mkl": "0"}),
    Stranger("onnx_reference:subject", ("onnx",)),
    Stranger("onnx_reference:opset9", ("onnx",)),
    Stranger("onnxruntime_batch_norm:subject", ("onnxruntime", "onnx")),
)


@dataclass(frozen=True)
class Seen:
    """What came of one of them.

    Attributes:
        stranger: Which.
        name: What the suite calls it.
        versions: "torch 2.13.0, ..." without what follows a +, which is how a version was built.
        statuses: How many cases have which status.
        findings: The declared findings, as data.
        rows: For every reason its status, how many cases, and the worst of them.
        shown: What the program of each finding prints.
    """

    stranger: Stranger
    name: str
    versions: str
    statuses: Mapping[str, int]
    findings: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    shown: Mapping[str, str]

    @property
    def command(self) -> str:
        """What repeats it."""
        variables = [f"{name}={value}" for name, value in self.stranger.environment.items()]
        return " ".join([*variables, f"python {FOLDER}/findings.py {self.stranger.subject}"])

    def row(self, why: str) -> dict[str, Any] | None:
        """The cases that differ for a reason."""
        return next((row for row in self.rows if row["status"] == "expected" and row["why"] == why), None)


def see(stranger: Stranger, other: Path) -> Seen:
    """Run the suite on one of them, and the programs of its findings.

    Raises:
        SystemExit: It did not run, or differs where it was not declared to.
    """
    python = str(other if stranger.other else Path(sys.executable))
    variables = os.environ | {"PYTHONPATH": str(Path.cwd())} | stranger.environment

    def run(*arguments: str | Path) -> str:
        done = subprocess.run([python, *arguments], env=variables, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(
                f"{stranger.subject}: no page is written, as this failed:\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        run(FOLDER / "findings.py", stranger.subject, "--json", file)
        found = json.loads(file.read_text("utf-8"))
    asked = f"from importlib.metadata import version; print(*map(version, {stranger.packages}))"
    versions = [version.partition("+")[0] for version in run("-c", asked).split()]
    named = ", ".join(f"{name} {version}" for name, version in zip(stranger.packages, versions, strict=True))
    shown = {finding["repro"]: run(FOLDER / "repros" / finding["repro"]) for finding in found["findings"]}
    return Seen(stranger, versions=named, shown=shown, **found)


def overview(seen: list[Seen]) -> Iterator[str]:
    """The table of all of them."""
    yield "| BatchNorm | tested with | cases pass | wrong in | otherwise in | not run | findings |"
    yield "|---|---|---|---|---|---|---|"
    for one in seen:
        wrong = sum(row["cases"] for finding in one.findings if (row := one.row(finding["what"])))
        counts = (
            one.statuses["passed"],
            wrong,
            one.statuses["expected"] - wrong,
            one.statuses["absent"],
            len(one.findings),
        )
        link = f"[{one.name}](#{one.name.lower().replace(' ', '-').replace('.', '')})"
        yield f"| {link} | {one.versions} | {' | '.join(map(str, counts))} |"
    yield ""


def section(one: Seen, earlier: dict[tuple[str, str], str]) -> Iterator[str]:
    """One of them: what is wrong, with a program that shows it, what is done otherwise, and what did not run.

    Args:
        one: It.
        earlier: Where a program and its output were shown already; it is added to.
    """
    yield from (f"## {one.name}", "", f"    {one.command}", "")
    for finding in one.findings:
        yield f"**Wrong:** {finding['what']}."
        row = one.row(finding["what"])
        if row:
            most = "" if row["worst"] == float("inf") else f", up to {row['worst']:.2g} tolerances"
            where = f" ({', '.join(row['quantities'])})"
            # A dtype that is otherwise is no part of what is wrong.
            said = "." if " dtype " in row["said"] else f": `{row['said']}`"
            yield f"Found by {row['cases']} cases{most}{where}{said}"
        else:
            yield "No case of the suite finds it."
        if finding["known"]:
            yield f"Known: {finding['known']}"
        key = (finding["repro"], one.shown[finding["repro"]])
        yield ""
        if key in earlier:
            yield from (f"The program that shows it is under {earlier[key]}: `repros/{key[0]}`", "")
            continue
        earlier[key] = one.name
        code = (FOLDER / "repros" / finding["repro"]).read_text("utf-8").rstrip()
        yield from ("```py", f"# {FOLDER}/repros/{finding['repro']}", code, "```", "")
        yield from ("```text", one.shown[finding["repro"]].rstrip(), "```", "")
    wrong = {finding["what"] for finding in one.findings}
    for word, statuses in (("Otherwise", ("expected",)), ("Not run", ("absent", "lacks"))):
        reasons = [row for row in one.rows if row["status"] in statuses and row["why"] not in wrong]
        yield from (f"**{word}:** {row['why']} ({row['cases']} cases).\\" for row in reasons[:-1])
        yield from (f"**{word}:** {row['why']} ({row['cases']} cases)." for row in reasons[-1:])
        yield from [""] * bool(reasons)


def main() -> None:
    """Run all of them and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--other", type=Path, default=OTHER, help="the Python of Equinox, Haiku and Keras")
    other = parser.parse_args().other
    seen = []
    with Progress() as progress:
        for stranger in progress.track(STRANGERS, description="holding BatchNorms to the suite"):
            seen.append(see(stranger, other))
    earlier: dict[tuple[str, str], str] = {}
    lines = [HEAD, *overview(seen)]
    for one in seen:
        lines += section(one, earlier)
    PAGE.write_text("\n".join(lines).rstrip() + "\n", "utf-8")


if __name__ == "__main__":
    main()
