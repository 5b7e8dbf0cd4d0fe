"""The serving benchmark on a tiny model: its clock, its rival, its split steps, and that it refuses wrong texts."""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs" / "bench"))

import http_rival
import results
import serving
import text_arms
import timing
from load import Burst, ask, latency_result
from naive import Agreement, NaiveReference
from rivals import MergedModels
from served import METHOD, MIXED, OBJECTIVES, make_study, questions
from setting import BenchError, Prompts, load, random_experts
from split import Share, gang, plans, same_tokens, split_over_longer
from text_arms import EngineTexts, in_process, mixed_plans, over_http
from timing import Steps, joint_steps, time_steps
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.plan import Row
from mage_ray.folder import StudyFolder
from mage_ray.generator import Generator, load_experts

pytestmark = pytest.mark.slow

BENCH = Path(serving.__file__).parent
SMALL = ["--model", "tiny", "--threads", "1", "--prompt-tokens", "6", "--new-tokens", "8"]
NEW = 8


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    return make_study(tmp_path_factory.mktemp("served"), "tiny")


@pytest.fixture(scope="module")
def generator(study: StudyFolder) -> Generator:
    return Generator.open(study.path, rows=48, length=32)


@pytest.fixture(scope="module")
def judge(generator: Generator, study: StudyFolder) -> EngineTexts:
    return EngineTexts.of(generator, study)


@pytest.fixture(scope="module")
def rival(study: StudyFolder) -> Iterator[str]:
    with http_rival.serving(study.path, threads=1) as url:
        yield url


@pytest.fixture(scope="module")
def player() -> Iterator[str]:
    """A server that plays what it is asked to: events, each after so many seconds; or an error; or half a stream.

    It begins when as many as ``together`` ask.
    """
    waiting: dict[int, asyncio.Barrier] = {}

    async def play(request: web.Request) -> web.StreamResponse:
        script = await request.json()
        together = script.get("together", 1)
        await waiting.setdefault(together, asyncio.Barrier(together)).wait()
        if "status" in script:
            return web.json_response(script["body"], status=script["status"])
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for delay, event in script["events"]:
            await asyncio.sleep(delay)
            await response.write(f": a comment\ndata: {json.dumps(event)}\n\n".encode())
        if script.get("done", True):
            await response.write(b"data: [DONE]\n\n")
        return response

    loop = asyncio.new_event_loop()
    app = web.Application()
    app.router.add_post("/v1/completions", play)
    runner = web.AppRunner(app)

    async def start() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return int(runner.addresses[0][1])

    port = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield f"http://127.0.0.1:{port}"
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": None}]}


def usage(tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"completion_tokens": tokens}}


def test_streams_run_at_once_and_are_timed_piece_by_piece(player: str) -> None:
    events = [[0.0, piece("")], [0.3, piece("o")], [0.1, piece("")], [0.1, piece("n")], [0.4, piece("e")]]
    script = {"events": [*events, [0.0, usage(7)]], "together": 70}
    burst = Burst.of(player, [script] * 70)
    # The server waits for all; one after another, they would never begin.
    assert len(burst.answers) == 70 and burst.seconds < 70 * 0.9
    for answer in burst.answers:
        assert answer.text == "one" and answer.tokens == 7
        assert 0.3 <= answer.first <= burst.seconds
        assert len(answer.gaps) == 2 and answer.gaps[0] >= 0.15 and answer.gaps[1] >= 0.3
        assert answer.first + sum(answer.gaps) <= burst.seconds


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ({"status": 400, "body": {"error": {"message": "seed: got x, allowed: a number"}}}, "400 seed: got x, allowed"),
        ({"status": 503, "body": ["starting"]}, r'503 \["starting"\]'),
        ({"events": [[0, piece("a")], [0, {"error": {"message": "gone"}}]]}, "gone"),
        ({"events": [[0, piece("a")]], "done": False}, "broke off"),
        ({"events": [[0, piece("")], [0, usage(3)]]}, "without text"),
    ],
)
def test_an_answer_that_is_none_ends_the_benchmark(player: str, script: dict[str, Any], message: str) -> None:
    whole = {"events": [[0, piece("a")], [0, usage(1)]]}
    assert ask(player, [whole])[0].text == "a"
    with pytest.raises(BenchError, match=message):
        ask(player, [whole, script])


