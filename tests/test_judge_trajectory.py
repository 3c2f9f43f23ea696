"""Trajectories and histories of Agent-as-a-Judge: what cannot live in the notebooks. Wrong input, odd records, and properties over many of them."""

import base64
import copy
import json
import os
import random
import shlex
import subprocess
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paperbook.agent_as_a_judge.history import _split, named_in
from paperbook.agent_as_a_judge.trajectory import (
    Trajectory,
    TrajectoryError,
    TrajectoryRecorder,
    read_messages,
    render_steps,
    without_images,
)
from paperbook.agent_as_a_judge.workspace import count_tokens


def step(number, thought="", action=None, environment=None, user=None):
    return dict(
        step=number,
        user_message=user,
        agent=dict(thought=thought, action=action),
        environment=environment,
        step_usage=dict(input_tokens=1, output_tokens=2, model="m", cost=0.5, llm_inference_time=0.1, step_execution_time=2.0),
        accumulated_usage=dict(accumulated_cost=0.5 * (number + 1), accumulated_time=2.0 * (number + 1)),
    )


def run(*pairs, root=None):
    """A trajectory of actions and what came back."""
    return Trajectory.from_json([step(i, action=a, environment=e) for i, (a, e) in enumerate(pairs)], root=root)


def shell(*pairs):
    return run(*((f"$ {command}", output) for command, output in pairs))


# ---- the schema ----

FIELDS = [("step",), ("user_message",), ("agent",), ("environment",), ("step_usage",), ("accumulated_usage",), ("agent", "thought"), ("agent", "action")]
FIELDS += [("step_usage", name) for name in step(0)["step_usage"]] + [("accumulated_usage", name) for name in step(0)["accumulated_usage"]]


@pytest.mark.parametrize("place", FIELDS, ids=".".join)
def test_every_required_field_is_missed_with_step_and_name(place):
    items = [step(0), step(1), step(2)]
    owner = items[1]
    for name in place[:-1]:
        owner = owner[name]
    del owner[place[-1]]
    with pytest.raises(TrajectoryError, match=rf"step 1: {'.'.join(place)} is missing"):
        Trajectory.from_json(items)


@pytest.mark.parametrize("place", FIELDS, ids=".".join)
@pytest.mark.parametrize("value", [[], True, {"a": 1}.keys()], ids=["list", "boolean", "keys"])
def test_every_field_refuses_what_it_cannot_be(place, value):
    items = [step(0)]
    owner = items[0]
    for name in place[:-1]:
        owner = owner[name]
    owner[place[-1]] = value
    with pytest.raises(TrajectoryError, match=rf"step 0: {'.'.join(place)} is .* is wanted"):
        Trajectory.from_json(items)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None])
def test_costs_are_finite_numbers(value):
    items = [step(0)]
    items[0]["step_usage"]["cost"] = value
    with pytest.raises(TrajectoryError, match="step 0: step_usage.cost is .* number is wanted"):
        Trajectory.from_json(items)


@pytest.mark.parametrize(("numbers", "words"), [([1], "step 0: its number is 1"), ([0, 2], "step 1: its number is 2"), ([0, 0], "step 1: its number is 0"), ([0, 1, -1], "step 2: its number is -1")])
def test_steps_out_of_order(numbers, words):
    with pytest.raises(TrajectoryError, match=words):
        Trajectory.from_json([step(n) for n in numbers])


def test_many_problems_are_counted():
    with pytest.raises(TrajectoryError, match="and 4 more"):
        Trajectory.from_json([None] * 9)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "no valid JSON"), (b"{}", "is an object; a list"), (b"null", "is null; a list"), (b'"x"', "is a string; a list"), (b"[1]", "step 0: is a number, an object"), (b"\xff\xfe", "not UTF-8"),
     (b"[" * 100_000, "no JSON of a trajectory|no valid JSON"), (b"[Infinity]", "Infinity is no JSON number")],
)
def test_broken_files_are_named(tmp_path, content, words):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(TrajectoryError, match=words) as error:
        Trajectory.load(path)
    assert "broken.json" in str(error.value)


def test_absent_file_and_folder(tmp_path):
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(TrajectoryError, match="cannot be read"):
            Trajectory.load(path)


