"""The playground in a real browser, on the real server: what a person does with it, from opening to sharing a link."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import browsing, watched
from playwright.sync_api import BrowserContext, Locator, Page, Request, Route, expect

pytestmark = pytest.mark.slow

FRONT = {
    "object": "front",
    "objectives": ["positive", "short"],
    "methods": {
        "bone-soup": [
            {"preference": {"positive": 0.0, "short": 1.0}, "rewards": {"positive": -0.5, "short": 2.0}},
            {"preference": {"positive": 1.0, "short": 0.0}, "rewards": {"positive": 1.25, "short": 0.1}},
        ]
    },
    "note": "Means over 24 prompts.",
}


TIMES = """
performance.getEntriesByType("resource").filter(({ name }) => name.includes("/v1/generations/"))
  .map(({ startTime, responseStart }) => [startTime, responseStart])
"""
"""When each change left and when its answer came."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    with browsing(tmp_path_factory.mktemp("chromium") / "profile") as context:
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        yield context


@pytest.fixture
def page(browser: BrowserContext) -> Iterator[Page]:
    """A page in which nothing may go wrong, but that a change may come when its generation has just ended (404)."""
    page, faults = watched(browser)
    yield page
    page.close()
    assert [fault for fault in faults if "/v1/generations/" not in fault] == []


@pytest.fixture
def refused_page(browser: BrowserContext) -> Iterator[Page]:
    """A page in which requests may be refused, and nothing else may go wrong."""
    page, faults = watched(browser)
    yield page
    page.close()
    assert [fault for fault in faults if "Failed to load resource" not in fault] == []


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return Path(os.environ.get("MAGE_RAY_ARTEFACTS") or tmp_path)


