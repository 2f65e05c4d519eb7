"""The documentation site: ``make docs`` builds it into docs/_build/html."""

from mmkd import __version__

project = 'mmkd'
author = 'The mmkd authors'
project_copyright = f'2026, {author}'
release = __version__

extensions = [
    'myst_nb',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
    'sphinx_copybutton',
]
exclude_patterns = ['_build', 'examples']
nitpicky = True
# What docstrings and signatures name of other packages has no page here.
nitpick_ignore_regex = [('py:.*', r'(?!mmkd).*|mmkd\.utils\.Official')]

html_theme = 'furo'
html_title = f'mmkd {release}'
html_static_path = ['_static']
html_css_files = ['site.css']

myst_enable_extensions = ['colon_fence', 'deflist', 'dollarmath']
# Links such as [the cache](faster_teachers.md#the-cache).
myst_heading_anchors = 3

# The notebook is Python with text in comments. It is executed once, and again
# when it has changed.
nb_custom_formats = {'.nb.py': ['jupytext.reads', {'fmt': 'py:percent'}]}
nb_execution_mode = 'cache'
nb_execution_raise_on_error = True
nb_execution_timeout = 1800
nb_merge_streams = True

autodoc_typehints = 'description'
autodoc_member_order = 'bysource'
autodoc_typehints_description_target = 'documented'
napoleon_numpy_docstring = False
copybutton_prompt_text = '>>> |\\$ '
copybutton_prompt_is_regexp = True
