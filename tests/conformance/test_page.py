"""The page of a conformance run: what it says, and that it works in a browser, alone and on a phone."""

import io
import json
import re
import shutil
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from rbn.conformance import kills, page
from rbn.conformance.cases import parse
from rbn.conformance.checks import Result
from rbn.conformance.comparison import Deviation
from rbn.conformance.diagnosis import Cause, Diagnosis
from rbn.conformance.loading import SUBJECTS
from rbn.conformance.mutants import MUTANTS
from rbn.conformance.report import coverage_of
from rbn.conformance.runner import Run, run
from rbn.conformance.suite import all_cases, select

NASTY = "<script>alert('x')</script> \"&amp; </details>\x1b[0m \udcff " + "long" * 100

REAL_CASES = select(
    all_cases(), ["rbn/train/offset10/8x3/*", "rbn/eval/offset0/3x4x2x3/scaling=channel_std/float32"]
)

VOID = {"meta", "link", "br", "input", "wbr", "hr", "img"}

SCHEMES = ("light", "dark")


def written(folder, runs):
    console = Console(file=io.StringIO())
    file = page.write_page(folder, runs, f"rbn conform --html 'a folder' {NASTY}", console)
    assert "wrote" in console.file.getvalue()
    assert [other.name for other in folder.iterdir()] == ["index.html"]
    return file


def fake_runs():
    """Runs with everything that a page has to show."""
    cases = select(all_cases(), ["bn/*/float32", "rbn/train/offset0/*"])
    names = [case.id for case in cases]
    results = [
        Result(
            name,
            case.group,
            "passed",
            (Deviation("y", 1e-7, 1e-6, "at [0]: 1.0 where 1.1 is due"),),
            "",
            0.01,
        )
        for name, case in zip(names, cases, strict=True)
    ]
    wrong = (
        Deviation("y", float("inf"), 1e-6, f"shape {NASTY}"),
        Deviation("dx", float("nan"), 0.0, "at [1]"),
    )
    results[0] = Result(
        names[0], cases[0].group, "failed", wrong, f"y {NASTY}", 1.5, (f"behaves like: {NASTY}",)
    )
    results[1] = Result(names[1], cases[1].group, "absent", message="has no option eps")
    results[2] = Result(names[2], cases[2].group, "expected", wrong, message=f"known {NASTY}")
    results[3] = Result(names[3], cases[3].group, "failed", message=f"ended the process\n{NASTY}")
    results[4] = Result(names[4], cases[4].group, "late", message=f"no result in time: {NASTY}")
    results[5] = Result(
        names[5], cases[5].group, "passed", (Deviation("refusal", message="ValueError: it says why"),), "said"
    )
    results.append(Result("rbn/no/*", "declarations", "failed", message="no case matches"))
    causes = (Cause(f"behaves like: {NASTY}", (names[0],)),)
    told = Diagnosis(causes, (f"y is wrong {NASTY}",), f"Something is left. {NASTY}")
    torch = Run("torch", SUBJECTS["torch"], cases, "done", 0.0, 12.5, {"torch": results}, {"torch": "2.13"})
    torch.diagnoses["torch"] = told
    return [
        torch,
        Run(
            "my.layers:Mine & more", ("my.layers:Mine & more",), cases, "done", results={NASTY: results[4:-1]}
        ),
        Run("jittor", SUBJECTS["jittor"], cases, "done", failure=f"Traceback {NASTY}"),
    ]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The page of a run of the reference."""
    runs = run({"numpy": SUBJECTS["numpy"]}, REAL_CASES, lambda runs: None)
    return written(tmp_path_factory.mktemp("real") / "a" / "folder", runs)


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """A page with failures, infinities and nasty strings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "shipped_kills", some_kills)
        return written(tmp_path_factory.mktemp("fake"), fake_runs())


def some_kills(cases):
    """No case rejects the first mutant, one the second, and every case all others."""
    for number, case in enumerate(cases):
        yield case, tuple(mutant.name for mutant in MUTANTS[1 if number == 0 else 2 :])


@pytest.fixture(params=["real", "fake"])
def file(request):
    return request.getfixturevalue(request.param)


