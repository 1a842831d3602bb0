"""Every `python` block of the README and the documentation runs, in the framework it is about.

But for docs/porting.md, whose blocks build on one another (tests/porting/test_page.py), and for
docs/libraries.md, whose libraries are not installed here (tests/integrations/).
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = [
    (f"{page.name}:{text[: found.start()].count(chr(10)) + 1}", found[1])
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if page.name not in ("porting.md", "libraries.md")
    for text in [page.read_text()]
    for found in re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
]


def framework_of(block):
    found = re.search(r"rbn\.(?:backends|conformance\.subjects)\.(torch|flax|mindspore|jittor)", block)
    return found[1] if found else "reference"


def test_every_framework_has_a_block(framework):
    if framework != "reference":
        assert any(framework_of(block) == framework for _, block in BLOCKS)


def test_the_blocks_run(framework, tmp_path, monkeypatch):
    """All blocks of a framework, in order and in one folder; those about none run with the reference."""
    monkeypatch.chdir(tmp_path)
    if framework == "flax":
        # What the block before it, PyTorch's, leaves behind.
        from rbn_core import weights
        from rbn_core.architectures import network
        from rbn_core.execution import initial_state

        weights.save("resnet18.safetensors", initial_state(network("resnet18", "rbn", 10)))
    for name, block in BLOCKS:
        if framework_of(block) == framework:
            exec(compile(block, name, "exec"), {"__name__": name})


@pytest.mark.parametrize("page", ["README.md", *sorted(page.name for page in (ROOT / "docs").glob("*.md"))])
def test_every_link_leads_somewhere(page):
    path = ROOT / page if page == "README.md" else ROOT / "docs" / page
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()) if "://" not in link]
    for link in links:
        assert (path.parent / link).exists(), link
