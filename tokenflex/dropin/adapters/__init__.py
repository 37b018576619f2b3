"""The built-in families: one function for each kind, from image inputs to patch grids."""

# ruff: noqa: F401  # importing the modules registers the families

from tokenflex.dropin.adapters import grids, sizes, tiles
