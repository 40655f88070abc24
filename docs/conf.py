"""The documents as pages: ``make docs``. Warnings are errors."""

project = "rehyat_jax"
copyright = "the rehyat_jax developers"  # Sphinx reads this name
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# Records of measurements stand beside their programs, outside of the pages.
suppress_warnings = ["myst.xref_missing"]

autodoc_typehints = "none"  # jaxtyping's shapes stand in the docstrings
autodoc_member_order = "bysource"
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
