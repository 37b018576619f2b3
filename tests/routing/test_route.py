"""The command that trains a router asks one split of digits for training, another for its curve."""

from __future__ import annotations

import json

import pytest

from tests.evaluation.test_runner import dataset, half_taught, processor  # noqa: F401 (fixtures)
from tokenflex.cli import main
from tokenflex.digits.dataset import DigitsDataset
from tokenflex.evaluation import evaluate
from tokenflex.routing import training
from tokenflex.training.checkpoint import save_model


@pytest.mark.filterwarnings("ignore:dataset has few questions:UserWarning")
def test_the_curve_is_of_the_test_split_and_training_of_validation(
    processor,  # noqa: F811
    half_taught,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """The model knows some of the test split by heart, so the splits differ."""
    read, get = [], DigitsDataset.__getitem__

    def record(self, index):
        read.append(get(self, index).id)
        return get(self, index)

    save_model(tmp_path, half_taught, processor)
    monkeypatch.setattr(training, "STEPS", 20)
    monkeypatch.setattr(DigitsDataset, "__getitem__", record)
    command = ["route", "--model", str(tmp_path), "--data", "digits", "--counts", "4,9,16"]
    assert main([*command, "--size", "6"]) == 0
    splits = ("validation", "test")
    assert read == [f"digits-{split}-{i}" for split in splits for i in range(6)]

    curve = json.loads((tmp_path / "router" / "report.json").read_text())["curve"]
    always = {row["setting"]: row["accuracy"] for row in curve if row["selector"] == "always"}
    validation, test = (
        evaluate(half_taught, processor, DigitsDataset(split, size=6), [4, 9, 16])["accuracy"]
        for split in splits
    )
    assert always == pytest.approx(test)
    assert all(abs(test[count] - validation[count]) > 0.05 for count in test)