def test_percentiles_are_over_all_streams_of_all_bursts(player: str) -> None:
    def burst(gap: float, seconds: float) -> Burst:
        script = {"events": [[0, piece("a")], [gap, piece("b")], [0, usage(2)]]}
        return Burst(ask(player, [script] * 4), seconds)

    result = latency_result([burst(0.0, 1.0), burst(0.3, 4.0), burst(0.0, 2.0)])
    assert result["streams"] == 4 and result["rounds"] == 3
    assert result["tokens_per_s_median"] == 4.0  # of 8, 2 and 4
    assert result["first_token"]["samples"] == result["between_tokens"]["samples"] == 12
    # A third of the gaps are long.
    assert result["between_tokens"]["seconds_p50"] < 0.25 <= result["between_tokens"]["seconds_p95"]


def test_the_study_serves_sixteen_trade_offs_and_never_stops(generator: Generator) -> None:
    assert generator.chat.stop == () and generator.study.objective_names == list(OBJECTIVES)
    asked = mixed_plans(generator)
    rows = [row for plan in asked for row in plan.rows]
    assert len(asked) == 16 and {len(plan.rows) for plan in asked} == {3}
    assert len(set(rows)) == 2 * 16 + 1 and Row((0.0,) * 4) in rows
    prompts = Prompts.random(160).take(16, 6)
    made = in_process(generator, asked, 24).run(prompts)
    texts = [bytes(answer).decode() for answer in made]
    assert {len(text) for text in texts} == {24}  # one character a token, and none is an end
    elsewhere = [asked[-1]] * 8 + [asked[0]] * 8
    assert made != in_process(generator, elsewhere, 24).run(prompts)


def test_questions_are_what_the_server_is_asked() -> None:
    [question] = questions([(3, 4)], [(0.25, 0.75)], 5)
    assert question["prompt"] == [3, 4] and question["max_tokens"] == 5 and question["temperature"] == 0.0
    assert question["preference"] == {"positive": 0.25, "short": 0.75} and question["method"] == METHOD
    assert question["stream"] and question["stream_options"] == {"include_usage": True}
    assert len(set(MIXED)) == 16 and all(0 < w < 1 and sum(p) == 1 for p in MIXED for w in p)


def test_the_rival_s_texts_are_the_engine_s_at_every_preference(
    rival: str, generator: Generator, judge: EngineTexts
) -> None:
    asked, prompts = mixed_plans(generator), Prompts.random(160).take(16, 6)
    texts = over_http("rival", rival, asked, NEW).run(prompts)
    assert texts == in_process(generator, asked, NEW).run(prompts)
    judged = judge.check("rival", asked, prompts, texts, NEW)
    assert judged == Agreement(16 * NEW, 0, 0.0)
    # More than its server has threads.
    many = [MIXED[i % 16] for i in range(64)]
    answers = ask(rival, questions(Prompts.random(160).take(64, 6), many, 4))
    assert [(answer.tokens, len(answer.text)) for answer in answers] == [(4, 4)] * 64


def test_a_rival_that_fails_is_told_and_goes_on(rival: str, generator: Generator) -> None:
    arm, prompts = over_http("rival", rival, mixed_plans(generator), NEW), Prompts.random(160).take(16, 6)
    with pytest.raises(BenchError, match="without text"):
        arm.run([(160,), *prompts[1:]])  # no such token
    assert len(arm.run(prompts)) == 16


def test_an_answer_of_another_length_is_refused(player: str, generator: Generator, monkeypatch: Any) -> None:
    script = {"events": [[0, piece("a")], [0, usage(NEW - 1)]]}
    monkeypatch.setattr(text_arms, "questions", lambda *arguments: [script] * 16)
    with pytest.raises(BenchError, match=rf"http: made \[{NEW - 1}, .*, {NEW} each were asked for"):
        over_http("http", player, mixed_plans(generator), NEW).run([(1,)] * 16)