def call(server: Any, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of an answer of the server."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"content-type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ask(server: Any, preference: dict[str, float], seed: int, tokens: int) -> dict[str, Any]:
    """The choice that the server gives for the page's request, not streamed."""
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": "tiny", "messages": messages, "preference": preference, "seed": seed, "max_tokens": tokens}
    status, answer = call(server, "POST", "/v1/chat/completions", body)
    assert status == 200, answer
    return answer["choices"][0]


@pytest.fixture(scope="module")
def long(server: Any) -> tuple[int, int]:
    """A seed and a number of tokens with which the first panel writes for seconds."""
    limits = call(server, "GET", "/v1/objectives")[1]["limits"]
    tokens = min(900, limits["max_tokens"], limits["length"] - 100)
    for seed in range(20):
        if ask(server, {"positive": 0.8, "short": 0.2}, seed, tokens)["finish_reason"] == "length":
            return seed, tokens
    raise AssertionError("this study's answers all end early")


def opened(page: Page, server: Any, fragment: str = "") -> Page:
    page.goto(f"{server.url}/{fragment}")
    expect(page.locator("#main")).to_be_visible()
    return page


def panel(page: Page, letter: str) -> Locator:
    return page.get_by_role("region", name=f"Panel {letter}", exact=True)


def figure(page: Page, letter: str, name: str) -> Locator:
    return panel(page, letter).locator(f"[data-figure={name}]")


def text(page: Page, letter: str) -> str:
    return panel(page, letter).locator(".text").text_content() or ""


def start(page: Page, seed: int, tokens: int, prompt: str = "Hello") -> None:
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.fill("#tokens", str(tokens))
    page.keyboard.press("Control+Enter")


def ended(page: Page, letters: str) -> None:
    for letter in letters:
        state = figure(page, letter, "state")
        expect(state).to_have_text(re.compile("^(stop|length|failed)$"), timeout=60_000)
        assert state.inner_text() != "failed", panel(page, letter).locator(".error").text_content()


def writing(page: Page, letter: str) -> None:
    """Wait for a panel's first text; looks at every frame, as a tiny model has soon written all of it."""
    page.wait_for_function(
        "letter => document.querySelector(`[aria-label='Text of panel ${letter}']`).textContent.trim() !== ''",
        arg=letter,
    )


def settings(page: Page) -> dict[str, Any]:
    """All that a person can set, as the page shows it."""
    shared = {
        name: page.locator(f"#{name}").input_value() for name in ("prompt", "system", "temperature", "tokens", "seed")
    }
    panels = []
    for one in page.locator(".panel").all():
        fields = [field.input_value() for field in one.locator("select, input").all()]
        panels.append([*fields, one.locator(".line").text_content()])
    return shared | {"panels": panels}


def test_panels_write_side_by_side_what_the_server_answers(server: Any, page: Page, pictures: Path) -> None:
    answer = page.goto(server.url)
    assert answer is not None
    policy = answer.header_value("content-security-policy") or ""
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    objectives = call(server, "GET", "/v1/objectives")[1]
    methods = panel(page, "A").get_by_label("Method").locator("option")
    expect(methods).to_have_text([method["name"] for method in objectives["methods"]])
    expect(page.locator("#front")).to_contain_text(call(server, "GET", "/v1/front")[1]["note"])
    panel(page, "A").get_by_role("slider").press("Home")
    panel(page, "B").get_by_role("slider").press("End")
    expect(panel(page, "A").locator(".line")).to_have_text("positive 1.00short 0.00")
    expect(panel(page, "B").locator(".line")).to_have_text("positive 0.00short 1.00")
    start(page, seed=5, tokens=48)
    ended(page, "AB")
    expect(page.get_by_role("status")).to_have_text("Done.")
    corners = {"A": {"positive": 1.0, "short": 0.0}, "B": {"positive": 0.0, "short": 1.0}}
    for letter, preference in corners.items():
        choice = ask(server, preference, seed=5, tokens=48)
        assert text(page, letter) == choice["message"]["content"] != ""
        expect(figure(page, letter, "state")).to_have_text(choice["finish_reason"])
        assert 1 <= int(figure(page, letter, "tokens").inner_text()) <= 48
        assert float(figure(page, letter, "rate").inner_text()) > 0
        assert re.fullmatch(r"\d+\.\d\d s", figure(page, letter, "wait").inner_text())
        assert re.fullmatch(r"\d+ %", figure(page, letter, "guided").inner_text())
    assert text(page, "A") != text(page, "B")
    expect(panel(page, "B").locator(".under")).to_contain_text("Written under positive 0.00 · short 1.00, ")
    page.screenshot(path=pictures / "playground.png")


def test_dragging_changes_what_is_being_written(server: Any, page: Page, long: tuple[int, int], pictures: Path) -> None:
    changes: list[Request] = []
    page.on("request", lambda request: changes.append(request) if request.method == "PATCH" else None)
    opened(page, server)
    slider = panel(page, "A").get_by_role("slider")
    box = slider.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + box["height"] / 2)
    start(page, *long)
    writing(page, "A")
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    ended(page, "AB")
    weights = panel(page, "A").locator(".line b").all_inner_texts()
    assert float(weights[0]) < 0.2
    assert len(changes) >= 1
    times = page.evaluate(TIMES)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(times)), "more than one change at once"
    assert all("/v1/generations/gen-" in request.url for request in changes)
    [last] = [json.loads(changes[-1].post_data or "")["preference"]]
    assert last == {"positive": float(weights[0]), "short": float(weights[1])}
    expect(panel(page, "A").locator(".changed").last).to_have_attribute("data-label", "/".join(weights))
    expect(panel(page, "A").locator(".changed").last).to_have_text(re.compile(r"\S"))
    expect(panel(page, "A").locator(".under")).to_contain_text(f"positive {weights[0]} · short {weights[1]}")
    expect(panel(page, "A").locator(".text > :first-child")).not_to_have_class("changed")
    expect(panel(page, "B").locator(".changed")).to_have_count(0)
    below = "box => box.scrollHeight - box.scrollTop - box.clientHeight"
    assert panel(page, "A").locator(".text").evaluate(below) < 24, "the end of the text is out of sight"
    page.screenshot(path=pictures / "playground-changed.png")


def test_stop_ends_the_generation_in_the_server_too(server: Any, page: Page, long: tuple[int, int]) -> None:
    opened(page, server)
    start(page, *long)
    writing(page, "A")
    name = panel(page, "A").get_attribute("data-generation")
    page.get_by_role("button", name="Stop").click()
    expect(figure(page, "A", "state")).to_have_text("stopped")
    expect(figure(page, "B", "state")).to_have_text(re.compile("^(stopped|stop)$"))
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    before = text(page, "A")
    page.wait_for_timeout(600)
    assert text(page, "A") == before
    assert len(before) < len(ask(server, {"positive": 0.8, "short": 0.2}, *long)["message"]["content"])
    deadline = time.monotonic() + 10
    change = {"preference": {"positive": 1.0}}
    while (status := call(server, "PATCH", f"/v1/generations/{name}", change)[0]) != 404:
        assert status == 200
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.1)
    start(page, seed=5, tokens=8)
    ended(page, "AB")