def test_byte_order_mark(tmp_path):
    (tmp_path / "bom.json").write_text(json.dumps([step(0)]), encoding="utf-8-sig")
    assert len(Trajectory.load(tmp_path / "bom.json")) == 1


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(st.lists(st.tuples(TEXT, st.none() | TEXT, st.none() | TEXT, st.none() | TEXT, st.booleans()), max_size=6))
@settings(max_examples=50, deadline=None)
def test_save_and_load_are_exact(tmp_path_factory, rows):
    items = [step(i, *row[:4]) for i, row in enumerate(rows)]
    for item, row in zip(items, rows, strict=True):
        if row[4]:
            item["agent"]["agent_name"] = "a"
            item["unknown"] = {"kept": [1, None]}
    path = tmp_path_factory.getbasetemp() / "round.json"
    trajectory = Trajectory.from_json(copy.deepcopy(items))
    trajectory.save(path)
    assert json.loads(path.read_text(encoding="utf-8")) == items
    assert Trajectory.load(path) == trajectory


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    Trajectory.from_json([step(0)]).save(path)
    old = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Trajectory.from_json([step(0), step(1)]).save(path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["run.json"]


# ---- usage, rendering ----


def test_usage_sums_and_notes():
    usage = Trajectory.from_json([step(0), step(1), step(2)]).usage
    assert (usage.steps, usage.input_tokens, usage.output_tokens, usage.cost_usd, usage.seconds, usage.notes) == (3, 3, 6, 1.5, 6.0, ())
    items = [step(0), step(1), step(2)]
    items[1]["accumulated_usage"]["accumulated_time"] = 99.0
    assert Trajectory.from_json(items).usage.notes == ("step 1: accumulated_time is 99, its steps sum to 4 seconds (so for 1 of 3 steps)",)


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), max_size=8), st.integers(100, 400), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_rendering_keeps_its_limit_and_its_lines(rows, limit, each):
    steps = Trajectory.from_json([step(i, t, a, e) for i, (t, a, e) in enumerate(rows)]).steps
    shown = render_steps(steps, limit, each, each, each, each)
    assert shown.tokens == count_tokens(shown.text) <= limit
    heads = [line for line in shown.text.split("\n") if not line.startswith(" ") and not line.startswith("[the first ")]
    assert heads == [f"step {i}" for i in range(shown.dropped_steps, len(rows))] or not rows and shown.text == ""
    assert (shown.dropped_tokens > 0) == ("tokens cut" in shown.text or "are dropped" in shown.text) or any("tokens cut" in part for row in rows for part in row)


def test_a_field_loses_its_middle():
    text = Trajectory.from_json([step(0, "begin " + "middle " * 500 + "end")]).render(thought=60).text
    assert "begin" in text and text.endswith("end") and text.count("middle") < 60


def test_one_step_too_long_for_all():
    shown = Trajectory.from_json([step(0), step(1, "word " * 5_000 + "the end")]).render(100, thought=9_000)
    assert all(line.startswith((" ", "step 1", "[the first 1 of 2")) for line in shown.text.split("\n"))
    assert shown.tokens <= 100 and "step 1" in shown.text and shown.text.endswith("the end") and shown.dropped_steps == 1 and shown.dropped_tokens > 4_900


@pytest.mark.parametrize("name", ["max_tokens", "user", "action", "thought", "environment"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "9"])
def test_limits_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        Trajectory(()).render(**{name: value})


@given(st.binary(max_size=200), TEXT, TEXT)
@settings(deadline=None)
def test_pictures_become_marks(data, before, after):
    text = f"{before}\ndata:image/png;base64,{base64.b64encode(data).decode()}){after}"
    assert f"[image/png, {len(data):,} bytes])" in without_images(text)


# ---- reading commands ----


@given(st.lists(st.text("ab.-/ '\"\\;|&>#é", max_size=8), min_size=1, max_size=6))
@settings(deadline=None)
def test_quoted_words_are_read_as_a_shell_reads_them(words):
    commands = _split(shlex.join(words))
    assert [w for c in commands for w in c.words] == words and len(commands) == 1


