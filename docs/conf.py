"""Settings of the documentation build: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path

from fedmoe_sched import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "fedmoe_sched"
author = "The fedmoe_sched developers"
copyright = author  # noqa: A001 - the name that Sphinx reads
version = release = __version__

extensions = [
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "numpydoc",
]
# Parts of the pages study.md and alignment.md.
exclude_patterns = ["_build", "study/*.md", "alignment/**/*.md"]
templates_path = ["_templates"]
# autosummary writes its pages with the first suffix.
source_suffix = {".rst": "restructuredtext", ".md": "markdown"}
default_role = "py:obj"

myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"  # numpydoc sections name the types, with shapes
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"fedmoe_sched {version}"
html_static_path = ["_static"]
html_css_files = ["mathml.css"]
