"""What every test shares. This file and tests marked gpu need only torch and pytest: GPU machines have no more."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Two workers on two cores: a library that starts a thread for each core would only get in the other's way.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models come in packages; a test that needs the network is a mistake
os.environ["PAPERBOOK_HOME"] = str(ROOT)

PARTS = ["The house", "Attention", "Low rank", "Reasoning", "Alignment", "Agents", "Reference"]

# The longest first, so that no worker starts a long test when the other has finished.
LONGEST = ["test_notebooks.py", "test_readme.py", "test_site.py", "test_wheel.py", "test_book.py", "test_cli.py"]


def pytest_ignore_collect(collection_path, config):
    """`-m gpu` opens only files that have such tests: the others import what a GPU machine lacks."""
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py":
        return "mark.gpu" not in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            skip = pytest.mark.skip(reason="needs a CUDA device: run `make gpu` on a machine that has one")
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(skip)


@pytest.fixture(scope="session")
def parts() -> list[str]:
    """The parts of the book, in order."""
    return PARTS


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout's top folder."""
    return ROOT


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, converted once for all workers; skips with the fixing command."""
    from paperbook.core.assets import AssetMissing, find

    try:
        return find("SmolLM2-135M-Instruct")
    except AssetMissing as missing:
        pytest.skip(str(missing))