class Parsed(HTMLParser):
    """The elements of a page with their texts; every one must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def __call__(self, tag=None, **attributes):
        return [
            element
            for element in self.elements
            if tag in (None, element["tag"])
            and all(value in element.get(name.strip("_"), "").split() for name, value in attributes.items())
        ]


def parsed(file):
    return Parsed(file.read_text())


def test_the_page_is_well_formed_and_its_links_lead_somewhere(file):
    found = parsed(file)
    ids = Counter(element["id"] for element in found.elements if "id" in element)
    assert set(ids.values()) == {1}
    links = {element["href"] for element in found("a")}
    assert links <= {f"#{name}" for name in ids}
    assert all("scope" in element for element in found("th"))
    assert len(found("table")) == len(found("caption"))


def test_the_page_needs_nothing_else(file):
    text = file.read_text()
    assert not re.search(r"https?:|@import|url\(", text)
    assert {name for element in parsed(file).elements for name in element} & {
        "src",
        "srcset",
        "onclick",
    } == set()


def test_nothing_in_a_message_becomes_markup(fake):
    found = parsed(fake)
    assert len(found("script")) == 2
    assert "<script>alert('x')</script> \"&amp; </details>" in found("pre")[0]["text"]


def test_the_matrix_of_a_real_run(real):
    found = parsed(real)
    cells = found("td", class_="passed")
    assert len(cells) == len({case.group for case in REAL_CASES})
    assert all(re.fullmatch(r"✓passed 0\.\d\d", cell["text"]) for cell in cells)
    assert "every case that ran is right" in " ".join(found("header")[0]["text"].split())
    assert len(found("details", class_="case")) == len(REAL_CASES)


def test_failures_come_first_and_are_open(fake):
    cases = parsed(fake)("details", class_="case")
    statuses = [case["class"].split()[1] for case in cases]
    assert statuses[:4] == ["failed", "failed", "absent", "expected"]  # of the first group that has failures
    groups = [
        "open" in group for group in parsed(fake)("details", class_="group") if group["id"].startswith("s0")
    ]
    assert groups == sorted(groups, reverse=True)
    assert all(("open" in case) == (status == "failed") for case, status in zip(cases, statuses, strict=True))
    assert "behaves like: <script>" in cases[0]["text"]
    assert "error ∞ / tolerance 1.00e-06 = ∞" in cases[0]["text"]


def test_cells_say_in_words_what_they_say_in_colour(fake):
    found = parsed(fake)
    assert found("td", class_="failed")[0]["text"] == "✗failed 2 failed: ∞"
    assert "✗ differs" in found("header")[0]["text"]
    reasons = [cell["text"] for cell in found("td", class_="reason")]
    assert reasons[0] == "has no option eps"
    assert len(reasons) == 2


def test_every_case_has_the_command_that_runs_it_again(fake):
    runs = fake_runs()
    commands = [case["data-command"] for case in parsed(fake)("details", class_="case")]
    assert f"rbn conform torch --only {runs[0].cases[0].id}" in commands
    assert f"rbn conform --subject 'my.layers:Mine & more' --only {runs[0].cases[5].id}" in commands
    assert "rbn conform torch" in commands  # of a wrong declaration


def test_coverage_says_what_did_not_run(tmp_path):
    cases = select(all_cases(), ["bn/train/offset0/8x3/*", "bn/train/offset0/2x5x7x7/*"])
    results = [
        Result(case.id, case.group, "absent" if case.dtype == "float64" else "passed") for case in cases
    ]
    runs = [Run("torch", ("m:T",), cases, "done", results={"torch": results})]
    table = coverage_of([results], runs)
    assert table["dtype"][1] == [[name for name in table["dtype"][0] if name == "float64"]]
    assert table["mode"] == (["train"], [[]])


def test_mistakes_that_no_case_or_one_case_finds_are_named(fake):
    rows = [row["text"] for row in parsed(fake)("tr")]
    assert any(MUTANTS[0].mistake in row and "✗ not covered by these cases" in row for row in rows)
    thin = next(row for row in rows if MUTANTS[1].mistake in row)
    assert "△ thinly covered: only" in thin
    assert "1 is not covered by these cases." in parsed(fake)("section", id="mistakes")[0]["text"]
    for mutant in MUTANTS:
        assert any(mutant.mistake in row and mutant.kind in row.splitlines() for row in rows)


def test_real_kills_are_counted(real):
    section = parsed(real)("section", id="mistakes")[0]["text"]
    counted = int(re.search(rf"(\d+) of {len(MUTANTS)} implementations", section)[1])
    assert 10 < counted < len(MUTANTS)


def test_a_page_takes_no_time_for_the_mistakes(monkeypatch):
    monkeypatch.setattr(kills, "behaviour", None)  # what runs a mutant
    found = page.killed(all_cases())
    assert {kill.mutant.name for kill in found} == {mutant.name for mutant in MUTANTS}
    assert min(len(kill.cases) for kill in found) > 1


def test_cases_that_are_none_of_the_suites_own_are_counted(tmp_path):
    case = parse("bn/train/offset0/5x3/float32")
    run = Run("m:A", ("m:A",), (case,), "done", results={"A": [Result(case.id, case.group, "passed")]})
    text = parsed(written(tmp_path, [run]))("section", id="mistakes")[0]["text"]
    assert "1 case that ran is none of the suite's own, and does not count here." in text


def test_an_interrupted_run_says_what_is_missing(tmp_path):
    cases = select(all_cases(), ["bn/train/offset0/8x3/float??"])
    right = Result(cases[0].id, cases[0].group, "passed")
    run = Run("m:A", ("m:A",), cases, "done", results={"A": [right]}, stopped="interrupted")
    text = parsed(written(tmp_path, [run]))("header")[0]["text"]
    assert "interrupted" in text
    assert "m:A: not all cases have a result." in text
    assert "interrupted: 1 of 2 cases have no result" in (tmp_path / "index.html").read_text()


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no space")

    (tmp_path / "index.html").write_text("old")
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        page.write_page(tmp_path, fake_runs(), "rbn conform", Console(file=io.StringIO()))
    assert [(other.name, other.read_text()) for other in tmp_path.iterdir()] == [("index.html", "old")]


def test_a_page_of_nothing(tmp_path):
    text = written(tmp_path, [Run("jittor", ("m:J",), (), "done", failure="no compiler")]).read_text()
    assert "No case ran." in text
    assert "no compiler" in text


# In a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A headless Chromium that tells what it requests and what its console says."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("needs Chromium: install Debian's chromium and chromium-driver, or the like")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for argument in (
        "--headless=new",
        "--no-sandbox",  # Chromium refuses to run as root with it
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(argument)
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chrome:
        yield chrome


def opened(chrome, file, width=1200, scheme="light", place=""):
    """Load a page anew in a window of some width."""
    window = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    chrome.get("about:blank")
    chrome.get_log("performance")
    chrome.get_log("browser")
    chrome.get(f"{Path(file).as_uri()}{place}")
    return chrome


def shown(chrome, selector):
    """How many elements are seen."""
    script = "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).length"
    return chrome.execute_script(script, selector)


def wait_for(condition):
    """A browser tells a page that something was unfolded a moment after it was: wait for what follows."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def typed(chrome, text):
    chrome.execute_script(
        "const field = document.getElementById('filter');"
        "field.value = arguments[0];"
        "field.dispatchEvent(new Event('input'))",
        text,
    )


