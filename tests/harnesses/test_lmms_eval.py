"""The adapter for lmms-eval: its entry point, one count per run, token counts."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.harnesses.names import OneTask, Unreadable
from tests.models.tiny import picture
from tokenflex.harnesses.assistant import Assistant

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
QUESTIONS = ["odd", "majority", "where", "read r1c1", "odd"]


def entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["lmms_eval.models"]["tokenflex"].split(":")
    return getattr(importlib.import_module(module), name)


def load(adapter, checkpoint, tokens, **config):
    """Make a model as lmms-eval does: from a string of arguments, and its own options."""
    lm = adapter.TokenFlex.create_from_arg_string(
        f"pretrained={checkpoint},tokens={tokens}",
        {"device": "cpu", "max_batch_size": None, **config},
    )
    lm.task_dict = {
        "digits": {"test": [{"question": q, "seed": i} for i, q in enumerate(QUESTIONS)]}
    }
    return lm


def messages(document):
    image = {"type": "image", "url": picture(document["seed"])}
    return [{"role": "user", "content": [image, {"type": "text", "text": document["question"]}]}]


def request_for(adapter, place, options, *, task="digits", ask=messages):
    arguments = ("context", ask, options, place, task, "test")
    metadata = {"task": task, "doc_id": place, "repeats": 1}
    return adapter.Instance("generate_until", arguments, 0, metadata)


def test_the_entry_point_names_a_chat_model(adapter):
    manifest = entry_point()()
    assert manifest.model_id == "tokenflex"
    assert manifest.simple_class_path is None
    module, name = manifest.chat_class_path.rsplit(".", 1)
    model_class = getattr(importlib.import_module(module), name)
    assert issubclass(model_class, adapter.lmms)
    assert not model_class.is_simple
    registry = sys.modules["lmms_eval.models.registry_v2"]
    if hasattr(registry, "ModelRegistryV2"):  # the package's own: it checks the class itself
        models = registry.ModelRegistryV2()
        models.register_manifest(manifest)
        assert models.get_model_class("tokenflex") is model_class


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize(("tokens", "count"), [("4", 4), ("2x3", (2, 3)), ("16", 16)])
def test_answers_and_token_counts_are_those_of_generate(
    adapter, checkpoint, greedy, tokens, count, batch_size
):
    lm = load(adapter, checkpoint, tokens, batch_size=batch_size)
    short, long = {"max_new_tokens": 3, "until": ["\n\n"]}, {"max_new_tokens": 6}
    options = [short, long, long, short, short]
    requests = [request_for(adapter, place, one) for place, one in enumerate(options)]
    results = lm.generate_until(requests)
    for place, (result, one) in enumerate(zip(results, options, strict=True)):
        said, read, written = greedy(
            [picture(place)], f"<image>{QUESTIONS[place]}", count, one["max_new_tokens"]
        )
        assert result.text == said
        assert result.token_counts.input_tokens == read
        assert result.token_counts.output_tokens == written


def test_the_adapter_never_looks_at_the_name_of_the_task(adapter, checkpoint, greedy):
    """Answers, tokens and rounds do not depend on it, so no task can have a special count."""
    lm = load(adapter, checkpoint, 9)
    lm.task_dict = OneTask(lm.task_dict["digits"])
    options = {"max_new_tokens": 4}
    lm_request = request_for(adapter, 1, options, task=Unreadable())
    (result,) = lm.generate_until([lm_request])
    said, read, written = greedy([picture(1)], f"<image>{QUESTIONS[1]}", 9, 4)
    assert result.text == said
    assert (result.token_counts.input_tokens, result.token_counts.output_tokens) == (read, written)

    def ask(document, **rounds):
        return (None, True, [], None) if rounds else messages(document)

    lm_request = request_for(adapter, 1, options, task=Unreadable(), ask=ask)
    assert lm.generate_until_multi_round([lm_request]) == [[said]]


def test_tiles_are_an_argument(adapter, checkpoint):
    def ask(document):
        image = {"type": "image", "url": picture(1, (32, 96))}
        return [{"role": "user", "content": [image, {"type": "text", "text": "odd"}]}]

    read = []
    for more in ("", ",max_tiles=3"):
        lm = load(adapter, checkpoint, f"4{more}")
        result = lm.generate_until([request_for(adapter, 0, {"max_new_tokens": 1}, ask=ask)])[0]
        read.append(result.token_counts.input_tokens)
    assert read == [4 + 1, 3 * 4 + 1]


def test_sampling_only_where_a_task_asks_for_it(adapter, checkpoint, monkeypatch):
    lm, asked = load(adapter, checkpoint, 4), []

    def reply(conversations, **options):
        asked.append(options)
        return [SimpleNamespace(text="", prompt_tokens=1, new_tokens=1)] * len(conversations)

    monkeypatch.setattr(lm.assistant, "reply", reply)
    for options in (
        {"temperature": 0, "top_p": None, "do_sample": False},
        {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5},
    ):
        lm.generate_until([request_for(adapter, 0, options)])
    assert asked == [
        {"max_new_tokens": 1024, "num_beams": 1},
        {
            "max_new_tokens": 5,
            "num_beams": 1,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.9,
        },
    ]


def test_rounds_follow_the_task_to_its_end(adapter, checkpoint, greedy):
    seen = []

    def ask(document, round_idx=None, previous_output=None, previous_round_info=None):
        seen.append((round_idx, previous_output, previous_round_info))
        turn = [{"role": "user", "content": [{"type": "text", "text": "odd"}]}]
        if round_idx is None:
            return messages(document)
        return (None, True, [], None) if round_idx == 2 else (turn, False, previous_output, "info")

    lm = load(adapter, checkpoint, 4)
    lm_request = request_for(adapter, 0, {"max_new_tokens": 2}, ask=ask)
    ((first, second),) = lm.generate_until_multi_round([lm_request])
    assert first == greedy([picture(0)], "<image>odd", 4, 2)[0]
    assert second == greedy([], "odd", 4, 2)[0]
    assert seen == [(None, None, None), (1, [first], None), (2, [first, second], "info")]


def test_a_task_without_an_end_is_stopped(adapter, checkpoint, monkeypatch):
    monkeypatch.setattr(adapter, "MAX_ROUNDS", 3)

    def ask(document, **rounds):
        return (messages(document), False, None, None) if rounds else messages(document)

    lm = load(adapter, checkpoint, 4)
    with pytest.raises(RuntimeError, match="digits does not end after 3"):
        lm.generate_until_multi_round([request_for(adapter, 0, {"max_new_tokens": 1}, ask=ask)])


def test_what_it_cannot_do_is_said(adapter, checkpoint):
    lm = load(adapter, checkpoint, 4)
    with pytest.raises(NotImplementedError, match="loglikelihood"):
        lm.loglikelihood([])

    def video(document):
        return [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]

    with pytest.raises(ValueError, match="'video'"):
        lm.generate_until([request_for(adapter, 0, {}, ask=video)])
    with pytest.raises(ValueError, match="tokens=64"):
        adapter.TokenFlex(pretrained=str(checkpoint))
    with pytest.raises(ValueError, match="9 and 16"):
        load(adapter, checkpoint, 10)
    with pytest.raises(FileNotFoundError, match="none"):
        load(adapter, checkpoint.parent / "none", 4)


def test_without_lmms_eval_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval.api.instance", None)
    monkeypatch.delitem(sys.modules, "tokenflex.harnesses.lmms_eval", raising=False)
    with pytest.raises(ImportError, match="pip install lmms-eval"):
        importlib.import_module("tokenflex.harnesses.lmms_eval")


def test_the_entry_point_is_light():
    code = (
        "import tokenflex.harnesses.manifest, sys; print({'torch', 'lmms_eval'} & {*sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


def test_auto_chooses_from_images_that_are_encoded_once(checkpoint, greedy):
    class ByLength:
        label = "auto"

        def select(self, model, images, tiles, prompts):
            shown.append(images.features)
            return [[4 if len(ids) == 2 else 16] * len(tiles) for ids in prompts]

    assistant, passes, shown = Assistant(checkpoint, 4, device="cpu"), [], []
    assistant.count = ByLength()
    assistant.model.model.vision_model.register_forward_hook(
        lambda module, inputs, output: passes.append(len(output.last_hidden_state))
    )
    questions, counts = ["odd", "read r1c1", "odd"], [4, 16, 4]
    chats = [messages_of(question, seed) for seed, question in enumerate(questions)]
    replies = assistant.reply(chats, max_new_tokens=3)
    assert assistant.label == "auto"
    assert passes == [3]
    assert [reply.vision_tokens for reply in replies] == counts
    for seed, (reply, question, count) in enumerate(zip(replies, questions, counts, strict=True)):
        assert reply.text == greedy([picture(seed)], f"<image>{question}", count, 3)[0]
        assistant.reply([chats[seed]], max_new_tokens=1)
        assert torch.allclose(shown[seed], shown[-1], atol=1e-5)  # each chat's own images


def messages_of(question, seed=1):
    image = {"type": "image", "image": picture(seed)}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


def test_a_placeholder_in_a_text_stands_for_no_image(checkpoint):
    assistant = Assistant(checkpoint, 4, device="cpu")
    plain, marked = (
        assistant.reply([[{"role": "user", "content": text}]], max_new_tokens=2)[0]
        for text in ("odd", "<im<image>age>odd")
    )
    assert plain == marked


def test_image_parts_are_read_as_in_a_chat(checkpoint, tmp_path):
    assistant = Assistant(checkpoint, 4, device="cpu")
    picture(1).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    expected = assistant.reply([messages_of("odd")], max_new_tokens=2)
    for part in (
        {"type": "image", "url": path},
        {"type": "image", "path": path},
        {"type": "image_url", "image_url": {"url": path}},
    ):
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "odd"}]}]
        assert assistant.reply([messages], max_new_tokens=2) == expected


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([{"type": "image"}], r"content\[0\] must hold an image, got none"),
        ([{"type": "image", "image": None}], r"content\[0\] must hold an image, got none"),
        ([{"type": "image", "image": "a", "url": "a"}], r"content\[0\] must hold one image"),
        (["odd"], r"content\[0\]: content must have parts of type text and image, got str"),
        ([{"type": "text", "text": None}], r"content\[0\]\.text must be a string, got NoneType"),
        ([{"type": "video", "video": "a.mp4"}], r"content\[0\]: .*got type 'video'"),
        (3, "content must be a string or a list of parts, got int"),
    ],
    ids=str,
)
def test_parts_that_are_no_text_or_image_are_refused_by_name(checkpoint, content, error):
    assistant = Assistant(checkpoint, 4, device="cpu")
    conversations = [messages_of("odd"), [{"role": "user", "content": content}]]
    with pytest.raises((TypeError, ValueError), match=r"conversations\[1\]\[0\]\." + error):
        assistant.reply(conversations, max_new_tokens=2)