def test_a_link_restores_everything_and_starts_nothing(server: Any, page: Page, browser: BrowserContext) -> None:
    opened(page, server)
    page.get_by_text("System prompt").click()
    values = {
        "prompt": "Grüße, 世界 🌍 <b>&",
        "system": "Be brief.",
        "temperature": "0.35",
        "tokens": "17",
        "seed": "42",
    }
    for name, value in values.items():
        page.fill(f"#{name}", value)
    page.get_by_role("button", name="Add panel").click()
    panel(page, "A").get_by_label("Method").select_option("bone-soup")
    panel(page, "B").get_by_label("Strength").fill("2.5")
    panel(page, "C").get_by_label("Candidates").fill("7")
    panel(page, "C").get_by_role("slider").fill("37")
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_role("status")).to_have_text("Link copied.")
    assert page.evaluate("navigator.clipboard.readText()") == page.url
    assert re.fullmatch(re.escape(server.url) + r"/#[A-Za-z0-9_-]+", page.url)
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0

    fresh, faults = watched(browser)
    posted: list[str] = []
    fresh.on("request", lambda request: posted.append(request.url) if request.method != "GET" else None)
    fresh.goto(page.url)
    expect(fresh.locator(".panel")).to_have_count(3)
    fresh.wait_for_timeout(300)
    assert settings(fresh) == settings(page)
    assert settings(fresh)["panels"][2][-1] == "positive 0.63short 0.37"
    assert settings(fresh)["prompt"] == values["prompt"]
    expect(panel(fresh, "A").get_by_label("Strength")).to_be_disabled()
    assert posted == []
    fresh.evaluate("location.hash = 'nonsense'")
    expect(fresh.get_by_role("status")).to_have_text("This link can't be read.")
    expect(fresh.locator(".panel")).to_have_count(2)
    fresh.close()
    assert faults == []