def test_the_matrix_is_seen_and_nothing_is_requested(chromium, file):
    opened(chromium, file)
    assert shown(chromium, ".matrix td") > 0
    assert chromium.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    requested = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert {url.partition(":")[0] for url in requested} <= {"file", "data"}
    assert file.as_uri() in requested


@pytest.mark.parametrize("width", [360, 768, 1200])
def test_the_page_does_not_scroll_sideways(chromium, file, width):
    opened(chromium, file, width)
    chromium.execute_script(UNFOLD)
    page_width, room = chromium.execute_script(
        "const page = document.documentElement; return [page.scrollWidth, page.clientWidth]"
    )
    assert page_width == room <= width


UNFOLD = "document.querySelectorAll('details').forEach((folded) => { folded.open = true; })"

CONTRASTS = """
const luminance = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3)
    .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const back = getComputedStyle(e).backgroundColor;
    if (!(back.startsWith("rgba") && back.endsWith(", 0)"))) return back;
  }
  return "rgb(255, 255, 255)";
};
const low = {};
for (const e of document.querySelectorAll("body *")) {
  if (!e.checkVisibility() || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
  if (["SCRIPT", "STYLE"].includes(e.tagName)) continue;
  const [front, back] = [getComputedStyle(e).color, behind(e)];
  const [a, b] = [luminance(front), luminance(back)].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) low[`${front} on ${back}`] = `${ratio.toFixed(2)} ${e.outerHTML.slice(0, 80)}`;
}
return low;
"""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_text_has_the_contrast_that_wcag_aa_asks_for(chromium, fake, scheme):
    opened(chromium, fake, scheme=scheme)
    dark = chromium.execute_script(
        "return getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 128"
    )
    assert dark == (scheme == "dark")
    chromium.execute_script(UNFOLD)
    assert chromium.execute_script(CONTRASTS) == {}


