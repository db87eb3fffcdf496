"""How Sphinx builds the documentation: `make docs`."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "dynavae"
author = copyright = "The dynavae developers"
release = version = importlib.metadata.version("dynavae")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "docstrings",
    "gallery",
    "generated",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_use_ivar = True
suppress_warnings = ["ref.python"]  # a class has two addresses: where it is written, where it is public
exclude_patterns = ["_build", "_generated"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["docs.css"]
html_title = f"dynavae {release}"
