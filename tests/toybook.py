"""A small book in a temporary folder, for tests that run notebooks, write records or break things."""

from pathlib import Path

import paperbook

CLAIMS = """
[toy]
title = "A toy paper"
arxiv = "0000.00000"
year = 2024
claims = [
  { id = "double", says = "Doubling works.", metric = "ratio", paper = { ratio = 2.0 } },
  { id = "halve", says = "Halving works.", metric = "ratio", paper = {} },
]

[later]
title = "A paper for later"
arxiv = "0000.00001"
year = 2024
claims = [{ id = "much", says = "Much will be shown.", metric = "share", paper = {} }]
"""


class ToyBook:
    """A checkout with one chapter `toy` and one planned chapter `later`."""

    def __init__(self, root: Path):
        self.root, self.out = root, root / "out"
        (root / "nbs" / "01_toy").mkdir(parents=True)
        (root / "seeds").mkdir()
        (root / "settings.ini").write_text("[DEFAULT]\n")
        (root / "seeds" / "claims.toml").write_text(CLAIMS)
        (root / "paperbook").symlink_to(Path(paperbook.__path__[0]).resolve())

    def write(self, name: str, *sources: str, chapter: str = "01_toy", parameters: str = 'scale = "ci"\nsize = 1'):
        """A notebook whose code cells are a parameters cell and then `sources`."""
        import nbformat

        from paperbook.core.book import Notebook

        tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
        cells = [nbformat.v4.new_markdown_cell(f"# About {name}"), tagged, *map(nbformat.v4.new_code_cell, sources)]
        path = self.root / "nbs" / chapter / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        return Notebook(path, chapter[3:], name)
