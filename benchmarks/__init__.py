"""Measurements: host cost with pytest-benchmark, kernels with a GPU harness. See README.md here."""
