"""The HTTP endpoint, by the official client and by hand, against the engine in this process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
from bad_requests import BAD_REQUESTS, GOOD, KEY, BadRequest
from servers import PROMPT, ROOT, Serving, serving, until

from mage_ray.decoding.request import Sampling
from mage_ray.folder import StudyFolder
from mage_ray.generator import Generator

pytestmark = pytest.mark.slow

METHODS = [
    "reference",
    "rewarded-soup",
    "bone-soup",
    "extrapolated-soup",
    "mod",
    "proxy-tuning",
    "mage-i-m",
    "mage-i-e",
]
HALF = {"positive": 0.5, "short": 0.5}


@pytest.fixture(scope="module")
def generator(study: StudyFolder) -> Generator:
    return Generator.open(study.path, rows=48, length=400)


def long_stream(client: openai.OpenAI, **fields: object) -> openai.Stream[openai.types.chat.ChatCompletionChunk]:
    asked = {"max_tokens": 300, "temperature": 1.0, "seed": 5} | fields
    extra = {"method": asked.pop("method", "mage-i-m"), "preference": asked.pop("preference", HALF)}
    return client.chat.completions.create(model="tiny", messages=PROMPT, stream=True, extra_body=extra, **asked)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("method", METHODS)
def test_texts_are_the_engines(server: Serving, generator: Generator, method: str) -> None:
    for weights in ([1.0, 0.0], [0.3, 0.7]):
        preference = dict(zip(("positive", "short"), weights, strict=True))
        got = server.client().chat.completions.create(
            model="tiny",
            messages=PROMPT,  # type: ignore[arg-type]
            max_tokens=20,
            temperature=0.8,
            seed=11,
            logprobs=True,
            extra_body={"preference": preference, "method": method, "strength": 1.4, "candidates": 20},
        )
        sampling = Sampling(20, 0.8, seed=11)
        [want] = generator.generate(
            [PROMPT[0]["content"]], preference, method, sampling=sampling, strength=1.4, candidates=20
        )
        choice = got.choices[0]
        assert choice.message.content == want.text and choice.finish_reason == want.finished
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert [t.logprob for t in choice.logprobs.content] == pytest.approx(want.logprobs, abs=1e-4)
        assert got.usage is not None and got.usage.completion_tokens == len(want.ids)
        mage = got.model_extra["mage"]  # type: ignore[index]
        plan = generator.plan(preference, method, strength=1.4, candidates=20)
        assert [row["weight"] for row in mage["rows"]] == list(plan.weights)
        assert mage["preference"] == preference and mage["strength"] == 1.4 and mage["candidates"] == 20
        assert mage["guided_share"] == (1.0 if plan.values else 0.0)


def test_a_stream_adds_up_to_the_whole(server: Serving) -> None:
    client = server.client()
    fields = {"model": "tiny", "messages": PROMPT, "max_tokens": 30, "temperature": 1.0, "seed": 3, "n": 3}
    whole = client.chat.completions.create(**fields, logprobs=True)  # type: ignore[call-overload]
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**fields, logprobs=True, stream=True, stream_options=options))  # type: ignore[call-overload]
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    for choice in whole.choices:
        own = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert own[0].delta.role == "assistant" and own[-1].finish_reason == choice.finish_reason
        logprobs = [t.logprob for c in own if c.logprobs for t in c.logprobs.content]
        assert logprobs == pytest.approx([t.logprob for t in choice.logprobs.content], abs=1e-4)
    assert len({choice.message.content for choice in whole.choices}) == 3


def test_completions_take_text_and_tokens(server: Serving, generator: Generator) -> None:
    client = server.client()
    ids = list(generator.chat.encode_text("once upon"))
    text = client.completions.create(model="tiny", prompt="once upon", max_tokens=9, temperature=0, logprobs=1)
    same = client.completions.create(model="tiny", prompt=ids, max_tokens=9, temperature=0)
    both = client.completions.create(model="tiny", prompt=["once upon", "a time"], n=2, max_tokens=9, temperature=0)
    assert text.choices[0].text == same.choices[0].text == both.choices[0].text == both.choices[1].text
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert text.choices[0].logprobs is not None and len(text.choices[0].logprobs.tokens or []) == 9
    assert both.usage is not None and both.usage.prompt_tokens == len(ids) + len(generator.chat.encode_text("a time"))


def test_a_stop_string_ends_an_answer_before_it(server: Serving) -> None:
    client = server.client()
    fields = {"model": "tiny", "messages": PROMPT, "max_tokens": 40, "temperature": 1.0, "seed": 2}
    text = client.chat.completions.create(**fields).choices[0].message.content  # type: ignore[call-overload]
    stop = next(c for c in text[10:] if c.isascii() and c.isprintable() and c not in text[:10])
    got = client.chat.completions.create(**fields, stop=[stop]).choices[0]  # type: ignore[call-overload]
    assert got.message.content == text[: text.index(stop)] and got.finish_reason == "stop"


def test_a_schedule_changes_the_preference_where_it_says(server: Serving) -> None:
    client = server.client()
    fields = {"model": "tiny", "messages": PROMPT, "max_tokens": 20, "temperature": 0}
    schedule = [{"at": 6, "preference": {"short": 1}}, {"at": 12, "preference": HALF}]
    plain, turned = (
        client.chat.completions.create(**fields, extra_body={"preference": HALF, **extra})  # type: ignore[call-overload]
        for extra in ({}, {"preference_schedule": schedule})
    )
    changes = turned.model_extra["mage"]["changes"]
    assert changes == [{"at": 6, "preference": {"positive": 0, "short": 1}}, {"at": 12, "preference": HALF}]
    assert turned.choices[0].message.content != plain.choices[0].message.content


def test_a_running_generation_changes_by_patch(server: Serving) -> None:
    client = server.client()
    stream = long_stream(client)
    first = next(stream)
    id = first.model_extra["mage"]["generations"][0]  # type: ignore[index]
    asked = {"preference": {"short": 1.0}, "method": "bone-soup"}
    patched = httpx.patch(f"{server.url}/v1/generations/{id}", json=asked, timeout=30)
    assert patched.status_code == 200
    assert patched.json()["mage"]["preference"] == {"positive": 0.0, "short": 1.0}
    rest = list(stream)
    [changed] = [c.model_extra["mage"] for c in rest if c.model_extra and c.model_extra["mage"]["changes"]][-1:]  # type: ignore[index]
    assert changed["method"] == "bone-soup" and len(changed["changes"]) == 1
    assert 0 < changed["changes"][0]["at"] < 300 and 0 < changed["guided_share"] < 1
    again = httpx.patch(f"{server.url}/v1/generations/{id}", json=asked, timeout=30)
    assert again.status_code == 404 and again.json()["error"]["code"] == "generation_not_found"


def test_a_client_that_leaves_frees_its_slots(server: Serving) -> None:
    clients, longest = 8, 900

    def cancelled() -> float:
        return (
            server.metric('requests_total{end="cancelled"}') if 'end="cancelled"' in server.get("/metrics").text else 0
        )

    before, tokens = cancelled(), server.metric("tokens_total")
    streams = [long_stream(server.client(), max_tokens=longest, seed=seed) for seed in range(clients)]
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.close()
    until(lambda: server.metric("rows") == 0, 30, "no rows")
    assert cancelled() == before + clients
    # None of them was written to its end, with nobody to read it.
    assert server.metric("tokens_total") - tokens < clients * longest
    assert server.post(max_tokens=1).status_code == 200


def test_a_client_that_leaves_an_answer_that_is_not_streamed(server: Serving) -> None:
    before = server.metric('requests_total{end="cancelled"}') if "cancelled" in server.get("/metrics").text else 0
    body = {"model": "tiny", "messages": PROMPT, "max_tokens": 300, "n": 8, "temperature": 1}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.3)
    until(lambda: 'end="cancelled"' in server.get("/metrics").text, 30)
    until(lambda: server.metric('requests_total{end="cancelled"}') > before, 30)


def test_what_can_be_asked_for_is_told(server: Serving) -> None:
    told = server.get("/v1/objectives").json()
    assert [o["name"] for o in told["objectives"]] == ["positive", "short"]
    assert [m["name"] for m in told["methods"]] == METHODS
    assert told["limits"] | {"length": 1024, "max_tokens": 900} == told["limits"]
    assert [m.id for m in server.client().models.list()] == ["tiny"]
    assert server.client().models.retrieve("tiny").id == "tiny"
    assert server.get("/v1/front").json()["methods"] == {}
    assert server.get("/healthz").json() == {"status": "ok"}


def test_the_readmes_client_runs(server: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    [example] = [
        b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL) if "openai" in b
    ]
    exec(example.replace("http://127.0.0.1:8000", server.url).replace('model="demo"', 'model="tiny"'), {})
    assert len(capsys.readouterr().out) > 20


def test_the_curl_line_that_is_printed_works(server: Serving) -> None:
    [line] = [line for line in server.log.read_text().splitlines() if line.startswith("curl ")]
    done = subprocess.run(["sh", "-c", f"{line} --silent --max-time 60"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_the_page_is_served_with_its_parts_alone(server: Serving) -> None:
    page = server.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("style.css", *(part for part in _parts(page.text) if part.endswith(".js"))):
        assert server.get(f"/playground/{name}").status_code == 200, name
    for name in ("..%2fapp.py", "index.html", "%2e%2e%2fapp.py", "app.py", "style.css%00"):
        assert server.get(f"/playground/{name}").status_code == 404, name


def _parts(html: str) -> list[str]:
    return [piece.split('"')[0] for piece in html.split('"/playground/')[1:]]


@pytest.mark.parametrize("bad", [b for b in BAD_REQUESTS if not b.keyed], ids=str)
def test_bad_requests_are_told_what_is_wrong(server: Serving, bad: BadRequest) -> None:
    got = httpx.request(bad.method, server.url + bad.path, content=bad.body, headers=bad.headers, timeout=60)
    assert got.status_code == bad.status, got.text
    error = got.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and "\n" not in error["message"]
    assert bad.met(error), error


def test_the_server_goes_on_after_bad_requests(server: Serving, generator: Generator) -> None:
    [want] = generator.generate([PROMPT[0]["content"]], HALF, sampling=Sampling(8, 0.0))
    assert server.post().json()["choices"][0]["message"]["content"] == want.text


def test_no_prompt_is_in_a_log(server: Serving, study: StudyFolder) -> None:
    secret = "xyzzy-plugh-7141"
    assert server.post(messages=[{"role": "user", "content": secret}]).status_code == 200
    assert server.post(messages=[{"role": "user", "content": secret}], n=99).status_code == 400
    texts = server.logs()
    assert any('"event": "answered"' in text for text in texts)
    assert not any(secret in text for text in texts)
    lines = [json.loads(line) for t in texts for line in t.splitlines() if line.startswith('{"time"')]
    answered = [line for line in lines if line["event"] == "answered"]
    assert {"request", "generation", "status", "tokens", "seconds"} <= answered[-1].keys()


def test_two_hundred_requests_at_once_are_all_answered(server: Serving) -> None:
    """48 rows hold 16 requests of three; 16 more may wait."""
    statuses: list[int] = []
    texts: set[str] = set()

    def one() -> None:
        got = server.post(max_tokens=200, temperature=1.0, seed=1)
        statuses.append(got.status_code)
        if got.status_code == 200:
            texts.add(got.json()["choices"][0]["message"]["content"])
        else:
            assert got.json()["error"]["type"] in ("rate_limit_error", "server_error") and got.headers["retry-after"]

    threads = [threading.Thread(target=one) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert len(statuses) == 200 and set(statuses) <= {200, 429, 503}
    assert statuses.count(200) >= 16 and statuses.count(429) > 0
    assert len(texts) == 1
    until(lambda: server.metric("running") == 0, 30)


def test_the_schema_holds_under_fuzzing(server: Serving, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"{server.url}/openapi.json", "--url", server.url,
        "--max-examples", "25", "--seed", "7", "--phases", "examples,coverage,fuzzing", "--checks",
        "not_a_server_error,content_type_conformance,response_schema_conformance", "--request-timeout", "60",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert server.post().status_code == 200


def test_keys_are_asked_for_and_compared(study: StudyFolder, tmp_path: Path) -> None:
    options = ("length=200", "streams_per_key=2")
    with serving(study.path, tmp_path, *options, MAGE_RAY_API_KEYS=f"another,{KEY}") as keyed:
        for bad in BAD_REQUESTS:
            if bad.keyed:
                got = httpx.request(bad.method, keyed.url + bad.path, content=bad.body, headers=bad.headers, timeout=60)
                assert got.status_code == bad.status and bad.met(got.json()["error"]), (bad, got.text)
        assert [model.id for model in keyed.client(KEY).models.list()] == ["tiny"]
        assert (
            keyed.get("/").status_code == keyed.get("/healthz").status_code == keyed.get("/metrics").status_code == 200
        )
        body = {"model": "tiny", "messages": PROMPT, "max_tokens": 2}
        more = httpx.post(f"{keyed.url}/v1/chat/completions", json=body | {"n": 3}, headers=GOOD, timeout=30)
        assert (
            more.status_code == 429 and more.headers["retry-after"] and "at most 2" in more.json()["error"]["message"]
        )
        fits = httpx.post(f"{keyed.url}/v1/chat/completions", json=body | {"n": 2}, headers=GOOD, timeout=30)
        assert fits.status_code == 200
        with pytest.raises(openai.AuthenticationError, match="authorization"):
            keyed.client("wrong").models.list()
    assert keyed.process.returncode == 0, "ended by SIGTERM, and not cleanly"