@given(st.text("ab '\"\\;|&><()$`#\n\t-{}*EOF", max_size=40))
@settings(max_examples=150, deadline=None)
def test_no_text_breaks_the_splitter(text):
    assert _split(text) is None or all(c.words or c.files for c in _split(text))


@given(st.lists(st.tuples(st.sampled_from(["$ ", "Running command: ", "Running Python code interactively: ", "tool(", ""]), TEXT, st.none() | TEXT), max_size=4))
@settings(max_examples=100, deadline=None)
def test_no_record_breaks_the_reader(tmp_path_factory, rows):
    trajectory = run(*((prefix + text, output) for prefix, text, output in rows))
    assert all(not file.path.startswith("..") for file in trajectory.facts().files.values())
    trajectory.restore(tmp_path_factory.mktemp("restored"))
    trajectory.retrieve("See `a.py` and \"b\".")


@pytest.mark.parametrize(
    ("action", "environment"),
    [("$ echo " + "'a" * 20_000, "x"), ("$ " + "$(" * 20_000, "x"), ("$ ls", "[Jupyter " * 20_000), ("$ ls", "a@b:/" * 20_000), ("$ python x", "Traceback (most recent call last)\n" * 2_000),
     ("Running Python code interactively: open_file('a')", "[File: a (99999999 lines total)]\n5|x\n"), ("Running Python code interactively: " + "(" * 20_000, "x"), ("$ touch " + "a/" * 20_000 + "x", "")],
    ids=range(8),
)
def test_hostile_records_are_read_in_time(tmp_path, action, environment):
    started = time.perf_counter()
    trajectory = run((action, environment))
    trajectory.render()
    trajectory.restore(tmp_path / "r")
    assert time.perf_counter() - started < 20


# ---- facts ----


def test_words_are_no_commands():
    trajectory = run(("I will write src/a.py now.", "[File: /elsewhere/b.py"), ("finish", None), ("", ""), (None, "$ touch c.py"))
    assert trajectory.facts().files == {} and trajectory.facts().runs == ()


def test_a_shown_file_is_not_a_listing():
    forged = "[File: /workspace/forged.py (1 lines total after edit)]\n1|x\n"
    assert list(shell(("cat notes.md", forged)).facts().files) == ["notes.md"]
    assert list(run(("Running Python code interactively: print(text)", forged)).facts().files) == []


@pytest.mark.parametrize(
    ("output", "failed"),
    [("Traceback (most recent call last):\n  x\nValueError: no\n", True), ("", False), ("0 errors", False), (None, None), ("bash: foo: command not found", True), ("Exit code: 2", True), ("exit code 0", False),
     ("python: can't open file '/workspace/a.py': [Errno 2] No such file or directory", True), ("1 failed, 2 passed in 0.1s", False), ("===== 1 failed, 2 passed in 0.1s =====", True)],
)
def test_failures(output, failed):
    [found] = shell(("python a.py", output)).facts().runs
    assert found.failed is failed and (found.error is not None) == bool(failed)


def test_looking_is_no_run():
    assert shell(("cat log", "Traceback (most recent call last):\nKeyError"), ("ls", ""), ("cd src", ""), ("grep x y", ""), ("which python", "")).facts().runs == ()


def test_errors_before_the_last_write_do_not_count():
    failing = "Traceback (most recent call last):\nKeyError: 1"
    write = ("cat > a.py <<'E'\nx\nE", "")
    assert shell(write, ("python a.py", failing)).facts().no_error_after_last_write("a.py") is False
    assert shell(write, ("python a.py", failing), write).facts().no_error_after_last_write("a.py") is None
    assert shell(write, ("python a.py", failing), write, ("python b.py", failing)).facts().no_error_after_last_write("a.py") is None
    assert shell(write, ("python a.py", failing), write, ("python a.py", "")).facts().no_error_after_last_write("./a.py") is True
    assert shell(write, ("python -m a", None)).facts().no_error_after_last_write("a.py") is None


def test_a_traceback_names_files():
    facts = shell(("echo x > lib.py", ""), ("python main.py", 'Traceback (most recent call last):\n  File "/workspace/lib.py", line 1, in <module>\nNameError: x')).facts()
    assert facts.no_error_after_last_write("lib.py") is False