def test_a_rival_that_does_not_start_is_one_clear_error_and_one_that_runs_ends_with_its_starter(
    study: StudyFolder, tmp_path: Path
) -> None:
    with pytest.raises(BenchError, match=r"the rival ended with 1; .*study\.yaml"), http_rival.serving(tmp_path, 1):
        pass
    command = [sys.executable, str(BENCH / "http_rival.py"), str(study.path), "0", "1"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0
    assert process.stderr is not None
    process.stderr.close()


def test_any_other_text_is_refused(generator: Generator, judge: EngineTexts) -> None:
    asked, prompts = mixed_plans(generator), Prompts.random(160).take(16, 6)
    right = [bytes(answer).decode() for answer in in_process(generator, asked, NEW).run(prompts)]

    def judged(text: str) -> Agreement:
        made = [list(text.encode()), *[list(other.encode()) for other in right[1:]]]
        return judge.check("http", asked, prompts, made, NEW)

    assert judged(right[0]).others == 0
    for t in (0, 4, NEW - 1):
        another = chr(0x4E00 + (ord(right[0][t]) - 0x4E00 + 1) % 160)
        with pytest.raises(BenchError, match="http: the text of request 0 is not the engine's"):
            judged(right[0][:t] + another + right[0][t + 1 :])
    for text in (right[0][:-1], right[0] + right[0][-1], "", right[1]):
        with pytest.raises(BenchError, match="http: the text of request 0"):
            judged(text)


@pytest.mark.parametrize(("best", "other"), [("甲", "己"), ("x", "xy"), ("xy", "x")])
def test_a_text_that_parts_at_a_tie_is_counted_and_let_through(study: StudyFolder, best: str, other: str) -> None:
    """Also where one token's text begins the other's, so that the texts part later than the tokens do."""
    generator = Generator.open(study.path, rows=3, length=32)
    [plan], [prompt] = mixed_plans(generator)[:1], Prompts.random(160).take(1, 6)
    ids = text_arms._answers(generator, [plan], [prompt], NEW)[0].ids
    t, twin = 3, next(i for i in range(160) if i not in ids)
    assert ids.index(ids[t]) == t
    characters = {i: chr(0x4E00 + i) for i in range(160)} | {ids[t]: best, twin: other}
    tokenizer = Tokenizer(
        tokenizer_models.WordLevel({text: i for i, text in characters.items()}, unk_token=characters[0])
    )
    tokenizer.decoder = decoders.Fuse()
    generator.chat.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    experts = [expert for members in load_experts(study, study.study).values() for expert in members]
    said = "".join(characters[i] for i in [*ids[:t], twin, (ids[t + 1] + 1) % 160, 5])

    def judged(factor: float) -> Agreement:
        models = MergedModels(load(study.study.model), experts)
        with torch.no_grad():
            head = models.reference.get_output_embeddings().weight
            head[twin] = head[ids[t]] * factor
        return EngineTexts(generator, models).check("http", [plan], [prompt], [list(said.encode())], NEW)

    tie = judged(1 - 1e-7)
    assert tie.others == 1 and tie.tokens == NEW and 0 <= tie.shortfall <= 1e-3
    with pytest.raises(BenchError, match="falls short of the best token by"):
        judged(-1.0)


def test_steps_are_those_that_all_requests_take(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[float] = []
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: ticks.pop(0)))
    source = Prompts.random(160)

    def steps(length: int, chunk: int) -> tuple[float, int]:
        """Their seconds, and how many there were, where one prompt is longer and computed in chunks."""
        ticks[:] = [100.0, 107.0, 108.0, 115.0, 900.0, 901.0]
        engine = Engine(Share("tiny", rows=24, length=48).runner(), stop=[], chunk=chunk)
        prompts = [*source.take(2, 6), *source.take(1, length)]
        seconds, made = joint_steps(engine, plans()["base"], prompts, 5)
        assert [len(tokens) for tokens in made] == [5, 5, 5]
        return seconds, 6 - len(ticks)

    # In its last step a request ends before the others have their tokens: that one isn't counted.
    assert steps(6, 128) == (5.0, 4)
    seconds, count = steps(14, 4)
    assert 2 <= count < 4 and seconds == {2: 7.0, 3: 4.0}[count]
    with pytest.raises(BenchError, match="no two steps"):
        steps(40, 2)


