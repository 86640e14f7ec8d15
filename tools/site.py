"""A hook of MkDocs: formulas as MathML, and files that lie beside `docs/` as pages.

A fence of the language `math` holds TeX, which code hosts render as well. MathML is part of HTML, so a page needs no
script for it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
BESIDE = {"CHANGELOG.md": "changes.md", "CONTRIBUTING.md": "contributing.md"}  # file: page


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Have fences of mathematics set as formulas."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": formula})
    return config


def formula(source: str, *_: Any, **__: Any) -> str:
    """Return TeX as MathML, in a box that scrolls on a narrow screen."""
    return f'<div class="formula">{convert(source, display="block")}</div>'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of `BESIDE` as pages."""
    for name, page in BESIDE.items():
        files.append(File.generated(config, page, content=as_page((ROOT / name).read_text(encoding="utf-8"))))
    return files


def as_page(text: str) -> str:
    """Return the text of a file beside `docs/` with its links as seen from there; those to other files become words."""
    words = re.sub(r"\[([^\]]+)\]\((?!docs/|https?:|#)[^)]*\)", r"\1", text)
    return words.replace("](docs/", "](")