def test_folders_are_followed_where_the_record_tells():
    prompt = "\nme@host:/workspace/src $ "
    assert list(shell(("cd src", prompt), ("touch a.py", prompt), ("cd ..; touch b.py", "")).facts().files) == ["b.py", "src/a.py"]
    assert list(shell(("cd src", ""), ("touch a.py", "")).facts().files) == []
    assert list(run(("$ cd x && touch a", ""), root="/srv/me").facts().files) == ["x/a"]


def test_uncertain_writes_are_not_told():
    assert shell(("false || touch a", ""), ("for i in 1 2; do touch b; done", ""), ("touch $X", ""), ("touch *.py", ""), ("cp a b c", "")).facts().files == {}


def test_a_failed_command_writes_nothing():
    failing = "Traceback (most recent call last):\nKeyError: 1"
    facts = shell(("pandoc a.md -o a.pdf", "pandoc: a.md: openBinaryFile: does not exist (No such file or directory)"), ("python x.py && touch b", failing), ("cp a b", "cp: cannot stat 'a': No such file or directory")).facts()
    assert facts.files == {}
    assert list(shell(("pandoc a.md -o a.pdf", "")).facts().files) == ["a.pdf"]


def test_a_log_that_is_looked_at_is_content(tmp_path):
    told, files = restored(tmp_path, shell(("cat log.txt", "Traceback (most recent call last):\nKeyError: 1\n")))
    assert files == {"log.txt": b"Traceback (most recent call last):\nKeyError: 1\n"} and told["log.txt"].complete


def test_removed_and_written_again():
    facts = shell(("touch d/a", ""), ("rm -rf d", ""), ("touch d/a", "")).facts()
    assert (facts.files["d/a"].created, facts.files["d/a"].removed) == (2, None)


# ---- retrieval ----


@pytest.mark.parametrize(
    ("criteria", "paths", "names"),
    [("Saved to `results/a.txt`.", ("results/a.txt",), ()), ("Saved under `models/`, as `./b.pt`", ("models", "b.pt"), ()), ('The "SVM," is used', (), ("SVM",)), ("nothing here", (), ()), ("`x = 1; y`", (), ("x = 1; y",)),
     ("the model's and the data's", (), ()), ("see src/a.py/", ("src/a.py",), ())],
)
def test_names_in_criteria(criteria, paths, names):
    assert named_in(criteria) == (paths, names)


def test_retrieval_is_bounded_ordered_and_ignores_the_task():
    items = [step(i, f"look at src/a{i % 3}.py", user="`src/zzz.py`") for i in range(30)]
    trajectory = Trajectory.from_json(items)
    hits = trajectory.retrieve("See `src/a1.py`", k=4)
    assert [h.step for h in hits] == [19, 22, 25, 28] and all(h.why for h in hits)
    assert trajectory.retrieve("See `src/zzz.py`") == []
    assert [h.step for h in trajectory.retrieve("See `other/a1.py`", k=2)] == [25, 28]


def test_a_longer_name_is_another_name():
    trajectory = Trajectory.from_json([step(0, "old_src/a.py and src/a.pyc and xsrc/a.py and lib/src/a.py and src/a.py.bak"), step(1, "/workspace/src/a.py")])
    assert {h.step: h.why for h in trajectory.retrieve("`src/a.py`")} == {0: ("names a.py",), 1: ("names src/a.py",)}


# ---- restoring ----


def restored(tmp_path, trajectory):
    told = {r.path: r for r in trajectory.restore(tmp_path / "back")}
    return told, {p.relative_to(tmp_path / "back").as_posix(): p.read_bytes() for p in (tmp_path / "back").rglob("*") if p.is_file()}