def test_the_split_plan_is_the_fused_one_and_the_others_are_its_halves() -> None:
    base, guide, away = plans()["base"], plans()["guide"], plans()["split"]
    assert [row.home for row in away.rows] == [0, 1, 1]
    rows = [Row(row.coefficients) for row in away.rows]
    assert list(base.rows) == rows[:1] and list(guide.rows) == rows[1:] and rows[2] == Row((0.0, 0.0, 0.0))
    steps = {"base": Steps([3.0, 2.0, 9.0]), "guide": Steps([4.0, 1.0, 4.0]), "split": Steps([4.4, 3.0, 90.0])}
    assert split_over_longer(steps, statistics.median) == pytest.approx(1.1)
    assert split_over_longer(steps, min) == pytest.approx(1.5)


def test_split_steps_are_measured_between_processes_and_a_wrong_guide_is_refused() -> None:
    reference = load("tiny")
    naive = NaiveReference(MergedModels(reference, random_experts(reference, 3, relative=0.5)))
    prompts = Prompts.random(160)
    threads = torch.get_num_threads()
    right, wrong = (Share("tiny", rows=24, length=32, relative=relative) for relative in (0.5, 0.9))
    with gang(right, right) as runners:
        assert torch.get_num_threads() == 1
        engine = Engine(runners, stop=[])
        for batch in (1, 8):
            assert same_tokens(engine, naive, prompts.take(batch, 6), NEW)
            steps = time_steps(engine, plans(), batch, 2, prompts, 6, NEW, naive)
            assert set(steps) == {"base", "guide", "split"}
            for own in steps.values():
                assert len(own.seconds) == 2 and min(own.seconds) > 0 and own.agreement.tokens == 3 * batch * NEW
    assert torch.get_num_threads() == threads
    with gang(right, wrong) as runners, pytest.raises(BenchError, match="split: token"):
        same_tokens(Engine(runners, stop=[]), naive, prompts.take(8, 6), NEW)
    # Again, and the other way round: nothing is left of the first group.
    with gang(wrong, right) as runners, pytest.raises(BenchError, match="fused: token"):
        same_tokens(Engine(runners, stop=[]), naive, prompts.take(8, 6), NEW)


def test_http_is_timed_beside_the_engine_and_the_rival(
    rival: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    only = ["--only", "http", "rival"]
    assert serving.main(["--out", str(out), "--url", rival, "--rounds", "2", *only, *SMALL]) == 0
    assert "http_vs_rival" in capsys.readouterr().out
    written = json.loads(out.read_text())
    arms = {f"{arm['name']}_b{arm['batch']}": arm for arm in written["arms"]}
    assert set(arms) == set(written["checks"]["arms"]) == {"http_b16", "engine_b16", "rival_b16"}
    for key, arm in arms.items():
        assert len(arm["seconds"]) == 2 and arm["tokens_per_s_best"] == pytest.approx(16 * 8 / min(arm["seconds"]))
        assert written["checks"]["arms"][key]["tokens"] == 3 * 16 * 8
    speed = {key: arm["tokens_per_s_median"] for key, arm in arms.items()}
    ratios = written["ratios"]
    assert set(ratios) == set(written["ratios_of_minima"]) == set(written["bars"]) == set(serving.RATIOS)
    assert ratios["http_vs_engine"] == pytest.approx(speed["http_b16"] / speed["engine_b16"])
    assert ratios["http_vs_rival"] == pytest.approx(speed["http_b16"] / speed["rival_b16"])
    assert written["setting"]["server"] == rival and written["machine"]["threads"] == 1
    assert written["split"] is None and written["latency"] == []


def test_a_whole_run_has_every_ratio_bar_and_percentile(rival: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "serving.py"), "--out", str(tmp_path / "r.json"), "--url", rival]
    done = subprocess.run([*command, "--rounds", "1", *SMALL], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "r.json").read_text())
    bars = {**serving.AT_LEAST, **serving.AT_MOST}
    assert set(written["ratios"]) == set(written["ratios_of_minima"]) == set(written["bars"]) == set(bars)
    for batch in (1, 8):
        own = written["split"][f"b{batch}"]
        median = {kind: own[kind]["seconds_median"] for kind in ("base", "guide", "split")}
        longer = max(median["base"], median["guide"])
        assert written["ratios"][f"split_step_b{batch}"] == pytest.approx(median["split"] / longer)
        assert own["tokens_as_fused"] and own["checks"]["split"]["tokens"] == 2 * batch * 8
    assert [entry["streams"] for entry in written["latency"]] == [1, 4, 16, 64]
    for entry in written["latency"]:
        assert entry["first_token"]["samples"] == entry["streams"]
        for kind in ("first_token", "between_tokens"):
            assert 0 < entry[kind]["seconds_p50"] <= entry[kind]["seconds_p95"]


