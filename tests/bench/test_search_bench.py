"""The search benchmark on a tiny study: its arithmetic, its naive trial, and a whole run that is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[2] / "jobs" / "bench"
sys.path.insert(0, str(BENCH))

import naive_trial  # noqa: E402
import search  # noqa: E402
import torch  # noqa: E402
from engines import GUIDE, ZERO, Tiny, guided, ids  # noqa: E402
from naive_trial import PeftModels, generate_planned  # noqa: E402
from quality import ratio_of_means  # noqa: E402
from searched import Runs, Searched, changed, sharing  # noqa: E402
from setting import BenchError  # noqa: E402
from studies import REWARDS, trained_study  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trial_check import check_trials, tried  # noqa: E402

from mage_ray.decoding.plan import Cadence, Plan, Row  # noqa: E402
from mage_ray.decoding.request import Sampling  # noqa: E402
from mage_ray.errors import UserError  # noqa: E402
from mage_ray.folder import StudyFolder  # noqa: E402
from mage_ray.search.recipe import own_recipe  # noqa: E402
from mage_ray.search.space import Space  # noqa: E402
from mage_ray.training.rollouts import search_prompts, study_prompts  # noqa: E402


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("rewards")
    (place / "rewards.py").write_text(REWARDS)
    return place


@pytest.fixture(scope="module")
def trained(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    return trained_study(tmp_path_factory.mktemp("study") / "run", tiny_model_folder)


@pytest.fixture(scope="module")
def tiny(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tiny_model_folder, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def models(tiny: Tiny) -> PeftModels:
    return PeftModels(AutoModelForCausalLM.from_pretrained(tiny.folder).eval(), tiny.paths)


def record(ended: float, hypervolume: float = 1.0, tokens: int = 10, seconds: float = 1.0) -> dict[str, Any]:
    """One that began two seconds before its end."""
    scores = {"hypervolume": hypervolume, "tokens": tokens, "engine_seconds": seconds}
    return {"trial": f"t{ended:g}", "began": ended - 2, "ended": ended, "scores": scores}


def test_times_and_overheads_are_those_of_the_trials_behind_the_first() -> None:
    searched = Searched.of(100.0, [record(125, seconds=2), record(110, seconds=1), record(120, seconds=3)])
    assert [one["ended"] for one in searched.records] == [110, 120, 125]
    assert searched.seconds_per_trial == 15 / 2
    assert searched.seconds_with_start == 25 / 3
    assert searched.overhead == pytest.approx(1 - 5 / 15)
    assert searched.overhead_within == pytest.approx(1 - 5 / 4)
    assert searched.overhead_with_first == pytest.approx(1 - 6 / (125 - 108))
    with pytest.raises(BenchError, match="trial t1 failed: too bad"):
        Searched.of(0.0, [record(2), {"trial": "t1", "began": 0, "ended": 1, "error": "too bad"}])


def test_the_best_setting_is_the_best_one_that_the_budget_reaches() -> None:
    searched = Searched.of(0.0, [record(3, 9.0, 30), record(1, 2.0, 50), record(2, 3.0, 25), record(4, 1.0, 5)])
    assert searched.tokens == [50, 75, 105, 110]
    assert [searched.best(n)["trial"] for n in (50, 74, 75, 104, 105, 110)] == ["t1", "t1", "t2", "t2", "t3", "t3"]
    with pytest.raises(BenchError, match="49 tokens"):
        searched.best(49)


def test_ratios_carry_what_prompts_share_and_what_seeds_differ_by() -> None:
    dice = np.random.default_rng(0)
    prompts_R = np.append(1.0, np.exp(0.3 * dice.standard_normal(4000)))
    # Noise that both share cancels: nothing is left where the seeds are alike.
    shared = ratio_of_means(np.stack([3 * prompts_R] * 3), np.stack([2 * prompts_R]), 0.9, dice)
    assert (shared.value, shared.low, shared.high) == pytest.approx((1.5, 1.5, 1.5))
    own = ratio_of_means(np.stack([prompts_R]), np.ones((1, 4001)), 0.9, dice)
    assert own.value == 1 and own.high == pytest.approx(np.exp(0.3 * 1.645), rel=0.05)
    # Seeds alone: a mean of three that are drawn among 1, 2 and 3 has the standard deviation sqrt(2 / 9).
    seeds = ratio_of_means(np.tile([[1.0], [2.0], [3.0]], 4001), np.ones((1, 4001)), 0.9, dice)
    assert seeds.value == 2 and (seeds.low, seeds.high) == pytest.approx((4 / 3, 8 / 3))
    assert np.isnan(ratio_of_means(np.ones((2, 11)), np.zeros((1, 11)), 0.9, dice).value)


def test_a_folder_shares_the_experts_and_has_prompts_of_its_own(trained: StudyFolder, tmp_path: Path) -> None:
    study = changed(trained.study, prompts={"evaluation": 9}, search={"prompts": 5, "seed": 3})
    folder = sharing(tmp_path / "one", study, trained)
    assert sharing(tmp_path / "one", study, trained).study == study
    for backbone in study.training.backbones:
        for name in study.objectives:
            assert folder.expert(backbone, name).samefile(trained.expert(backbone, name))
    train, unseen = study_prompts(study)
    assert train == study_prompts(trained.study)[0] and len(unseen) == 9 and len(search_prompts(study)) == 5
    assert len({*train, *unseen, *search_prompts(study)}) == len(train) + 9 + 5
    with pytest.raises(UserError, match=r"the search benchmark: evaluation\.max_new_tokens"):
        changed(trained.study, evaluation={"max_new_tokens": 0})


def test_what_has_finished_is_kept_and_another_setting_refused(trained: StudyFolder, tmp_path: Path) -> None:
    runs = Runs(trained, trained.study, tmp_path / "work", 1)
    runs.claim({"trials": 3, "grid": 5})
    made = []

    def make(place: Path) -> dict[str, int]:
        assert place.is_dir() and not list(place.iterdir())
        (place / "left").touch()
        made.append(place)
        if len(made) == 1:
            raise BenchError("cut short")
        return {"number": len(made)}

    with pytest.raises(BenchError):
        runs.kept("part", make)
    assert runs.kept("part", make) == runs.kept("part", make) == {"number": 2}
    runs.claim({"trials": 3, "grid": 5})
    with pytest.raises(UserError, match="was begun with grid 5, allowed: 4"):
        runs.claim({"trials": 3, "grid": 4})


def test_rows_merged_by_peft_are_the_sum_of_deltas_and_leave_the_reference_alone(
    tiny: Tiny, models: PeftModels
) -> None:
    before = {name: weight.clone() for name, weight in models.reference.named_parameters()}
    row = Row((0.9, -0.4, 0.0, 1.3))
    merged, expected = models.of(row), tiny.merged(row)
    for name, weight in expected.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name).double(), weight, rtol=1e-4, atol=1e-5)
    assert not torch.equal(merged.lm_head.weight, before["lm_head.weight"]) or "lm_head" not in tiny.adapters[0].factors
    assert all(torch.equal(weight, before[name]) for name, weight in models.reference.named_parameters())
    assert models.of(Row((0.0,) * 4)) is models.reference
    with pytest.raises(BenchError, match="value models"):
        models.of(Row((1.0,) * 4, "scalar"))


def generated(models: PeftModels, plan: Plan, prompts: Sequence[tuple[int, ...]], **how: Any) -> list[list[int]]:
    stop = how.pop("stop", (258,))
    sampling = Sampling(**{"max_new_tokens": 12, "temperature": 0.0} | how)
    return generate_planned([models.of(row) for row in plan.rows], plan, prompts, sampling, stop, 259)


@pytest.mark.parametrize(
    "plan",
    [
        guided(),
        guided(0.0, candidates=3),
        guided(2.0, candidates=None),
        Plan.of([((1.0, 0.0, 0.0, 0.0), 0.3), (GUIDE, 0.9), (ZERO, -0.2)]),
    ],
)
def test_a_naive_trial_draws_each_first_token_by_the_plan(tiny: Tiny, models: PeftModels, plan: Plan) -> None:
    """Beside a longer prompt, so that padding counts; at a temperature and with top-p."""
    prompts = [ids("A short one"), ids("One that is longer by a good deal")]
    count, temperature, top_p = 600, 0.8, 0.9
    made = generated(models, plan, prompts * count, max_new_tokens=2, temperature=temperature, top_p=top_p, seed=5)
    for i, prompt in enumerate(prompts):
        # The second token's distribution depends on the first: its caches and positions are looked at, too.
        firsts = [tokens[0] for tokens in made[i::2]]
        common = statistics.mode(firsts)
        seconds = [tokens[1] for tokens in made[i::2] if tokens[0] == common and len(tokens) > 1]
        for drawn, context in ((firsts, prompt), (seconds, (*prompt, common))):
            p_V = nucleus((tiny.logprobs(plan, context)[-1] / temperature).softmax(-1), top_p)
            observed_V = torch.bincount(torch.tensor(drawn), minlength=len(p_V)).double()
            assert observed_V[p_V == 0].sum() == 0
            # Pearson's statistic, what is rarely expected taken together.
            often_V = len(drawn) * p_V >= 5
            p_C = torch.cat([p_V[often_V], p_V[~often_V].sum()[None]]) + 1e-9
            observed_C = torch.cat([observed_V[often_V], observed_V[~often_V].sum()[None]])
            statistic = float(((observed_C - len(drawn) * p_C) ** 2 / (len(drawn) * p_C)).sum())
            assert len(p_C) > 2 or drawn is seconds
            assert statistic < len(p_C) + 4.5 * (2 * len(p_C)) ** 0.5, (i, context == prompt)


def nucleus(p_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest set of most likely tokens that has at least ``top_p``, normalised."""
    ordered, order = p_V.sort(descending=True)
    kept = ordered.cumsum(0) - ordered < top_p
    total = torch.zeros_like(p_V).scatter(0, order, ordered * kept)
    return total / total.sum()


