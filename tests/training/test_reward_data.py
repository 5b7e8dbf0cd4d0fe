"""What reward models learn from: every form of a row, every bad one, the split and the order; and the calibration."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_ray.errors import FieldError
from mage_ray.specs import RewardSpec
from mage_ray.training.calibration import (
    LARGEST,
    calibration_error,
    fitted_scale,
    mean_interval,
    negative_log_likelihood,
    rightness,
)
from mage_ray.training.reward_data import Comparison, Labelled, length_order, read_rows, split

GOOD = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}


def write(folder: Path, *records: Any, name: str = "some.jsonl") -> str:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    data = "".join(line + "\n" for line in lines).encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(folder / name)


def read(data: str, **options: Any) -> list[Any]:
    return read_rows("kind", RewardSpec(data=data, **options))


@pytest.mark.parametrize(
    ("record", "chosen", "rejected"),
    [
        (GOOD, GOOD["chosen"], GOOD["rejected"]),
        (
            {"chosen": "Human: Hi\n\nAssistant: Hello! \n", "rejected": "\n\nHuman: Hi\n\nAssistant:  No."},
            "\n\nHuman: Hi\n\nAssistant: Hello!",
            "\n\nHuman: Hi\n\nAssistant:  No.",
        ),
        ({"prompt": " Hi ", "chosen": " Hello!", "rejected": "No."}, GOOD["chosen"], GOOD["rejected"]),
        (
            {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello!", "rejected": " No."},
            GOOD["chosen"],
            GOOD["rejected"],
        ),
        ({"prompt": "Something else", **GOOD}, GOOD["chosen"], GOOD["rejected"]),
        (
            {
                "chosen": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello!"},
                ],
                "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}],
            },
            GOOD["chosen"],
            GOOD["rejected"],
        ),
    ],
)
@pytest.mark.parametrize("name", ["some.jsonl", "some.jsonl.gz"])
def test_every_form_of_a_pair(tmp_path: Path, record: Any, chosen: str, rejected: str, name: str) -> None:
    [row] = read(write(tmp_path, record, name=name))
    assert (row.chosen, row.rejected) == (chosen, rejected)


def test_a_dialogues_group_is_its_opening_and_the_longer_answer_its_last() -> None:
    rows = [
        Comparison(f"\n\nHuman: a\n\nAssistant: {one}", f"\n\nHuman: a\n\nAssistant: {other}", "")
        for one, other in (("long long", "short"), ("b\n\nHuman: very long\n\nAssistant: c", "bb"), ("ab", "cd"))
    ]
    assert [row.longer for row in rows] == [1, 0, 0.5]


def test_openings_that_differ_only_in_case_and_space_are_one_group(tmp_path: Path) -> None:
    later = {side: f"\n\nHuman: HI \n\nAssistant: Yes?\n\nHuman: {side}\n\nAssistant: x" for side in GOOD}
    other = {side: text.replace("Hi", "Hey") for side, text in GOOD.items()}
    groups = [row.group for row in read(write(tmp_path, GOOD, later, other))]
    assert groups[0] == groups[1] != groups[2]


@pytest.mark.parametrize("name", ["some.csv", "some.csv.gz"])
def test_labelled_texts_from_csv(tmp_path: Path, name: str) -> None:
    lines = ["text,humor", '"Two, and', 'a ""line"" more",True', "plain,False", "é,1", "x,0"]
    rows = read(write(tmp_path, *lines, name=name), label="humor")
    assert [(row.text, row.label) for row in rows] == [
        ('Two, and\na "line" more', True),
        ("plain", False),
        ("é", True),
        ("x", False),
    ]
    assert len({row.group for row in rows}) == 4


def test_labelled_texts_from_jsonl_with_columns_and_words_of_their_own(tmp_path: Path) -> None:
    records = [{"joke": "a", "kind": "HUMOR"}, {"joke": "b", "kind": "NO_HUMOR"}, {"joke": "A ", "kind": "humor"}]
    rows = read(write(tmp_path, *records), text="joke", label="kind", positive="HUMOR")
    assert [row.label for row in rows] == [True, False, True]
    assert rows[0].group == rows[2].group != rows[1].group
    numbers = [{"text": text, "good": label} for text, label in (("a", 1), ("b", 0), ("c", 1.0), ("d", True))]
    assert [row.label for row in read(write(tmp_path, *numbers), label="good")] == [True, False, True, True]


@pytest.mark.parametrize(
    ("line", "options", "words"),
    [
        ("", {}, "an empty line"),
        ("{secret", {}, "no JSON"),
        ("[]", {}, "got a list"),
        ({"chosen": "secret"}, {}, "the columns chosen, allowed: the columns chosen and rejected"),
        ({**GOOD, "rejected": ""}, {}, "line 2, rejected: got an empty text"),
        ({**GOOD, "rejected": " \n"}, {}, "line 2, rejected: got an empty text"),
        ({**GOOD, "chosen": None}, {}, "line 2, chosen: got no text"),
        ({**GOOD, "chosen": math.nan}, {}, "line 2, chosen: got no text"),
        ({**GOOD, "chosen": GOOD["rejected"] + " "}, {}, "chosen and rejected that are the same"),
        ({"chosen": "secret", "rejected": "secrets"}, {}, "line 2, chosen: got an answer alone"),
        ({"prompt": "", "chosen": "secret", "rejected": "secrets"}, {}, "line 2, prompt: got an empty text"),
        ({**GOOD, "chosen": "\n\nHuman: secret"}, {}, "a dialogue without an answer"),
        ({**GOOD, "chosen": [{"role": "user"}]}, {}, "line 2, chosen: got no text"),
        ('{"chosen": "\\n\\nHuman: secret \\ud800", "rejected": "b"}', {}, "half a surrogate pair"),
        ({"text": "secret"}, {"label": "humor"}, "the columns text, allowed: the columns text and humor"),
        ({"text": "", "humor": True}, {"label": "humor"}, "line 2, text: got an empty text"),
        ({"text": "secret", "humor": None}, {"label": "humor"}, "line 2, humor: got no label"),
        ({"text": "secret", "humor": math.nan}, {"label": "humor"}, "line 2, humor: got no label"),
        ({"text": "secret", "humor": 2}, {"label": "humor"}, "true or false, 1 or 0, or two values"),
        ({"text": "secret", "humor": "secret"}, {"label": "humor"}, r"rewards.kind.positive"),
        ({"text": "a", "humor": "secret"}, {"label": "humor", "positive": "fun"}, "two values, fun and one other"),
    ],
)
def test_a_bad_row_is_named_by_its_line_without_its_text(
    tmp_path: Path, line: Any, options: dict[str, Any], words: str
) -> None:
    fine: dict[str, Any] = {"text": "fine", "humor": False} if "label" in options else GOOD
    with pytest.raises(FieldError, match=r"^some\.jsonl, line 2") as caught:
        read(write(tmp_path, fine, line, fine), **options)
    assert words in str(caught.value)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["text,humor", "a,True", "secret"], "line 3: got 1 fields, allowed: 2"),
        (["text,humor", '"a', 'b",True', "secret,False,more"], "line 4: got 3 fields"),
        (["text,humor", '"secret"x,True'], "line 2: got no CSV"),
        (["text,text", "a,True"], "line 1: got names that are empty or the same"),
    ],
)
def test_a_bad_line_of_csv(tmp_path: Path, lines: list[str], words: str) -> None:
    with pytest.raises(FieldError) as caught:
        read(write(tmp_path, *lines, name="some.csv"), label="humor")
    assert words in str(caught.value) and "secret" not in str(caught.value)


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("text,humor\né,True\n".encode("latin-1"))
    (tmp_path / "plain.csv.gz").write_bytes(b"text,humor\n")
    (tmp_path / "empty.jsonl").touch()
    one_class = write(tmp_path, *({"text": text, "humor": True} for text in "ab"), name="true.jsonl")
    names = ("latin.csv", "plain.csv.gz", "empty.jsonl", "missing.csv", "pairs.txt")
    for source in [str(tmp_path / name) for name in names] + [one_class, "", "./here", "nobody/nothing"]:
        with pytest.raises(FieldError) as caught:
            read(source, label="humor")
        assert caught.value.field == "rewards.kind.data", source
        assert "\n" not in str(caught.value)


def make_rows(groups: int, each: int = 2) -> list[Labelled]:
    return [Labelled(f"{group}.{i}", bool(i), str(group)) for group in range(groups) for i in range(each)]


@given(st.integers(3, 60), st.floats(0.01, 0.99), st.integers(0, 5), st.randoms())
def test_no_group_is_in_two_parts_and_their_order_does_not_matter(
    groups: int, held_out: float, seed: int, random: Any
) -> None:
    rows = make_rows(groups)
    parts = split(rows, held_out, seed)
    inside = [{row.group for row in part} for part in (parts.train, parts.calibrate, parts.measure)]
    assert all(inside) and not (inside[0] & inside[1] or inside[0] & inside[2] or inside[1] & inside[2])
    assert sum(map(len, (parts.train, parts.calibrate, parts.measure))) == len(rows)
    assert len(inside[1]) <= len(inside[2]) <= len(inside[1]) + 1
    assert abs(len(inside[1] | inside[2]) - held_out * groups) <= 2
    shuffled = random.sample(rows, len(rows))
    again = split(shuffled, held_out, seed)
    assert [{row.group for row in part} for part in (again.train, again.calibrate, again.measure)] == inside


def test_another_seed_holds_out_others_and_two_groups_are_too_few() -> None:
    rows = make_rows(40)
    assert split(rows, 0.3, 0) != split(rows, 0.3, 1)
    with pytest.raises(ValueError, match="2 groups"):
        split(make_rows(2), 0.5, 0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 60), st.integers(0, 3))
def test_an_order_takes_each_example_once_an_epoch_and_is_the_same_for_fewer_steps(
    count: int, batch_size: int, steps: int, seed: int
) -> None:
    batch_size = min(batch_size, count)
    lengths = np.random.default_rng(count).integers(1, 1000, count).tolist()
    order = length_order(lengths, batch_size, steps, seed)
    assert len(order) == steps * batch_size and set(order) <= set(range(count))
    epoch = count // batch_size * batch_size
    for start in range(0, len(order) - epoch + 1, epoch):
        assert max(Counter(order[start : start + epoch]).values()) == 1
    assert length_order(lengths, batch_size, max(1, steps // 2), seed) == order[: max(1, steps // 2) * batch_size]


def test_an_order_pads_little_and_begins_anywhere() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 640).tolist()
    order = length_order(lengths, 8, 80, 0)
    longest = [max(lengths[i] for i in order[at : at + 8]) for at in range(0, 640, 8)]
    assert 8 * sum(longest) < 1.1 * sum(lengths)  # 1.77 times at random
    assert sum(longest[:20]) == pytest.approx(sum(longest[-20:]), rel=0.5)
    assert order != length_order(lengths, 8, 80, 1)
    with pytest.raises(ValueError, match="3 examples, 4 in a batch"):
        length_order([1, 2, 3], 4, 1, 0)


def nll(margins: Any, scale: float) -> float:
    return sum(-math.log(1 / (1 + math.exp(-scale * m))) for m in margins) / len(margins)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30))
def test_the_fitted_scale_is_the_likeliest(margins: list[float]) -> None:
    margin_N = np.array(margins)
    scale = fitted_scale(margin_N)
    assert 0.999 / LARGEST <= scale <= 1.001 * LARGEST
    assert negative_log_likelihood(scale * margin_N) == pytest.approx(nll(margins, scale), abs=1e-9)
    target = (len(margins) + 1) / (len(margins) + 2)

    def smoothed(scale: float) -> float:
        return target * nll(margins, scale) + (1 - target) * nll(margins, -scale)

    assert smoothed(scale) <= min(smoothed(10**power) for power in np.linspace(-2, 2, 201)) + 1e-6


def test_a_scale_that_was_lost_is_found_again() -> None:
    dice = np.random.default_rng(0)
    logit = dice.normal(0, 2, 40_000)
    sign = np.where(dice.random(len(logit)) < 1 / (1 + np.exp(-logit)), 1, -1)
    assert fitted_scale(sign * logit * 5) == pytest.approx(0.2, rel=0.05)
    assert calibration_error(sign * logit) < 0.01 < 0.1 < calibration_error(sign * logit * 5)
    # Always right, but only eight times: as sure as 9 in 10.
    assert fitted_scale(np.full(8, 2.0)) == pytest.approx(math.log(9) / 2)
    assert fitted_scale(np.array([-1.0, -2.0])) == pytest.approx(1 / LARGEST)


@given(st.lists(st.floats(-8, 8), min_size=1, max_size=40))
def test_the_calibration_error_is_the_one_written_out(margins: list[float]) -> None:
    bins: dict[int, list[tuple[float, float]]] = {}
    for margin in margins:
        confidence = 1 / (1 + math.exp(-abs(margin)))
        right = 0.5 if margin == 0 else float(margin > 0)
        bins.setdefault(min(int((confidence - 0.5) * 20), 9), []).append((confidence, right))
    expected = sum(abs(sum(c for c, _ in rows) - sum(r for _, r in rows)) for rows in bins.values()) / len(margins)
    assert calibration_error(np.array(margins)) == pytest.approx(expected, abs=1e-9)
    assert rightness(np.array([-0.1, 0.0, 3.0])).tolist() == [0, 0.5, 1]


def test_an_interval_is_that_of_a_mean_and_counts_whole_groups() -> None:
    dice = np.random.default_rng(1)
    values = (dice.random(400) < 0.7).astype(float)
    alone = mean_interval(values, [str(i) for i in range(400)], 0.95, 4000, 0)
    assert alone["value"] == values.mean()
    expected = 1.96 * values.std() / 20
    assert alone["high"] - alone["value"] == pytest.approx(expected, rel=0.15)
    assert alone["value"] - alone["low"] == pytest.approx(expected, rel=0.15)
    # Four copies of each row in one group say no more than one.
    copies = mean_interval(np.repeat(values, 4), [str(i // 4) for i in range(1600)], 0.95, 4000, 0)
    assert copies["high"] - copies["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.1)
    half = mean_interval(values, [str(i) for i in range(400)], 0.5, 4000, 0)
    assert half["high"] - half["low"] == pytest.approx(0.674 / 1.96 * 2 * expected, rel=0.15)
