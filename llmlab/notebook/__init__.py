"""Notebooks as scripts: run one with parameters, export one as a page. Imported by the command line alone."""