def test_a_naive_answer_ends_with_its_first_stop_and_what_it_cannot_do_is_refused(models: PeftModels) -> None:
    plan, prompts = guided(), [ids("And then?"), ids("How so?"), ids("Who was it, of all of them?")]
    endless = generated(models, plan, prompts, stop=())
    stops = (endless[0][3], endless[1][6])
    made = generated(models, plan, prompts, stop=stops)
    for tokens, whole in zip(made, endless, strict=True):
        assert len(whole) == 12 and tokens == whole[: len(tokens)]
        assert len(tokens) == min([whole.index(stop) + 1 for stop in stops if stop in whole], default=12)
    assert min(map(len, made)) < 12
    with pytest.raises(BenchError, match="every token"):
        generated(models, plan.at(Cadence(every=2)), [ids("And then?")])


@pytest.mark.slow
def test_greedy_tokens_of_both_are_checked_and_a_wrong_guide_is_refused(
    trained: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = changed(trained.study, search={"grid": 3, "prompts": 2})
    checks = check_trials(study, trained)["arms"]
    assert {arm: check["tokens"] for arm, check in checks.items()} == {"engine": 72, "naive": 72}
    assert all(check["shortfall"] <= 1e-3 for check in checks.values())
    right = naive_trial.PlanGuidance

    def weaker(plan: Plan, *rest: Any) -> naive_trial.PlanGuidance:
        return right(replace(plan, weights=tuple(w * (0.2 if i else 1) for i, w in enumerate(plan.weights))), *rest)

    monkeypatch.setattr(naive_trial, "PlanGuidance", weaker)
    with pytest.raises(BenchError, match="naive: token"):
        check_trials(study, trained)


def test_fresh_trials_try_the_defaults_and_then_random_settings(trained: StudyFolder) -> None:
    study = trained.study
    assert tried(study, 0) == own_recipe(study, "mage-i-m")
    settings = [tried(study, number) for number in (1, 2, 3)]
    assert settings == [tried(study, number) for number in (1, 2, 3)]
    assert len({setting.guidance.strength for setting in settings}) == 3
    for setting in settings:
        strength, alpha = setting.guidance.strength, setting.guidance.base_extrapolation
        assert 0 <= strength <= 3 and 0 <= alpha <= 1 and abs(strength / 3 - alpha) > 1e-3
        assert setting.guidance.candidates in (5, 10, 20, 50)
    # The base's own coefficients have a norm of 2.5 at the corners.
    limited, numbers = changed(study, search={"max_norm": 3.5}), range(1, 8)
    assert all(Space(limited).excess(_config(tried(limited, number))) <= 0 for number in numbers)
    assert any(Space(limited).excess(_config(tried(study, number))) > 0 for number in numbers)
    with pytest.raises(BenchError, match="none of 1000"):
        tried(changed(study, search={"max_norm": 2}), 1)


def _config(recipe: Any) -> dict[str, Any]:
    guidance = recipe.guidance
    return {
        "strength": guidance.strength,
        "extrapolation": guidance.base_extrapolation,
        "candidates": guidance.candidates,
    }


def test_options_have_their_sizes_and_the_default_searcher_is_the_searchs_own(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "r.json")]
    full, quick = search.parse(out), search.parse([*out, "--quick", "--trials", "7"])
    assert (full.trials, full.unseen, full.seeds) == (12, 32, 3)
    assert (quick.trials, quick.unseen, quick.seeds) == (7, 4, 1)
    assert full.work == tmp_path / "r-work"
    for wrong in (["--trials", "1"], ["--population", "3"], ["--pymoo", "optuna"]):
        with pytest.raises(SystemExit):
            search.parse([*out, *wrong])


