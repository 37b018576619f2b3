"""The table of families on the page matches the tests."""

from __future__ import annotations

import re

import pytest

from tests.dropin import report
from tests.dropin.configs import ALL, model_type
from tests.dropin.processors import NEED_TORCHVISION, PROCESSORS
from tests.dropin.report import COLUMNS, PAGE, RECORD, Outcomes
from tests.dropin.test_fitting import NOT_FITTED
from tests.dropin.test_packing import REFUSED
from tests.dropin.tiny import MODELS
from tokenflex.dropin import supported_families
from tokenflex_kernels.versions import is_older


def read_families() -> dict[str, dict[str, str]]:
    """The table of the page: family -> column -> cell."""
    (table,) = re.findall(
        r"table: families -->\n(.*?)\n<!-- end", PAGE.read_text("utf-8"), re.DOTALL
    )
    header, _, *rows = (
        [cell.strip() for cell in row.split("|")[2:-1]] for row in table.splitlines()
    )
    names = [row.split("|")[1].strip() for row in table.splitlines()[2:]]
    return {
        name: dict(zip(header, row, strict=True)) for name, row in zip(names, rows, strict=True)
    }


FAMILIES = read_families()
REPORTED = {
    "transformers": "5.23.0",
    "torch": "2.13.0",
    "torchvision": None,
    "families": FAMILIES,
    "relative_error": {"llava": {"before": 1.0, "after": 0.123, "held_out": 0.2}},
    "loss_at_step_0": {"llava": {"stock": 0.1, "random": 2.0, "fitted": 0.1234}},
}


def test_every_family_is_in_the_table():
    assert list(FAMILIES) == sorted(ALL), "run pytest tests/dropin --dropin-report"
    assert {model_type(name) for name in FAMILIES} == set(supported_families())
    assert all(list(cells) == list(COLUMNS) for cells in FAMILIES.values())


def test_reported_cells_are_true():
    (written_for,) = re.findall(r"(?m)^transformers ([\d.]+), torch", RECORD.read_text("utf-8"))
    if is_older("transformers", written_for):
        pytest.skip(f"the table is of transformers {written_for}")
    for name, cells in FAMILIES.items():
        assert (cells["packing"] == "refused") == (model_type(name) in REFUSED)
        assert (cells["fit"] == "refused") == (name in NOT_FITTED)
        with_own = "beside torchvision" if name in NEED_TORCHVISION else "yes"
        assert cells["processor"] == (with_own if name in PROCESSORS else "not tested")
        others = {
            cells[column] for column in cells if column not in ("fit", "packing", "processor")
        }
        assert others == {"yes"}, name


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", PAGE.read_text("utf-8")))
def test_links_lead_somewhere(target):
    assert (PAGE.parent / target).exists()


class Said:
    def __init__(self, nodeid: str, outcome: str, when: str = "call", **properties) -> None:
        self.nodeid, self.outcome, self.when = nodeid, outcome, when
        self.skipped, self.failed = outcome == "skipped", outcome == "failed"
        self.user_properties = list(properties.items())


def test_outcomes_of_a_run_become_cells():
    outcomes, (test,), (processor,) = Outcomes(), COLUMNS["one count"], COLUMNS["processor"]
    outcomes.add(Said(f"a.py::{test}[llava-9]", "passed"))
    outcomes.add(Said(f"a.py::{test}[llava-pixtral-9]", "passed"))
    outcomes.add(Said(f"a.py::{test}[llava-pixtral-count2]", "failed"))
    outcomes.add(Said(f"a.py::{test}[mistral3-9]", "skipped", when="setup"))
    outcomes.add(Said(f"a.py::{test}[gemma3-9]", "passed", when="setup"))
    outcomes.add(Said(f"a.py::{processor}[mistral3]", "skipped", when="setup"))
    assert outcomes.report()["families"]["mistral3"]["processor"] == "needs torchvision"
    outcomes.add(Said(f"a.py::{processor}[lfm2_vl]", "passed"))
    outcomes.add(Said(f"a.py::{processor}[llava]", "passed"))
    processors = {name: row["processor"] for name, row in outcomes.report()["families"].items()}
    assert (processors["lfm2_vl"], processors["llava"]) == ("beside torchvision", "yes")
    cells = {name: row["one count"] for name, row in outcomes.report()["families"].items()}
    assert cells["llava"] == "yes"
    assert cells["llava-pixtral"] == "no"
    assert cells["mistral3"] == "not run"
    assert cells["gemma3"] == "not run"
    (packing,) = COLUMNS["packing"]
    assert outcomes.report()["families"]["gemma3"]["packing"] == "not run"
    outcomes.add(Said(f"a.py::{packing}[llava]", "passed"))
    assert outcomes.report()["families"]["gemma3"]["packing"] == "refused"


def test_a_run_of_some_tests_rewrites_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RECORD", tmp_path / "record.md")
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    outcomes = Outcomes()
    for test in COLUMNS["one count"]:
        for name in MODELS:
            outcomes.add(Said(f"a.py::{test}[{name}-9]", "passed"))
    with pytest.raises(ValueError, match=r"lacks count per image, .*, loss_at_step_0$"):
        report.write(outcomes.report())
    with pytest.raises(ValueError, match="lacks relative_error"):
        report.write({**REPORTED, "relative_error": {}})
    assert not list(tmp_path.iterdir())
    for name, source in (("page.md", PAGE), ("record.md", RECORD)):
        (tmp_path / name).write_text(source.read_text("utf-8"), "utf-8")
    report.write(REPORTED)
    assert (tmp_path / "page.md").read_text("utf-8") == PAGE.read_text("utf-8")
    record = (tmp_path / "record.md").read_text("utf-8")
    assert "transformers 5.23.0, torch 2.13.0, torchvision None" in record
    assert "| llava | 0.100 | 2.00 | 0.123 |" in record
    assert "| llava | 1.00 | 0.12 | 0.20 |" in record
