"""Adapters for public evaluation harnesses, and tables of benchmarks by counts."""
