"""Rows as read from a CSV."""

from __future__ import annotations

from benchmarks.results import new_row


def row(op, case, variant, p50, *, mode="forward", device="cuda", **values):
    fields = new_row(op=op, case=case, mode=mode, variant=variant, status="ok", p50_us=str(p50))
    fields |= {
        "device": device,
        "tokens": "8192",
        "p20_us": str(p50),
        "p80_us": str(p50),
        "samples": "50",
        "timing": "graph" if device == "cuda" else "host",
        "tokens_per_s": "1000",
        "backend": "triton" if variant.startswith("tokenflex") else "",
        "gpu": "Some GPU" if device == "cuda" else "",
        "cpu": "Some CPU",
        "threads": "2",
        "load": "0.1",
        "torch": "2.11",
        "commit": "abc",
    }
    return fields | {name: str(value) for name, value in values.items()}


def not_run(op, case, mode, **values):
    """Return the row of a case that found no time left."""
    return row(op, case, "", "", mode=mode, status="not run: no time left", backend="", **values)
