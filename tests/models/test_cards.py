"""Model cards: written beside every saved model, and never over somebody else's."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import LlavaConfig, utils

from tests.models.tiny import tiny_model
from tokenflex.models.cards import CARD, PICTURE, is_generated, keep_edited_card, write_card

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
    assert 'AutoModelForImageTextToText.from_pretrained("mine")' in card.text
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


@pytest.mark.parametrize("card_exists", [False, True])
def test_pushing_uploads_our_card_unless_the_repository_has_one(monkeypatch, card_exists):
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
    tiny_model().push_to_hub("someone/mine")
    assert {"config.json", "model.safetensors", CARD, "tokenflex_auto.py"} <= {*uploaded}
    if card_exists:
        assert "# Theirs" in uploaded["card"]
    else:
        assert "# someone/mine\n" in uploaded["card"]
        assert 'from_pretrained("someone/mine")' in uploaded["card"]
