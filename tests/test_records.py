"""core.records: what is written, what is refused, and how claims, tables and broken files are shown."""

import dataclasses
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from toybook import ToyBook

from paperbook.core import records
from paperbook.core.records import (
    STATUSES,
    BookNotFound,
    RecordError,
    Verdict,
    claim_rows,
    fill_tables,
    find_root,
    load_claims,
    load_record,
    load_records,
    readme_tables,
    record,
    render_table,
)

YES = Verdict("reproduced", "2.0 times")


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.delenv("PAPERBOOK_RESULTS", raising=False)
    monkeypatch.setenv("PAPERBOOK_HOME", str(tmp_path))
    return ToyBook(tmp_path)


def toy(name="speed", scale="ci", **more):
    return record(name, **({"chapter": "toy", "scale": scale, "metrics": {"x": 1}} | more))


def test_where_records_go(book, monkeypatch):
    assert toy().parent == book.root / "_runs" / "results" / "toy"
    assert toy(scale="full").parent == toy(scale="gpu").parent == book.root / "nbs" / "01_toy" / "results"
    monkeypatch.setenv("PAPERBOOK_RESULTS", str(book.root / "elsewhere"))
    assert toy(scale="full").parent == book.root / "elsewhere" / "toy"


def test_what_a_record_holds(book):
    torch = pytest.importorskip("torch")
    path = toy(metrics={"a": np.float32(0.5), "b": torch.tensor([1, 2]), "c": float("nan"), 4: -np.inf},
               params={"p": (1, None)}, table=[{"row": np.int8(1)}], claim="double", verdict=YES, seeds=range(2),
               wall_s=1.23456)
    raw = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert raw["metrics"] == {"a": 0.5, "b": [1, 2], "c": None, "4": None}
    assert (raw["params"], raw["table"], raw["seeds"], raw["wall_s"]) == ({"p": [1, None]}, [{"row": 1}], [0, 1], 1.235)
    assert raw["schema"] == 1 and raw["machine"]["cores"] >= 1 and "python" in raw["versions"] and raw["command"]
    assert str(book.root) not in path.read_text()
    back = load_record("toy", "speed")
    assert back.verdict == YES and dataclasses.asdict(back) == raw


@pytest.mark.parametrize("wrong, says", [
    (dict(scale="huge"), "scale='huge'.*ci, full, gpu"),
    (dict(name="Output Error"), "lower_snake_case"),
    (dict(name="../up"), "lower_snake_case"),
    (dict(claim="triple", verdict=YES), "claim='triple'.*double, halve"),
    (dict(claim="double"), "go together"),
    (dict(verdict=YES), "go together"),
    (dict(wall_s=0), "wall_s=0"),
    (dict(wall_s=float("nan")), "wall_s=nan"),
    (dict(chapter="nowhere"), "chapter='nowhere'"),
    (dict(chapter="later", scale="full"), "chapter='later' has no folder"),
])
def test_refused_and_nothing_written(book, wrong, says):
    with pytest.raises(ValueError, match=says):
        toy(**wrong)
    assert not list(book.root.rglob("*.json"))


def test_metrics_that_are_no_data(book):
    with pytest.raises(TypeError, match=r"metrics\.model is of type object"):
        toy(metrics={"model": object()})


@pytest.mark.parametrize("status", ["works", "", "Reproduced"])
def test_verdict_is_one_of_six(status):
    with pytest.raises(ValueError, match="no verdict"):
        Verdict(status, "says")
    with pytest.raises(ValueError, match="says is empty"):
        Verdict(STATUSES[0], " ")


def test_the_strongest_record_speaks(book):
    toy(metrics={"x": "gpu"}, scale="gpu")
    toy(metrics={"x": "ci"})
    spoil(next(book.root.rglob("speed--ci--*.json")), lambda r: r.update(date="2900-01-01T00:00:00+00:00"))
    assert load_record("toy", "speed").metrics["x"] == "gpu" and load_record("toy", "speed", "ci").metrics["x"] == "ci"
    assert [r.scale for r in load_records("toy")] == ["gpu", "ci"]
    older = load_record("toy", "speed", "gpu")
    path = book.root / "nbs" / "01_toy" / "results" / "speed--gpu--other.json"
    path.write_text(json.dumps(dataclasses.asdict(older) | {"date": "2999-01-01T00:00:00+00:00", "metrics": {"x": "new"}}))
    assert load_record("toy", "speed").metrics["x"] == "new"


def test_missing_record_says_what_there_is_and_what_to_run(book):
    toy()
    with pytest.raises(RecordError, match="no record 'spede'; it has: speed. Run:  paperbook run toy"):
        load_record("toy", "spede")
    with pytest.raises(RecordError, match="at scale 'gpu'.*--scale gpu"):
        load_record("toy", "speed", "gpu")


