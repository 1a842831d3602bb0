"""What a source distribution and a wheel hold, and what an index shows of them."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
RELATIVE = r"\]\((?!https?://)[^)]+\)"
GITHUB = {
    "GITHUB_SERVER_URL": "https://github.com",
    "GITHUB_REPOSITORY": "someone/rbn",
    "GITHUB_SHA": "abc123",
}


def files_of_the_repository():
    """What git lists; what it has in a source distribution where there is no git."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    (sources,) = ROOT.glob("*.egg-info/SOURCES.txt")
    return {name for name in sources.read_text().splitlines() if ".egg-info" not in name}


def copied(folder):
    """A copy of the repository without what git ignores."""
    for name in files_of_the_repository():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
        (folder / name).chmod((ROOT / name).stat().st_mode)
    return folder


def build(what, source, target, **environment):
    """Call a hook of the build backend; returns what it made and what it said."""
    kept = {name: os.environ[name] for name in os.environ if not name.startswith(("GITHUB_", "PYTHON"))}
    command = [sys.executable, "-W", "default", "-c", BUILD, what, target]
    done = subprocess.run(command, cwd=source, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = (path for path in target.iterdir() if path.suffix in (".gz", ".whl"))
    return made, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, what was said, and its files without the top folder."""
    folder = tmp_path_factory.mktemp("sdist")
    archive, said = build("build_sdist", copied(folder / "source"), folder)
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz"), said


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel that is made of it; without a compiler, as the loops are not what is looked at."""
    source = shutil.copytree(sdist[0], tmp_path_factory.mktemp("source") / "rbn")
    return build("build_wheel", source, tmp_path_factory.mktemp("wheel"), CXX="no_such_compiler")


@pytest.mark.parametrize("distribution", ["sdist", "wheel"])
def test_nothing_is_warned_of(distribution, request):
    _, said = request.getfixturevalue(distribution)
    said = re.sub(r"(?m)^.*(no_such_compiler|building extension).*$", "", said)
    assert re.findall(r"(?im)^.*(?:warning|deprecat|ignored).*$", said) == []


def test_a_source_distribution_is_the_repository(sdist):
    folder, _ = sdist
    made = {"PKG-INFO", "setup.cfg"}
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {name for name in found if ".egg-info" not in name} - made == files_of_the_repository()
    assert os.access(folder / ".ci" / "run", os.X_OK)


def test_a_wheel_is_for_every_python_and_holds_the_package_alone(wheel):
    path, _ = wheel
    assert re.fullmatch(r"rbn-[\d.]+-py3-none-linux_\w+\.whl", path.name)
    names = zipfile.ZipFile(path).namelist()
    kinds = {name.rpartition(".")[2] for name in names if ".dist-info/" not in name}
    assert kinds == {"py", "typed", "json", "html", "css", "js", "h", "toml"}
    assert {name for name in names if name.endswith(".h")} == {"rbn/kernels/rbn_kernels.h"}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"rbn", "rbn_core"}


def test_an_index_gets_who_made_it_and_for_what(wheel):
    with zipfile.ZipFile(wheel[0]) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(opened.read(name).decode())
    assert metadata["Author"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_all("Project-URL")
    pythons = {text.rpartition(" ")[2] for text in metadata.get_all("Classifier") if "Python :: 3." in text}
    assert pythons == {"3.11", "3.12", "3.13"}
    # No repository is known here: the text of the links is left, and what is shown as code is not touched.
    description = metadata.get_payload()
    assert re.findall(RELATIVE, description) == []
    assert "docs/rbn.md" in description
    assert "[RBN, CVPR 2021](https://mmcheng.net/rbn)" in description


def test_links_lead_to_the_repository_that_builds(sdist, tmp_path):
    source = shutil.copytree(sdist[0], tmp_path / "rbn")
    path, _ = build("build_sdist", source, tmp_path, **GITHUB)
    with tarfile.open(path) as opened:
        text = opened.extractfile(f"{path.name.removesuffix('.tar.gz')}/PKG-INFO").read().decode()
    assert re.findall(RELATIVE, text) == []
    assert "[docs/rbn.md](https://github.com/someone/rbn/blob/abc123/docs/rbn.md)" in text


def pinned(name):
    return re.search(rf"^{name}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def test_pre_commit_checks_with_the_pinned_versions():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.search(r"ruff-pre-commit\n +rev: v(\S+)\n", text)[1] == pinned("ruff")
    # mypy is that of .venv, which is the pinned one.
    assert re.search(r"id: mypy\n(?: +\S.*\n)*? +entry: make types ", text)
    assert re.search(r"^types: .*\n(?:\t.*\n)*\t.*\.venv/bin/mypy ", (ROOT / "Makefile").read_text(), re.M)


def test_the_version_to_cite_is_the_project_s():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
