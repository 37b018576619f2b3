"""The pages of docs/ are true: the Python of two of them runs, and links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean

import pytest

import tokenflex
from tests.dropin.clips import clip, processor_with_videos
from tests.dropin.processors import stock_processor
from tests.dropin.test_training import Samples
from tests.dropin.tiny import stock_model
from tests.models.tiny import WIDTH, picture, tiny_model
from tokenflex import TokenCounts
from tokenflex.digits.processor import digits_processor
from tokenflex.routing.router import Router
from tokenflex.routing.storage import save_router

DOCS = Path(__file__).parents[1] / "docs"
MODELS = (DOCS / "models.md").read_text(encoding="utf-8")
DROPIN = (DOCS / "dropin.md").read_text(encoding="utf-8")
README = (DOCS.parent / "README.md").read_text(encoding="utf-8")


def snippets_of(page: str, language: str = "python") -> list[str]:
    blocks = page.split("```")[1::2]
    return [b.removeprefix(f"{language}\n") for b in blocks if b.startswith(f"{language}\n")]


def test_python_of_the_models_page_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    digits_processor(16).save_pretrained(tmp_path)
    save_router(Router((4, 9, 16), WIDTH, WIDTH), tmp_path, {})
    names = {"folder": str(tmp_path), "a": picture(1), "b": picture(2)}
    page, _ = MODELS.split("## The released model")  # whose snippet tests/models runs
    snippets = snippets_of(page)
    assert len(snippets) >= 7
    for snippet in snippets:
        quick = snippet.replace("max_steps=100", "max_steps=1, report_to=[], use_cpu=True")
        exec(compile(quick, "docs/models.md", "exec"), names)
    assert names["trainer"].state.global_step == 1
    assert names["answer"][0]["generated_text"]


def test_figures_of_chosen_counts_are_those_of_the_report():
    report = json.loads((DOCS / "results/selection/report.json").read_text(encoding="utf-8"))
    measured = {(point["selector"], point["setting"]): point for point in report["curve"]}
    _, table = MODELS.split("<!-- selection table", 1)
    rows = [line.strip("|").split("|") for line in table.splitlines()[3:] if line.startswith("|")]
    shown = [[cell.strip() for cell in row] for row in rows if len(row) == 7][:12]
    assert {row[0] for row in shown} == {point["selector"] for point in report["curve"]}
    for selector, setting, *figures in shown:
        point = measured[selector, setting]
        assert figures == [
            *(f"{point['accuracy']:.3f}", f"{point['tokens']:.2f}"),
            *(f"{point['prefill_tokens']:.2f}", f"{point['accuracy_unweighted']:.3f}"),
            f"{point['tokens_unweighted']:.2f}",
        ]
    assert f"{report['parameters']} parameters" in MODELS


def test_figures_of_the_baselines_are_those_of_the_report():
    report = json.loads((DOCS / "results/baselines/report.json").read_text(encoding="utf-8"))
    baselines = report["baselines"]
    difficult = baselines["difficult"]
    page = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    table = page.split("| | 4 tokens | 9 tokens | 4, difficult | 9, difficult |\n", 1)[1]
    rows = {}
    for line in table.split("\n\n")[0].splitlines()[1:]:
        name, *shown = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name.split()[0].strip("`") if name != "the model" else "model"] = shown
    of_all = {"model": report["accuracy"], **baselines["accuracy"]}
    assert rows.keys() == of_all.keys()
    for name, shown in rows.items():
        of_difficult = difficult["accuracy"].get(name)
        assert shown == [
            *(f"{of_all[name][count]:.3f}" for count in ("4", "9")),
            *(f"{of_difficult[count]:.3f}" if of_difficult else "" for count in ("4", "9")),
        ]
    assert f"{difficult['questions']['4']:,} and {difficult['questions']['9']:,} difficult" in page


def test_figures_of_the_baselines_on_reading_are_means_of_their_reports():
    page = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    table = page.split("**On reading**", 1)[1].split("|---|---|---|---|---|---|\n", 1)[1]
    shown = {}
    for line in table.split("\n\n")[0].splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        shown[name.split(" ([")[0]] = cells
    expected = {}
    for title, name, of in (
        ("the one model", "positions", "of the one model"),
        ("the model for 64 tokens, asked at fewer", "fixed-large-positions", "of the model for 64"),
    ):
        reports = [
            json.loads((DOCS / f"results/baselines/reading/{name}/{seed}.json").read_text("utf-8"))
            for seed in ("report", "seed1", "seed2")
        ]
        for way in ("model", *reports[0]["baselines"]["accuracy"]):
            of_all = [{"model": r["accuracy"], **r["baselines"]["accuracy"]}[way] for r in reports]
            difficult = [r["baselines"]["difficult"]["accuracy"].get(way, {}) for r in reports]
            columns = [[row.get(count) for row in of_all] for count in ("16", "36", "64")]
            columns += [[row.get(count) for row in difficult] for count in ("16", "36")]
            expected[title if way == "model" else f"`{way}`, {of}"] = [
                "" if None in column else f"{fmean(column):.3f}" for column in columns
            ]
    assert shown == expected
    below = []
    for way in ("strided", "pooled"):
        pairs = zip(shown["the one model"], shown[f"`{way}`, of the model for 64"], strict=True)
        gaps = [f"{float(ours) - float(theirs):.2f}" for ours, theirs in list(pairs)[:2]]
        below.append(" and ".join(gaps))
    assert f"{below[0]} below the one model, against {below[1]}" in " ".join(page.split())


def test_the_router_meets_its_target():
    """Always-largest minus a point at 60 % of its tokens, by kinds; at 75 % by questions."""
    report = json.loads((DOCS / "results/selection/report.json").read_text(encoding="utf-8"))
    measured = {(point["selector"], point["setting"]): point for point in report["curve"]}
    largest, own = measured["always", "16"], measured["router", "own"]
    thrifty = measured["router", "0.1"]
    assert own["accuracy"] > largest["accuracy"] - 0.01
    assert own["tokens"] < 0.6 * largest["tokens"]
    assert thrifty["accuracy_unweighted"] > largest["accuracy_unweighted"] - 0.01
    assert thrifty["tokens_unweighted"] < 0.75 * largest["tokens_unweighted"]


@pytest.fixture
def stock_llava(tmp_path, monkeypatch) -> dict:
    """A LLaVA where both pages look for one, and what their snippets take as given."""
    monkeypatch.chdir(tmp_path)
    for folder in ("path/to/a/model", "path/to/a/llava"):
        stock_model("llava").save_pretrained(folder)
        stock_processor("llava").save_pretrained(folder)
    pictures = {name: picture(seed) for seed, name in enumerate("abc")}
    return {**pictures, "pictures": [*pictures.values()], "prompts": ["<image> is", "a <image>"]}


def test_python_of_the_drop_in_page_runs_in_order(stock_llava):
    pytest.importorskip("peft")
    names = {**stock_llava, "data": Samples("llava", 8)}
    names["prompts"] = ["<image> is this <image>", "what is <image>"]
    snippets = snippets_of(DROPIN)
    assert len(snippets) == 6  # the fifth is TRL's, slow to import, and the last one of videos
    question = [{"type": "image", "image": names["a"]}, {"type": "text", "text": "what is this"}]
    names["samples"] = [{"messages": [{"role": "user", "content": question}]}] * 2
    for snippet in snippets[:4]:
        quick = snippet.replace("max_steps=100", "max_steps=1, report_to=[], use_cpu=True")
        quick = quick.replace("steps=1000", "steps=1, max_new_tokens=2")
        exec(compile(quick, "docs/dropin.md", "exec"), names)
        if snippet is snippets[0]:
            assert [*names["inputs"]["num_image_tokens"]] == [64, 256, 144]
    assert names["answer"].shape[1] == names["inputs"]["input_ids"].shape[1] + 8
    assert names["out"].shape[1] == names["logits"].shape[1] + 64
    assert names["model"].training


def test_videos_of_the_drop_in_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, *others = clip(1, 9)
    first.save("clip.gif", save_all=True, append_images=others, duration=100)
    processor = processor_with_videos("qwen2_5_vl")
    model = tokenflex.replace_projector(stock_model("qwen2_5_vl"), processor, num_image_tokens=64)
    names = {"model": model, "processor": processor}
    exec(compile(snippets_of(DROPIN)[5], "docs/dropin.md", "exec"), names)
    assert names["answer"].shape[1] > 256


@pytest.mark.slow
def test_trl_of_the_drop_in_page_runs(stock_llava, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = [
        {
            "messages": [
                {"role": "user", "content": "what is this"},
                {"role": "assistant", "content": "a cat"},
            ],
            "images": [picture(i)],
        }
        for i in range(8)
    ]
    names = {
        "counts": TokenCounts((4, 9), (1, 1)),
        "data": datasets.Dataset.from_list(rows),
        "arguments": trl.SFTConfig(
            "runs", max_steps=1, report_to=[], use_cpu=True, bf16=False, max_length=None
        ),
    }
    names["model"], names["processor"] = tokenflex.from_pretrained("path/to/a/model")
    exec(compile(snippets_of(DROPIN)[4], "docs/dropin.md", "exec"), names)
    names["trainer"].train()
    assert names["trainer"].state.global_step == 1


def test_the_readme_s_drop_in_snippet_runs(stock_llava):
    (snippet,) = [s for s in snippets_of(README, "") if "path/to/a/llava" in s]
    exec(compile(snippet, "README.md", "exec"), {**stock_llava, "tokenflex": tokenflex})


LINKS = [
    (page.name, target)
    for page in sorted(DOCS.glob("*.md"))
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_links_lead_somewhere(page, target):
    assert (DOCS / page).parent.joinpath(target).exists()