def spoil(path, change):
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("damage, says", [
    (lambda p: p.write_text(p.read_text()[:40]), "no readable record"),
    (lambda p: p.write_bytes(b"\xff\xfe"), "no readable record"),
    (lambda p: p.write_text("[]"), "schema None"),
    (lambda p: spoil(p, lambda r: r.update(schema=2)), "schema 2, this paperbook reads 1. Update paperbook"),
    (lambda p: spoil(p, lambda r: r.pop("seeds")), "lacks 'seeds'"),
    (lambda p: spoil(p, lambda r: r.update(mood="good")), "unknown 'mood'"),
    (lambda p: spoil(p, lambda r: r.update(scale="huge")), "scale 'huge'"),
    (lambda p: spoil(p, lambda r: r["verdict"].update(status="works")), "no verdict"),
    (lambda p: spoil(p, lambda r: r.update(verdict="yes")), "does not hold what a record must"),
])
def test_broken_files_are_named_and_stop_only_themselves(book, damage, says):
    bad = toy("bad", claim="double", verdict=YES)
    toy("fine", claim="halve", verdict=YES)
    damage(bad)
    with pytest.raises(RecordError, match=says) as caught:
        load_record("toy", "bad")
    assert bad.name in str(caught.value)
    assert load_record("toy", "fine").verdict == YES
    rows = {row.claim: row for row in claim_rows() if row.chapter == "toy"}
    assert (rows["double"].status, rows["halve"].status) == ("not yet", "reproduced")
    assert rows[""].status == "unreadable record" and rows[""].record.endswith(bad.name)
    assert [r.name for r in records.readable_records()] == ["fine"]


def test_claims_owed_and_paid(book):
    assert [(r.chapter, r.claim, r.status, r.record) for r in claim_rows()] == [
        ("toy", "double", "not yet", ""), ("toy", "halve", "not yet", ""), ("later", "much", "not yet", "")]
    toy("small", claim="double", verdict=Verdict("does not hold here", "1.0 times"))
    toy("large", scale="full", claim="double", verdict=YES)
    row = claim_rows()[0]
    assert (row.status, row.ours, row.paper) == ("reproduced", "2.0 times", "ratio 2")
    assert row.record.startswith("nbs/01_toy/results/large--full--")


def test_small_runs_are_no_evidence_for_the_readme(book):
    toy(claim="double", verdict=YES, table=[{"a": 1}])
    assert readme_tables() == {"claims": "Not yet: toy 2, later 1 (claims per chapter)."}
    toy(scale="full", claim="double", verdict=YES, table=[{"size": 3, "speed": 1 / 3}])
    tables = readme_tables()
    assert tables["toy.speed"].startswith("| size | speed |\n| ---: | ---: |\n| 3 | 0.3333 |\n\n*")
    assert "| reproduced |" in tables["claims"] and tables["claims"].endswith("Not yet: later 1 (claims per chapter).")
    assert "20" + "26-" not in tables["toy.speed"]  # no date: tables change only with their numbers


def test_fill_tables():
    text = "a <!-- table:x.y -->old<!-- /table --> b <!-- table:z --><!-- /table -->"
    done = fill_tables(text, {"x.y": "1", "z": "2"})
    assert done == "a <!-- table:x.y -->\n1\n<!-- /table --> b <!-- table:z -->\n2\n<!-- /table -->"
    assert fill_tables(done, {"x.y": "1", "z": "2"}) == done and fill_tables("none", {}) == "none"
    with pytest.raises(ValueError, match="no table 'z'. Known: x.y"):
        fill_tables(text, {"x.y": ""})
    with pytest.raises(ValueError, match="not closed"):
        fill_tables("<!-- table:x.y --> text <!-- table:z --><!-- /table -->", {"x.y": "", "z": ""})


def test_render_table():
    assert render_table([]) == "*(no rows)*"
    assert render_table([{"a_b": 1}, {"c": "x|y\nz"}]) == "| a b | c |\n| ---: | --- |\n| 1 | – |\n| – | x\\|y z |"


def test_root_is_found_from_below_and_refused_with_a_remedy(book, monkeypatch, tmp_path_factory):
    below = book.root / "nbs" / "01_toy"
    monkeypatch.delenv("PAPERBOOK_HOME")
    monkeypatch.chdir(below)
    assert find_root() == book.root.resolve()
    monkeypatch.setenv("PAPERBOOK_HOME", str(tmp_path_factory.mktemp("empty")))
    with pytest.raises(BookNotFound, match="PAPERBOOK_HOME"):
        find_root()
    assert find_root(book.root) == book.root.resolve()


def test_broken_claims_file_is_named(book):
    (book.root / "seeds" / "claims.toml").write_text("[toy\n")
    with pytest.raises(ValueError, match="claims.toml is no readable TOML"):
        load_claims()


def test_writing_is_atomic(book):
    """A reader that loops while a writer loops never sees half a file."""
    toy(metrics={"x": list(range(2000))})
    seen, done = [], threading.Event()

    def read():
        while not done.is_set():
            seen.append(len(load_record("toy", "speed").metrics["x"]))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(5):
        toy(metrics={"x": list(range(2000))})
    done.set()
    reader.join()
    assert seen and set(seen) == {2000}
    assert [p.suffix for p in (book.root / "_runs" / "results" / "toy").iterdir()] == [".json"]


def test_command_and_commit(book, monkeypatch):
    monkeypatch.setenv("PAPERBOOK_COMMAND", "paperbook run toy -p n 3")
    toy()
    assert load_record("toy", "speed").command == "paperbook run toy -p n 3" and load_record("toy", "speed").commit is None
    subprocess.run("git init -q . && git add settings.ini && git -c user.name=x -c user.email=x commit -qm x && git add -A "
                   "&& git -c user.name=x -c user.email=x commit -qm y", shell=True, cwd=book.root, check=True)
    toy("other")
    assert len(load_record("toy", "other").commit.rstrip("+")) >= 7


def test_loads_no_torch():
    code = "import sys, paperbook.core.records, paperbook.core.book, paperbook.core.assets; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
