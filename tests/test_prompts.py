"""Where prompts come from, and that training and evaluation never share one."""

from __future__ import annotations

import gzip
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_ray.errors import FieldError
from mage_ray.prompts import Prompt, load_prompts, make_prompt, split_prompts

HH = "\n\nHuman: How do newts\nsleep?\n\nAssistant: Under stones.\n\nHuman: And frogs?\n\nAssistant: In mud."


def write(folder: Path, *lines: Any, name: str = "some.jsonl") -> str:
    data = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(folder / name)


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_our_own_list_is_large_and_varied() -> None:
    prompts = load_prompts("builtin")
    assert len(prompts) >= 220
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    lengths = [len(prompt.text.split()) for prompt in prompts]
    assert min(lengths) >= 5
    assert max(lengths) <= 35
    assert len({" ".join(prompt.text.split()[:3]) for prompt in prompts}) > 0.7 * len(prompts)


def test_our_own_list_has_no_near_duplicates() -> None:
    words = [(p.text, set(re.findall(r"[a-z']+", p.text.lower()))) for p in load_prompts("builtin")]
    close = [(a, b) for (a, x), (b, y) in combinations(words, 2) if len(x & y) / len(x | y) > 0.5]
    assert close == []


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"prompt": "  Why? "}, "Why?"),
        ({"prompt": [{"role": "user", "content": "Why?"}], "chosen": "no"}, "Why?"),
        (
            {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"},
                          {"role": "assistant", "content": "So."}, {"role": "user", "content": "Really?"}]},
            "Why?",
        ),
        ({"chosen": HH, "rejected": "x"}, "How do newts\nsleep?"),
        ({"chosen": "\n\nHuman: Are you\n\nHuman: there?\n\nAssistant: Yes."}, "Are you"),
        ({"prompt": "What comes after \n\nHuman: in a log?"}, "What comes after \n\nHuman: in a log?"),
        ({"prompt": "Two\u2028lines"}, "Two\u2028lines"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["some.jsonl", "some.jsonl.gz"])
def test_every_form_of_a_record(tmp_path: Path, record: dict[str, Any], text: str, name: str) -> None:
    path = write(tmp_path, json.dumps(record, ensure_ascii=False), name=name)
    assert texts(load_prompts(path)) == [text]


def test_a_named_column(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "not this", "question": "this"})
    assert texts(load_prompts(path, column="question")) == ["this"]


def test_duplicates_are_dropped_and_the_order_kept(tmp_path: Path) -> None:
    path = write(tmp_path, *({"prompt": text} for text in ("b", "a", "b ", "A", "c  d", "c\nD")))
    assert texts(load_prompts(path)) == ["b", "a", "c  d"]


def test_ids_are_stable() -> None:
    # The first 16 hex digits of `printf 'why is it so?' | sha256sum`.
    assert make_prompt(" Why  is it so?\n").id == "82d719d8311db36d"


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_a_limit_is_deterministic_and_nested(small: int, large: int, seed: int) -> None:
    small, large = sorted((small, large))
    everything = load_prompts("builtin")
    some, more = (load_prompts("builtin", limit, seed=seed) for limit in (small, large))
    assert len(some) == min(small, len(everything))
    assert set(some) <= set(more)
    assert some == [prompt for prompt in everything if prompt in set(some)]


