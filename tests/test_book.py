"""core.book: finding notebooks, running them, and above all what happens when one goes wrong."""

import base64
import json
import os
import time

import pytest

pytest.importorskip("papermill")
import nbformat  # noqa: E402
import psutil  # noqa: E402
from toybook import ToyBook  # noqa: E402

from paperbook.core import book as core_book  # noqa: E402
from paperbook.core.book import (  # noqa: E402
    Notebook,
    ToolMissing,
    UnknownTarget,
    extract_figures,
    load_book,
    run_notebook,
    run_notebooks,
    select,
)

RECORD = """
from paperbook.core.records import record
record("answer", chapter="toy", scale=scale, metrics={"size": size})
"""
WELL = """
import os
print(scale, size, os.environ["OMP_NUM_THREADS"], os.environ["NUMBA_NUM_THREADS"], os.path.basename(os.getcwd()))
"""
ERROR = "def divide(a, b):\n    return a / b\n\ndivide(size, 0)  # here it goes wrong"
MEMORY = """
import resource
used = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, used[1]))
block = bytearray(8 * 2**30)
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return ToyBook(tmp_path_factory.mktemp("book"))


def printed(outcome):
    cells = nbformat.read(outcome.executed, 4).cells
    return "".join(out.get("text", "") for cell in cells for out in cell.get("outputs", ()) if out.get("name") == "stdout")


def test_each_patient_ends_in_its_own_way_and_the_others_finish(toy):
    """One run over notebooks that work, raise, hang, are killed, run out of memory, and cannot be read."""
    patients = [
        toy.write("01_well", WELL, RECORD),
        toy.write("02_error", "print('before')", ERROR, "print('never')"),
        toy.write("03_hangs", "import time\nwhile True: time.sleep(0.1)"),
        toy.write("04_killed", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"),
        toy.write("05_memory", MEMORY),
        toy.write("06_syntax", "def ("),
        toy.write("07_plain", "print('no size here')", parameters='scale = "ci"'),
        Notebook(toy.root / "broken.ipynb", "toy", "08_broken"),
    ]
    patients[-1].path.write_text('{"cells": [')
    done = run_notebooks(patients, toy.out, parameters={"size": 7}, workers=3, threads=1, cell_timeout_s=8)
    outcomes = {outcome.notebook.name: outcome for outcome in done}
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "01_well": "passed", "02_error": "failed", "03_hangs": "timed out", "04_killed": "died",
        "05_memory": "failed", "06_syntax": "failed", "07_plain": "passed", "08_broken": "failed"}
    assert all(bool(outcome.message) != outcome.passed for outcome in done)

    # parameters, scale, threads, folder and the place for records arrive, and leave no trace here
    assert printed(outcomes["01_well"]) == "ci 7 1 1 01_toy\n"
    saved = json.loads(next((toy.out / "results" / "toy").glob("answer--ci--*.json")).read_text())
    assert saved["metrics"] == {"size": 7} and saved["command"] == "paperbook run toy/01_well --scale ci -p size 7"
    assert "PAPERBOOK_COMMAND" not in os.environ and "PAPERBOOK_RESULTS" not in os.environ

    # a failure shows its cell and its traceback, without colours and machinery, and keeps what ran
    message = outcomes["02_error"].message
    assert message.startswith("toy/02_error failed in cell 4") and "divide(size, 0)  # here it goes wrong" in message
    assert message.endswith("ZeroDivisionError: division by zero") and "return a / b" in message
    assert "\x1b" not in message and "papermill" not in message
    assert printed(outcomes["02_error"]) == "before\n"

    for name, says in [("03_hangs", "the cell took longer than 8 s"), ("05_memory", "MemoryError"),
                       ("04_killed", "most often because memory ran out"), ("05_memory", "Try fewer at once"),
                       ("06_syntax", "SyntaxError"), ("08_broken", "broken.ipynb is no readable notebook")]:
        assert says in outcomes[name].message, outcomes[name].message


def test_a_notebook_stuck_in_compiled_code_is_ended_with_all_its_processes(toy):
    """The regular expression holds the interpreter's lock for ever, so that no interrupt is heard."""
    stuck = toy.write("20_stuck", "print('in', flush=True)", "import re\nre.match('(a+)+$', 'a' * 60 + 'b')")
    before, start = {p.pid for p in psutil.Process().children(recursive=True)}, time.perf_counter()
    outcome = run_notebook(stuck, toy.out, timeout_s=12)
    assert outcome.status == "timed out" and "the notebook took longer than 12 s" in outcome.message
    assert time.perf_counter() - start < 25
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before


