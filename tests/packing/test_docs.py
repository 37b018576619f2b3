"""The Python of docs/packing.md runs, and so do the hooks of the plugin for axolotl."""

from __future__ import annotations

import runpy
import sys
import types
from typing import Any

import pytest

from tests.dropin.processors import stock_processor
from tests.dropin.table import IMAGE
from tests.dropin.tiny import stock_model
from tests.packing.test_trainers import chats, options
from tests.test_docs import DOCS, snippets_of
from tests.test_examples import EXAMPLES
from tokenflex import packing
from tokenflex.dropin import ImageTextCollator

PAGE = (DOCS / "packing.md").read_text(encoding="utf-8").split("## The row map")[0]


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    model, processor = stock_model("llava"), stock_processor("llava")
    return {"model": model, "processor": processor, "data": chats(8)}


def run(snippet: str, names: dict[str, Any]) -> None:
    quick = snippet.replace("max_steps=100", "max_steps=1, report_to=[], use_cpu=True")
    exec(compile(quick, "docs/packing.md", "exec"), names)


def test_python_of_the_page_runs_in_order(names, capsys):
    snippets = snippets_of(PAGE)
    assert len(snippets) == 4
    for snippet in (snippets[0], *snippets[2:]):  # TRL is slow to import
        run(snippet, names)
    assert names["trainer"].state.global_step == 1
    assert len(names["rows"]) == 2
    assert float(capsys.readouterr().out.splitlines()[-1]) > 0.99999


@pytest.mark.slow
def test_trl_of_the_page_runs(names, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    names["data"] = datasets.Dataset.from_list(names["data"])
    names["arguments"] = trl.SFTConfig(**options(tmp_path, bf16=False, max_length=None))
    run(snippets_of(PAGE)[1], names)
    assert names["trainer"].state.global_step == 1


def test_the_plugin_for_axolotl_wraps_its_collators(monkeypatch):
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, base)
    plugin = runpy.run_path(str(EXAMPLES / "axolotl_packing.py"))["ImagePacking"]()
    model = stock_model("llava")
    padding = ImageTextCollator(stock_processor("llava"), image_token_id=IMAGE)
    trainer = types.SimpleNamespace(
        model=model, data_collator=padding, eval_data_collator=padding, bench_data_collator=padding
    )
    plugin.post_model_load({}, model)
    plugin.post_trainer_create({}, trainer)
    assert packing.is_enabled(model)
    for collator in (trainer.data_collator, trainer.eval_data_collator):
        row = collator(chats(3))
        assert len(row["cu_seq_lens_q"]) == 4
    assert trainer.bench_data_collator is padding
