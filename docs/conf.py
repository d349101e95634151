"""Sphinx's settings; `make docs` (docs/build.py) is what runs it, on a copy of the pages with the reference added."""

project = "distill_trainers"
author = copyright = "The distill-trainers contributors"

extensions = ["myst_parser"]
root_doc = "README"
myst_heading_anchors = 5  # links to headings by the names that GitHub gives them
myst_links_external_new_tab = False

html_theme = "furo"
html_title = "distill_trainers"
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
