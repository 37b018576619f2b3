"""Requests per second at fixed and mixed counts: of ``tokenflex serve``, and of vLLM."""
