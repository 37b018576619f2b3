"""Model cards: written beside every saved model, and never over somebody else's."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlavaConfig, utils

from tests.dropin.processors import picture, stock_processor
from tests.dropin.tiny import stock_model
from tests.models.tiny import tiny_model
from tokenflex import TokenFlexForConditionalGeneration, replace_projector
from tokenflex.digits.processor import digits_processor
from tokenflex.models.cards import (
    CARD,
    PICTURE,
    card_text,
    is_generated,
    keep_edited_card,
    share_card,
    write_card,
)

REPORT = {
    "accuracy": {"4": 0.5, "2x3": 0.75},
    "accuracy_by_kind": {"read": {"4": 0.25, "2x3": 0.5}, "odd": {"4": 0.75, "2x3": 1.0}},
    "questions": {"read": 1000, "odd": 234},
}


def test_a_saved_model_has_a_card_that_hubs_can_read(tmp_path):
    tiny_model().save_pretrained(tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / CARD)
    assert (card.data.library_name, card.data.pipeline_tag) == (
        "transformers",
        "image-text-to-text",
    )
    assert "tokenflex" in card.data.tags
    assert "# mine\n" in card.text
    assert "arXiv:2504.03154" in card.text
    assert 'AutoModelForImageTextToText.from_pretrained("path/to/this/folder")' in card.text
    assert "## Accuracy" not in card.text


def test_accuracies_are_a_table_a_picture_and_metadata(tmp_path):
    (tmp_path / PICTURE).write_bytes(b"")
    assert write_card(tmp_path, tiny_model().config, report=REPORT, name="read it")
    card = ModelCard.load(tmp_path / CARD)
    assert "| vision tokens | 4 | 2x3 |" in card.text
    assert "| all questions | 0.500 | 0.750 |" in card.text
    assert "| read | 0.250 | 0.500 |" in card.text
    assert "Share of 1,234 questions" in card.text
    assert f"]({PICTURE})" in card.text
    metrics = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert metrics == {
        "accuracy at 4 vision tokens": 0.5,
        "accuracy at 2x3 vision tokens": 0.75,
    }


def test_a_card_that_somebody_edited_stays(tmp_path):
    config = tiny_model().config
    assert write_card(tmp_path, config)
    assert is_generated(tmp_path / CARD)
    assert write_card(tmp_path, config, report=REPORT)  # ours is replaced
    edited = (tmp_path / CARD).read_text().replace("# ", "# My ", 1)
    (tmp_path / CARD).write_text(edited)
    assert not is_generated(tmp_path / CARD)
    assert not write_card(tmp_path, config)
    assert (tmp_path / CARD).read_text() == edited
    (tmp_path / "next").mkdir()
    write_card(tmp_path / "next", config)
    keep_edited_card(tmp_path, tmp_path / "next")
    assert (tmp_path / "next" / CARD).read_text() == edited


def test_sources_are_named_with_their_licences_and_without_paths_of_this_machine(tmp_path):
    encoder = tmp_path / "folder" / "encoder"
    encoder.mkdir(parents=True)
    (encoder / CARD).write_text("---\nlicense: mit\n---\n# encoder\n")
    sources = {"vision encoder": str(encoder), "language model": "someone/text-1b"}
    write_card(tmp_path, tiny_model().config, sources=sources)
    card = ModelCard.load(tmp_path / CARD)
    assert "from `encoder`" in card.text
    assert str(tmp_path) not in card.text
    assert "`encoder`: mit" in card.text
    assert "from `someone/text-1b`" in card.text
    assert card.data.base_model == ["someone/text-1b"]


def test_the_card_of_a_conversion_says_how_to_load_it(tmp_path):
    config = LlavaConfig()
    config.tokenflex = {"num_image_tokens": 9}
    write_card(tmp_path, config, sources={"stock model": "a/b"})
    text = (tmp_path / CARD).read_text()
    assert "a converted `llava`" in text
    assert "tokenflex.from_pretrained(" in text
    assert "| stock model | from `a/b` |" in text


def code_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)


@pytest.mark.parametrize("converted", [False, True])
def test_the_code_of_a_card_runs(tmp_path, monkeypatch, capsys, converted):
    folder = tmp_path / "path/to/this/folder"
    if converted:
        processor = stock_processor("llava")
        model = replace_projector(stock_model("llava"), processor, num_image_tokens=16)
    else:
        model, processor = tiny_model(num_image_tokens=9), digits_processor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    picture(1).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(code_of((folder / CARD).read_text()), "card", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")  # an answer


@pytest.mark.parametrize("name", ["a \"b\" 'c'", "two\nlines", "back\\slash", "#[x](y) <b> `c`"])
def test_any_name_gives_a_card_that_can_be_read(name):
    text = card_text(tiny_model().config, name, report=REPORT, repository=name)
    card = ModelCard(text)
    assert card.data.model_name == name
    loads = [node for node in ast.walk(ast.parse(code_of(text))) if isinstance(node, ast.Constant)]
    assert name in [node.value for node in loads]
    title = re.search(r"^# (.*)$", card.text, re.MULTILINE).group(1)
    assert re.sub(r"\\(?=[`*<>\[\]\\])", "", title) == " ".join(name.split())


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A saved model whose card has accuracies, a source and a picture."""
    folder = tmp_path / "run"
    tiny_model().save_pretrained(folder)
    (folder / PICTURE).write_bytes(b"picture")
    sources = {"vision encoder": "someone/encoder"}
    write_card(folder, tiny_model().config, report=REPORT, sources=sources)
    return folder


