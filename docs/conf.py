# SPDX-License-Identifier: BSD-3-Clause
"""Sphinx settings. Nothing here needs the network: no inventories of other projects, no scripts from elsewhere."""

import importlib.util

import matplotlib as mpl

import fastops

mpl.use("Agg")

project = "fastops"
author = "the fastops developers"
copyright = "2026, the fastops developers"
version = release = fastops.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "tutorials"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
default_role = "literal"
nitpicky = True

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "none"
# The references of fastops.torch, fastops.jax and fastops.keras need their names alone; torch and jax are large.
autodoc_mock_imports = [name for name in ("jax", "keras", "torch") if not importlib.util.find_spec(name)]
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

sphinx_gallery_conf = {
    "examples_dirs": ["tutorials"],
    "gallery_dirs": ["gallery"],
    "filename_pattern": r"/plot_",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "min_reported_time": 10_000,
    "show_memory": False,
    "write_computation_times": False,
    "within_subsection_order": "FileNameSortKey",
    "backreferences_dir": None,
}

html_theme = "pydata_sphinx_theme"
html_title = "fastops"
html_static_path = ["_static"]
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "navbar_end": ["theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