def test_everything_works_by_keyboard(server: Any, page: Page, long: tuple[int, int]) -> None:
    opened(page, server)

    def reach(target: Locator) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if target.evaluate("element => element === document.activeElement"):
                assert target.evaluate("element => getComputedStyle(element).outlineStyle") == "solid", "no focus ring"
                return
        raise AssertionError(f"Tab doesn't reach {target}")

    reach(page.get_by_label("Prompt", exact=True))
    page.keyboard.press("Control+a")
    page.keyboard.type("Hello")
    reach(page.get_by_label("Max tokens"))
    page.keyboard.type(str(long[1]))
    reach(page.get_by_label("Seed"))
    page.keyboard.type(str(long[0]))
    reach(panel(page, "A").get_by_role("slider"))
    page.keyboard.press("Control+Enter")
    writing(page, "A")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".changed", state="attached")
    page.keyboard.press("Escape")
    expect(figure(page, "A", "state")).to_have_text("stopped")
    expect(panel(page, "A").locator(".line")).to_have_text("positive 0.79short 0.21")
    reach(page.get_by_role("button", name="Generate"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Writing in 2 panels …")
    page.keyboard.press("Escape")
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    reach(page.get_by_role("button", name="Remove panel B"))
    page.keyboard.press("Enter")
    expect(page.locator(".panel")).to_have_count(1)
    expect(page.get_by_role("button", name="Add panel")).to_be_focused()
    for _ in range(5):
        page.keyboard.press("Enter")
    expect(page.locator(".panel")).to_have_count(4)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_one_column(server: Any, page: Page, pictures: Path, scheme: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.emulate_media(color_scheme=scheme)
    opened(page, server)
    page.get_by_role("button", name="Add panel").click()
    start(page, seed=5, tokens=24, prompt="unbroken" * 20)
    ended(page, "ABC")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    boxes = [one.bounding_box() for one in page.locator(".panel").all()]
    assert len({box["x"] for box in boxes if box}) == 1
    page.screenshot(path=pictures / f"playground-phone-{scheme}.png", full_page=True)


def with_objectives(page: Page, server: Any, names: list[str]) -> None:
    """The server's study, but of other objectives: for what the page looks like, as no such study is served here."""
    answer = call(server, "GET", "/v1/objectives")[1]
    answer["objectives"] = [{"name": name, "type": "function", "direction": "maximise"} for name in names]
    points = [
        {"preference": {name: 1.0}, "rewards": {other: float(other == name) for other in names}} for name in names
    ]
    front = {"object": "front", "objectives": names, "methods": {answer["defaults"]["method"]: points}, "note": ""}
    page.route("**/v1/objectives", lambda route: route.fulfill(json=answer))
    page.route("**/v1/front", lambda route: route.fulfill(json=front))


def test_three_objectives_are_a_point_in_a_triangle(server: Any, page: Page, pictures: Path) -> None:
    with_objectives(page, server, ["helpful", "harmless", "funny"])
    opened(page, server)
    picture = panel(page, "A").locator(".triangle")
    handle = panel(page, "A").get_by_role("slider", name=re.compile("^Preference among helpful, harmless, funny"))
    expect(handle).to_have_attribute("aria-valuetext", "helpful 0.80 · harmless 0.10 · funny 0.10")
    handle.press("ArrowRight")
    expect(handle).to_have_attribute("aria-valuetext", "helpful 0.78 · harmless 0.12 · funny 0.10")
    for _ in range(12):
        handle.press("Shift+ArrowUp")
    expect(handle).to_have_attribute("aria-valuetext", "helpful 0.00 · harmless 0.00 · funny 1.00")
    box, corner = picture.bounding_box(), picture.locator("polygon").first.bounding_box()
    assert box is not None and corner is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(corner["x"] + corner["width"], corner["y"] + corner["height"], steps=4)
    page.mouse.up()
    expect(handle).to_have_attribute("aria-valuetext", "helpful 0.00 · harmless 1.00 · funny 0.00")
    expect(picture).to_have_text("helpful 0.00harmless 1.00funny 0.00")
    expect(page.locator(".chosen li").first).to_contain_text("evaluated at helpful 0.00 · harmless 1.00 · funny 0.00")
    page.get_by_label("Across").select_option("funny")
    expect(page.locator(".chart")).to_have_attribute("aria-label", re.compile("harmless over funny"))
    page.screenshot(path=pictures / "playground-triangle.png")


def test_more_objectives_have_a_slider_each_that_keep_their_sum(server: Any, page: Page) -> None:
    with_objectives(page, server, ["helpful", "harmless", "funny", "short"])
    opened(page, server)
    panel(page, "A").get_by_label("Weight of funny").fill("55")
    expect(panel(page, "A").locator(".sliders")).to_have_text(re.compile("^helpful 0.39.*funny 0.55"))
    sliders = panel(page, "A").get_by_role("slider").all()
    assert len(sliders) == 4
    assert sum(int(slider.input_value()) for slider in sliders) == 100


def test_the_front_shows_the_point_nearest_to_each_preference(server: Any, page: Page) -> None:
    page.route("**/v1/front", lambda route: route.fulfill(json=FRONT))
    opened(page, server)
    panel(page, "A").get_by_label("Method").select_option("bone-soup")
    chosen, badge = page.locator(".chosen li"), page.locator(".badge")
    expect(chosen.first).to_have_text(
        "Abone-soup, evaluated at positive 1.00 · short 0.00: reward positive 1.25 · short 0.10"
    )
    expect(chosen.last).to_have_text(re.compile("^B.*, not evaluated$"))
    expect(badge).to_have_text(["A"])
    right = badge.bounding_box()
    panel(page, "A").get_by_role("slider").fill("51")
    expect(chosen.first).to_contain_text("reward positive -0.50 · short 2.00")
    left = badge.bounding_box()
    assert left is not None and right is not None
    assert left["x"] < right["x"] and left["y"] < right["y"]
    page.route("**/v1/front", lambda route: route.fulfill(json=FRONT | {"methods": {}, "note": "Nothing yet."}))
    opened(page, server, "?again")
    expect(page.locator("#front")).to_have_text("Evaluated frontNothing yet.")


def test_a_refusal_is_one_line_in_its_panel(server: Any, refused_page: Page) -> None:
    page = opened(refused_page, server)
    panel(page, "A").get_by_label("Candidates").fill("1000000")
    start(page, seed=5, tokens=8)
    expect(panel(page, "A").get_by_role("alert")).to_have_text(re.compile("^candidates: got 1000000, allowed: "))
    expect(figure(page, "A", "state")).to_have_text("failed")
    ended(page, "B")
    expect(panel(page, "B").locator(".error")).to_have_text("")

    def busy(route: Route) -> None:
        error = {"message": "queue: got 33 requests, allowed: 32", "type": "server_error", "param": None, "code": None}
        route.fulfill(status=503, headers={"retry-after": "3"}, json={"error": error})

    page.route("**/v1/chat/completions", busy)
    page.keyboard.press("Control+Enter")
    expect(panel(page, "B").get_by_role("alert")).to_have_text("queue: got 33 requests, allowed: 32; try again in 3 s")


def chunk(content: str, positive: float = 1.0, finish: str | None = None) -> str:
    choice = {"index": 0, "delta": {"role": "assistant", "content": content}, "finish_reason": finish}
    plan = {"preference": {"positive": positive, "short": 1 - positive}, "method": "bone-soup", "strength": 1}
    mage = plan | {"candidates": 5, "generations": ["gen-0-0"], "guided_share": 0}
    return f"data: {json.dumps({'choices': [choice], 'mage': mage})}\n\n"


def test_each_change_is_labelled_but_those_that_wrote_little(server: Any, page: Page) -> None:
    written = [("at first ", 1.0), ("a", 0.75), ("b", 0.5), ("as long as a line ", 0.5), ("the rest", 0.25)]
    stream = "".join(chunk(*piece) for piece in written) + chunk("", 0.25, "stop") + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream))
    opened(page, server)
    page.keyboard.press("Control+Enter")
    ended(page, "AB")
    parts = panel(page, "A").locator(".text > *").all()
    assert [part.text_content() for part in parts] == ["at first ", "a", "bas long as a line ", "the rest"]
    assert [part.get_attribute("data-label") for part in parts] == [None, None, "0.50/0.50", "0.25/0.75"]


@pytest.mark.parametrize(
    ("end", "line"),
    [
        (
            'data: {"error": {"message": "engine: got a fault, allowed: none"}}\n\n',
            "engine: got a fault, allowed: none",
        ),
        ("", "the stream broke off before its end"),
    ],
)
def test_what_a_model_writes_is_text_even_if_the_stream_breaks(server: Any, page: Page, end: str, line: str) -> None:
    nasty = "<img src=x onerror=\"console.error('ran')\"><script>console.error('ran')</script>"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=chunk(nasty) + end))
    opened(page, server)
    page.keyboard.press("Control+Enter")
    expect(panel(page, "A").get_by_role("alert")).to_have_text(line)
    assert text(page, "A") == nasty
    assert page.locator(".text img, .text script").count() == 0


