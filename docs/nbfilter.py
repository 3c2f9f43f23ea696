#!/usr/bin/env python3
"""Take nbdev's housekeeping out of a notebook before a page is made of it.

Quarto calls this as a filter (JSON on stdin, JSON on stdout); docs/conf.py imports `clean`.
"""

import json
import re
import sys

DIRECTIVE = re.compile(r"^#\s*\|\s*(\w+)(?!\w|:).*\n?", re.M)  # `#| echo: false` is Quarto's own and stays
HOUSEKEEPING = {"hide", "default_exp"}
ARGUMENT = re.compile(r"^(\w+(?:, \w+)*): ", re.M)


def list_arguments(outputs: list) -> None:
    """In what show_doc printed, make a list of the docstring's `name: meaning` lines."""
    for output in outputs:
        shown = "".join(output.get("data", {}).get("text/markdown", ""))
        if shown.startswith("---\n\n### "):
            head, code, words = re.split(r"(^```python\n.*?^```\n)", shown, maxsplit=1, flags=re.M | re.S)
            words = re.sub(r"\n(Returns|Raises)\b", r"\n\n\1", ARGUMENT.sub(r"\n- `\1`: ", words))
            output["data"]["text/markdown"] = head.removeprefix("---\n\n") + code + words


def clean(notebook: dict) -> dict:
    """Drop hidden cells and directive lines; sources become lists of lines, which is what Quarto can read."""
    cells = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            if HOUSEKEEPING & set(DIRECTIVE.findall(source)):
                continue
            source = DIRECTIVE.sub("", source)
            list_arguments(cell["outputs"])
        cells.append({**cell, "source": source.splitlines(keepends=True)})
    return {**notebook, "cells": cells}


if __name__ == "__main__":
    json.dump(clean(json.load(sys.stdin)), sys.stdout)
