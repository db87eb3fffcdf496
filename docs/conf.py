"""How Sphinx builds the documentation: `make docs`."""

from __future__ import annotations

import importlib.metadata

project = "dynavae"
author = "The dynavae developers"
release = version = importlib.metadata.version("dynavae")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"dynavae {release}"