def test_a_key_is_asked_for_and_kept_out_of_the_link(server: Any, refused_page: Page) -> None:
    page = refused_page
    error = {"message": "authorization: got none, allowed: a key", "type": "authentication_error"}

    def locked(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer opensesame":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": error})

    page.route("**/v1/**", locked)
    page.goto(server.url)
    expect(page.locator("#trouble")).to_have_text("authorization: got none, allowed: a key")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("opensesame")
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_visible()
    expect(page.get_by_label("API key")).to_be_hidden()
    start(page, seed=5, tokens=8)
    ended(page, "AB")
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_role("status")).to_have_text("Link copied.")
    state = page.evaluate("async () => (await import('/playground/link.js')).decoded(location.hash.slice(1))")
    assert state["seed"] == 5
    assert "opensesame" not in json.dumps(state)
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def evaluated(page: Page, module: str, body: str, argument: Any = None) -> Any:
    """What a function's body returns, with the module of the page as ``m`` and the argument as ``x``."""
    return page.evaluate(f"async (x) => {{ const m = await import('/playground/{module}.js'); {body} }}", argument)


def test_weights_and_points(server: Any, page: Page) -> None:
    opened(page, server)
    for numbers in ([1, 1, 1], [0.005, 0.995], [3, 0, 0], [0, 0], [-1, 2], [1e-9, 1e-9], [0.1] * 7):
        weights = evaluated(page, "simplex", "return m.rounded(x);", numbers)
        assert sum(round(100 * weight) for weight in weights) == 100
        assert all(weight >= 0 and weight == round(weight, 2) for weight in weights)
    for weights in ([0.2, 0.3, 0.5], [1, 0, 0], [0, 0.07, 0.93]):
        assert evaluated(page, "simplex", "return m.toWeights(m.toPoint(x));", weights) == weights
    outside = {(-3, -1): [1, 0, 0], (5, -2): [0, 1, 0], (0.5, 9): [0, 0, 1], (0.5, -4): [0.5, 0.5, 0]}
    for point, weights in outside.items():
        assert evaluated(page, "simplex", "return m.toWeights(x);", list(point)) == weights
    assert evaluated(page, "simplex", "return m.withWeight([0.5, 0.3, 0.2], 0, 0);") == [0, 0.6, 0.4]
    assert evaluated(page, "simplex", "return m.withWeight([1, 0, 0], 0, 0.5);") == [0.5, 0.25, 0.25]
    scale = evaluated(page, "fronts", "return m.scale(x);", [-0.5, 1.2, 4.3])
    assert scale["ticks"] == [0, 2, 4]
    assert scale["low"] < -0.5 and scale["high"] > 4.3
    assert len(evaluated(page, "fronts", "return m.scale([2, 2]).ticks;")) >= 1