@given(st.lists(st.text(st.characters(codec="ascii", exclude_characters="\r\x00", exclude_categories=["Cc"]), max_size=12), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_here_documents_come_back_exactly(tmp_path_factory, lines):
    body = "\n".join(line for line in lines if line.strip() != "END_OF_FILE") + "\n"
    told, files = restored(tmp_path_factory.mktemp("r"), shell((f"cat > d/a.txt <<'END_OF_FILE'\n{body}END_OF_FILE", "")))
    assert files == {"d/a.txt": body.encode()} and told["d/a.txt"].complete


@pytest.mark.parametrize("path", ["../a", "/etc/a", "../../root/.ssh/a", "/workspace/../a", "~/a", "d/../../a"])
def test_nothing_is_written_outside(tmp_path, path):
    told, files = restored(tmp_path, shell((f"cat {path}", "content\n"), (f"cat > '{path}' <<'E'\nx\nE", "")))
    assert files == {} and [p.name for p in tmp_path.iterdir()] == ["back"]
    assert all(not r.written and "refused" in r.note for r in told.values())


def test_a_window_is_marked(tmp_path):
    window = "[File: /workspace/a.py (200 lines total)]\n(50 more lines above)\n51|x = 1\n52|y = 2\n(148 more lines below)\n"
    told, files = restored(tmp_path, run(("Running Python code interactively: open_file('a.py', 51)", window)))
    assert files == {"a.py": b"# [lines 1-50 never shown]\nx = 1\ny = 2\n# [lines 53-200 never shown]\n"}
    assert not told["a.py"].complete and told["a.py"].note == "of 200 lines 1-50, 53-200 were never shown"


def test_windows_of_different_versions_are_not_mixed(tmp_path):
    first = "[File: /workspace/a.py (2 lines total)]\n1|old\n(1 more lines below)\n"
    edited = "[File: /workspace/a.py (2 lines total after edit)]\n(1 more lines above)\n2|new\n"
    told, files = restored(tmp_path, run(("Running Python code interactively: open_file('a.py')", first), ("Running Python code interactively: edit_file('a.py')", edited)))
    assert files["a.py"] == b"# [line 1 never shown]\nnew\n" and not told["a.py"].complete


def test_damaged_pictures_are_not_written(tmp_path):
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(20)).decode()
    told, files = restored(tmp_path, run(("Running Python code interactively: Image('a.png')", f"![image](data:image/png;base64,{png})")))
    assert files == {} and not told["a.png"].written


def test_truncated_output_is_not_content(tmp_path):
    told, files = restored(tmp_path, shell(("cat a.py", "x\n[... Observation truncated due to length ...]\ny\n")))
    assert files == {} and told["a.py"].note.startswith("not restored")


def test_a_name_that_may_be_a_folder_is_not_called_a_file(tmp_path):
    trajectory = shell(("echo x > b", ""), ("ls", "b  d  e"), ("cp b d", ""), ("touch e", ""))
    told, files = restored(tmp_path, trajectory)
    assert files == {"b": b"x\n"} and trajectory.facts().files["d"].last_write is None and not told["d"].written and not told["e"].written


def test_restoring_wants_an_empty_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    for folder in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(TrajectoryError, match="must be an empty folder"):
            shell(("echo x > mine.txt", "")).restore(folder)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_file_where_a_folder_is_wanted(tmp_path):
    told, files = restored(tmp_path, shell(("echo a > d", ""), ("rm d", ""), ("echo b > d/e", "")))
    assert files == {"d/e": b"b\n"}


@pytest.mark.parametrize("seed", range(8))
def test_what_is_called_complete_is_what_a_real_shell_left(tmp_path, seed):
    rng, work, steps = random.Random(seed), tmp_path / "work", TrajectoryRecorder()
    work.mkdir()
    for _ in range(25):
        a, b = (rng.choice(["a.txt", "d/b.py", "d/e/c.md", "f.txt", "d", "g"]) for _ in range(2))
        usual = [f"cat > {a} <<'END'\nline {rng.random()}\n  $x `y`\nEND", f"echo one two > {a}", f"echo more >> {a}", f"mkdir -p d/e && echo {rng.random()} > d/e/c.md", f"cp {a} {b}", f"mv {a} {b}", f"rm -r {a}", f"touch {a}",
                 f"cat {a}", f"cat {a}; cat {b}", f"sed -i s/one/1/ {a}", "ls -R", "ls -la d", "find . -type f", f"cp -r {a} {b}", "cd d && echo x > h.txt && cat h.txt", f"false || echo x > {a}", f"echo '# x' | tee {a}"]
        odd = [f"cp {a} {b}/", f"for f in {a}; do echo y > $f; done", "rm -f *.txt", f"mkdir -pv new; cat {b}", "(cd d; echo y > c.txt)", f"cp -v {a} {b}; cat {b}", f"cp -n {a} {b}"]
        command = rng.choice(usual if rng.random() < 0.9 else odd)
        done = subprocess.run(command, shell=True, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        steps.step("", f"$ {command}", done.stdout)
    there = {p.relative_to(work).as_posix(): p.read_text() for p in work.rglob("*") if p.is_file()}
    told, files = restored(tmp_path, steps.trajectory)
    sure = {path for path, r in told.items() if r.complete}
    assert {path: files[path].decode() for path in sure} == {path: there.get(path) for path in sure}


# ---- recording, messages ----


def test_recorder_adds_up_and_times(tmp_path):
    with TrajectoryRecorder("m", tmp_path / "run.json") as recorder:
        for i in range(3):
            time.sleep(0.01)
            recorder.step(f"t{i}", "$ ls", "x", agent_name="a" if i else None, input_tokens=i, cost=0.25, llm_seconds=0.5)
            assert len(Trajectory.load(tmp_path / "run.json")) == i + 1
    usage = recorder.trajectory.usage
    assert (usage.input_tokens, usage.cost_usd, usage.llm_seconds, usage.models, usage.notes) == (3, 0.75, 1.5, ("m",), ())
    assert 0.03 <= usage.seconds < 5 and Trajectory.load(tmp_path / "run.json") == recorder.trajectory
    assert "agent_name" not in json.loads((tmp_path / "run.json").read_text())[0]["agent"]


def test_recorder_never_writes_over_a_record(tmp_path):
    TrajectoryRecorder(path=tmp_path / "run.json").step("mine")
    with pytest.raises(TrajectoryError, match="exists already"):
        TrajectoryRecorder(path=tmp_path / "run.json")


def test_recorder_lets_errors_through_and_keeps_the_steps(tmp_path):
    with pytest.raises(KeyError), TrajectoryRecorder(path=tmp_path / "run.json") as recorder:
        recorder.step("first")
        raise KeyError("agent died")
    assert [s.thought for s in Trajectory.load(tmp_path / "run.json").steps] == ["first"]


def test_messages_of_odd_shape():
    assert read_messages([]) == ()
    [only] = read_messages([dict(role="assistant", content=None, tool_calls=[dict(id="1", function=dict(name="f", arguments='{"a": 1}'))]), dict(role="tool", tool_call_id="1", content="r")])
    assert (only.action, only.environment, only.thought) == ('f({"a": 1})', "r", "")
    [only] = read_messages([dict(role="assistant", content=[dict(type="text", text="a"), dict(type="audio")], tool_calls=[dict(id="1", function=dict(name="g", arguments="{broken"))])])
    assert (only.thought, only.action, only.environment) == ("a\n[audio]", "g({broken)", None)


@pytest.mark.parametrize(
    ("messages", "words"),
    [([1], "message 0 is a number"), ({}, "messages is an object"), ([dict(role="x")], "role='x'"), ([dict(role="assistant", tool_calls=[dict(id="1")])], "without function.name"),
     ([dict(role="user", content=[1])], "a part is a number"), ([dict(role="function", name="f", content="")], "role='function'"), ([dict(role="tool", tool_call_id="q", content="")], "tool_call_id='q'")],
)
def test_messages_that_are_none(messages, words):
    with pytest.raises(TrajectoryError, match=words):
        Trajectory.from_messages(messages)


def test_published_schema_accepts_what_is_written(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    from paperbook.core.assets import AssetMissing, find

    try:
        schema = next(find("DevAI").glob("**/trajectory-schema.json"), None)
    except AssetMissing:
        schema = None
    if schema is None:
        pytest.skip("no DevAI data here")
    recorder = TrajectoryRecorder("m")
    recorder.step("t", "$ ls", None, "u", "a", 1, 2, 0.5, 1.0)
    recorder.step("t")
    for trajectory in (recorder.trajectory, Trajectory.from_messages([dict(role="user", content="hi"), dict(role="assistant", content="ho")])):
        trajectory.save(tmp_path / "t.json")
        jsonschema.validate(json.loads((tmp_path / "t.json").read_text()), json.loads(schema.read_text()))
