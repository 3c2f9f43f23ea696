"""The book as a reader meets it: built by Sphinx, opened in a real browser that has no network."""

import functools
import html
import http.server
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
pytestmark = pytest.mark.xdist_group("site")  # one build for all
WITH_FIGURE = "nbs/02_magicpig/01_derive"

# Opens a page in a frame and writes into its own body what a reader would see there.
PROBE = """<!doctype html><body><iframe id="page" style="width:1400px;height:4000px"></iframe><script>
const page = document.getElementById("page"), path = new URLSearchParams(location.search).get("page");
const texts = (root, query) => [...root.querySelectorAll(query)].map(node => node.textContent.trim());
function look() {
  const d = page.contentDocument, w = page.contentWindow;
  return {
    title: d.title,
    sidebar: texts(d, ".bd-sidebar-primary a.internal"),
    parts: texts(d, ".bd-sidebar-primary .caption"),
    headings: texts(d, "main h2, main h3, main .rubric").map(text => text.replace(/#$/, "")),
    equations: d.querySelectorAll("mjx-container").length,
    broken_equations: d.querySelectorAll("mjx-merror, [data-mjx-error]").length,
    raw_equations: [...d.querySelectorAll(".math")].filter(node => /\\\\[(\\[]/.test(node.textContent)).length,
    figures: [...d.querySelectorAll("article img, main img")].filter(i => i.complete && i.naturalWidth > 100).length,
    hits: texts(d, "#search-results li a"),
    litter: texts(d, "main p, main li, main h1, main h2").join(" ").match(/#\\||default_exp|\\{#eq-|@eq-|<math/g) || [],
    resources: w.performance.getEntriesByType("resource").map(r => r.name),
  };
}
page.onload = () => setTimeout(() => {
  const out = document.createElement("pre");
  out.id = "seen"; out.textContent = JSON.stringify(look());
  document.body.replaceChildren(out);
}, 8000);
page.src = path;
</script></body>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(root, tmp_path_factory):
    """The built book. Every warning of Sphinx is an error: a dead reference, a heading out of order, a missing page."""
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "-d", out / "doctrees"]
    done = subprocess.run([*build, ".", out / "html"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (out / "html" / "probe.html").write_text(PROBE, encoding="utf-8")
    return out / "html"


@pytest.fixture(scope="module")
def see(site, tmp_path_factory):
    """Function: page path -> what a reader sees there."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium here, and it could not be installed: apt-get install chromium")
    profile = tmp_path_factory.mktemp("profile")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def look(page):
        address = f"http://127.0.0.1:{server.server_port}/probe.html?page={page}"
        command = [browser, "--headless", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                   f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                   "--virtual-time-budget=30000", "--dump-dom", address]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # Chromium's sandbox refuses to run as root
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
        assert seen, f"{browser} showed nothing of {page}\n{done.stderr[-2000:]}"
        return json.loads(html.unescape(seen[1]))

    yield look
    server.shutdown()


def test_every_chapter_is_in_the_sidebar(see, root, parts):
    from paperbook.core.book import load_book

    seen = see("index.html")
    titles = [notebook.title for chapter in load_book(root) for notebook in chapter.notebooks]
    plain = lambda text: re.sub(r"[`*’']", "", text)  # noqa: E731  Sphinx sets quotes and code in its own way
    missing = [title for title in titles if plain(title) not in map(plain, seen["sidebar"])]
    assert not missing, f"{missing} are not in the sidebar: {seen['sidebar']}"
    subjects = [part.split(":")[0] for part in seen["parts"]]
    assert list(dict.fromkeys(subjects)) == parts


def test_a_page_shows_equations_and_figures(see):
    seen = see(f"{WITH_FIGURE}.html")
    assert seen["equations"] > 10 and seen["broken_equations"] == seen["raw_equations"] == 0, seen
    assert seen["figures"] >= 1, "no figure was drawn"
    assert seen["litter"] == [], "the filter left nbdev's or Quarto's own marks on the page"


def test_the_reference_documents_the_public_names(see):
    import paperbook.magicpig

    seen = see("nbs/99_reference/02_magicpig.html")
    public = {name for name, value in vars(paperbook.magicpig).items() if inspect.isclass(value) or inspect.isfunction(value)}
    assert {"LSHConfig", "MagicPIGCache", "register"} <= public
    assert public <= set(seen["headings"]) and seen["litter"] == [], seen


def test_search_finds_a_page(see):
    seen = see("search.html%3Fq=collision")
    assert any("hash" in hit.lower() or "key" in hit.lower() for hit in seen["hits"]), seen["hits"]


def test_pages_ask_nothing_of_the_network(site, see):
    pages = [path.relative_to(site).as_posix() for path in site.rglob("*.html") if path.name != "probe.html"]
    for page in pages:
        text = (site / page).read_text(encoding="utf-8")
        asked = re.findall(r'<(?:script|img|iframe)[^>]+src="(https?://[^"]+)', text)
        asked += re.findall(r'<link[^>]+rel="stylesheet"[^>]+href="(https?://[^"]+)', text)
        assert not asked, f"{page} asks {asked}"
    seen = see(f"{WITH_FIGURE}.html")
    assert any("tex-chtml-full.js" in name for name in seen["resources"])
    assert [name for name in seen["resources"] if "//127.0.0.1:" not in name and not name.startswith("data:")] == []
