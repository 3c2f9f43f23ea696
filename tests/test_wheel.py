"""What `pip install paperbook` gives: a wheel that needs nothing of the dev group and never saw this checkout."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

BIN = "Scripts" if os.name == "nt" else "bin"


def call(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def modules(root):
    """Every module a user can import, packages included."""
    package = root / "paperbook"
    found = [path.relative_to(root).with_suffix("") for path in sorted(package.rglob("*.py"))]
    names = [".".join(path.parts).removesuffix(".__init__") for path in found]
    return [name for name in names if not name.split(".")[-1].startswith("_")]


@pytest.fixture(scope="session")
def bare(root, tmp_path_factory):
    """The Python of a fresh environment that holds the wheel and its requirements, and nothing else."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    shutil.copytree(root / "paperbook", source / "paperbook", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    python = place / "venv" / BIN / "python"
    if uv:
        call(uv, "build", "-q", "--wheel", "-p", sys.executable, "-o", place, source)
        call(uv, "venv", "-q", "-p", sys.executable, place / "venv")
        install = [uv, "pip", "install", "-q", "-p", python]
    else:
        call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", place, source)
        venv.create(place / "venv", with_pip=True)
        install = [python, "-m", "pip", "install", "-q"]
    call(*install, "-c", root / "constraints.txt", *place.glob("*.whl"))
    return python


LIGHT = {"paperbook", "paperbook.core", *(f"paperbook.core.{name}" for name in ("assets", "book", "cli", "records"))}
IMPORT = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
assert "site-packages" in module.__file__, f"not the wheel: {module.__file__}"
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.mark.timeout(1200)  # where uv is not, pip takes its time
def test_every_module_imports_without_the_dev_group(bare, root, tmp_path):
    """Each in a process of its own, so that none leans on what another one imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PAPERBOOK"))}
    forbidden = {"nbdev", "papermill", "nbformat", "fastcore", "matplotlib", "pytest", "IPython"}
    for name in modules(root):
        loaded = set(json.loads(call(bare, "-c", IMPORT, name, cwd=tmp_path, env=environment)))
        assert not loaded & forbidden, f"{name} imports {loaded & forbidden}"
        # The command and what it leans on must start at once.
        if name in LIGHT:
            assert not loaded & {"torch", "transformers"}, f"{name} imports {loaded & {'torch', 'transformers'}}"
    out = call(bare.parent / "paperbook", "--help", cwd=tmp_path, env=environment)
    assert "report" in out


def test_metadata_has_one_source(root):
    """settings.ini says it; everything that repeats it agrees."""
    from configparser import ConfigParser

    ini = ConfigParser(delimiters=["="], interpolation=None)
    ini.read(root / "settings.ini", encoding="utf-8")
    settings = ini["DEFAULT"]
    import paperbook

    assert paperbook.__version__ == settings["version"] == importlib.metadata.version("paperbook")
    assert "project" not in tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.M)[1] == settings["version"]
    assert settings["repository"] in citation
    assert f"## {settings['version']}" in (root / "CHANGELOG.md").read_text(encoding="utf-8")
    quarto = (root / "_quarto.yml").read_text(encoding="utf-8")
    assert f"repo-url: {settings['repository']}\n" in quarto and f"repo-branch: {settings['branch']}\n" in quarto
    workflow = (root / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert f'"{settings["min_python"]}"' in workflow
    canonical = lambda name: re.split(r"[<>=!~\[; ]", name)[0].lower().replace("_", "-")  # noqa: E731
    locked = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonical(line) for line in locked if "==" in line}
    for key in settings:
        if key.endswith("requirements"):
            missing = {canonical(line) for line in settings[key].split()} - pinned
            assert not missing, f"constraints.txt lacks {missing} of {key}: run `make lock`"
