"""Panels and notebooks in JupyterLab in Chromium: what a person sees and does. A package, so that its conftest has a name of its own."""
