"""The jobs of a suite: every regime gets the same budget from the same start."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from experiments.ablation.jobs import Job, plan_jobs
from experiments.ablation.regimes import (
    BUDGETS,
    EXTRA_SHARE,
    PAPER_ODDS,
    fewest_count,
    other_grids,
    regimes,
)
from experiments.ablation.results import collect
from experiments.ablation.scales import LARGE, LIMITED, QUICK, QUICK_LIMITED, SCALES, SMALL
from experiments.ablation.suites import LEVERS, SUITES, regimes_of
from tests.experiments.ablation.tiny import TINY
from tokenflex.cli import main
from tokenflex.counts import token_grid
from tokenflex.digits.processor import SPECIAL_TOKENS, digits_vocabulary
from tokenflex.reading.content import all_words
from tokenflex.training.config import TrainConfig


def jobs_of(scale=SMALL, seeds=(0, 1, 2), **options) -> list[Job]:
    return plan_jobs(scale, regimes_of("paper", scale), seeds, on_gpu=False, **options)


def config_of(job: Job) -> TrainConfig:
    return TrainConfig.model_validate(job.config)


@pytest.mark.parametrize("scale", [SMALL, LARGE, QUICK], ids=lambda scale: scale.name)
def test_every_regime_has_the_same_budget(scale):
    """Steps, images shown a step, learning rates, schedule: all but what a regime is about."""
    jobs = [job for job in jobs_of(scale) if job.needs]
    assert len(jobs) == 3 * (len(scale.regimes) or 10)
    own = {"name", "counts", "weights", "draw"}
    budgets = {
        json.dumps(config_of(job).stages[0].model_dump(mode="json", exclude=own)) for job in jobs
    }
    assert len(budgets) == 1
    assert {job.steps for job in jobs} == {scale.steps}
    evaluations = {config_of(job).evaluation.model_dump_json() for job in jobs}
    assert len(evaluations) == 1


def test_every_regime_of_a_seed_starts_from_the_same_checkpoint():
    jobs = jobs_of()
    for seed in range(3):
        of_seed = [job for job in jobs if job.seed == seed]
        (start,) = [job for job in of_seed if job.needs is None]
        assert {job.config["model"].get("start") for job in of_seed if job is not start} == {
            f"seed{seed}/start/checkpoint"
        }
        assert {job.config["seed"] for job in of_seed} == {seed}
        assert "projector_position" not in start.config["model"]
    assert len({job.name for job in jobs}) == len(jobs) == 33


@pytest.mark.parametrize("scale", SCALES.values(), ids=lambda scale: scale.name)
def test_no_regime_trains_at_a_count_that_is_asked_as_unseen(scale):
    """But for the regimes that are about the fewest tokens, which say so."""
    unseen = {token_grid(count) for count in scale.unseen}
    for one in regimes(scale).values():
        trained = [tuple(n) if isinstance(n, list) else n for n in one.stage["counts"]]
        own = {token_grid(fewest_count(scale.counts[0]))} if "fewest" in one.name else set()
        assert unseen & {token_grid(count) for count in trained} == unseen & own, one.name
    assert other_grids((4, 9, 16)) == [
        *((1, 2), (2, 1), (2, 5), (5, 2)),
        *((3, 5), (5, 3), (4, 5), (5, 4)),
    ]


def test_the_start_is_at_the_largest_count_alone():
    start = config_of(jobs_of()[0])
    assert start.encoder_warm_up is not None
    assert start.stages[0].counts == (16,)


def test_models_are_asked_on_scans_of_their_own_split():
    for job in jobs_of():
        config = config_of(job)
        assert (config.data.split, config.evaluation.data.split) == ("train", "test")
        assert config.evaluation.counts == (4, 9, 16, *SMALL.unseen)


def test_regimes_are_those_of_the_paper():
    known = regimes(SMALL)
    assert [known[f"fixed-{size}"].stage["counts"] for size in ("small", "middle", "large")] == [
        [4],
        [9],
        [16],
    ]
    odds = {name: known[name].stage["weights"] for name in ("stochastic", "odds-5-3-2")}
    assert odds == {"stochastic": [0.2, 0.3, 0.5], "odds-5-3-2": [0.5, 0.3, 0.2]}
    assert known["per-step"].stage["draw"] == "step"
    assert known["all-counts"].stage["draw"] == "all"


def test_regimes_near_the_fewest_tokens_differ_from_their_model_in_the_counts_alone():
    known = regimes(SMALL)
    spread = known["positions-spread"]
    shares = {
        name: {str(n): share for n, share in zip(*stage_of.values(), strict=True)}
        for name in ("positions-spread", "positions-spread-fewest", "positions-spread-narrow")
        for stage_of in [known[name].stage]
    }
    before = shares.pop("positions-spread")
    for name, odds in shares.items():
        assert sum(odds.values()) == pytest.approx(1)
        more = {"1": 0.1} if name.endswith("fewest") else dict.fromkeys(("[1, 2]", "[2, 1]"), 0.05)
        expected = {n: 0.9 * before.get(n, 0) + more.get(n, 0) for n in {**before, **more}}
        assert odds == pytest.approx(expected)
        assert replace(known[name], name="", title="", stage={}) == replace(
            spread, name="", title="", stage={}
        )
    assert EXTRA_SHARE == 0.1
    specialist = known["fixed-fewest-positions"]
    assert (specialist.stage, specialist.model) == (
        {"counts": [1], "weights": [1.0]},
        known["fixed-small-positions"].model,
    )
    assert specialist.start == known["fixed-small-positions"].start
    near, longer = (known[f"positions-spread-fewest{suffix}"] for suffix in ("", "-longer"))
    assert longer.stage == {**near.stage, "steps": known["positions-longer"].stage["steps"]}


def test_a_specialist_for_the_fewest_tokens_also_starts_from_a_model_that_reads():
    known = regimes(SMALL)
    ready, plain = (known[f"fixed-fewest-positions{suffix}"] for suffix in ("-ready", ""))
    assert (ready.stage, ready.model) == (plain.stage, plain.model)
    start, *_ = jobs = plan_jobs(SMALL, [ready], [0], on_gpu=False)
    assert jobs[-1].needs == start.name
    stage = config_of(start).stages[0]
    assert (stage.counts, stage.steps) == (SMALL.counts, SMALL.start_steps + 2 * SMALL.steps)
    assert start.config["model"]["image_positions"] == "shared"


def test_other_grids_reach_the_encoders_where_the_large_count_does_not():
    """SMALL has 8 x 8 patches, LARGE 16 x 16; READING trains all of its 8 x 8."""
    for scale, finer in ((SMALL, ([6, 8], [8, 6])), (LARGE, ([12, 16], [16, 12]))):
        known = regimes(scale)
        spread = known["positions-spread"]
        regime = known["positions-spread-finer"]
        assert regime.stage["counts"] == [*spread.stage["counts"], *finer]
        assert regime.stage["weights"][-2:] == [0.05, 0.05]
        assert sum(regime.stage["weights"]) == pytest.approx(1)
        assert regime in regimes_of("extremes", scale)
    reading = SCALES["reading"]
    assert "positions-spread-finer" not in regimes(reading)
    assert len(regimes_of("extremes", reading)) == len(regimes_of("extremes", SMALL)) - 1


def test_a_regime_of_another_start_waits_for_it():
    known = regimes(SMALL)
    names = ("fixed-small", "positions-wide", "fixed-small-positions-wide")
    jobs = plan_jobs(SMALL, [known[name] for name in names], [0], on_gpu=False)
    assert [(job.name, job.needs) for job in jobs] == [
        ("seed0/start", None),
        ("seed0/fixed-small", "seed0/start"),
        ("seed0/start-wide", None),
        ("seed0/positions-wide", "seed0/start-wide"),
        ("seed0/fixed-small-positions-wide", "seed0/start-wide"),
    ]
    widths = [job.config["model"]["text"]["config"]["hidden_size"] for job in jobs]
    assert widths == [64, 64, 128, 128, 128]
    assert jobs[3].config["model"]["image_positions"] == "shared"
    assert jobs[1].config == plan_jobs(SMALL, [known[names[0]]], [0], on_gpu=False)[1].config


def test_suites_share_the_runs_they_have_in_common():
    """Their jobs of one name are the same, so one folder can hold all suites."""
    known: dict[str, Job] = {}
    for suite in SUITES:
        for job in plan_jobs(SMALL, regimes_of(suite, SMALL), [0, 1], on_gpu=False):
            assert known.setdefault(job.name, job) == job
    names = {name for names in SUITES.values() for name in names}
    starts = {regimes(SMALL)[name].start.name for name in names}
    assert len(known) == 2 * (len(starts) + len(names))


@pytest.mark.parametrize("suite", ["gap", "unseen", "extremes", "limited"])
def test_every_run_of_the_other_suites_is_a_valid_configuration(suite):
    for job in plan_jobs(SMALL, regimes_of(suite, SMALL), [0], on_gpu=False):
        config_of(job)


def test_runs_on_limited_data_share_their_canvases_with_their_start_and_their_specialists():
    """A difference within a row of the table is of the counts alone."""
    jobs = plan_jobs(LIMITED, regimes_of("limited", LIMITED), [0], on_gpu=False, asked_again=7)
    by_name = {job.name: job for job in jobs}
    regimes_of_suite = [job for job in jobs if job.needs]
    assert len(regimes_of_suite) == len(BUDGETS) * 8
    for job in regimes_of_suite:
        assert job.config["data"] == by_name[job.needs].config["data"]
        assert job.asked_again == 7
        assert by_name[job.needs].asked_again == 0
    for budget in BUDGETS:
        of_budget = [job for job in regimes_of_suite if job.name.endswith(f"-{budget.name}")]
        assert {job.config["data"].get("size") for job in of_budget} == {budget.canvases}
        assert {job.steps for job in of_budget} == {budget.factor * LIMITED.steps}
        assert len({job.needs for job in of_budget}) == 1
        assert [job.config["stages"][0]["counts"] for job in of_budget] == 2 * [
            *([4], [9], [16]),
            [4, 9, 16],
        ]
    fresh = LIMITED.batch_size * max(job.steps for job in jobs)
    assert fresh < 100_000  # canvases of the data set: a run on fresh ones sees none twice


def test_the_quick_form_on_limited_data_goes_on_from_the_start_of_the_other():
    """In one folder the start is trained once; data of two sizes, at the smallest count."""
    start, *_ = jobs_of(QUICK, seeds=(0,))
    same, *rest = plan_jobs(QUICK_LIMITED, regimes_of("limited", QUICK_LIMITED), [0], on_gpu=False)
    assert (same.name, same.config) == (start.name, start.config)
    assert {job.needs for job in rest} == {start.name}
    assert [
        (job.config["data"].get("size"), job.config["stages"][0]["counts"]) for job in rest
    ] == [
        *((300, [4]), (300, [4, 9, 16])),
        *((None, [4]), (None, [4, 9, 16])),
    ]


def test_a_longer_run_sees_the_vision_tokens_of_three_specialists():
    longer = regimes(SMALL)["positions-longer"]
    mean = sum(n * odds for n, odds in zip((4, 9, 16), PAPER_ODDS, strict=True))
    assert longer.stage["steps"] * mean == pytest.approx(SMALL.steps * (4 + 9 + 16), rel=0.01)


def test_every_lever_compares_with_its_own_count():
    """A specialist is trained at the count of its place."""
    known = regimes(SMALL)
    for lever in LEVERS:
        trained = [known[name].stage["counts"] for name in lever.specialists]
        assert trained == [[count] for count in SMALL.counts[: len(trained)]], lever.title
        assert known[lever.general].stage["counts"] == [*SMALL.counts]


def test_an_unknown_suite_is_refused(capsys):
    assert main(["ablate", "--suite", "paperr"]) == 2
    said = capsys.readouterr().err
    assert "suite must be one of paper, gap, unseen, extremes, limited, got 'paperr'" in said
    assert main(["ablate", "--quick", "--suite", "gap"]) == 2
    assert "--quick is of the suites paper and limited, got it" in capsys.readouterr().err


@pytest.mark.parametrize("scale", SCALES.values(), ids=lambda scale: scale.name)
def test_every_scale_has_a_valid_configuration(scale):
    words = {
        "digits": digits_vocabulary(scale.cells),
        "reading": [*SPECIAL_TOKENS, *all_words()],
    }
    assert len(words[scale.task]) <= scale.vocabulary
    assert scale.batch_size % 3 == 0
    for job in plan_jobs(scale, regimes_of(scale.suite, scale), [0], on_gpu=False):
        config_of(job)


def test_on_a_gpu_precision_and_workers_are_those_of_the_scale():
    (start, *_) = plan_jobs(LARGE, [regimes(LARGE)["stochastic"]], [0], on_gpu=True, workers=12)
    config = config_of(start)
    assert (config.precision, config.workers, config.threads) == ("bf16", 12, None)


def test_a_folder_of_another_ablation_is_refused(tmp_path):
    for job in jobs_of(TINY, seeds=(0,)):
        job.write_config(tmp_path)
        job.write_config(tmp_path)  # the same again is a continuation
    for job in jobs_of(TINY, seeds=(0,), workers=3):  # on another machine too
        job.write_config(tmp_path)
    other = jobs_of(replace(TINY, steps=41), seeds=(0,))[1]
    with pytest.raises(ValueError, match=r"holds another ablation: .*config\.yaml differs"):
        other.write_config(tmp_path)


def test_a_report_that_is_cut_off_is_named(tmp_path):
    job = jobs_of(TINY, seeds=(0,))[0]
    job.write_config(tmp_path)
    (tmp_path / job.name / "report.json").write_text('{"accu')
    with pytest.raises(ValueError, match=r"seed0/start/report\.json is not JSON"):
        job.report(tmp_path)
    again = replace(job, asked_again=2)
    (tmp_path / job.name / "trained.json").write_text('{"questions": {}}')
    with pytest.raises(ValueError, match=r"seed0/start/trained\.json lacks accuracy; delete"):
        again.trained_accuracy(tmp_path)
    assert job.trained_accuracy(tmp_path) is None


@pytest.mark.parametrize("text", ["{}", "[]", '{"accuracy": {}}'])
def test_a_report_of_something_else_is_named(tmp_path, text):
    job = jobs_of(TINY, seeds=(0,))[0]
    job.write_config(tmp_path)
    (tmp_path / job.name / "report.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"start/report\.json lacks .*stages, standard_error; delete"
    ):
        job.report(tmp_path)


def test_a_damaged_configuration_is_named(tmp_path):
    job = jobs_of(TINY, seeds=(0,))[0]
    job.write_config(tmp_path)
    (tmp_path / job.name / "config.yaml").write_text("seed: [")
    with pytest.raises(ValueError, match=r"seed0/start/config\.yaml is damaged"):
        job.write_config(tmp_path)


def test_what_a_teacher_sees_counts(tmp_path):
    """Every image once more, at the largest count."""
    cost = {}
    for name in ("positions", "positions-distilled"):
        jobs = plan_jobs(SMALL, [regimes(SMALL)[name]], [0], on_gpu=False)
        for job in jobs:
            folder = tmp_path / job.name
            folder.mkdir(parents=True, exist_ok=True)
            stages = [{"tokens_per_image": 11.5, "seconds": 1.0}]
            found = {"accuracy": {}, "accuracy_by_kind": {}, "standard_error": {"4": 0.1}}
            report = {**found, "questions": {}, "samples": 1, "stages": stages}
            (folder / "report.json").write_text(json.dumps(report))
        rows = collect(SMALL, [regimes(SMALL)[name]], jobs, tmp_path, "")["regimes"]
        cost[name] = rows[name]["vision_tokens"]["mean"] / (SMALL.steps * SMALL.batch_size)
    assert cost == {"positions": 11.5, "positions-distilled": 11.5 + 16}


def test_the_reading_task_has_its_own_data_and_processor(capsys):
    reading = SCALES["reading"]
    for suite in SUITES:
        for job in plan_jobs(reading, regimes_of(suite, reading), [0], on_gpu=False):
            config = config_of(job)
            assert config.model.processor == config.data.name == "reading"
            assert config.evaluation is not None
            assert config.evaluation.data.name == "reading"
            assert config.model.max_tiles == 2
            assert (config.data.questions, config.evaluation.data.questions) == (20, 8)
            rates = config.stages[0].learning_rate
            assert rates.get("vision") == (None if job.needs is None else 2e-4)
            assert rates["text"] == rates["projector"] == 2e-3
    assert main(["ablate", "--task", "reading", "--quick"]) == 2
    assert "--task reading has one scale, got it with --quick" in capsys.readouterr().err
