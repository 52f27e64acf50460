"""Notebooks: sources in percent format, the .ipynb files that `build` makes of them, and the exercises' `checks` and `plots`."""
