"""Results of a run of these tests for each family, for docs/dropin.md and experiments/dropin.md.

    PYTHONPATH=.venv-torchvision python -m pytest tests/dropin --dropin-report

writes the table of families of docs/dropin.md, and the measurements of experiments/dropin.md.
`make test-torchvision` installs into that folder.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.dropin.processors import NEED_TORCHVISION, PROCESSORS
from tests.dropin.tiny import MODELS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/dropin.md"
RECORD = ROOT / "experiments/dropin.md"

# column -> the tests that must have passed for a family
COLUMNS = {
    "one count": ["test_uniform_count_trains_every_projector_parameter"],
    "count per image": [
        "test_each_prompt_of_a_mixed_batch_is_as_if_alone",
        "test_precomputed_tokens_in_the_stock_model_give_the_same_logits",
    ],
    "greedy, beams": ["test_generation_of_a_mixed_batch_is_that_of_each_prompt"],
    "processor": ["test_counts_reach_the_model"],
    "fit": ["test_fitted_tokens_are_near_the_stock_ones"],
    "packing": ["test_packed_logits_are_those_of_each_sample_alone"],
    "PEFT": ["test_peft_trains_and_saves_its_copy_of_the_projector"],
    "save, load": ["test_saved_conversion_loads_exactly"],
    "restore": ["test_restored_model_is_the_stock_one"],
}


class Outcomes:
    """The outcomes of each test for each family."""

    def __init__(self) -> None:
        self.results: dict[tuple[str, str], list[str]] = {}
        self.properties: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, report: Any) -> None:
        """Add one phase of one test; only calls, skips and failures count."""
        match = re.match(r"(\w+)(?:\[(.*)\])?$", report.nodeid.rpartition("::")[2])
        if match is None or (report.when != "call" and not report.skipped and not report.failed):
            return
        test, parameters = match[1], match[2] or ""
        # "llava-pixtral-beams": a name of a model, then what else the test is parametrised over
        names = [n for n in MODELS if parameters == n or parameters.startswith(f"{n}-")]
        if names:
            key = test, max(names, key=len)
            self.results.setdefault(key, []).append(report.outcome)
            self.properties.setdefault(key, {}).update(report.user_properties)

    def report(self) -> dict[str, Any]:
        """Return the cells of the table, and the measurements."""
        families = {
            name: {column: self._cell(name, column) for column in COLUMNS} for name in MODELS
        }
        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__.split("+")[0],
            "torchvision": _torchvision_version(),
            "families": families,
            "relative_error": self._measured("test_fitted_tokens_are_near_the_stock_ones", "error"),
            "loss_at_step_0": self._measured(
                "test_loss_at_step_0_is_near_the_stock_model_s", "loss"
            ),
        }

    def _cell(self, name: str, column: str) -> str:
        outcomes = [o for test in COLUMNS[column] for o in self.results.get((test, name), [])]
        if column == "processor" and name not in PROCESSORS:
            return "not tested"
        if not outcomes:  # the test leaves out the families that refuse
            return "refused" if column in ("packing", "fit") and self._ran(column) else "not run"
        if "failed" in outcomes:
            return "no"
        if "skipped" in outcomes:
            return "needs torchvision" if column == "processor" else "not run"
        if column == "processor" and name in NEED_TORCHVISION:
            return "beside torchvision"
        return "yes"

    def _ran(self, column: str) -> bool:
        return any(test in COLUMNS[column] for test, _ in self.results)

    def _measured(self, test: str, key: str) -> dict[str, Any]:
        return {
            name: properties[key]
            for (of, name), properties in sorted(self.properties.items())
            if of == test and key in properties
        }


def _torchvision_version() -> str | None:
    try:
        return version("torchvision")
    except PackageNotFoundError:
        return None


def families_table(report: dict[str, Any]) -> str:
    """The table of docs/dropin.md."""
    rows = ["| family | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    rows += [
        f"| {name} | " + " | ".join(cells[column] for column in COLUMNS) + " |"
        for name, cells in report["families"].items()
    ]
    return "\n".join(rows)


def measurements(report: dict[str, Any]) -> dict[str, str]:
    """The tables of experiments/dropin.md, by name."""
    versions = [f"{name} {report[name]}" for name in ("transformers", "torch", "torchvision")]
    losses = ["| family | stock | new, random | new, fitted |", "|---|---|---|---|"]
    losses += [
        f"| {name} | {loss['stock']:.3f} | {loss['random']:.2f} | {loss['fitted']:.3f} |"
        for name, loss in report["loss_at_step_0"].items()
    ]
    errors = ["| family | random | fitted | fitted, on held-out images |", "|---|---|---|---|"]
    errors += [
        f"| {name} | {error['before']:.2f} | {error['after']:.2f} | {error['held_out']:.2f} |"
        for name, error in report["relative_error"].items()
    ]
    return {
        "versions": ", ".join(versions),
        "loss at step 0": "\n".join(losses),
        "relative error": "\n".join(errors),
    }


def with_tables(text: str, tables: dict[str, str]) -> str:
    """``text`` with its tables replaced."""
    for name, table in tables.items():
        start, end = f"<!-- table: {name} -->", "<!-- end of table -->"
        pattern = re.compile(f"{re.escape(start)}\n.*?\n{re.escape(end)}", flags=re.DOTALL)
        text, number = pattern.subn(f"{start}\n{table}\n{end}", text)
        if number != 1:
            raise ValueError(f"the page must hold {start!r} once, found it {number} times")
    return text


def write(report: dict[str, Any]) -> None:
    """Rewrite the tables of both pages.

    Raises:
        ValueError: The run left out a column or a measurement; both files stay as they were.
    """
    cells = report["families"].values()
    lacking = [column for column in COLUMNS if "not run" in [row[column] for row in cells]]
    lacking += [name for name in ("relative_error", "loss_at_step_0") if not report[name]]
    if lacking:
        raise ValueError(
            f"the report needs a run of all of tests/dropin, this one lacks {', '.join(lacking)}"
        )
    pages = {
        path: with_tables(path.read_text(encoding="utf-8"), tables)
        for path, tables in (
            (PAGE, {"families": families_table(report)}),
            (RECORD, measurements(report)),
        )
    }
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
