"""``tokenflex info``: versions, device and backends; it needs the core alone."""

from __future__ import annotations

import argparse
import json

from tokenflex.cli.parser import CommandLine


def add_to(commands: CommandLine) -> None:
    """Add the command and its arguments."""
    info = commands.add(
        "info", _info, "show what is installed and the backend of each op", "tokenflex info"
    )
    info.add_argument("--json", action="store_true", help="print as JSON")


def _info(options: argparse.Namespace) -> int:
    from tokenflex_kernels import info

    facts = info()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    extension = facts["extension"]
    if not extension["built"]:
        built = "not built"
    elif extension["cuda"]:
        built = f"built with CUDA for {', '.join(extension['cuda_architectures'])}"
    else:
        built = "built without CUDA"
    rows = [(name, version or "not installed") for name, version in facts["versions"].items()]
    rows += [
        ("extension", built),
        ("device", f"{facts['device']['type']} ({facts['device']['name']})"),
        ("TOKENFLEX_BACKEND", facts["backend"]),
    ]
    for name, value in rows:
        print(f"{name:<20}{value}")
    print("\nop                  backend")
    for op, backend in facts["ops"].items():
        print(f"{op:<20}{backend}")
    return 0
