"""Packing under transformers' Trainer and TRL: records, counts, losses, accumulation."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

import tokenflex.projector
from tests.data.test_packing import SAMPLES, drawn, talk
from tests.models.test_tiling import tiling_processor
from tests.models.tiny import IMAGE, picture, tiny_model
from tokenflex import DataCollatorWithPacking, TokenCounts
from tokenflex.data.packing import PackingCollator
from tokenflex.data.samples import Conversation, Sample
from tokenflex.digits.processor import digits_processor

COUNTS = TokenCounts((4, 9, 16), (0.2, 0.3, 0.5), seed=7)


@pytest.fixture(scope="module")
def processor():
    return digits_processor()


def messages(*texts: str) -> list[dict]:
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def records(number: int = 8) -> list[dict]:
    """Questions of several lengths about a picture each, every fourth without one."""
    return [
        {
            "index": i,
            "images": [picture(i)] if i % 4 else [],
            "messages": messages("odd " * (1 + i % 3), "7 " * (1 + i % 2)),
        }
        for i in range(number)
    ]


def options(folder, **changes) -> TrainingArguments:
    given = {
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **changes,
    }
    return TrainingArguments(str(folder), **given)


def train(folder, collator, data=None, model=None, **changes) -> tuple[float, dict]:
    """Train a tiny model; return its loss and its weights."""
    model = model or tiny_model()
    data = records() if data is None else data
    trainer = Trainer(model, options(folder, **changes), train_dataset=data, data_collator=collator)
    loss = trainer.train().training_loss
    return loss, {name: weight.clone() for name, weight in model.state_dict().items()}


def same_batch(batch: dict, expected: dict) -> None:
    for name in ("labels", "position_ids", "target_rows"):
        assert torch.equal(batch[name], expected[name]), name
    assert torch.equal(batch["plan"].source, expected["plan"].source)
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert [*batch["num_image_tokens"]] == [*expected["num_image_tokens"]]


# ---- records


def test_records_become_the_batch_of_the_training_loop(processor):
    """Conversations in a list of lists, in strings with marks, without an image, alone."""
    batch = DataCollatorWithPacking(processor, COUNTS)(
        [
            {
                "index": 0,
                "epoch": 3,
                "image": SAMPLES[0].images[0],
                "messages": [messages("odd", "3"), messages("read r1c1", "blank")],
            },
            {
                "index": 1,
                "epoch": 3,
                "images": SAMPLES[1].images,
                "messages": messages("<image> where <image> count", "5", "odd", "7"),
            },
            {"index": 2, "epoch": 3, "messages": messages("majority", "red green")},
            {"index": 3, "epoch": 3, "image": SAMPLES[3].images, "messages": [
                {"role": "user", "content": [
                    {"type": "image"}, {"type": "text", "text": " colour r2c2"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "blue"}]},
            ]},
        ]
    )  # fmt: skip
    own = PackingCollator(processor, COUNTS, share_prefix=True)(drawn(epoch=3))
    assert torch.equal(batch["plan"].source, own.plan.source)
    assert torch.equal(batch["target_rows"][0], own.target_rows)
    assert torch.equal(batch["labels"][0], own.plan.labels)
    assert torch.equal(batch["position_ids"][0], own.shared_prefixes.position_ids)
    assert torch.equal(batch["pixel_values"], own.pixel_values)
    assert batch["num_image_tokens"] == own.num_image_tokens


def test_forms_of_one_record(processor):
    """Images inside of messages, a prompt with a completion, texts, and processed features."""
    collator, image = DataCollatorWithPacking(processor, 9), picture(5)
    asked = {"type": "text", "text": " odd"}
    inside = [
        {"role": "user", "content": [{"type": "image", "image": image}, asked]},
        *messages("", "7")[1:],
    ]
    sample = Sample("a", (image,), (talk("odd", "7"),))
    expected = collator([sample])
    words = processor.tokenizer.convert_tokens_to_ids(["7", "<eos>"])
    assert expected["labels"][expected["labels"] != -100].tolist() == words
    call = {"images": image, "text": "<image> odd 7<eos>"}
    chosen = processor(**call, num_image_tokens="auto")
    learned = torch.where(chosen["input_ids"] == words[0], 0, -100)
    learned[:, -2:] = chosen["input_ids"][:, -2:]
    for record in (
        {"messages": inside},
        {"messages": messages("odd", "7"), "images": [image]},
        {"prompt": messages("odd"), "completion": messages("", "7")[1:], "images": [image]},
        {"prompt": "<image> odd ", "completion": "7<eos>", "image": image},
        {**chosen, "labels": learned},
        {**processor(**call, num_image_tokens=9), "labels": processor_labels(processor, call)},
        {name: getattr(value, "tolist", lambda v=value: v)() for name, value in chosen.items()}
        | {"labels": learned.tolist()},
    ):
        same_batch(collator([record]), expected)
    whole = collator([{"text": call["text"], "images": [image]}])
    assert whole["labels"][0, 9:].tolist() == whole["plan"].input_ids[9:].tolist()
    assert {*whole["labels"][0, :9].tolist()} == {-100}


def processor_labels(processor, call) -> torch.Tensor:
    ids = processor(**call, num_image_tokens=9)["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    return labels


def test_stored_images_of_the_datasets_library_are_read(processor, tmp_path):
    picture(1).save(tmp_path / "a.png")
    talked = {"messages": messages("odd", "7")}
    stored = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    collator = DataCollatorWithPacking(processor, 4)
    expected = collator([{**talked, "images": [picture(1)]}])
    same_batch(collator([{**talked, "images": [stored]}]), expected)
    path = {"bytes": None, "path": str(tmp_path / "a.png")}
    same_batch(collator([{**talked, "image": path}]), expected)


def test_answers_of_a_prompt_are_not_learned(processor):
    prompt = messages("odd", "7", "read r1c1")
    record = {"prompt": prompt, "completion": messages("", "blank")[1:], "images": [picture(1)]}
    collator = DataCollatorWithPacking(processor, 4)
    whole = collator([{"messages": [*prompt, *record["completion"]], "images": [picture(1)]}])
    batch = collator([record])
    learned = processor.tokenizer.convert_tokens_to_ids(["blank", "<eos>"])
    assert batch["labels"][batch["labels"] != -100].tolist() == learned
    assert int((whole["labels"] != -100).sum()) == 4
    again = collator([{"messages": [*prompt, *record["completion"]], "images": [picture(1)]}])
    assert torch.equal(again["labels"], whole["labels"])


def test_images_may_stand_after_a_prompts_answers(processor):
    """The answers of a prompt are left out, whichever turns show the images."""
    collator = DataCollatorWithPacking(processor, 4)

    def learned(images: int, *texts: str) -> list[str]:
        talked = messages(*texts)
        (labels,) = collator(
            [
                {
                    "prompt": talked[:-1],
                    "completion": talked[-1:],
                    "images": [picture(i) for i in range(images)],
                }
            ]
        )["labels"]
        return processor.tokenizer.convert_ids_to_tokens(labels[labels != -100].tolist())

    assert learned(2, "<image> odd", "7", "<image> odd", "8") == ["8", "<eos>"]
    assert learned(1, "odd", "7", "<image>", "8") == ["8", "<eos>"]
    assert learned(3, "odd", "7", "odd", "8 9 <image> <image> <image>") == ["8", "9", "<eos>"]
    assert learned(2, "odd", "7", "odd", "8") == ["8", "<eos>"]


def test_tiles_and_truncation(processor):
    tiling = tiling_processor(6, use_thumbnail=True)
    image = picture(1, (64, 96))
    record = {"messages": [messages("odd", "7"), messages("odd odd", "8")], "images": [image]}
    batch = DataCollatorWithPacking(tiling, 4)([record])
    assert batch["num_image_tokens"] == [4] * 7
    chosen = tiling(images=image, text="<image> odd 7<eos>", num_image_tokens="auto")
    assert chosen["tiles_per_image"] == [7]
    features = DataCollatorWithPacking(tiling, 4)([{**chosen}])
    assert features["plan"].token_counts == (28,)
    late = {**record, "messages": messages("odd", "7", "<image> odd", "8")}
    late["messages"][0]["content"] = "odd"
    cut = DataCollatorWithPacking(tiling, 4, max_length=8)([late, record | {"images": []}])
    assert len(cut["pixel_values"]) == 0
    text = {**tiling(text="odd 7<eos>"), "pixel_values": None}
    mixed = DataCollatorWithPacking(tiling, 4)([text, {**chosen}])
    assert len(mixed["pixel_values"]) == 7


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "records.1. must have messages.*remove_unused_columns=False"),
        ({"labels": 3}, "records.1. must have messages.*got labels"),
        ([3], "records.1. must be a dict or a Sample, got list"),
        ({"messages": messages("<image> odd", "7")}, "records.1.*<image> 1 times for 0 images"),
        ({"prompt": "<image> odd", "completion": "7"}, "one placeholder.*0 images, got 1"),
        ({"messages": messages("odd")}, "records.1.*no assistant turn"),
        ({"messages": [messages("odd", "7"), [{"role": "user", "content": [
            {"type": "image", "image": 1}]}]]}, "must show the same images"),
        ({"input_ids": [1, IMAGE], "num_image_tokens": "auto"}, "hold 1 images, for 0 images"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels must be as long as input_ids, 2, got 1"),
        ({"input_ids": [IMAGE] * 13, "num_image_tokens": [4, 9],
          "pixel_values": torch.zeros(2, 3, 4, 4)}, "one count for all images of a record"),
        ({"input_ids": [IMAGE] * 5, "num_image_tokens": [4],
          "pixel_values": torch.zeros(1, 3, 4, 4)}, "hold 5 placeholders, for 1 tiles of 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(processor, record, message):
    collator = DataCollatorWithPacking(processor, 4)
    with pytest.raises((ValueError, TypeError), match=message):
        collator([records()[0], record])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": ""}, "records.1. must hold at least one token, got text ''"),
        ({"text": " "}, "records.1. must hold at least one token, got text ' '"),
        ({"text": "", "images": [picture(1)]}, "records.1.*one placeholder.*1 images, got 0"),
        ({"input_ids": []}, r"records.1. must hold at least one token, got input_ids \[\]"),
        ({"input_ids": torch.zeros(1, 0)}, "records.1. must hold at least one token, got inp"),
        ({"input_ids": [5, 6], "attention_mask": [0, 0]},
         r"records.1. must hold at least one token.*and attention_mask \[0, 0\]"),
        ({"prompt": "", "completion": ""}, "records.1..completion must hold text to learn from"),
        ({"prompt": "odd", "completion": ""}, "records.1..completion must hold text to learn from"),
        ({"prompt": " ", "completion": " "}, "records.1. must hold.*, got prompt ' ' and compl"),
        ({"prompt": [], "completion": []}, "records.1.*at least one, got an empty list"),
        ({"messages": []}, "records.1.*at least one, got an empty list"),
        ({"messages": [[]]}, "records.1.*at least one, got an empty list"),
        ({"messages": [messages("odd", "7"), []]}, "records.1.*at least one, got an empty list"),
        (Sample("a", (), ()), "records.1. must hold at least one conversation, got none"),
        (Sample("a", (), (Conversation(()),)), "records.1. must hold at least one token, got none"),
        (Sample("a", (), (talk("odd", "7"), Conversation(()))),
         "records.1.: conversation 1 must hold at least one token, got none"),
    ],
)  # fmt: skip
def test_a_record_of_nothing_is_named(processor, record, message):
    collator = DataCollatorWithPacking(processor, 4)
    with pytest.raises((ValueError, TypeError), match=message):
        collator([records()[0], record])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": [IMAGE, -5]}, r"records.0..input_ids.1. must be in \[0, .*, got -5"),
        ({"input_ids": [IMAGE, 2**40]}, r"records.0..input_ids.1. must be in \[0, .*, got 10995"),
        ({"labels": [-100, -1]}, r"records.0..labels.1. must be in .* or -100, got -1"),
        ({"labels": [2**40, 5]}, r"records.0..labels.0. must be in .* or -100, got 10995"),
        ({"attention_mask": [1, 2]}, r"records.0..attention_mask.1. must be in \[0, 1\], got 2"),
        ({"attention_mask": [-1, 1]}, r"records.0..attention_mask.0. must be in \[0, 1\], got -1"),
        ({"pixel_values": torch.zeros(1, 3, 4, 0)}, r"at least one pixel, got shape \[1, 3, 4, 0"),
        ({"pixel_values": torch.zeros(1, 0, 4, 4)}, r"at least one pixel, got shape \[1, 0, 4, 4"),
        ({"input_ids": [[IMAGE, 5], [IMAGE, 6]]}, r"input_ids must be one row.*\[2, 2\].*several"),
        ({"input_ids": [IMAGE, 5.5]}, "input_ids must hold ints, got torch.float32"),
        ({"input_ids": [IMAGE, None]}, "input_ids must be a row of ints, got list"),
        ({"input_ids": "abc"}, "input_ids must be a row of ints, got str"),
        ({"input_ids": 5}, r"input_ids must be one row.*shape \[\]"),
        ({"labels": [-100, None]}, "labels must be a row of ints, got list"),
        ({"labels": [[-100], [5]]}, r"labels must be one row.*\[2, 1\]"),
        ({"labels": [True, False]}, "labels must hold ints, got torch.bool"),
        ({"attention_mask": [0.5, 1.0]}, "attention_mask must hold ints"),
        ({"attention_mask": [0, 1]}, "attention_mask must not hide placeholders"),
        ({"num_image_tokens": "aut"}, "num_image_tokens must be counts or 'auto', got 'aut'"),
        ({"num_image_tokens": [4.0]}, r"records.0..num_image_tokens.0. must be an int"),
        ({"num_image_tokens": [4]}, "hold 1 placeholders, for 1 tiles of 4 vision tokens"),
        ({"num_image_tokens": [4], "input_ids": [IMAGE, IMAGE, 5, IMAGE, IMAGE]},
         "hold text between the 4 placeholders of a tile"),
        ({"tiles_per_image": [1.0]}, "tiles_per_image must hold ints"),
        ({"tiles_per_image": [1, 0], "input_ids": [IMAGE, IMAGE]}, r"images of \[1, 0\] tiles"),
        ({"pixel_values": "x"}, "pixel_values must be an array of floats, got str"),
        ({"pixel_values": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}, "must be floats, got torch"),
        ({"pixel_values": torch.zeros(1, 1, 3, 4, 4)}, r"must be \[tiles.*got shape \[1, 1, 3"),
        ({"grids": [(1, 1), (1, 1)]}, "grids must have one pair for each of 1 tiles, got 2"),
        ({"grids": [(1.0, 1.0)]}, r"grids.0. must be a \(height, width\) pair of ints"),
        ({"images": [picture(1)]}, "must hold input_ids or images, got both"),
        ({"image_index": [1]}, r"image_index must show each of the 1 tiles once.*got \[1\]"),
    ],
)  # fmt: skip
def test_processed_records_are_checked(processor, changes, message):
    record = {
        "input_ids": [IMAGE, 5],
        "num_image_tokens": "auto",
        "pixel_values": torch.zeros(1, 3, 4, 4),
    }
    collator = DataCollatorWithPacking(processor, 4)
    assert collator([record])["plan"].lengths == (5,)
    with pytest.raises((ValueError, TypeError), match=message):
        collator([{**record, **changes}])


ODD_VALUES = [
    *(None, True, False, 0, -1, 7, 2**40, 10**30, 0.5, float("nan"), "", " ", "odd", "<image>"),
    *("auto", "\ud800", b"", b"odd", [], [[]], [[], []], {}, [None], [0], [-1], [5], [IMAGE]),
    *([5, "a"], [0.5], ["odd"], [{}], [{"role": "user"}], [{"content": ""}], {"bytes": None}),
    *([{"role": "assistant", "content": "7"}], [{"role": "user", "content": []}], (), (4, 4)),
    *(np.array([]), np.array(5), np.array([5]), np.zeros((0, 2)), np.array(["odd"]), np.float32(1)),
    *(torch.zeros(0), torch.tensor(5), torch.tensor([5, IMAGE]), torch.zeros(1, 3, 4, 4)),
    *(
        torch.zeros(0, 3, 4, 4),
        torch.ones(1, 3, 4, 4).to(torch.complex64),
        [picture(1)],
        picture(1),
    ),
]
WHOLE = {
    "messages": {"id": "a", "index": 0, "epoch": 0, "images": [picture(1)],
                 "messages": messages("<image> odd", "7")},
    "prompt": {"image": picture(1), "prompt": "<image> odd", "completion": " 7<eos>"},
    "turns": {"prompt": messages("odd"), "completion": [messages("odd", "7")[1]]},
    "text": {"text": "odd 7<eos>", "kind": "odd"},
    "input_ids": {"input_ids": [IMAGE, 5, 6], "labels": [-100, 5, 6], "attention_mask": [1, 1, 1],
                  "num_image_tokens": "auto", "tiles_per_image": [1], "image_index": [0],
                  "grids": [(1, 1)], "pixel_values": torch.zeros(1, 3, 4, 4)},
}  # fmt: skip


@pytest.mark.parametrize("form", WHOLE)
def test_odd_values_of_any_field_are_read_or_named(processor, form):
    collator, refused = DataCollatorWithPacking(processor, COUNTS), 0
    assert collator([WHOLE[form]])["plan"].num_tokens > 0
    for key in [*WHOLE[form], "images", "pixel_values", "num_image_tokens"]:
        for value in ODD_VALUES:
            try:
                batch = collator([{"text": "odd"}, {**WHOLE[form], key: value}])
            except (ValueError, TypeError, OSError) as error:
                refused += 1
                if "records" not in str(error):
                    raise AssertionError(f"{key} of {value!r:.60} is not named") from error
            else:
                assert min(batch["plan"].lengths) > 0, (key, value)
    assert refused > 0


@pytest.mark.parametrize("key", ["text", "prompt", "completion"])
def test_half_of_a_surrogate_pair_is_named(processor, key):
    record = {"prompt": "odd", "completion": "7"} if key != "text" else {}
    with pytest.raises(ValueError, match=f"records.1..{key} holds half of a surrogate pair"):
        DataCollatorWithPacking(processor, 4)([records()[0], {**record, key: "odd \ud800"}])


def test_processed_records_keep_their_pixels(processor):
    """A batch of processed records is that of their images: each its own pixels, counts, labels."""
    collator = DataCollatorWithPacking(processor, COUNTS)
    texts = ["<image> odd 7<eos>", "odd", "<image> count <image> 3<eos>", "<image> where 5<eos>"]
    images = [[picture(1)], [], [picture(2), picture(3)], [picture(4)]]
    raw, processed, expanded = [], [], []
    for i, (text, shown) in enumerate(zip(texts, images, strict=True)):
        raw.append({"text": text, "images": shown, "index": i})
        call = {"text": text, "images": shown or None}
        processed.append({**processor(**call, num_image_tokens="auto"), "index": i})
        count = COUNTS.draw(i, 0)
        expanded.append({**processor(**call, num_image_tokens=count), "index": i})
    expected = collator(raw)
    assert len({*expected["num_image_tokens"]}) > 1
    same_batch(collator(processed), expected)
    same_batch(collator(expanded), expected)


def test_processed_records_of_a_batch_fit_together(processor):
    collator = DataCollatorWithPacking(processor, 4)
    record = {"input_ids": [IMAGE, 5], "pixel_values": torch.zeros(1, 3, 4, 4)}
    wide = {**record, "pixel_values": torch.zeros(1, 3, 4, 8)}
    with pytest.raises(ValueError, match=r"records\[1\].pixel_values must have tiles of \[3, 4, 4"):
        collator([record, wide])
    with pytest.raises(ValueError, match="must all hold grids, or none"):
        collator([record, {**record, "grids": np.array([[1, 1]])}])
    assert collator([{**record, "grids": np.array([[1, 1]])}])["grids"] == [(1, 1)]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "records must hold at least one record"),
        (None, "records must be a list of records, got NoneType"),
        ({"text": "odd"}, "records must be a list of records, got dict"),
        ("odd", "records must be a list of records, got str"),
    ],
)
def test_a_batch_is_a_list_of_records(processor, records, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DataCollatorWithPacking(processor, 4)(records)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"counts": [4, 9]}, r"counts must be TokenCounts, an int or a .* pair, got \[4, 9\]"),
        ({"share_prefix": "no"}, "share_prefix must be a bool, got 'no'"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"max_length": 7.5}, "max_length must be an int, got 7.5"),
    ],
)
def test_options_of_the_collator_are_checked(processor, given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DataCollatorWithPacking(processor, **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "odd 7"}, "records.0. must have one of .*got messages beside text"),
        ({"prompt": "odd", "completion": "7"}, "got messages beside prompt and completion"),
        ({"input_ids": [5, 6]}, "got messages beside input_ids"),
        ({"images": [picture(1)], "image": picture(2)}, "under one key, got images and image"),
        ({"num_image_tokens": 4}, r"records.0..num_image_tokens belongs to input_ids"),
        ({"messages": 3}, "records.0..messages must be a list of messages.*got int"),
        ({"messages": {"role": "user"}}, "records.0..messages must be a list.*got dict"),
        ({"messages": [messages("odd", "7"), 3]}, r"messages.1. must be a list.*got int"),
        ({"messages": None, "prompt": "odd", "completion": messages("", "7")[1:]},
         r"records.0..prompt must be a list of messages or a string.*got str"),
        ({"messages": None, "prompt": [messages("odd", "7")], "completion": [messages("odd", "7")]},
         r"records.0..prompt.0. must be a dict, got list"),
        ({"messages": None, "prompt": messages("odd", "7"), "completion": messages("odd")},
         r"records.0..completion must hold an assistant turn"),
        ({"messages": None, "text": 3}, "records.0..text must be a string, got int"),
        ({"messages": None, "text": "<image> 7"}, "records.0.: .*0 images, got 1"),
        ({"index": 1.5}, r"records.0..index must be an int, got 1.5"),
        ({"index": True}, r"records.0..index must be an int, got True"),
        ({"index": -1}, r"records.0..index must be at least 0, got -1"),
        ({"index": 1, "epoch": "x"}, r"records.0..epoch must be an int, got 'x'"),
    ],
)  # fmt: skip
def test_nothing_of_a_record_is_ignored(processor, changes, message):
    record = {"messages": messages("odd", "7"), **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        DataCollatorWithPacking(processor, 4)([record])


def test_images_are_read_under_every_key(processor, tmp_path):
    """A path under a key of JSONL files would otherwise train on the text alone."""
    path = tmp_path / "a.png"
    picture(1).save(path)
    collator = DataCollatorWithPacking(processor, 4)
    talked = {"messages": messages("odd", "7")}
    expected = collator([{**talked, "images": [picture(1)]}])
    for beside in (
        {"image": str(path), "images": []},
        {"image_path": str(path)},
        {"image_paths": [path], "image": None},
    ):
        same_batch(collator([{**talked, **beside}]), expected)
    with pytest.raises(FileNotFoundError, match=r"records\[0\].images\[0\].*missing.png"):
        collator([{**talked, "image": str(tmp_path / "missing.png")}])


def test_conversations_may_name_the_same_path(processor, tmp_path):
    """Paths read from JSON are equal, not the same object."""
    path = str(tmp_path / "a.png")
    picture(1).save(path)
    talks = [
        [
            {"role": "user", "content": [{"type": "image", "path": "".join(path)}, text]},
            *messages("", "7")[1:],
        ]
        for text in ({"type": "text", "text": " odd"}, {"type": "text", "text": " count"})
    ]
    talks[1][0]["content"][0]["path"] = path[:4] + path[4:]
    batch = DataCollatorWithPacking(processor, 4)([{"messages": talks}])
    assert len(batch["pixel_values"]) == 1


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_columns_formatted_as_arrays_are_read(processor, kind):
    datasets = pytest.importorskip("datasets")
    row = {"messages": messages("odd", "7"), "index": 3, "length": 12}
    collator = DataCollatorWithPacking(processor, COUNTS)
    data = datasets.Dataset.from_list([row]).with_format(kind)
    same_batch(collator([data[0]]), collator([row]))


def test_images_and_features_do_not_mix(processor):
    features = {**processor(images=picture(1), text="<image> odd 7", num_image_tokens="auto")}
    with pytest.raises(ValueError, match="all hold images, or all pixel_values"):
        DataCollatorWithPacking(processor, 4)([records()[1], features])


def test_processors_of_other_models_are_refused():
    with pytest.raises(TypeError, match="ImageTextCollator"):
        DataCollatorWithPacking(object(), 4)


# ---- counts


def test_counts_follow_seed_epoch_and_index(processor):
    collator = DataCollatorWithPacking(processor, COUNTS)
    shown = [{**record, "epoch": 5, "images": [picture(1)]} for record in records()]
    expected = [COUNTS.draw(i, 5) for i in range(8)]
    assert len({*expected}) > 1
    assert collator(shown)["num_image_tokens"] == expected
    assert collator(shown[3:5])["num_image_tokens"] == expected[3:5]
    del shown[2]["epoch"]
    assert collator(shown[2:3])["num_image_tokens"] == [COUNTS.draw(2, 0)]


def test_counts_without_an_index_follow_the_batch(processor):
    """The same in a copy of the collator, others in other batches and for other pixels."""
    collator = DataCollatorWithPacking(processor, COUNTS)
    rows = [
        {"messages": messages("odd", "7"), "images": [picture(i)]} for i in range(64)
    ]  # told apart by their pixels alone
    counts = collator(rows)["num_image_tokens"]
    assert pickle.loads(pickle.dumps(collator))(rows)["num_image_tokens"] == counts
    assert {*counts} == {4, 9, 16}
    assert collator(rows[::-1])["num_image_tokens"][::-1] != counts
    alone = [collator([row])["num_image_tokens"][0] for row in rows]
    assert {*alone} == {4, 9, 16}
    features = [
        {**processor(images=picture(i), text="<image> odd 7", num_image_tokens="auto")}
        for i in range(16)
    ]
    assert len({collator([row])["num_image_tokens"][0] for row in features}) > 1


def test_the_processors_count_is_the_default(processor):
    (count,) = DataCollatorWithPacking(processor)([records()[1]])["num_image_tokens"]
    assert count == processor.num_image_tokens


# ---- the model's loss


@pytest.mark.parametrize("text", ["qwen2", "llama"])
def test_the_loss_in_training_is_that_of_all_logits(processor, text):
    model, batch = tiny_model(text), DataCollatorWithPacking(processor, COUNTS)(records())
    with torch.no_grad():
        expected = model(**batch)
    shifted = torch.nn.functional.cross_entropy(expected.logits[0, :-1], batch["labels"][0, 1:])
    assert float(expected.loss) == pytest.approx(float(shifted), rel=1e-5)
    output = model.train()(**batch)
    assert output.logits is None
    assert float(output.loss) == pytest.approx(float(expected.loss), rel=1e-5)
    number = int((batch["labels"][:, 1:] != -100).sum())
    for items in (4 * number, torch.tensor(4 * number)):
        part = model(**batch, num_items_in_batch=items).loss
        assert float(part) == pytest.approx(float(expected.loss) / 4, rel=1e-5)
    model.lm_head = torch.nn.Sequential(model.lm_head)  # as an adapter would wrap it
    assert float(model(**batch).loss) == pytest.approx(float(expected.loss), rel=1e-5)


def test_the_projector_writes_into_the_packed_row(processor, monkeypatch):
    calls = []
    op = tokenflex.projector.project_and_pack

    def record(*args, **given):
        calls.append(given)
        return op(*args, **given)

    monkeypatch.setattr(tokenflex.projector, "project_and_pack", record)
    model, batch = tiny_model().train(), DataCollatorWithPacking(processor, COUNTS)(records())
    loss = model(**batch).loss
    assert len(calls) == 1
    together = model(**{**batch, "output_image_hidden_states": True}).loss
    assert len(calls) == 1
    assert float(loss) == pytest.approx(float(together), rel=1e-6)


def test_a_batch_without_targets_has_the_loss_zero(processor):
    batch = DataCollatorWithPacking(processor, 4)([{"text": "odd", "image": None}])
    loss = tiny_model().train()(**batch).loss
    loss.backward()
    assert float(loss) == 0


def test_labels_may_be_masked_after_collating(processor):
    """The loss in training is then still that of evaluation."""
    model, batch = tiny_model(), DataCollatorWithPacking(processor, COUNTS)(records())
    learned = (batch["labels"][0] != -100).nonzero().squeeze(1)
    batch["labels"][0, learned[::2]] = -100
    for head in (model.lm_head, torch.nn.Sequential(model.lm_head)):
        model.lm_head = head
        expected = float(model.eval()(**batch).loss)
        assert float(model.train()(**batch).loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_rows": torch.tensor([0])}, r"target_rows must be \[1, N\], got shape \[1\]"),
        ({"target_rows": torch.tensor([[0.0]])}, "target_rows must be an int64 tensor, got torch"),
        ({"target_rows": [[0]]}, "target_rows must be an int64 tensor, got list"),
        ({"labels": torch.tensor([[5]])}, r"labels of one row, \[1, 3\], got shape \[1, 1\]"),
        ({"input_ids": torch.full((2, 3), 5), "labels": torch.full((2, 3), 5)},
         r"labels of one row, \[1, 3\], got shape \[2, 3\]"),
    ],
)  # fmt: skip
def test_target_rows_are_checked(changes, message):
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "labels": torch.tensor([[5, 6, 7]]),
        "target_rows": torch.tensor([[0, 1]]),
    }
    model = tiny_model().train()
    model(**inputs)
    with pytest.raises((ValueError, TypeError), match=message):
        model(**{**inputs, **changes})


def test_positions_of_another_row_are_refused(processor):
    batch = DataCollatorWithPacking(processor, 4)(records())
    batch["position_ids"] = batch["position_ids"][:, 1:]
    with pytest.raises(ValueError, match=r"position_ids must be \[1, "):
        tiny_model()(**batch)


# ---- Trainer


@pytest.mark.parametrize(
    "changes", [{}, {"dataloader_num_workers": 2}, {"label_names": ["labels"]}]
)
def test_accumulated_micro_batches_are_the_whole_batch(processor, tmp_path, changes):
    collator = DataCollatorWithPacking(processor, COUNTS)
    with torch.no_grad():
        expected = float(tiny_model()(**collator(records())).loss)
    whole, weights = train(tmp_path, collator, per_device_train_batch_size=8)
    assert whole == pytest.approx(expected, rel=1e-4)
    accumulated, others = train(
        tmp_path, collator, **{"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
        **changes,
    )  # fmt: skip
    assert accumulated == pytest.approx(expected, rel=1e-4)
    start = tiny_model().state_dict()
    assert any(not torch.equal(weights[name], start[name]) for name in start)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"torch_empty_cache_steps": 1},
        {"train_sampling_strategy": "group_by_length"},
        {"accelerator_config": {"split_batches": True}},
        {"include_num_input_tokens_seen": "all"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_of_trainer_change_no_loss(processor, tmp_path, changes):
    datasets = pytest.importorskip("datasets")
    rows = [{**record, "length": 10 + i} for i, record in enumerate(records(4))]
    data = datasets.Dataset.from_list(rows)
    collator = DataCollatorWithPacking(processor, COUNTS)
    expected, _ = train(tmp_path, collator, rows)
    loss, _ = train(tmp_path, collator, data, **changes)
    assert loss == pytest.approx(expected, rel=0.02 if "bf16" in changes else 1e-4)


@pytest.mark.parametrize("rows", [records(4), [{**r, "images": []} for r in records(4)]])
def test_a_stream_trains_as_a_list(processor, tmp_path, rows):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(rows)

    collator = DataCollatorWithPacking(processor, COUNTS)
    expected, _ = train(tmp_path, collator, rows)
    loss, _ = train(tmp_path, collator, Stream())
    assert loss == pytest.approx(expected, rel=1e-5)


def test_evaluation_gives_the_loss_and_aligned_predictions(processor, tmp_path):
    model, data = tiny_model(), records(7)
    collator = DataCollatorWithPacking(processor, COUNTS)
    with torch.no_grad():
        losses = [
            float(model(**collator(data[first : first + 3])).loss)
            for first in (0, 3, 6)
            for _ in data[first : first + 3]
        ]
    seen = []

    def hits(prediction) -> dict:
        labels = prediction.label_ids[:, 1:]
        learned = labels != -100
        seen.append(int(learned.sum()))
        answers = prediction.predictions[:, :-1].argmax(-1)
        return {"accuracy": float((answers == labels)[learned].mean())}

    trainer = Trainer(
        model, options(tmp_path), eval_dataset=data, data_collator=collator, compute_metrics=hits
    )
    report = trainer.evaluate()
    assert report["eval_loss"] == pytest.approx(sum(losses) / 7, rel=1e-5)
    assert 0 <= report["eval_accuracy"] <= 1
    assert seen == [sum(int((collator([r])["labels"][:, 1:] != -100).sum()) for r in data)]
    trainer.args.prediction_loss_only = True
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / 7, rel=1e-5)


def test_columns_that_trainer_takes_away_are_missed(processor, tmp_path):
    collator = DataCollatorWithPacking(processor, COUNTS)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        train(tmp_path, collator, remove_unused_columns=True)
    samples = [Sample("a", (picture(1),), (talk("odd", "7"),))] * 8  # no dict: nothing is removed
    train(tmp_path, collator, samples, remove_unused_columns=True)


@pytest.mark.release
def test_compiled_training_has_the_same_loss(processor, tmp_path):
    collator = DataCollatorWithPacking(processor, COUNTS)
    expected, _ = train(tmp_path, collator)
    loss, _ = train(tmp_path, collator, torch_compile=True, torch_compile_backend="eager")
    assert loss == pytest.approx(expected, rel=1e-4)


# ---- TRL


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_sft_trainer_takes_the_collator(processor, tmp_path, adapter):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets")
    peft = pytest.importorskip("peft")
    rows = [{**row, "images": row["images"] or [picture(9)]} for row in records(4)]
    collator = DataCollatorWithPacking(processor, 9)
    with torch.no_grad():
        expected = float(tiny_model()(**collator(rows)).loss)
    trainer = trl.SFTTrainer(
        tiny_model(),
        args=trl.SFTConfig(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
        data_collator=collator,
        peft_config=peft.LoraConfig(target_modules=["q_proj", "up"]) if adapter else None,
    )
    assert trainer.train().training_loss == pytest.approx(expected, rel=1e-4)
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_public_name():
    assert tokenflex.DataCollatorWithPacking is DataCollatorWithPacking