def start(rewards: Path, *options: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(BENCH / "search.py"), *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(rewards), "COLUMNS": "120"},
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_and_measures_all(trained: StudyFolder, rewards: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "r.json", tmp_path / "kept"
    options = ["--out", out, "--study", trained.path, "--work", work, "--quick", "--trials", "4", "--threads", "1"]
    killed = start(rewards, *options)
    end = time.monotonic() + 300
    while not list((work / "optuna-0" / "search").glob("trials/*.json")):
        assert killed.poll() is None and time.monotonic() < end, killed.communicate()[0][-3000:]
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not out.exists() and not (work / "optuna-0" / "done.json").exists()
    finished = {name: (work / name / "done.json").read_text() for name in ("checks", "nsga2-0")}

    again = start(rewards, *options)
    output, _ = again.communicate(timeout=500)
    assert again.returncode == 0, output[-3000:]
    assert finished == {name: (work / name / "done.json").read_text() for name in finished}
    made = json.loads(out.read_text())
    assert [(one["algorithm"], one["seed"]) for one in made["searches"]] == [
        ("nsga2", 0),
        ("optuna", 0),
        ("random", 0),
    ]
    assert made["budget"] == min(one["tokens"] for one in made["searches"])
    for one in made["searches"]:
        assert one["trials"] == len(one["history"]) == 4
        assert one["history"][-1]["tokens"] == one["tokens"]
        within = one["history"][: one["trials_within_budget"]]
        assert within[-1]["tokens"] <= made["budget"]
        assert one["searched_hypervolume"] == max(entry["hypervolume"] for entry in within)
        assert one["unseen_hypervolume"]["low"] <= one["unseen_hypervolume"]["high"]
    volumes = {one["algorithm"]: one["unseen_hypervolume"]["value"] for one in made["searches"]}
    default = made["defaults"]["unseen_hypervolume"]["value"]
    ratios, seconds = made["ratios"], made["seconds_per_trial"]
    assert ratios["pymoo_vs_default"] == pytest.approx(volumes["nsga2"] / default)
    assert ratios["optuna_vs_default"] == pytest.approx(volumes["optuna"] / default)
    assert ratios["pymoo_vs_random"] == pytest.approx(volumes["nsga2"] / volumes["random"])
    resident = seconds["resident"]["seconds_median"]
    assert ratios["trials_vs_naive"] == pytest.approx(seconds["naive"]["seconds_median"] / resident)
    assert ratios["trials_vs_fresh_engine"] == pytest.approx(seconds["fresh_engine"]["seconds_median"] / resident)
    assert 0 < ratios["trial_overhead"] == made["overheads"]["overhead"][0] < 1
    assert set(made["bars"]) == {"trial_overhead", "trials_vs_naive"}
    [naive], [fresh] = made["fresh_trials"]["naive"], made["fresh_trials"]["fresh_engine"]
    assert sum(naive["parts"].values()) < naive["seconds"] and {"merge", "generate"} <= set(naive["parts"])
    assert naive["hypervolume"] > 0
    # The defaults, on the same prompts and by the same seeds as in every search.
    of_defaults = [one["hypervolume"] for one in made["searches"][0]["history"]]
    assert any(fresh["hypervolume"] == pytest.approx(volume) for volume in of_defaults)
    assert made["machine"]["threads"] == 1 and made["setting"]["trials"] == 4

    refused = start(rewards, *options, "--grid", "2")
    output, _ = refused.communicate(timeout=200)
    assert refused.returncode == 1 and "was begun with grid 3, allowed: 2" in output
