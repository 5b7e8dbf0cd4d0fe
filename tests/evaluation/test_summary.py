"""Intervals that hold what they should, and tables with gaps that say where the gap is."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from evaluation_samples import GRID_2, GRID_3, front, make_samples

from mage_ray.errors import FieldError, UserError
from mage_ray.evaluation import measures
from mage_ray.evaluation.summary import MEASURES, Summary, paired_difference, summarise

OBJECTIVES = ["o0", "o1"]


def summary_of(samples: pd.DataFrame, resamples: int = 300, seed: int = 0) -> Summary:
    return summarise(samples, OBJECTIVES, [-1.0, -1.0], resamples=resamples, seed=seed)


@pytest.fixture(scope="module")
def samples() -> pd.DataFrame:
    means = {"reference": np.zeros((1, 2)), "rewarded-soup": front(0.8, GRID_2), "bone-soup": front(1.0, GRID_2)}
    return make_samples(means, GRID_2)


def test_values_are_the_measures_of_the_mean_points(samples: pd.DataFrame) -> None:
    summary = summary_of(samples)
    assert [one.method for one in summary.methods] == ["reference", "rewarded-soup", "bone-soup"]
    assert (summary.prompts, summary.seeds) == (12, 2)
    for method in ("rewarded-soup", "bone-soup"):
        rows = samples[samples["method"] == method]
        points = np.array([rows.loc[rows["point"] == p, ["reward/o0", "reward/o1"]].mean() for p in range(11)])
        one = summary.method(method)
        np.testing.assert_allclose(one.points, points, atol=1e-9)
        np.testing.assert_allclose(one.preferences, GRID_2)
        expected = {
            "hypervolume": measures.hypervolume(points, [-1, -1]),
            "inner_product": measures.inner_product(GRID_2, points),
            "controllability": measures.controllability(GRID_2, points),
            "front_length": measures.front_length(points),
            "sparsity": measures.sparsity(points),
            "spacing": measures.spacing(points),
            "kl": rows["kl"].mean(),
            "length": rows["tokens"].mean(),
            "repetition": rows["completion"].map(measures.repetition).mean(),
            "distinct": np.mean([distinct_2(rows[rows["point"] == p]["completion"]) for p in range(11)]),
        }
        assert set(expected) == set(MEASURES)
        assert {name: one.measures[name].value for name in MEASURES} == pytest.approx(expected)


def distinct_2(texts: pd.Series) -> float:
    pairs = [pair for text in texts for pair in zip(text.lower().split(), text.lower().split()[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def test_row_order_does_not_matter(samples: pd.DataFrame) -> None:
    sorted_by_method = samples.sample(frac=1, random_state=1).sort_values("method", kind="stable")
    shuffled = summary_of(sorted_by_method).method("bone-soup")
    np.testing.assert_allclose(shuffled.points, summary_of(samples).method("bone-soup").points, atol=1e-9)


def test_intervals_contain_their_values(samples: pd.DataFrame) -> None:
    for one in summary_of(samples).methods:
        assert (one.point_intervals[..., 0] <= one.points).all()
        assert (one.points <= one.point_intervals[..., 1]).all()
        for interval in one.measures.values():
            assert math.isnan(interval.value) or interval.low <= interval.value <= interval.high


def test_a_method_without_an_axis_serves_every_preference_with_its_one_point(samples: pd.DataFrame) -> None:
    leaning = samples[samples["point"] < 4]  # a grid whose mean is not the even preference
    reference = summary_of(leaning).method("reference")
    everywhere = np.repeat(reference.points, 4, axis=0)
    assert reference.measures["inner_product"].value == pytest.approx(measures.inner_product(GRID_2[:4], everywhere))
    assert math.isnan(reference.measures["controllability"].value)
    assert math.isnan(reference.measures["sparsity"].low)


@pytest.mark.slow
def test_intervals_cover_the_truth_about_as_often_as_they_claim() -> None:
    # Noise of the size of the front itself: here plain percentiles hold the hypervolume in 3 of 4 runs only.
    # That of a front minus a single point they hold in every other, since only the front is lifted by noise.
    truth = {"a": front(1.0, GRID_2), "b": front(1.1, GRID_2), "one": np.zeros((1, 2))}
    volumes = {name: measures.hypervolume(points, [-1, -1]) for name, points in truth.items()}
    wish = measures.inner_product(GRID_2, truth["a"])
    runs, hits = 60, np.zeros(5)
    for run in range(runs):
        samples = make_samples(truth, GRID_2, prompts=32, seeds=1, prompt_noise=1.0, noise=1.0, seed=run)
        summary = summary_of(samples, seed=run)
        a = summary.method("a")
        volume, product = a.measures["hypervolume"], a.measures["inner_product"]
        difference = paired_difference(summary, "b", "a", "hypervolume")
        unlike = paired_difference(summary, "a", "one", "hypervolume")
        low, high = a.point_intervals[2, 0]
        hits += [
            volume.low <= volumes["a"] <= volume.high,
            product.low <= wish <= product.high,
            low <= truth["a"][2, 0] <= high,
            difference.low <= volumes["b"] - volumes["a"] <= difference.high,
            unlike.low <= volumes["a"] - volumes["one"] <= unlike.high,
        ]
    # 95 % of 60 is 57; 51 is less likely than 1 in 100 at a true coverage of 93 %.
    assert (hits >= 51).all(), hits


def test_a_paired_difference_is_sharper_than_two_intervals_when_prompts_are_hard_for_all() -> None:
    means = {"a": front(1.0, GRID_2), "b": front(1.1, GRID_2)}
    summary = summary_of(make_samples(means, GRID_2, prompt_noise=1.0, noise=0.05))
    for measure in ("hypervolume", "inner_product"):
        paired = paired_difference(summary, "b", "a", measure)
        a, b = (summary.method(name).measures[measure] for name in ("a", "b"))
        assert paired.value == pytest.approx(b.value - a.value)
        assert a.high > b.low  # two intervals do not tell them apart
        assert 0 < paired.low <= paired.value <= paired.high
        assert paired.high - paired.low < 0.5 * math.hypot(a.high - a.low, b.high - b.low)


def test_a_method_differs_from_itself_by_nothing(samples: pd.DataFrame) -> None:
    difference = paired_difference(summary_of(samples), "bone-soup", "bone-soup", "hypervolume")
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_equal_texts_tie_exactly() -> None:
    # With every point the same there is one place on the front and no control, in the sample and in every resample.
    rows = make_samples({"a": np.zeros((11, 2))}, GRID_2, noise=0.0, prompt_noise=1 / 3)
    one = summary_of(rows).method("a")
    assert (one.measures["front_length"].low, one.measures["front_length"].high) == (1, 1)
    assert one.measures["controllability"].high == 0


def test_more_seeds_of_the_same_prompts_do_not_hide_the_variance_of_prompts() -> None:
    # Rows drawn one by one would make the interval shrink with the number of seeds; prompts are what was sampled.
    means = {"a": front(1.0, GRID_2)}
    widths = []
    for seeds in (1, 16):
        rows = make_samples(means, GRID_2, seeds=seeds, prompt_noise=0.5, noise=0.0)
        interval = summary_of(rows).method("a").measures["inner_product"]
        widths.append(interval.high - interval.low)
    assert widths[1] == pytest.approx(widths[0], rel=1e-6)


def test_one_prompt_gives_values_without_bounds() -> None:
    one = summary_of(make_samples({"a": front(1.0, GRID_2)}, GRID_2, prompts=1)).method("a")
    for interval in one.measures.values():
        assert not math.isnan(interval.value)
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)
    assert np.isnan(one.point_intervals).all()


def test_the_seed_decides_the_resamples(samples: pd.DataFrame) -> None:
    first, again, other = (summary_of(samples, seed=seed).to_json() for seed in (1, 1, 2))
    assert first == again != other


def test_json_holds_every_measure_and_null_for_the_undefined(samples: pd.DataFrame) -> None:
    content = json.loads(summary_of(samples).to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["objectives"] == OBJECTIVES
    reference, *_, bone = content["methods"]
    assert set(bone["measures"]) == set(MEASURES)
    assert np.shape(bone["point_intervals"]) == (11, 2, 2)
    assert reference["measures"]["controllability"] == {"value": None, "low": None, "high": None}
    assert reference["preferences"] == [[None, None]]


def test_a_missing_cell_is_named(samples: pd.DataFrame) -> None:
    gone = (samples["method"] == "bone-soup") & (samples["point"] == 4) & (samples["prompt_id"] == "p3")
    with pytest.raises(UserError, match=r"method bone-soup, point 4: no generation for prompt p3 .*\(2 of 264 cells"):
        summary_of(samples[~gone])


def test_a_cell_that_is_there_twice_is_named(samples: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="method reference, point 0: prompt p0 with seed 0 is more than once"):
        summary_of(pd.concat([samples, samples.iloc[:1]]))


def test_a_value_that_is_not_a_number_is_named(samples: pd.DataFrame) -> None:
    broken = samples.copy()
    broken.loc[broken.index[30], "reward/o1"] = math.nan
    with pytest.raises(UserError, match="method rewarded-soup, point 0: prompt p3 with seed 0 is not a number"):
        summary_of(broken)


def test_methods_must_agree_on_the_grid(samples: pd.DataFrame) -> None:
    broken = samples.copy()
    moved = (broken["method"] == "bone-soup") & (broken["point"] == 2)
    broken["preference"] = [
        [0.75, 0.25] if here else own for here, own in zip(moved, broken["preference"], strict=True)
    ]
    with pytest.raises(UserError, match=r"method bone-soup, point 2: its preference is \(0.75, 0.25\).*\(0.8, 0.2\)"):
        summary_of(broken)


def test_preferences_need_one_weight_per_objective() -> None:
    rows = make_samples({"a": front(1.0, GRID_3)}, GRID_3)
    with pytest.raises(UserError, match="method a, point 0: preference has 3 weights, not 2"):
        summary_of(rows)


@pytest.mark.parametrize(
    ("objectives", "reference_point", "options", "field"),
    [
        (["o0"], [0.0], {}, "objectives"),
        (OBJECTIVES, [0.0], {}, "reference_point"),
        (OBJECTIVES, [0.0, 0.0], {"resamples": 0}, "resamples"),
        (OBJECTIVES, [0.0, 0.0], {"confidence": 1.0}, "confidence"),
    ],
)
def test_bad_arguments_are_named(
    samples: pd.DataFrame, objectives: list[str], reference_point: list[float], options: dict, field: str
) -> None:
    with pytest.raises(FieldError, match=f"^{field}: got"):
        summarise(samples, objectives, reference_point, **options)


def test_unknown_columns_methods_and_measures_are_named(samples: pd.DataFrame) -> None:
    with pytest.raises(UserError, match=r"missing columns kl, reward/o1$"):
        summary_of(samples.drop(columns=["kl", "reward/o1"]))
    with pytest.raises(UserError, match="no row"):
        summary_of(samples.iloc[:0])
    summary = summary_of(samples)
    with pytest.raises(FieldError, match=r"^method: got mod, allowed: reference, rewarded-soup"):
        summary.method("mod")
    with pytest.raises(FieldError, match=r"^measure: got volume"):
        paired_difference(summary, "bone-soup", "reference", "volume")


def test_the_interval_of_distinct_2_is_about_where_other_prompts_put_it() -> None:
    """Against drawing the prompts anew from all that there are, which resampling a few stands for."""
    random = np.random.default_rng(3)
    words = [f"w{i}" for i in range(60)]
    texts = [" ".join(random.choice(words, 12, p=np.arange(60, 0, -1) / 1830)) for _ in range(4000)]
    values, bounds = [], []
    for begin in range(0, 4000, 40):
        own = texts[begin : begin + 40]
        frame = pd.DataFrame(
            {
                "method": "one", "point": 0, "preference": None, "prompt_id": [f"p{i}" for i in range(40)], "seed": 0,
                "completion": own, "tokens": 12, "kl": 0.0, "reward/o0": 0.0, "reward/o1": 0.0,
            }
        )  # fmt: skip
        frame["preference"] = [(0.5, 0.5)] * 40
        found = summary_of(frame).method("one").measures["distinct"]
        values.append(found.value)
        bounds.append((found.low, found.high))
    lows, highs = np.array(bounds).T
    held = np.mean((lows <= np.mean(values)) & (np.mean(values) <= highs))
    assert held >= 0.85
    assert np.mean(highs - lows) < 2 * (np.quantile(values, 0.975) - np.quantile(values, 0.025))