def test_refresh_stores_outputs_that_do_not_change(toy):
    noisy = toy.write("30_noisy", "import sys\nprint(1)\nprint('warning', file=sys.stderr)\nprint(scale, size)", "size + 1")
    raw = json.loads(noisy.path.read_text())
    raw["cells"][1]["execution_count"] = 9
    noisy.path.write_text(json.dumps(raw))
    stored = []
    for _ in range(2):
        assert run_notebook(noisy, toy.out, refresh=True).passed
        stored.append(noisy.path.read_text())
    assert stored[0] == stored[1] and stored[0].endswith("}\n")
    notebook = nbformat.reads(stored[0], 4)
    assert notebook.cells[2].outputs == [{"name": "stdout", "output_type": "stream", "text": "1\nci 1\n"}]
    assert all(cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    assert "papermill" not in stored[0] and notebook.cells[1].metadata == {"tags": ["parameters"]}


def test_a_failed_refresh_leaves_the_notebook_alone(toy):
    bad = toy.write("31_bad", "1 / 0")
    before = bad.path.read_bytes()
    assert not run_notebook(bad, toy.out, refresh=True).passed
    assert bad.path.read_bytes() == before


@pytest.mark.parametrize("wrong, says", [
    (dict(scale="huge"), "scale='huge'.*ci, full, gpu"),
    (dict(parameters={"sise": 1}), "no parameter 'sise'. It has: scale, size"),
    (dict(refresh=True, parameters={"size": 1}), "leave scale and parameters alone"),
    (dict(refresh=True, scale="full"), "leave scale and parameters alone"),
])
def test_bad_arguments_start_nothing(toy, monkeypatch, wrong, says):
    monkeypatch.setattr(core_book, "_supervise", lambda *_: pytest.fail("a process was started"))
    notebook = toy.write("40_idle", "1")
    with pytest.raises(ValueError, match=says):
        run_notebook(notebook, toy.out, **wrong)


def test_bad_arguments_for_many(toy):
    some = [toy.write("40_idle", "1"), toy.write("07_plain", "1", parameters='scale = "ci"')]
    with pytest.raises(ValueError, match="no selected notebook has a parameter 'sise'. They have: scale, size"):
        run_notebooks(some, toy.out, parameters={"sise": 1})
    with pytest.raises(ValueError, match="workers=0"):
        run_notebooks(some, toy.out, workers=0)
    with pytest.raises(ValueError, match="scale='huge'"):
        run_notebooks(some, toy.out, scale="huge")


def test_without_papermill_the_command_is_named(toy, monkeypatch):
    monkeypatch.setattr(core_book, "find_spec", lambda name: None)
    with pytest.raises(ToolMissing, match=r"pip install 'paperbook\[dev\]'"):
        run_notebook(toy.write("40_idle", "1"), toy.out)


def test_parameters_must_be_literals(toy):
    sly = toy.write("41_sly", "1", parameters="size = 2 ** 10")
    with pytest.raises(ValueError, match="toy/41_sly: the parameters cell"):
        sly.parameters  # noqa: B018


def test_book_lists_what_is_written_and_what_is_planned(tmp_path):
    book = ToyBook(tmp_path)
    book.write("01_first", "#| default_exp toy.first")
    book.write("02_second", "1")
    (tmp_path / "nbs" / "01_toy" / "notes.ipynb").write_text("not part of the book")
    chapters = load_book(tmp_path)
    assert [(c.number, c.name, c.title, len(c.notebooks)) for c in chapters] == [
        (1, "toy", "A toy paper", 2), (2, "later", "A paper for later", 0)]
    first, second = chapters[0].notebooks
    assert (first.title, first.module, second.module) == ("About 01_first", "paperbook.toy.first", None)
    assert first.parameters == {"scale": "ci", "size": 1}


def test_select(tmp_path, monkeypatch):
    toy = ToyBook(tmp_path)
    one, two = toy.write("01_derive", "1"), toy.write("02_index", "1")
    other = toy.write("01_derive", "1", chapter="03_other")
    book = load_book(tmp_path)
    assert select(book, "all") == [one, two, other]
    assert select(book, "toy") == select(book, "01_toy") == select(book, "nbs/01_toy/") == [one, two]
    for target in ("index", "02_index", "toy/index", "01_toy/02_index", str(two.path)):
        assert select(book, target) == [two]
    assert select(book, "other/derive") == [other]
    monkeypatch.chdir(one.path.parent)
    assert select(book, "01_derive.ipynb") == [one]
    with pytest.raises(UnknownTarget, match="'derive' could be toy/01_derive or other/01_derive"):
        select(book, "derive")
    with pytest.raises(UnknownTarget, match="chapter 'later' is planned"):
        select(book, "later")
    with pytest.raises(UnknownTarget, match="Did you mean toy/02_index"):
        select(book, "toy/indxe")
    with pytest.raises(UnknownTarget, match="paperbook list"):
        select(book, "zzzzzz")


def test_extract_figures(tmp_path):
    png = base64.b64encode(b"picture").decode()
    cell = nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output("display_data", {"image/png": png})])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell("", outputs=cell.outputs)]), tmp_path / "01_x.ipynb")
    paths = extract_figures(tmp_path / "01_x.ipynb", tmp_path / "figures")
    assert [p.name for p in paths] == ["01_x-1.png", "01_x-2.png"] and paths[1].read_bytes() == b"picture"
