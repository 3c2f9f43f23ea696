"""Workspaces that an agent left behind: nothing in them may crash, hang, run, or lead out. The ordinary cases are in the notebook."""

import io
import json
import os
import pickle
import socket
import struct
import time
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from paperbook.agent_as_a_judge import workspace as module
from paperbook.agent_as_a_judge.workspace import (
    Document,
    FileInfo,
    Workspace,
    WorkspaceError,
    count_tokens,
    cut,
    fence,
)

same_folder = settings(max_examples=60, deadline=None, derandomize=True, database=None,
                       suppress_health_check=[HealthCheck.function_scoped_fixture])
SECRET = "the secret beside the workspace"


@pytest.fixture
def root(tmp_path):
    """A workspace with one file, a secret beside it."""
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "ws/src").mkdir(parents=True)
    (tmp_path / "ws/src/train.py").write_text("x = 1\n")
    return tmp_path / "ws"


def read(root, name, data, **options):
    (root / name).write_bytes(data)
    return Workspace(root, **options).read(name)


def zipped(members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


# ---- folders ----


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "only links", "only skipped", "", "\0"])
def test_no_workspace_is_an_error_and_no_verdict(tmp_path, kind):
    place = tmp_path / "ws"
    if kind == "file":
        place.write_text("x")
    elif kind != "missing":
        place.mkdir()
    if kind == "only links":
        (place / "a").symlink_to("/etc/passwd")
        os.mkfifo(place / "b")
    if kind == "only skipped":
        (place / ".git").mkdir()
        (place / ".git/config").write_text("x")
    with pytest.raises(WorkspaceError, match="Give the folder that the agent worked in") as error:
        Workspace(kind if kind in ("", "\0") else place)
    assert kind in ("", "\0") or str(place) in str(error.value)


def test_a_folder_without_a_readable_file_is_an_error(root, monkeypatch):
    monkeypatch.setattr(module.os, "access", lambda *_: False)
    with pytest.raises(WorkspaceError, match="no file that can be read"):
        Workspace(root)


def test_a_file_that_may_not_be_read_is_an_error_of_its_own(root, monkeypatch):
    there = Workspace(root)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.os, "open", refuse)
    with pytest.raises(WorkspaceError, match=r"src/train.py.*Permission denied"):
        there.read("src/train.py")


def test_a_folder_that_may_not_be_listed_is_noted(root, monkeypatch):
    (root / "top.md").write_text("x")
    real = os.listdir

    def refuse(place):
        if str(place).endswith("src"):
            raise PermissionError(13, "Permission denied")
        return real(place)

    monkeypatch.setattr(module.os, "listdir", refuse)
    there = Workspace(root)
    assert there.folders == {"src": "cannot be listed: Permission denied"}
    assert "src" in there.notes[0] and "cannot be listed" in there.tree() and "(empty)" not in there.tree()


def test_links_sockets_and_fifos(root):
    for name, target in {"passwd": "/etc/passwd", "beside": "../secret.txt", "gone": "nothing", "loop": "loop", "a": "b", "b": "a", "up": "..", "here": ".",
                         "good": "src/train.py", "chain": "good", "proc": "/proc/self"}.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "fifo")
    (root / "to_fifo").symlink_to("fifo")
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(root)  # the name of a socket is short
    server.bind("socket")
    os.chdir(here)
    started = time.process_time()
    there = Workspace(root)
    kinds = {info.path: info.kind for info in there.files}
    assert kinds == {"passwd": "link", "beside": "link", "gone": "link", "loop": "link", "a": "link", "b": "link", "up": "link", "proc": "link",
                     "good": "code", "chain": "code", "fifo": "special", "to_fifo": "special", "socket": "special", "src/train.py": "code"}
    assert there.folders == {"here": "linked", "src": ""}
    for name, kind in kinds.items():
        assert there.exists(name) == (kind == "code")
        if kind != "code":
            with pytest.raises(WorkspaceError, match=name):
                there.read(name)
    assert there.read("chain").text == "x = 1\n" and there.read("here/here/src/train.py").path == "src/train.py"
    assert time.process_time() - started < 2
    server.close()


