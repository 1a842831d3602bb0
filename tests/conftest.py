"""Which tests run: those that need no framework, or with ``--framework NAME`` those of that framework.

One framework per process, because Jittor and PyTorch in one process have crashed.
"""

from pathlib import Path

import pytest

from rbn.backends.frameworks import FRAMEWORKS

TESTS = Path(__file__).parent
CHOSEN, LEFT_OUT = pytest.StashKey(), pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--framework", choices=FRAMEWORKS, help="run the tests of this framework alone")


def pytest_configure(config):
    config.addinivalue_line("markers", "framework(*names): runs with --framework NAME, once per name")
    config.addinivalue_line("markers", "long: one search over very many cases, which make test leaves out")
    if config.option.framework == "mindspore":  # what it rewrites at level O1 lies in folders that it forgets
        config.addinivalue_line("filterwarnings", "ignore:Implicitly cleaning up:ResourceWarning")


def pytest_report_header(config):
    return f"tests that need: {config.option.framework or 'no framework (the others: --framework NAME)'}"


@pytest.fixture(
    scope="session",
    params=["reference", *(pytest.param(name, marks=pytest.mark.framework(name)) for name in FRAMEWORKS)],
)
def framework(request):
    """The name of what is tested: the NumPy reference or one of the four frameworks."""
    return request.param


@pytest.fixture(scope="session")
def runs():
    """Whether the process of a number runs; one that has ended and that nobody waited for does not."""

    def runs(process):
        try:
            return Path("/proc", process, "stat").read_text().rpartition(") ")[2][0] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):  # the latter when it goes between opening and reading
            return False

    return runs


def pytest_ignore_collect(collection_path, config):
    """Leave the folders of the other frameworks alone: their tests import the framework."""
    name = _folder(collection_path)
    return True if name in FRAMEWORKS and name != config.option.framework else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    selected, deselected = [], []
    for item in items:
        if (name := _folder(item.path)) in FRAMEWORKS:
            item.add_marker(pytest.mark.framework(name))
        mark = item.get_closest_marker("framework")
        names = mark.args if mark else (None,)
        if unknown := set(names) - {None, *FRAMEWORKS}:
            raise pytest.UsageError(f"{item.nodeid}: unknown in the framework mark: {', '.join(unknown)}")
        (selected if config.option.framework in names else deselected).append(item)
    items[:] = selected
    config.hook.pytest_deselected(items=deselected)
    config.stash[CHOSEN] = {item for item in selected if item.get_closest_marker("long")}


def pytest_collection_finish(session):
    session.config.stash[LEFT_OUT] = len(session.config.stash.get(CHOSEN, set()).difference(session.items))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of xdist's processes, which all collect the same
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter, config):
    if left_out := config.stash.get(LEFT_OUT, 0):
        terminalreporter.line(f"long tests left out: {left_out}")


def _folder(path):
    """The top folder of tests/ that a path lies in."""
    parts = path.relative_to(TESTS).parts if path.is_relative_to(TESTS) else ()
    return parts[0] if parts else None
