"""Text as it comes: whole characters, and nothing that a stop string takes back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from engines import Tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tiny_tokenizer

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.plan import Plan
from mage_ray.decoding.request import Generation, Request, Sampling, Token
from mage_ray.decoding.text import TextStream
from mage_ray.errors import FieldError

_tokenizer = make_tiny_tokenizer()
BROKEN = "\ufffd"


def decode(tokens: Sequence[int]) -> str:
    return str(_tokenizer.decode(tokens, skip_special_tokens=True))


def byte_ids(text: str | bytes) -> list[int]:
    """One token for each byte, whether or not the bytes are text."""
    if isinstance(text, str):
        return list(_tokenizer(text)["input_ids"])
    alphabet = _tokenizer.get_vocab()
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [alphabet[char] for char in map(bytes_to_unicode().__getitem__, text)]


class Pieces:
    """A tokenizer whose tokens are any byte strings, as merges make them: token i is ``pieces[i]``."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.pieces[t] for t in tokens).decode(errors="replace")


def fed(stream: TextStream, tokens: Sequence[int]) -> tuple[list[str], str]:
    """What each token added until a stop string appeared, and the rest."""
    shown: list[str] = []
    for token in tokens:
        shown.append(stream.add(token))
        if stream.stopped:
            break
    return shown, stream.end()


def test_a_character_of_many_tokens_comes_with_its_last() -> None:
    tokens = byte_ids("a€😀é")
    shown, rest = fed(TextStream(decode), tokens)
    assert shown == ["a", "", "", "€", "", "", "", "😀", "", "é"]
    assert rest == ""


def test_an_unfinished_character_at_the_end_is_shown_as_broken() -> None:
    shown, rest = fed(TextStream(decode), byte_ids("a€")[:-1])
    assert ("".join(shown), rest) == ("a", BROKEN)


def test_special_tokens_are_no_text() -> None:
    shown, rest = fed(TextStream(decode), [*byte_ids("ab"), 256, *byte_ids("c")])
    assert "".join(shown) + rest == "abc"


@pytest.mark.parametrize(
    ("pieces", "stop", "shown", "rest", "stopped"),
    [
        ([b"xaEND1y"], ["END"], ["xa"], "", True),  # inside one token
        ([b"ab", b"cE", b"N", b"Dx"], ["END"], ["ab", "c", "", ""], "", True),  # across tokens
        ([b"a", b"E", b"N", b"x"], ["END"], ["a", "", "", "ENx"], "", False),  # a beginning that comes to nothing
        ([b"a", b"E", b"N"], ["END"], ["a", "", ""], "EN", False),  # the same at the end
        ([b"a", b"b", b"END"], ["END"], ["a", "b", ""], "", True),  # all of the last token
        ([b"a", b"a", b"a", b"b"], ["aab"], ["", "", "a", ""], "", True),  # overlaps with itself
        ([b"x", b"ab", b"c"], ["abcd", "bc"], ["x", "", "a"], "", True),  # the candidates overlap
        ([b"xabcd"], ["bc", "abcd"], ["x"], "", True),  # the first in the text, not in the list
        ([b"\xe2\x82", b"\xac", b"!"], ["€"], ["", ""], "", True),  # a stop string of split bytes
        ([b"ab\xe2"], ["b"], [""], "a", True),  # in front of an unfinished character, at the very end
        ([b"ab\xe2", b"\x82\xac."], ["b"], ["", "a"], "", True),
        ([b"q", b"ab\xe2"], ["abc"], ["q", ""], "ab" + BROKEN, False),
    ],
)
def test_stop_strings(pieces: list[bytes], stop: list[str], shown: list[str], rest: str, stopped: bool) -> None:
    stream = TextStream(Pieces(pieces).decode, stop)
    assert fed(stream, range(len(pieces))) == (shown, rest)
    assert stream.stopped == stopped
    assert stream.end() == ""


def cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the stop strings in it."""
    return text[: min([text.find(s) for s in stop if s in text], default=len(text))]


def whole(text: str) -> str:
    """A text without the unfinished character, of up to three broken ones, at its end."""
    return text.rstrip(BROKEN)


words = st.text("ab€😀 \n", max_size=30)
stops = st.lists(st.text("ab€ ", min_size=1, max_size=4), max_size=3)


@settings(max_examples=400, deadline=None)
@given(words, stops, st.data())
def test_the_pieces_are_the_text_up_to_the_first_stop_string(text: str, stop: list[str], data: st.DataObject) -> None:
    """For any tokenisation of its bytes. The stop string counts that is first there when one is complete."""
    encoded = text.encode()
    encoded = encoded[: len(encoded) - data.draw(st.integers(0, 2))]  # perhaps within a character
    borders = data.draw(st.sets(st.integers(1, max(1, len(encoded) - 1)))) if encoded else set()
    edges = [0, *sorted(b for b in borders if b < len(encoded)), len(encoded)]
    pieces = [encoded[a:b] for a, b in itertools.pairwise(edges)]
    tokenizer = Pieces(pieces)
    stream = TextStream(tokenizer.decode, stop)
    shown, rest = fed(stream, range(len(pieces)))

    expected, stopped = encoded.decode(errors="replace"), False
    for n in range(1, len(pieces) + 1):
        known = b"".join(pieces[:n]).decode(errors="ignore")
        complete = b"".join(pieces[:n]).decode(errors="replace")
        # While a character is unfinished nothing new is looked at, unless no more comes.
        if (n == len(pieces) or not complete.endswith(BROKEN)) and any(s in known for s in stop):
            expected, stopped = cut(known, stop), True
            assert len(shown) == n
            break
    assert ("".join(shown) + rest, stream.stopped) == (expected, stopped)
    so_far = ""
    for piece in shown:  # never a part of what isn't text in the end
        so_far += piece
        assert expected.startswith(so_far)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 259), max_size=40))
def test_any_tokens_at_all_give_the_text_that_decoding_them_together_gives(tokens: list[int]) -> None:
    shown, rest = fed(TextStream(decode), tokens)
    assert "".join(shown) + rest == decode(tokens)


@settings(max_examples=200, deadline=None)
@given(words, stops)
def test_what_is_held_back_is_only_what_may_become_a_stop_string(text: str, stop: list[str]) -> None:
    shown, rest = fed(TextStream(decode, stop), byte_ids(text))
    if rest:
        assert any(s.startswith(rest) and s != rest for s in stop)
    assert len(shown) <= len(byte_ids(text))


class Byte:
    """A tiny model's engine whose answers are text; greedy answers are drawn once without stop strings."""

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self.engine, self.plan = engine, plan

    def tokens(self, sampling: Sampling) -> list[Token]:
        return list(self.engine.stream(Request(tuple(byte_ids("hello")), self.plan, sampling)))


@pytest.fixture(scope="module")
def byte(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Byte:
    engine = Tiny(tiny_model_folder, tmp_path_factory.mktemp("text")).engine(4, 120, stop=(), decode=decode)
    return Byte(engine, Plan.of([((0.0,) * 4, 1.0)]))


@pytest.mark.parametrize("seed", range(6))
def test_an_answer_is_the_text_of_its_tokens_as_it_streams(byte: Byte, seed: int) -> None:
    drawn = byte.tokens(Sampling(40, 1.0, seed=seed))
    assert Generation.of(drawn).text == decode([t.id for t in drawn])
    assert drawn[-1].finished == "length"


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 5])  # 4 has no three whole characters in a row
@pytest.mark.parametrize("length", [1, 2, 3])
def test_an_answer_ends_before_its_stop_string_and_shows_no_part_of_it(byte: Byte, seed: int, length: int) -> None:
    """Whatever its own text holds is made its stop string; the tokens are those drawn without one."""
    free = byte.tokens(Sampling(40, 1.0, seed=seed))
    text = Generation.of(free).text
    [stop, *_] = [s for i in range(5, 40) if len(s := text[i : i + length]) == length and BROKEN not in s]
    drawn = byte.tokens(Sampling(40, 1.0, seed=seed, stop=("never in it", stop)))
    assert [t.id for t in drawn] == [t.id for t in free[: len(drawn)]]
    assert drawn[-1].finished == "stop"
    assert "".join(t.text for t in drawn) == text[: text.find(stop)]
    assert stop in decode([t.id for t in drawn])
    assert stop not in decode([t.id for t in drawn[:-1]]) or decode([t.id for t in drawn[:-1]]).endswith(BROKEN)
    assert byte.engine.runner.live == 0


def test_what_was_held_back_comes_with_the_last_token(byte: Byte) -> None:
    free = byte.tokens(Sampling(40, 0.0))
    text = Generation.of(free).text
    drawn = byte.tokens(Sampling(40, 0.0, stop=(text[-1] + "and no more",)))
    assert Generation.of(drawn).text == text
    assert drawn[-1].finished == "length"


def test_a_stop_token_is_no_text_and_releases_what_was_held_back(
    tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory, byte: Byte
) -> None:
    free = [t.id for t in byte.tokens(Sampling(40, 0.0))]
    n = next(i for i in range(3, 40) if free[i] not in free[:i] and not decode(free[:i]).endswith(BROKEN))
    tiny = Tiny(tiny_model_folder, tmp_path_factory.mktemp("stop"))
    engine = tiny.engine(4, 120, stop=(free[n],), decode=decode)
    before = decode(free[:n])
    [got] = engine.generate(
        [Request(tuple(byte_ids("hello")), byte.plan, Sampling(40, 0.0, stop=(before[-1] + "\x00more",)))]
    )
    assert (got.ids, got.finished, got.text) == (tuple(free[: n + 1]), "stop", before)


@pytest.mark.parametrize("stop", ["abc", ("",), (1,), ("a", "")])
def test_unusable_stop_strings_are_refused(stop: object) -> None:
    with pytest.raises(FieldError, match="stop"):
        Sampling(stop=stop)  # type: ignore[arg-type]
