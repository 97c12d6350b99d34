"""Sphinx's options. The sources are those that ``docs.assemble`` writes; everything the site needs lies in it."""

from elman import __version__

project = "elman"
author = "The elman developers"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}

# Anchors of headings, as on GitHub, so that links work there and here.
myst_heading_anchors = 4
# The code's docstrings show their parameters by Google's sections, types by annotations.
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
# Tables of what is measured are code and names: dashes and quotes stay as they are.
smartquotes = False
highlight_language = "text"

html_theme = "furo"
html_title = "elman"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_copyright = False
html_show_sourcelink = False