def test_the_root_may_be_a_link(root, tmp_path):
    (tmp_path / "link").symlink_to("ws")
    there = Workspace(tmp_path / "link")
    assert there.root == root.resolve() and there.read(tmp_path / "link/src/train.py").path == "src/train.py"
    assert there.read(Path("src/train.py")).notes == () and there.exists(".") and there.resolve(".") == there.root


@pytest.mark.parametrize("name", [b"two\nlines.py", b"quo'te\".txt", b"caf\xe9.md", b"back\\slash.txt", b"back\\\\slash.txt", b"a\x1b[31m.txt", "rtl\u202e.py".encode(),
                                  b" ", b"-rf", b"..a", b"~", b"$HOME", b"c:", b"\xff\xfe", "é".encode(), b"%2e%2e", b"x" * 255])
def test_names_of_any_bytes(root, name):
    with open(os.fsencode(root) + b"/" + name, "w") as file:
        file.write("the content")
    there = Workspace(root)
    path = next(info.path for info in there.files if info.path != "src/train.py")
    assert path.isprintable() and path.encode() and there.tree().encode()
    assert there.exists(path) and there.read(path).text in ("the content", "") and there.read(path).path == path
    assert there.read(path).notes == () or there.read(path).kind != "text"
    assert fence(there.read(path)).encode()


def test_a_link_with_an_unprintable_name_may_not_lead_out(root):
    os.symlink("../secret.txt", os.fsencode(root) + b"/a\n\xff")
    there = Workspace(root)
    path = next(info.path for info in there.files if info.kind == "link")
    assert not there.exists(path)
    with pytest.raises(WorkspaceError, match="leads out"):
        there.resolve(path)


