"""Requests per second of ``tokenflex serve`` at fixed and mixed counts."""
