"""core.cli: the command as a newcomer meets it, in a process of its own."""

import json
import os
import subprocess
import sys
import time

import pytest

pytest.importorskip("papermill")
from toybook import ToyBook  # noqa: E402

RUN = """
from paperbook.core.records import Verdict, record
record("doubling", chapter="toy", scale=scale, metrics={"ratio": 2.0}, claim="double",
       table=[{"size": size, "doubled": 2 * size}], verdict=Verdict("reproduced", f"{size} became {2 * size}"))
"""
FIGURE = """
from IPython.display import display
display({"image/png": "iVBORw0KGgo="}, raw=True)
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    book = ToyBook(tmp_path_factory.mktemp("book"))
    book.write("01_double", RUN, FIGURE)
    return book


@pytest.fixture
def call(toy):
    """Run `paperbook WORDS` inside the toy book; the finished process."""

    def run(*words, **env):
        full = os.environ | {"PAPERBOOK_HOME": str(toy.root), "COLUMNS": "160"} | env
        for name in ("PAPERBOOK_RESULTS", "FORCE_COLOR"):
            full.pop(name, None)
        code = "from paperbook.core.cli import app; app(prog_name='paperbook')"
        return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, env=full,
                              cwd=toy.root, timeout=120)

    return run


def test_run_shows_table_verdict_and_places(call, toy):
    done = call("run", "toy", "-p", "size", 21)
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stderr and "toy/01_double" in done.stdout
    assert "toy.doubling" in done.stdout and "42" in done.stdout
    assert "claim double: reproduced. 21 became 42" in done.stdout
    assert f"executed notebooks: {toy.root / '_runs' / 'notebooks'}" in done.stdout
    assert (toy.root / "_runs" / "notebooks" / "toy" / "01_double.ipynb").is_file()
    assert (toy.root / "_runs" / "figures" / "toy" / "01_double-1.png").is_file()
    report = {row["claim"]: row for row in json.loads(call("report", "--json").stdout)}
    assert (report["double"]["status"], report["halve"]["status"], report["much"]["status"]) == (
        "reproduced", "not yet", "not yet")


def test_a_failing_notebook_is_told_and_counted(call, toy, tmp_path):
    bad = toy.write("02_bad", "print('fine')", "raise RuntimeError('on purpose')")
    try:
        done = call("run", "02_bad", "--out", tmp_path / "elsewhere")
    finally:
        bad.path.unlink()
    assert done.returncode == 1 and "RuntimeError: on purpose" in done.stdout and "toy/02_bad failed" in done.stdout
    assert (tmp_path / "elsewhere" / "notebooks" / "toy" / "02_bad.ipynb").is_file()


@pytest.mark.parametrize("words, says", [
    (("run", "tory"), "names no chapter or notebook. Did you mean toy?"),
    (("run", "later"), "planned and has no notebooks yet"),
    (("run", "toy", "--scale", "huge"), "huge"),
    (("run", "toy", "-p", "sise", "3"), "no selected notebook has a parameter 'sise'"),
    (("run", "toy", "-p", "size"), "is not a name and a value"),
    (("run", "toy", "-p"), "is not a name and a value"),
    (("run", "toy", "--workers", "0"), "--workers"),
    (("run", "toy", "--refresh", "-p", "size", "3"), "leave scale and parameters alone"),
    (("run",), "TARGET"),
    (("sing",), "sing"),
    (("report", "--json", "--markdown"), "exclude each other"),
])
def test_bad_input_is_one_message_and_status_2(call, words, says):
    done = call(*words)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr + done.stdout


def test_outside_a_checkout(call, tmp_path):
    done = call("list", PAPERBOOK_HOME=str(tmp_path))
    assert done.returncode == 2 and "PAPERBOOK_HOME" in done.stderr and "Traceback" not in done.stderr
    assert "Traceback" in call("list", PAPERBOOK_HOME=str(tmp_path), PAPERBOOK_DEBUG="1").stderr


def test_list_names_chapters_notebooks_and_plans(call):
    shown = call("list").stdout
    assert "01 toy" in shown and "01_double" in shown and "02 later  (planned)" in shown


def test_report_in_every_form(call, toy):
    assert call("report").returncode == 0
    assert call("report", "--markdown").stdout.startswith("| chapter | claim |")
    broken = toy.root / "nbs" / "01_toy" / "results" / "torn--full--x.json"
    broken.parent.mkdir(exist_ok=True)
    broken.write_text("{")
    try:
        done = call("report")
    finally:
        broken.unlink()
    assert done.returncode == 0 and "unreadable record" in done.stdout and "Much will be shown" in done.stdout


def test_report_write_fills_the_readme_once(call, toy):
    readme = toy.root / "README.md"
    readme.write_text("# Toy\n\n<!-- table:claims --><!-- /table -->\n")
    assert "filled" in call("report", "--write").stdout
    once = readme.read_text()
    assert "Not yet: toy 2, later 1" in once
    assert "current" in call("report", "--write").stdout and readme.read_text() == once
    readme.write_text("<!-- table:nothing --><!-- /table -->")
    done = call("report", "--write")
    assert done.returncode == 2 and "no table 'nothing'" in done.stderr


def test_assets_say_where_or_how(call, tmp_path):
    done = call("assets", PAPERBOOK_CACHE=str(tmp_path))
    assert done.returncode == 0 and "SmolLM2-135M-Instruct" in done.stdout and "python-reference" in done.stdout


def test_help_for_every_verb_and_a_fast_start(call):
    start = time.perf_counter()
    top = call("--help").stdout
    assert time.perf_counter() - start < 10
    for verb in ("list", "run", "report", "assets"):
        assert verb in top and call(verb, "--help").returncode == 0
    assert call("--version").stdout.startswith("paperbook ")
    probe = "import sys, paperbook.core.cli; print(sorted({'torch', 'papermill', 'nbformat', 'numba'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "[]\n"


CHAPTER = '''"""Sing the toy's song."""
import typer
print("imported")
app = typer.Typer()

@app.command()
def sing(loud: bool = False):
    """Sing."""
    print("LA" if loud else "la")

@app.command()
def stumble():
    """Fail as a chapter would."""
    raise ValueError("pitch=9 is too high. Use 1 to 5.")
'''


def test_a_chapters_command_is_found_by_its_file_and_imported_only_when_called(tmp_path):
    """Core knows no chapter: a package with toy/cli.py is enough."""
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "cli.py").write_text(CHAPTER)
    code = f"import paperbook; paperbook.__path__.append({str(tmp_path)!r})\n" \
           "from paperbook.core.cli import app; app(prog_name='paperbook')"

    def call(*words):
        return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)

    top = call("--help").stdout
    assert "Sing the toy's song." in top and "imported" not in top
    assert call("toy", "sing", "--loud").stdout == "imported\nLA\n"
    assert "Usage: paperbook toy sing" in call("toy", "sing", "--help").stdout
    wrong = call("toy", "stumble")
    assert wrong.returncode == 2 and wrong.stderr == "paperbook: pitch=9 is too high. Use 1 to 5.\n"
