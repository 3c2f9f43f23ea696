"""The book by Sphinx, for machines without Quarto: same `_quarto.yml`, same notebook filter, no network."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from nbfilter import clean  # noqa: E402

book = yaml.safe_load((HERE.parent / "_quarto.yml").read_text(encoding="utf-8"))["book"]
parts = [entry for entry in book["chapters"] if isinstance(entry, dict)]

project = html_title = book["title"]
author = book["author"]
project_copyright = author
extensions = ["myst_nb"]
source_suffix = {".ipynb": "myst-nb", ".qmd": "myst-nb"}
include_patterns = ["index.qmd", *(page for part in parts for page in part["chapters"])]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
math_eqref_format = "({number})"
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "sphinx_book_theme"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "repository_url": book["repo-url"],
    "repository_branch": book["repo-branch"],
    "use_repository_button": True,
    "use_source_button": True,
    "use_issues_button": True,
    "use_download_button": False,
    "home_page_in_toc": True,
    "show_toc_level": 2,
}
# MathJax from the installed wheel, so that a page never asks the network for it.
mathjax_path = "mathjax/tex-chtml-full.js"


def copy_mathjax(app):
    source = Path(importlib.util.find_spec("mathjax").origin).parent / "static/mathjax/es5"
    target = Path(app.outdir) / "_static/mathjax"
    fonts = "output/chtml/fonts/woff-v2"
    shutil.copytree(source / fonts, target / fonts, dirs_exist_ok=True)
    shutil.copy(source / "tex-chtml-full.js", target)


def sidebar():
    """One captioned toctree for each part; a part still empty points at the claims its papers wait with."""
    waiting = f"In the making <{book['repo-url']}/blob/{book['repo-branch']}/seeds/claims.toml>"
    for part in parts:
        pages = [page.rpartition(".")[0] for page in part["chapters"]] or [waiting]
        yield "\n".join([f"\n```{{toctree}}\n:caption: {part['part']}\n:hidden:\n", *pages, "```\n"])


def equations(markdown):
    """Quarto's `$$ {#eq-x}` and `@eq-x`, in MyST's words."""
    markdown = re.sub(r"\$\$[ \t]*\{#(eq-[\w-]+)\}", r"$$ (\1)", markdown)
    return re.sub(r"(?<![\w`])@(eq-[\w-]*\w)", r"{eq}`\1`", markdown)


def read(app, docname, source):
    if docname == "index":
        source[0] = source[0].replace(" {.unnumbered}", "") + "".join(sidebar())
        return
    notebook = clean(json.loads(source[0]))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = equations("".join(cell["source"]))
        elif "#| echo: false\n" in cell["source"]:
            cell["metadata"].setdefault("tags", []).append("remove-input")
        for output in cell.get("outputs", []):
            if markdown := output.get("data", {}).get("text/markdown"):
                output["data"]["text/markdown"] = equations("".join(markdown))
    source[0] = json.dumps(notebook)


def setup(app):
    app.connect("builder-inited", copy_mathjax)
    app.connect("source-read", read)