def test_a_limit_does_not_depend_on_the_files_order_but_on_the_seed(tmp_path: Path) -> None:
    records = [{"prompt": f"question {i}"} for i in range(50)]
    forward, backward = write(tmp_path, *records), write(tmp_path, *records[::-1], name="back.jsonl")
    assert set(load_prompts(forward, 10)) == set(load_prompts(backward, 10))
    assert set(load_prompts(forward, 10)) != set(load_prompts(forward, 10, seed=1))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "an empty line"),
        ("{nonsense secret", "no JSON"),
        ('["secret"]', "got a list"),
        ('{"question": "secret"}', "the columns question, allowed: a column prompt or messages or chosen"),
        ("{}", "the columns none"),
        ('{"prompt": ""}', "an empty prompt"),
        ('{"prompt": " \\n"}', "an empty prompt"),
        ('{"prompt": 3}', "no prompt"),
        ('{"prompt": null}', "no prompt"),
        ('{"messages": [{"role": "assistant", "content": "secret"}]}', "no prompt"),
        ('{"messages": ["secret"]}', "no prompt"),
        ('{"messages": [{"role": "user", "content": ["secret"]}]}', "no prompt"),
        ('{"chosen": "\\n\\nHuman: \\n\\nAssistant: secret"}', "an empty prompt"),
        ('{"prompt": "secret \\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_by_its_number_without_its_text(tmp_path: Path, line: str, words: str) -> None:
    path = write(tmp_path, {"prompt": "fine"}, line, {"prompt": "also fine"})
    with pytest.raises(FieldError, match=r"^some\.jsonl, line 2") as caught:
        load_prompts(path)
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 100)[:40])
    (tmp_path / "plain.jsonl.gz").write_bytes(b'{"prompt": "a"}\n')
    (tmp_path / "empty.jsonl").touch()
    names = ("latin.jsonl", "torn.jsonl.gz", "plain.jsonl.gz", "empty.jsonl", "missing.jsonl", "prompts.txt")
    for source in [str(tmp_path / name) for name in names] + ["", "./here", "a/b/c"]:
        with pytest.raises(FieldError) as caught:
            load_prompts(source)
        assert caught.value.field == "prompts.source"
        assert "\n" not in str(caught.value)


def test_a_hub_dataset_without_a_network_is_one_line() -> None:
    with pytest.raises(FieldError, match=r"^prompts\.source: got nobody/nothing") as caught:
        load_prompts("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [0, -1, True, 2.5])
def test_a_bad_limit(limit: Any) -> None:
    with pytest.raises(FieldError, match=r"^prompts\.limit"):
        load_prompts("builtin", limit)


numbers = st.integers(0, 60)


@given(st.lists(numbers, min_size=2, max_size=40, unique=True), st.data(), st.integers(0, 9))
def test_a_split_never_overlaps(items: list[int], data: st.DataObject, seed: int) -> None:
    prompts = [make_prompt(f"Question {i}") for i in items]
    train = data.draw(st.integers(1, len(items) - 1))
    evaluation = data.draw(st.integers(1, len(items) - train))
    search = data.draw(st.integers(0, len(items) - train - evaluation))
    shuffled = data.draw(st.permutations(prompts + prompts[: len(prompts) // 2]))
    to_train, to_evaluate, to_search = split_prompts(shuffled, train, evaluation, seed, search)
    assert [len(set(part)) for part in (to_train, to_evaluate, to_search)] == [train, evaluation, search]
    assert len({p.text for p in (*to_train, *to_evaluate, *to_search)}) == train + evaluation + search
    assert {*to_train, *to_evaluate, *to_search} <= set(prompts)
    # The search takes nothing from the others.
    assert split_prompts(prompts, train, evaluation, seed) == (to_train, to_evaluate, [])


def test_a_larger_evaluation_takes_nothing_from_training() -> None:
    prompts = load_prompts("builtin")
    trained_on, _, _ = split_prompts(prompts, 128, 32, seed=3)
    _, evaluated_on, _ = split_prompts(prompts, 64, 90, seed=3)
    assert not set(trained_on) & set(evaluated_on)
    assert split_prompts(prompts, 128, 32, seed=4)[0] != trained_on


@pytest.mark.parametrize(("train", "evaluation", "name"), [(0, 1, "train"), (1, 0, "evaluation"), (2, 2, "train")])
def test_a_split_that_does_not_fit(train: int, evaluation: int, name: str) -> None:
    prompts = [make_prompt(text) for text in ("a", "b", "c", "C")]
    with pytest.raises(FieldError, match=rf"^prompts\.{name}: "):
        split_prompts(prompts, train, evaluation)
    with pytest.raises(FieldError, match=r"^search\.prompts: got 2, allowed: up to 1,"):
        split_prompts(prompts, 1, 1, search=2)
