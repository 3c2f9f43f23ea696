"""The checkout keeps its own promises: one source for everything, nothing stale, no dead link."""

import ast
import filecmp
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from paperbook.core.records import fill_tables, load_claims, load_records, readme_tables

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*.qmd"), *(ROOT / "seeds").glob("*.md"), *NOTEBOOKS])
MAX_KB = 300
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


def cells(path, kind):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell | {"source": "".join(cell["source"])} for cell in notebook["cells"] if cell["cell_type"] == kind]


@cache
def prose(path):
    """The Markdown of a page, without its code blocks and code spans."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join(cell["source"] for cell in cells(path, "markdown"))
    return re.sub(r"^(```+).*?^\1[ \t]*$|(`+)[^`\n]+\2", "", text, flags=re.M | re.S)


def tracked():
    """Files that are, or are about to be, in the repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


# ---- the package and its notebooks ----


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    """The checkout's notebooks and package somewhere else, where nbdev may write."""
    place = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "paperbook"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copy(ROOT / name, place)
    return place


def nbdev(command, folder):
    done = subprocess.run([Path(sys.executable).parent / command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def differences(left, right):
    """Names of files that are not the same in two folders."""
    names = {p.relative_to(top) for top in (left, right) for p in top.rglob("*")
             if p.is_file() and "__pycache__" not in p.parts}
    return sorted(str(n) for n in names if not ((left / n).is_file() and (right / n).is_file()
                                               and filecmp.cmp(left / n, right / n, shallow=False)))


def test_export_is_in_sync(copy):
    exported = [*(copy / "paperbook").rglob("*.py")]
    for path in exported:
        if path.name != "__init__.py":
            path.unlink()  # a module whose notebook is gone must not survive
    nbdev("nbdev-export", copy)
    stale = differences(ROOT / "paperbook", copy / "paperbook")
    assert not stale, f"paperbook/ is not what the notebooks export: {stale}. Run `make export`."


def test_clean_is_a_no_op(copy):
    nbdev("nbdev-clean", copy)
    dirty = differences(ROOT / "nbs", copy / "nbs")
    assert not dirty, f"notebooks hold what nbdev-clean removes: {dirty}. Run `make export`."


@every_notebook
def test_folder_number_and_name_say_where_code_lives(path):
    module = re.findall(r"^#\| *default_exp +(\S+)", "\n".join(cell["source"] for cell in cells(path, "code")), re.M)
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem) and re.fullmatch(r"\d\d_[a-z0-9_]+", path.parent.name)
    assert module in ([], [f"{path.parent.name[3:]}.{path.stem[3:]}"])


def test_chapters_import_only_core():
    """A chapter imports `paperbook.core` and nothing of another chapter; core imports no chapter."""
    for path in (ROOT / "paperbook").glob("*/*.py"):
        own = path.parent.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom):
                base = ["", f"paperbook.{own}.", "paperbook."][min(node.level, 2)]
                names = [f"{base}{node.module or ''}".rstrip(".")]
                names += [f"{names[0]}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            used = {name.split(".")[1] for name in names if name.startswith("paperbook.")} - {"__version__"}
            assert used <= {own, "core"}, f"{path.relative_to(ROOT)} imports {used - {own, 'core'}}"


# ---- the book ----


def book():
    import yaml

    return yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["book"]


def test_table_of_contents_is_complete_and_in_order(parts):
    listed = [page for part in book()["chapters"] if isinstance(part, dict) for page in part["chapters"]]
    written = [path.relative_to(ROOT).as_posix() for path in NOTEBOOKS]
    assert sorted(listed) == written, "_quarto.yml must list each notebook once"
    within = {}
    for page in listed:
        within.setdefault(Path(page).parent, []).append(page)
    assert all(pages == sorted(pages) for pages in within.values())
    named = [part["part"].split(":")[0] for part in book()["chapters"] if isinstance(part, dict)]
    assert list(dict.fromkeys(named)) == parts


def test_preface_names_every_paper():
    preface = (ROOT / "index.qmd").read_text(encoding="utf-8")
    assert [paper["arxiv"] for paper in load_claims(ROOT).values() if paper["arxiv"] not in preface] == []


def test_there_is_one_quarto_project():
    found = [path for path in tracked() if path.name.startswith("_quarto.y")]
    assert found == [ROOT / "_quarto.yml"], "nbdev likes to make a second one in nbs/"


def test_top_level_is_the_houses():
    """A new top-level folder is a decision, not an accident."""
    folders = {path.relative_to(ROOT).parts[0] for path in tracked() if len(path.relative_to(ROOT).parts) > 1}
    assert folders <= {"nbs", "paperbook", "tests", "seeds", "docs", ".ci", ".github"}


def test_quarto_filter_takes_out_housekeeping():
    code = lambda source: {"cell_type": "code", "metadata": {}, "outputs": [], "source": source}  # noqa: E731
    title = {"cell_type": "markdown", "metadata": {}, "source": "# Title"}
    notebook = {"metadata": {}, "cells": [code("#| default_exp a.b"), code(["#| hide\n", "import nbdev"]),
                                          code("#| exports\ndef f():\n    pass"), title]}
    done = subprocess.run([sys.executable, ROOT / "docs/nbfilter.py"], input=json.dumps(notebook), capture_output=True,
                          text=True, check=True, cwd=ROOT / "nbs")
    assert [cell["source"] for cell in json.loads(done.stdout)["cells"]] == [["def f():\n", "    pass"], ["# Title"]]


# ---- each notebook ----


@every_notebook
def test_notebook_takes_parameters(path):
    tagged = [cell for cell in cells(path, "code") if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1, "one cell is tagged parameters"
    values = {}
    for line in ast.parse(tagged[0]["source"]).body:
        values[line.targets[0].id] = ast.literal_eval(line.value)  # literals only: papermill injects right after it
    assert values["scale"] == "ci" and values["seed"] == 0


@every_notebook
def test_notebook_can_be_read(path):
    words = sum(len(cell["source"].split()) for cell in cells(path, "markdown"))
    assert words >= 250, f"{words} words of prose: the reader wants the why"
    long = [cell["source"].splitlines()[0] for cell in cells(path, "code") if len(cell["source"].splitlines()) > 45]
    assert not long, f"one idea a cell; these are over 45 lines: {long}"
    first = cells(path, "markdown")[0]["source"]
    assert re.match(r"# .+\n+> .+", first), "the first cell is a title and one sentence in a quote"


@every_notebook
def test_outputs_are_fit_to_commit(path):
    kilobytes = path.stat().st_size // 1000
    assert kilobytes <= MAX_KB, f"{kilobytes} kB: keep a notebook under {MAX_KB} kB"
    ran = [cell for cell in cells(path, "code") if cell["source"].strip()]
    assert any(cell["outputs"] for cell in ran), "committed without outputs: run `make notebooks`"
    for cell in ran:
        assert cell.get("execution_count") is None
        for output in cell["outputs"]:
            assert output["output_type"] != "error", output
            data = output.get("data", {})
            assert not any("widget" in kind for kind in data), "a widget does not survive in a committed notebook"
            texts = [output.get("text", []), *(value for kind, value in data.items() if kind.startswith("text/"))]
            text = "".join("".join(lines) for lines in texts)
            assert not MACHINE.search(text), f"a path of one machine: {MACHINE.search(text)[0]}"
            assert not re.search(r"\d+%\|.*\||\d(it/s|s/it)\b", text), f"a progress bar: {text[:200]}"


# ---- links ----

LINK = re.compile(r"(?<!\\)\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^()\s>]*(?:\([^()\s]*\)[^()\s>]*)*)>?(?:\s+\"[^\"]*\")?\)")


@cache
def anchors(path):
    """The names of a page's headings, as GitHub and MyST make them."""
    seen, names = Counter(), set()
    for heading in re.findall(r"^#+[ \t]+(.+?)[ \t]*(?:\{.*\})?$", prose_with_code_spans(path), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        names.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return names


def prose_with_code_spans(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join(cell["source"] for cell in cells(path, "markdown"))
    return re.sub(r"^(```+).*?^\1[ \t]*$", "", text, flags=re.M | re.S)


@every_page
def test_links_are_alive(path):
    dead = []
    for target in LINK.findall(prose(path)):
        link = urlsplit(target)
        if link.scheme:
            if link.scheme not in ("https", "mailto") or not (link.netloc or link.path) or " " in target:
                dead.append(f"{target} (not a well-formed https address)")
            continue
        other = (path.parent / unquote(link.path)).resolve() if link.path else path
        if not other.exists():
            dead.append(f"{target} (no such file)")
        elif not other.is_relative_to(ROOT):
            dead.append(f"{target} (outside the checkout)")
        elif link.fragment and link.fragment not in anchors(other):
            dead.append(f"{target} (no such heading)")
    assert not dead, "\n".join(dead)


EQUATION = re.compile(r"\{#(eq-[\w-]+)\}")


def test_equations_are_labelled_once_and_by_chapter():
    labels = Counter(label for path in NOTEBOOKS for label in EQUATION.findall(prose(path)))
    assert [label for label, count in labels.items() if count > 1] == []
    for path in NOTEBOOKS:
        wrong = [label for label in EQUATION.findall(prose(path))
                 if not label.startswith(f"eq-{path.parent.name[3:].replace('_', '-')}-")]
        assert not wrong, f"{path.name}: a label carries its chapter's name: {wrong}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_equation_references_resolve(path):
    labels = {label for other in NOTEBOOKS for label in EQUATION.findall(prose(other))}
    everything = "\n".join(cell["source"] for kind in ("markdown", "code") for cell in cells(path, kind))
    assert set(re.findall(r"(?<![\w`/])@(eq-[\w-]*\w)", everything)) <= labels


# ---- claims, records, tables ----


def test_claims_are_well_formed():
    papers = tomllib.loads((ROOT / "seeds/claims.toml").read_text(encoding="utf-8"))
    assert list(papers) == ["attention_transfer", "magicpig", "q_galore", "welore", "cogo", "dualformer", "cgpo",
                            "meta_rewarding", "agent_as_a_judge", "ttg"]
    for paper in papers.values():
        assert set(paper) == {"title", "arxiv", "year", "claims"} and re.fullmatch(r"\d{4}\.\d{5}", paper["arxiv"])
        identities = [claim["id"] for claim in paper["claims"]]
        assert len(set(identities)) == len(identities) > 0
        for claim in paper["claims"]:
            assert set(claim) == {"id", "says", "metric", "paper"} and claim["says"].endswith(".")
            assert all(isinstance(figure, int | float) for figure in claim["paper"].values())


def test_written_chapters_are_those_of_the_claims():
    papers = list(load_claims(ROOT))
    for folder in {path.parent for path in NOTEBOOKS}:
        number, name = int(folder.name[:2]), folder.name[3:]
        if number not in (0, 99):
            assert papers[number - 1] == name, f"{folder.name}: chapter {number} is {papers[number - 1]}"


def test_records_pay_claims_that_exist(monkeypatch, tmp_path):
    monkeypatch.setenv("PAPERBOOK_RESULTS", str(tmp_path))  # only what is committed
    claims = load_claims(ROOT)
    for record in load_records():
        known = [claim["id"] for claim in claims.get(record.chapter, {}).get("claims", [])]
        assert record.claim is None or record.claim in known, record
    # A record nobody can find is no record: folder, name, scale and machine are in its file name.
    for path in (ROOT / "nbs").glob("*/results/*.json"):
        raw = json.loads(path.read_text(encoding="utf-8"))
        assert path.parent.parent.name[3:] == raw["chapter"]
        assert path.stem == f"{raw['name']}--{raw['scale']}--{raw['machine']['slug']}"
        assert raw["scale"] != "ci" or raw["claim"] is None, f"{path.name}: a small run pays no claim"


def test_readme_tables_are_current():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- table:claims -->" in text
    assert fill_tables(text, readme_tables(ROOT)) == text, "README.md is behind the records: run `make tables`"


# ---- hygiene ----

MACHINE = re.compile(r"(?<![\w.}>$~-])/(?:work|root|farm|home|Users|tmp/\w+|opt/[a-z])/[\w.-]+|\b[A-Z]:\\Users\\")


def test_no_paths_of_one_machine():
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in MACHINE.finditer(text)]
    assert not found, "\n".join(found)


def test_no_file_is_too_large():
    most = {"adapter_model.safetensors": 10_000_000}  # the weights that To the Globe reads with
    large = [path.relative_to(ROOT).as_posix() for path in tracked() if path.stat().st_size > most.get(path.name, 500_000)]
    assert not large, f"over 500 kB, or 10 MB for an adapter: {large}"


def test_code_style():
    """`ruff check`, with the rules of pyproject.toml, over what is written by hand."""
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "-q", "setup.py", "docs", "tests"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
