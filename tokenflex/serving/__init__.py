"""Serving: vLLM, an OpenAI-compatible server, export and a playground."""
