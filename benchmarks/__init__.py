"""Measurements of every op and model against their peers: see README.md here."""
