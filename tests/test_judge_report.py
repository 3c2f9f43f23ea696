"""The page of a judged task, opened from a file in a real browser: what it quotes is hostile, and nothing of it may run, load or be hidden."""

import shutil

import pytest
from test_site import BROWSERS
from test_ttg_demo import Browser, wait

from paperbook.agent_as_a_judge.devai import Task
from paperbook.agent_as_a_judge.judge import Report
from paperbook.agent_as_a_judge.report import write_report
from paperbook.agent_as_a_judge.static import Evidence, Usage, Verdict

pytestmark = pytest.mark.xdist_group("judge_report")  # one browser for all

HOSTILE = """</pre></li></ol></code></div></details></article></title></style></svg><script>document.title = "owned"; owned = 1</script>
<img src="http://127.0.0.1:9/img" onerror="owned = 1"><svg onload="owned = 1"><iframe src="javascript:owned = 1"></iframe><link rel="stylesheet" href="http://127.0.0.1:9/css">
<meta http-equiv="refresh" content="0;url=http://127.0.0.1:9/"><base href="http://127.0.0.1:9/"><form action="http://127.0.0.1:9/"><input autofocus onfocus="owned = 1"></form>
" onmouseover="owned = 1" ' autofocus onfocus='owned = 1' <style>body { display: none }</style><a href="javascript:owned = 1">click</a><!-- <plaintext> `</code><script>owned = 1</script>`
"""
WIDE = "wide" * 150


def hostile_report():
    rows = [dict(criteria=f"{number} {HOSTILE} {WIDE}", category=HOSTILE, prerequisites=list(range(number))) for number in range(4)]
    pieces = (Evidence("file", "src/train.py:12", f"{WIDE}\n{HOSTILE}", HOSTILE), Evidence(HOSTILE, f"{WIDE}/{HOSTILE}", HOSTILE, WIDE))
    verdicts = [Verdict(number, satisfied, HOSTILE, pieces, 0.5, Usage(1), 1.0, HOSTILE, HOSTILE if number == 3 else None) for number, satisfied in enumerate((True, False, None, None))]
    task = Task(name=f"name {HOSTILE}", query=HOSTILE, requirements=rows)
    other = task.model_copy(update=dict(requirements=[row.model_copy(update=dict(satisfied=True, criteria=HOSTILE)) for row in task.requirements]))
    return Report(task, {"judge": HOSTILE, "model": HOSTILE}, HOSTILE, f"{WIDE}{HOSTILE}", HOSTILE, verdicts), other


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    command = next(filter(None, map(shutil.which, BROWSERS)), None)
    if command is None:
        pytest.skip("no Chromium here, and it could not be installed: apt-get install chromium")
    made = Browser(command, tmp_path_factory.mktemp("profile"))
    made.do("Page.enable")
    yield made
    made.process.terminate()
    made.process.wait(30)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    report, other = hostile_report()
    return write_report(report, tmp_path_factory.mktemp("page") / "page.html", compare=other, compare_name=HOSTILE)


def visit(browser, path, width=1280, scheme="light"):
    """Open a file; the addresses that it asked for."""
    browser.do("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.do("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])
    browser.do("Page.navigate", url="about:blank")
    browser.events.clear()
    browser.do("Page.navigate", url=path.as_uri())
    wait(lambda: browser.js("location.protocol == 'file:' && document.readyState") == "complete", 20)
    browser.js("new Promise(done => setTimeout(done, 300))")
    return [event["params"]["request"]["url"] for event in browser.events if event.get("method") == "Network.requestWillBeSent"]