def test_the_same_weights_keep_their_card_where_they_are_saved_again(trained, tmp_path):
    model = TokenFlexForConditionalGeneration.from_pretrained(trained)
    earlier = (trained / CARD).read_text()
    model.save_pretrained(trained)
    assert (trained / CARD).read_text() == earlier
    model.save_pretrained(tmp_path / "second")
    text = (tmp_path / "second" / CARD).read_text()
    assert is_generated(tmp_path / "second" / CARD)
    assert text.replace("second", "run").splitlines()[:-1] == earlier.splitlines()[:-1]
    assert (tmp_path / "second" / PICTURE).read_bytes() == b"picture"
    (trained / CARD).write_text("mine")
    model.save_pretrained(tmp_path / "third")
    assert (tmp_path / "third" / CARD).read_text() == "mine"


@pytest.mark.parametrize("change", ["weights", "config"])
def test_another_model_does_not_get_the_card(trained, tmp_path, change):
    model = TokenFlexForConditionalGeneration.from_pretrained(trained)
    if change == "weights":
        with torch.no_grad():
            next(model.model.projector.parameters()).add_(1)
    else:
        model.config.num_image_tokens = 4
    model.save_pretrained(tmp_path / "second")
    assert "## Accuracy" not in (tmp_path / "second" / CARD).read_text()
    model.save_pretrained(trained)
    assert "## Accuracy" not in (trained / CARD).read_text()


def test_only_the_main_process_writes_a_card(tmp_path):
    tiny_model().save_pretrained(tmp_path / "mine", is_main_process=False)
    assert not (tmp_path / "mine" / CARD).exists()


def test_a_card_of_another_form_stays(tmp_path):
    config = tiny_model().config
    (tmp_path / CARD).write_bytes(b"\xff\xfe card")
    share_card(tmp_path, config, "someone/mine")
    assert not write_card(tmp_path, config)
    assert (tmp_path / CARD).read_bytes() == b"\xff\xfe card"
    (tmp_path / CARD).unlink()
    (tmp_path / CARD).symlink_to(tmp_path / "nowhere")
    assert not write_card(tmp_path, config)
    assert (tmp_path / CARD).is_symlink()


@pytest.mark.parametrize("card_exists", [False, True])
def test_pushing_uploads_our_card_unless_the_repository_has_one(trained, monkeypatch, card_exists):
    """Against a stand-in of the hub: what would be uploaded."""
    uploaded: dict[str, str] = {}
    theirs = ModelCard("---\ntags: []\n---\n# Theirs\n")

    class Hub:
        def create_repo(self, repo_id, **options):
            return type("Url", (), {"repo_id": repo_id})

        def create_commit(self, repo_id, operations, **options):
            for operation in operations:
                uploaded[operation.path_in_repo] = operation.path_or_fileobj
            uploaded["card"] = Path(uploaded[CARD]).read_text(encoding="utf-8")

    def load(repo_id, **options):
        if card_exists:
            return theirs
        raise utils.hub.EntryNotFoundError("no card")

    monkeypatch.setattr(utils.hub, "hf_api", Hub)
    monkeypatch.setattr(utils.hub.ModelCard, "load", load)
    TokenFlexForConditionalGeneration.from_pretrained(trained).push_to_hub("someone/mine")
    assert {"config.json", "model.safetensors", CARD, "tokenflex_auto.py"} <= {*uploaded}
    if card_exists:
        assert "# Theirs" in uploaded["card"]
    else:
        assert "# someone/mine\n" in uploaded["card"]
        assert 'from_pretrained("someone/mine")' in uploaded["card"]
        assert "path/to/this/folder" not in uploaded["card"]
        assert "| all questions | 0.500 | 0.750 |" in uploaded["card"]
        assert "from `someone/encoder`" in uploaded["card"]
        assert PICTURE in uploaded
        tiny_model().push_to_hub("someone/mine")  # of no folder
        assert "# someone/mine\n" in uploaded["card"]
        assert 'from_pretrained("someone/mine")' in uploaded["card"]
        assert "## Accuracy" not in uploaded["card"]