def test_without_a_url_the_server_is_started_its_texts_are_the_engine_s_and_it_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "serving.py"), "--out", str(tmp_path / "r.json"), "--only", "http"]
    done = subprocess.run([*command, "--rounds", "1", *SMALL], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "r.json").read_text())
    assert set(written["ratios"]) == {"http_vs_engine"} and written["setting"]["server"] == "started"
    assert written["checks"]["arms"]["http_b16"]["tokens"] == 2 * 16 * 8
    [url] = re.findall(r"http://127\.0\.0\.1:\d+", done.stdout + done.stderr)[:1]
    with pytest.raises(BenchError, match="Connect"):
        ask(url, questions([(1, 2)], MIXED[:1], 2))


def test_a_server_that_answers_for_other_preferences_ends_the_run_and_writes_nothing(
    rival: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text_arms, "MIXED", MIXED[::-1])
    monkeypatch.setattr(text_arms, "mixed_plans", lambda generator: [generator.plan(p, METHOD) for p in MIXED])
    out = tmp_path / "r.json"
    arguments = ["--out", str(out), "--url", rival, "--rounds", "1", "--only", "http", *SMALL[:-1], "20"]
    assert serving.main(arguments) == 1
    assert "error: http_b16: the text of request" in capsys.readouterr().err and not out.exists()


def test_the_study_can_be_saved_for_a_server_of_one_s_own(tmp_path: Path, study: StudyFolder) -> None:
    place = tmp_path / "study"
    assert serving.main(["--out", str(tmp_path / "r.json"), "--save-study", str(place), *SMALL]) == 0
    assert not (tmp_path / "r.json").exists()
    files = sorted(path.relative_to(place) for path in place.rglob("*.safetensors"))
    assert len(files) == 5
    for file in files:
        assert (place / file).read_bytes() == (study.path / file).read_bytes()


@pytest.mark.parametrize(
    "wrong", [["--only", "nobody"], ["--rounds", "0"], ["--new-tokens", "3"], ["--threads", "0"], ["--streams", "2"]]
)
def test_wrong_options_end_at_once(wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        serving.parse(["--out", str(tmp_path / "r.json"), *wrong])
    assert ended.value.code == 2 and "error:" in capsys.readouterr().err


def test_bars_look_the_right_way() -> None:
    met = {"http_vs_engine": 0.9, "http_vs_rival": 3.0, "split_step_b1": 1.15, "split_step_b8": 0.9}
    missed = {"http_vs_engine": 0.89, "http_vs_rival": 2.9, "split_step_b1": 1.16, "split_step_b8": 2.0}
    of = (serving.AT_LEAST, serving.AT_MOST)
    assert [bar["pass"] for bar in results.bars(met, *of).values()] == [True] * 4
    assert [bar["pass"] for bar in results.bars(missed, *of).values()] == [False] * 4
    # The decoding benchmark's own are not among them.
    assert results.bars({"guided_memory": 1.0}, *of) == {} != results.bars({"guided_memory": 1.0})