def key(browser, name, code):
    for kind in ("keyDown", "keyUp"):
        browser.do("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, text="\r" if name == "Enter" and kind == "keyDown" else "")


def test_nothing_that_is_quoted_runs_or_loads(browser, page):
    assert visit(browser, page) == [page.as_uri()]
    assert browser.js("typeof owned") == "undefined"
    assert browser.js("document.title").startswith("name </pre>")
    assert browser.js("document.querySelectorAll('script, img, iframe, link, base, form, input, object, embed, plaintext, [onload], [onerror], [onfocus], [onmouseover], [style], [src]').length") == 0
    assert browser.js("[document.querySelectorAll('style').length, document.querySelectorAll('svg').length, document.querySelectorAll('article').length]") == [1, 1, 4]
    assert browser.js("[...document.querySelectorAll('a')].every(a => a.getAttribute('href').startsWith('#'))")
    assert browser.js("[...document.querySelectorAll('#e0-0 li')].map(line => line.textContent)") == [WIDE, *HOSTILE.splitlines()], "what a file holds is shown to the letter"
    assert browser.js("document.querySelector('#e0-1 pre').textContent") == HOSTILE.removesuffix("\n")


def test_the_policy_holds_where_escaping_would_not(browser, page, tmp_path):
    hole = '<script>document.title = "owned"; owned = 1</script><img src="http://127.0.0.1:9/x" onerror="owned = 1"><p id="hole" style="display: none" onclick="owned = 1">hole</p>'
    torn = tmp_path / "torn.html"
    torn.write_text(page.read_text(encoding="utf-8").replace("<main>", f"<main>{hole}"), encoding="utf-8")
    visit(browser, torn)
    browser.js("document.getElementById('hole').click()")
    assert browser.js("[typeof owned, getComputedStyle(document.getElementById('hole')).display]") == ["undefined", "block"]
    assert browser.js("document.title") != "owned" and browser.outside() == [torn.as_uri()]


def test_evidence_opens_by_click_and_by_keyboard(browser, page):
    visit(browser, page)
    is_open = "[...document.querySelectorAll('article details')].map(d => d.open && d.querySelector('figure').getBoundingClientRect().height > 0)"
    assert browser.js(is_open) == [False] * 4
    x, y = browser.js("(s => { s.scrollIntoView({block: 'center'}); const r = s.getBoundingClientRect(); return [r.x + 20, r.y + r.height / 2]; })(document.querySelectorAll('article summary')[1])")
    for kind in ("mousePressed", "mouseReleased"):
        browser.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    wait(lambda: browser.js(is_open) == [False, True, False, False], 5, lambda: browser.js(is_open))
    browser.js("document.activeElement.blur(); document.querySelector('.node').focus()")
    nodes = []
    while not browser.js("document.activeElement.matches('article summary')"):
        nodes.append(browser.js("document.activeElement.getAttribute('href')"))
        key(browser, "Tab", 9)
        assert len(nodes) < 60, nodes
    assert nodes[:4] == ["#r0", "#r1", "#r2", "#r3"], "every node of the graph is reached by Tab"
    key(browser, "Enter", 13)
    wait(lambda: browser.js(is_open) == [True, True, False, False], 5, lambda: browser.js(is_open))


def test_links_lead_to_requirements_and_to_what_was_shown_before(browser, page, tmp_path):
    visit(browser, page)
    browser.js("document.querySelectorAll('.node')[2].focus()")
    key(browser, "Enter", 13)
    wait(lambda: browser.js("document.querySelector('article:target')?.id") == "r2", 5)
    long = (Evidence("file", "train.log", f"{HOSTILE}\n" * 100),)
    rows = Report(Task(name="long", requirements=["a", "b"]), {"judge": "llm"}, "black_box", "work", "0", [Verdict(number, True, "", long) for number in (0, 1)])
    visit(browser, write_report(rows, tmp_path / "long.html"))
    browser.js("document.querySelector('#r1 details').open = true; document.querySelector('#r1 figure a').click()")
    wait(lambda: browser.js("[location.hash, document.querySelector('#r0 details').open]") == ["#e0-0", True], 5)


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (800, "dark"), (1280, "light")])
def test_the_page_fits_every_window(browser, page, width, scheme):
    visit(browser, page, width, scheme)
    browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js("[...document.querySelectorAll('main p, main h3, main dd, main .badge')].filter(e => e.getBoundingClientRect().right > innerWidth).length") == 0
    assert (browser.js("getComputedStyle(document.documentElement).backgroundColor") == "rgb(253, 252, 249)") == (scheme == "light"), "the page's own style is allowed, and follows the reader's scheme"