def test_filtering(chromium, fake):
    opened(chromium, fake)
    everything = len(chromium.find_elements("css selector", ".case"))
    typed(chromium, "failed torch")
    assert shown(chromium, ".case") == shown(chromium, ".case.failed") == 3
    assert chromium.find_element("css selector", "output").text == f"3 of {everything} cases"
    typed(chromium, "group:bn/train/data/float32")
    groups = chromium.execute_script(
        "return [...document.querySelectorAll('.group')].filter(g => !g.hidden).map(g => g.dataset.group)"
    )
    assert set(groups) == {"bn/train/data/float32"}
    typed(chromium, "no such case")
    assert shown(chromium, ".group") == 0
    typed(chromium, "")
    assert (
        chromium.execute_script(
            "return document.querySelectorAll('.cases [hidden], .subject[hidden]').length"
        )
        == 0
    )
    assert shown(chromium, ".case.failed") == 3


def test_a_cell_leads_to_its_cases_and_a_case_unfolds(chromium, real):
    opened(chromium, real)
    assert shown(chromium, ".case") == 0
    chromium.find_element("css selector", ".matrix td a").click()
    wait_for(lambda: shown(chromium, ".case") > 0)
    chromium.find_element("css selector", ".group[open] .case summary").click()
    wait_for(lambda: shown(chromium, ".case table tbody tr") > 5)
    assert shown(chromium, ".case .command code") == 1


def test_a_row_leads_to_its_cases(chromium, fake):
    opened(chromium, fake)
    row = chromium.find_element("css selector", ".matrix tbody th a")
    chromium.execute_script("arguments[0].click()", row)
    assert chromium.find_element("css selector", "#filter").get_attribute("value") == f"group:{row.text}"
    assert 0 < shown(chromium, ".case") < len(chromium.find_elements("css selector", ".case"))


def test_an_address_with_a_place_unfolds_it(chromium, real):
    opened(chromium, real, place="#c1")
    assert chromium.execute_script("return document.getElementById('c1').open")
    wait_for(lambda: shown(chromium, "#c1 table") == 1)


def test_without_scripts_failures_are_readable(chromium, fake):
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened(chromium, fake)
        assert "ended the process" in chromium.find_element("css selector", "#cases").text
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_what_is_late_and_what_a_refusal_said_are_there(fake, tmp_path, monkeypatch):
    text = fake.read_text(errors="replace")
    assert "1 late</a>" in text
    assert '<p class="message">no result in time: ' in text
    assert '<p class="message">said</p>' in text
    assert "ValueError: it says why" in text
    run = Run(
        "torch", ("m:A",), (), "done", results={"A": [Result("rbn/f", "rbn/g", "late", message="slow")]}
    )
    text = written(tmp_path, [run]).read_text()
    assert text.count("no result in time</strong>") == 2  # of the run and of all
    assert "differs</strong>" not in text
    assert "nothing is known of it" in text