def test_events_are_the_same_however_the_stream_is_cut(server: Any, page: Page) -> None:
    opened(page, server)
    stream = ': hello\n\ndata: {"a": "ü"}\n\nevent: x\r\ndata: one\r\ndata: two\r\n\r\ndata: [DONE]\n\ndata: unfinished'
    cut = "const p = m.eventParser(); return x.flatMap((part) => p(part));"
    for size in (1, 2, 3, 7, 1000):
        parts = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert evaluated(page, "events", cut, parts) == ['{"a": "ü"}', "one\ntwo", "[DONE]"]


def test_links_of_others_are_refused_unless_sound(server: Any, page: Page) -> None:
    opened(page, server)
    good: list[Any] = [1, "p", "", None, 5, None, ["a", "b"], [[[0.5, 0.5], "mod", None, 3]]]
    encode = "return m.decoded(btoa(JSON.stringify(x)));"
    assert evaluated(page, "link", encode, good)["panels"][0]["candidates"] == 3
    bad: dict[int, list[Any]] = {
        0: [2, None],
        1: [None, 3],
        4: ["5"],
        6: [["a"], "ab", None],
        7: [
            [],
            None,
            [[[0.5, 0.5], None, None, 3]],
            [[[0.5, "x"], "mod", None, 3]],
            [[[1, 0], "mod", "1", None]],
            [1] * 5,
        ],
    }
    for place, values in bad.items():
        for value in values:
            assert evaluated(page, "link", encode, [*good[:place], value, *good[place + 1 :]]) is None
    assert evaluated(page, "link", "return ['', '%', 'bm8', 'e30'].map(m.decoded);") == [None] * 4


def test_figures_of_a_run(server: Any, page: Page) -> None:
    opened(page, server)
    body = """
    const run = new m.Run(1000);
    const seen = [run.rate, run.wait];
    const mage = { preference: {}, generations: ["g"] };
    run.take({ choices: [{ delta: { role: "assistant", content: "" } }], mage }, 1100);
    seen.push(run.wait);
    for (let i = 1; i <= 3; i += 1) run.take({ choices: [{ delta: { content: "x" } }] }, 1500 + 500 * i);
    seen.push(run.id, run.tokens, run.wait, run.rate);
    run.take({ choices: [], usage: { completion_tokens: 8 } }, 9000);
    return [...seen, run.tokens, run.rate];
    """
    assert evaluated(page, "run", body) == [None, None, None, "g", 3, 1000, 1.5, 8, 4]


def test_only_the_latest_change_waits(server: Any, page: Page) -> None:
    opened(page, server)
    body = """
    const seen = []; let value = 0; let at_once = 0; let most = 0;
    const change = m.oneAtATime(async () => {
      most = Math.max(most, (at_once += 1));
      seen.push(value);
      await new Promise((done) => setTimeout(done, 20));
      at_once -= 1;
    });
    const first = change();
    for (value = 1; value < 9; value += 1) change();
    await first;
    return [seen, most];
    """
    assert evaluated(page, "latest", body) == [[0, 9], 1]