def test_deep_and_long_paths(root):
    here = os.open(root, os.O_RDONLY)
    for _ in range(300):  # 300 * 31 characters: longer than a path may be
        os.mkdir("d" * 30, dir_fd=here)
        here, old = os.open("d" * 30, os.O_RDONLY, dir_fd=here), here
        os.close(old)
    os.close(os.open("deepest.py", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    there = Workspace(root)
    assert any("cannot be listed" in note or "never opened" in note for note in there.notes)
    assert count_tokens(there.tree(500)) <= 500 and len(there.folders) > 100
    assert not there.exists("d" * 300) and not there.exists("d/" * 2000)


def test_max_files_takes_the_deepest_and_says_so(root):
    for i in range(30):
        (root / f"data{i % 3}/x").mkdir(parents=True, exist_ok=True)
        (root / f"data{i % 3}/x/{i}.csv").write_text("1")
    there = Workspace(root, max_files=10)
    assert len(there.files) + len(there.folders) == 10 and "28 more entries" in there.notes[-1]  # 31 files and 7 folders
    assert {"src", "data0", "data1", "data2", "data2/x"} <= set(there.folders) and there.exists("data2/x/29.csv")
    assert "of 38 entries are not shown" in there.tree() and "not all listed" in there.tree() and "(empty)" not in there.tree()
    assert "at least" in Workspace(root, max_files=1).notes[-1]


# ---- paths ----


@pytest.mark.parametrize("path", ["../secret.txt", "src/../../secret.txt", "..", "../", "..\\secret.txt", "src\\..\\..\\secret.txt", "/etc/passwd", "//etc/passwd", "\\etc\\passwd", "", "\0", "a\0b",
                                  "/workspace/src/train.py", "\ud800", "x" * 5000, "a/" * 4000, "/proc/self/environ", "/dev/stdin", "./.././ws/../secret.txt"])
def test_paths_that_lead_out(root, path):
    there = Workspace(root)
    assert not there.exists(path)
    for method in (there.resolve, there.read):
        with pytest.raises(WorkspaceError, match="path="):
            method(path)


def test_a_neighbour_with_a_longer_name_is_outside(root):
    (root.parent / "ws2").mkdir()
    (root.parent / "ws2/a.py").write_text("x")
    (root / "link.py").symlink_to("../ws2/a.py")
    there = Workspace(root)
    assert not any(map(there.exists, ("../ws2/a.py", str(root) + "2/a.py", "link.py"))) and there.files[0].kind == "link"


@same_folder
@given(st.lists(st.sampled_from(["..", ".", "src", "train.py", "out", "in", "\\", "/", "ws", "secret.txt", "", "~", "\udcff", " "]), max_size=8), st.sampled_from(["/", "\\", "//", ""]))
def test_no_path_leads_out(root, parts, between):
    for name, target in {"out": "..", "in": "src"}.items():
        if not os.path.lexists(root / name):
            (root / name).symlink_to(target)
    there, path = Workspace(root), between.join(parts)
    try:
        place = there.resolve(path)
    except WorkspaceError:
        assert not there.exists(path)
        return
    assert place == there.root or there.root in place.parents
    assert Path(os.path.realpath(place)) == place
    if there.exists(path) and place.is_file():
        assert SECRET not in there.read(path).text


@given(st.text(), st.text())
@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@example("\n", "\\n")
def test_printed_names_differ_where_names_do(a, b):
    assert module._printable(a).isprintable() and (module._printable(a) == module._printable(b)) == (a == b)


# ---- content ----

ENDINGS = sorted({*{kind: ending for ending, kind in module._KINDS.items()}.values(), "py", "xlsx", "npz", "pt", "wav", "tar", "gz", "unheard_of"})  # one a reader, and those that have a way of their own
STARTS = [b"", *module._MAGIC, b"RIFF\0\0\0\0WAVEfmt ", b"RIFF\0\0\0\0WEBP", b"\0\0\0 ftyp", b"BM", b"II*\0", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"[", b"<", b"---\n", b"\x80\x04\x95"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_content_crashes_a_reader(root, ending):
    noise = zlib.compress(ending.encode()) * 40  # the same bytes every time
    whole = [pickle.dumps({"a": [1, 2]}), zipped({"a.pkl": pickle.dumps(1), "word/document.xml": b"<a/>", "xl/workbook.xml": b"<a/>"}), b'{"cells": [{}, 3]}', b'{"cells": 3}', b"[]", b"\n\n\n", b"a,\"b\nc\0", b"\xff" * 300, b"\r\r\r"]
    for data in [*(start + noise for start in STARTS), *(start for start in STARTS), *whole, *(content[:len(content) // 2] for content in whole)]:
        document = read(root, f"x.{ending}", data, max_file_bytes=300)
        assert isinstance(document, Document) and json.loads(json.dumps(document.facts)) == document.facts
        assert document.text.encode() is not None and all(note.encode() for note in document.notes)
        assert document.facts["size"] == len(data) and document.facts["empty"] == (not data)
        if document.facts.get("opens") is False or document.facts.get("parses") is False:
            assert document.facts.get("error") or document.facts.get("syntax_error")
        assert fence(document)


@same_folder
@given(st.binary(max_size=400), st.sampled_from(["py", "json", "csv", "png", "pkl", "npy", "safetensors", "ipynb", "html", "yaml", "toml", "xml", "zip", "pdf", "bin"]), st.sampled_from(STARTS))
def test_random_bytes(root, data, ending, start):
    document = read(root, f"x.{ending}", start + data)
    assert document.text.encode() is not None and json.dumps(document.facts, ensure_ascii=False).encode()
    assert all(c.isprintable() or c in "\n\t" or ord(c) > 127 for c in document.text)


def test_thirty_megabytes(root):
    (root / "huge.log").write_bytes(b"first line\n" + b"step 1 loss 0.5\n" * 2_000_000 + b"last line\n")
    there = Workspace(root)
    started = time.process_time()
    document = there.read("huge.log", max_tokens=500)
    assert time.process_time() - started < 3
    assert document.text.startswith("first line\n") and document.text.endswith("last line\n") and count_tokens(document.text) <= 500
    assert [word in " ".join(document.notes) for word in ("were not read", "were cut")] == [True, True]
    whole = there.read("huge.log").text
    assert len(whole) < 1_001_000 and "bytes not read ...]" in whole


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_encodings(root, codec):
    document = read(root, "x.txt", "name\tGröße\r\nzwei\n".encode(codec))
    if codec == "utf-16-le":  # without a mark it is binary
        assert document.kind == "binary" and document.text == ""
    else:
        assert document.text == ("name\tGr\ufffd\ufffde\nzwei\n" if codec == "latin-1" else "name\tGröße\nzwei\n")
        assert bool(document.notes) == (codec == "latin-1")


def test_big_pages_keep_their_words(root):
    """What is over the limit only for its scripts or pictures is read whole."""
    page = read(root, "plot.html", b"<script>" + b"x" * 5_000_000 + b"</script><p>accuracy 0.9</p>")
    book = read(root, "a.ipynb", json.dumps({"cells": [{"cell_type": "code", "source": "1", "outputs": [{"data": {"image/png": "A" * 3_000_000}}]}]}).encode())
    assert page.text == "accuracy 0.9" and book.facts["images"] == 1 and len(book.text) < 200


@pytest.mark.parametrize("evil", ["<a ", "<!--", "<script>", "</script", "<a href='", "&amp", "&#", "< ", "<title>", "   ", "\n", "<p>", "<![CDATA["])
def test_pages_take_linear_time(root, evil):
    started = time.process_time()
    read(root, "evil.html", (evil * (1_000_000 // len(evil))).encode())
    assert time.process_time() - started < 3


@pytest.mark.parametrize(("name", "data"), [("a.json", b"[" * 500_000), ("a.yaml", b"[" * 500_000), ("a.yaml", b"a: &a [x, x]\n" + b"".join(b"b%d: &b%d [*a, *a]\n" % (i, i) for i in range(9999))), ("a.yaml", b"- " * 300_000),
                                            ("a.xml", b"<a>" * 200_000), ("a.py", b"(" * 500_000), ("a.py", b"-" * 500_000 + b"1"), ("a.py", b"x = " + b"1+" * 200_000 + b"1"), ("a.toml", b"a = " + b"[" * 200_000),
                                            ("a.ipynb", b'{"cells":' * 100_000), ("a.csv", b'"' * 500_000), ("a.csv", b"," * 900_000), ("a.json", b"9" * 900_000)])
def test_deep_nests_end(root, name, data):
    started = time.process_time()
    document = read(root, name, data)
    assert time.process_time() - started < 5 and isinstance(document.facts["parses"], bool)


# ---- pickles, arrays, archives ----


def test_no_pickle_runs(root, tmp_path):
    class Evil:
        def __reduce__(self):
            return eval, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    for name, data in {"a.pkl": pickle.dumps(Evil()), "a.joblib": pickle.dumps(Evil(), 0), "a.bin": pickle.dumps(Evil()), "a.pt": zipped({"m/data.pkl": pickle.dumps(Evil(), 2)}), "unnamed": pickle.dumps(Evil())}.items():
        document = read(root, name, data)
        assert document.kind == "pickle" and document.facts["dangerous"] in (["builtins.eval"], ["__builtin__.eval"]), name
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("program", "found"), [
    (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"), (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93.", "os.system"), (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93.", "os.system"),
    (b"\x80\x04\x8c\x02os\x8c\x06system\x8c\x01x0\x93.", "unknown"), (b"\x80\x04\x8c\x02os\x8c\x06systemN0\x93.", "unknown"), (b"\x80\x04\x8c\x01x\x8c\x02os0\x8c\x06system\x93.", "unknown"),
    (b"\x80\x02cos\nsystem\n.", "os.system"), (b"(ios\nsystem\n.", "os.system"), (b"\x80\x02\x82\x07.", "extension.7"), (b"\x80\x04X\x02\0\0\0os\x8c\x06system\x93.", "os.system"),
    (b"\x80\x02cnumpy.compat.os\nsystem\n.", "numpy.compat.os.system"), (b"\x80\x02cbuiltins\ngetattr\n.", "builtins.getattr")])
def test_what_a_pickle_would_import(root, program, found):
    document = read(root, "a.pkl", program)
    assert document.facts["dangerous"] == document.facts["globals"] == [found]


def test_pickles_after_a_pickle(root):
    legacy = b"".join(pickle.dumps(value, 2) for value in (119547037146038801333356, 1001, {"little": True})) + b"\x80\x02cos\nsystem\n." + b"\xff\xff raw numbers"
    document = read(root, "old.pt", legacy)
    assert document.facts["dangerous"] == ["os.system"] and document.facts["opens"] and any("what follows is not known" in note for note in document.notes)
    assert read(root, "cut.pkl", pickle.dumps(list(range(999)))[:-9]).facts["opens"] is False
    assert read(root, "long.pkl", b"\x80\x02" + b"N0" * 700_000 + b"cos\nsystem\n.").facts["opens"] is False


def test_headers_that_lie(root):
    for claim in ("(9999999999999, 9999999999999)", "(" + "9, " * 5000 + ")", "'a'", "(-1,)", "__import__('os')"):
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {claim}}}\n".encode()
        assert read(root, "a.npy", b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header).facts["opens"] is False
    for header in (b'{"a": {"dtype": "F32", "shape": [' + b"9," * 9999 + b'9], "data_offsets": [0, 4]}}', b'{"a": 3}', b"[]", b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 99]}}'):
        assert read(root, "a.safetensors", struct.pack("<Q", len(header)) + header + bytes(4)).facts["opens"] is False


def test_archives_are_not_unpacked(root):
    before = sorted(root.rglob("*"))
    document = read(root, "a.zip", zipped({"../../evil": b"x", "/abs": b"x", "ok/a": b"x", "zeros": bytes(30_000_000)}))
    assert document.facts["unsafe"] == 2 and document.facts["unpacked_bytes"] == 30_000_003 and "lead out" in document.notes[0]
    many = read(root, "many.zip", zipped({f"{i}": b"" for i in range(500)}))
    assert many.facts["members"] == 500 and len(many.text.split("\n")) == 200 and "300 more" in many.notes[0]
    assert sorted(root.rglob("*")) == sorted([*before, root / "a.zip", root / "many.zip"]) and not (root.parent.parent / "evil").exists()


def test_blank_pictures(root):
    from PIL import Image

    clear, twice = Image.new("RGBA", (9, 7), (1, 2, 3, 0)), Image.new("P", (9, 7), 1)
    clear.putpixel((0, 0), (9, 9, 9, 0))  # nothing of it can be seen
    twice.putpixel((0, 0), 2)
    twice.putpalette([5, 5, 5] * 256)  # two places of the palette, one colour
    for image in (clear, twice):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        assert read(root, "a.png", stream.getvalue()).facts["blank"] is True
    for mode, color, other in (("L", 7, 8), ("RGB", (1, 2, 3), (1, 2, 4)), ("RGBA", (1, 2, 3, 9), (1, 2, 3, 8)), ("P", 1, 2), ("1", 0, 1), ("LA", (1, 2), (1, 3))):
        for blank in (True, False):
            image = Image.new(mode, (9, 7), color)
            if not blank:
                image.putpixel((8, 6), other)
            if mode == "P":
                image.putpalette([i for i in range(256) for _ in range(3)])
            stream = io.BytesIO()
            image.save(stream, "PNG")
            facts = read(root, "a.png", stream.getvalue()).facts
            assert (facts["opens"], facts["blank"], facts["width"], facts["height"]) == (True, blank, 9, 7), (mode, blank)


# ---- cut, tree, fence ----

texts = st.text(st.sampled_from("ab \n.é数7_X\t"), max_size=300)


@given(texts, st.integers(1, 80), st.sampled_from(["head", "tail", "ends"]), st.sampled_from([count_tokens, len, lambda text: len(text.split())]))
@settings(max_examples=400, derandomize=True, database=None, deadline=None)
def test_cut(text, most, keep, count):
    short, dropped = cut(text, most, keep, count)
    if count(text) <= most:
        assert (short, dropped) == (text, 0)
        return
    mark = f"[... {dropped:,} tokens cut ...]"
    assert dropped >= 1 and mark in short
    head, tail = short.split(mark)
    tail = tail[1:]
    assert count(short) <= max(most, count(mark))
    assert (text.startswith(head) or text.startswith(head[:-1])) and text.endswith(tail)
    assert keep == "ends" or (tail if keep == "head" else head) == ""
    assert len(head) + len(tail) <= len(text) + 1


@given(st.dictionaries(st.lists(st.sampled_from("abcd"), min_size=1, max_size=5).map("/".join), st.integers(0, 10**7), max_size=40), st.integers(1, 200))
@settings(max_examples=150, derandomize=True, database=None, deadline=None)
def test_tree(names, most):
    files = [FileInfo(f"{name}.py", size, "code") for name, size in names.items()]
    folders = {"/".join(name.split("/")[:depth]): "" for name in names for depth in range(1, name.count("/") + 1)}
    assume(files)
    whole = module._tree(files, folders, 0, 10**6).split("\n")
    assert len(whole) == 1 + len(files) + len(folders)
    lines = module._tree(files, folders, 0, most).split("\n")
    assert count_tokens("\n".join(lines)) <= most or len(lines) == 2  # the root, and how many are missing
    if len(lines) < len(whole):
        shown = len(lines) - 2
        assert lines[-1] == f"[... {len(whole) - 1 - shown:,} of {len(whole) - 1:,} entries are not shown ...]"
    depth = lambda line: len(line) - len(line.lstrip())  # noqa: E731
    assert all(depth(after) <= depth(before) + 2 for before, after in zip(lines, lines[1:], strict=False))


@given(st.text(st.sampled_from("ab<|>/\n[]INST_s \u202e\ud800"), max_size=80), st.text(max_size=20))
@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@example("<|im_end|><<|im_end|>|im_end|></s><s><bos>[INST][/INST]<<SYS>><\uff5cend\u2581of\u2581sentence\uff5c>", "</s>\nEND")
def test_fence(text, source):
    fenced = fence(text, source)
    mark = fenced.split(" ")[1]
    lines = fenced.split("\n")
    assert fenced.encode() and lines[0].startswith(f"BEGIN {mark} source: ") and lines[-1] == f"END {mark}"
    assert "\n".join(lines[2:-1]).count(mark) == 0 and fenced.count(mark) == 3
    assert not any(word in fenced for word in ("<|im_end|>", "</s>", "<s>", "<bos>", "[INST]", "[/INST]", "<<SYS>>", "<\uff5cend"))
    assert fence(text, source) == fenced


def test_a_fence_that_occurs_is_made_anew(monkeypatch):
    class Hash:
        made = iter(["a" * 64, "b" * 64, "c" * 64])

        def __init__(self, _):
            self.hexdigest = lambda: next(Hash.made)

    monkeypatch.setattr(module.hashlib, "sha256", Hash)
    assert fence(f"END {'a' * 16}", "b" * 16).endswith(f"\nEND {'c' * 16}")
