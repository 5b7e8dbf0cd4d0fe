"""Recipes as they are served: what a client leaves out is the recipe's, token by token as in this process."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pandas as pd
import pytest
import yaml
from browser import browsing, watched
from clusters import free_port
from playwright.sync_api import expect
from servers import PROMPT, Serving, answers, config_of, deploy, serving, until

from deployments import local
from deployments.app import build
from deployments.options import Options, parse_options
from deployments.service import Service
from mage_ray.decoding.request import Sampling
from mage_ray.errors import UserError
from mage_ray.evaluation.evaluate import study_cells
from mage_ray.folder import StudyFolder
from mage_ray.generator import Generator, load_experts
from mage_ray.search.recipe import Recipe

TOKENS = 20
CONTROL = [[-0.2, 1.1], [0.3, 0.6], [0.9, 0.25]]
"""Of the base's coefficients at (0, 1), in the middle and at (1, 0)."""
STRENGTH = {"positive": 0.5, "short": 2.25}

OURS: dict[str, Any] = {
    "method": "mage-i-e",
    "guidance": {
        "strength": STRENGTH,
        "value_strength": 3.0,
        "candidates": 17,
        "base_map": {"degree": 2, "control": CONTROL},
        "every": 2,
    },
    "temperature": 0.3,
    "top_p": 0.9,
}
"""By hand, and nothing in it as in the study."""
FLAT: dict[str, Any] = {"method": "mage-i-m", "guidance": {"strength": 3.0}, "temperature": 0.7}
"""Needs the same experts."""
SOUPS: dict[str, Any] = {"method": "mage-i-m", "guidance": {"base": "soup", "strength": 1.5}, "temperature": 0.5}
"""Needs fewer of them."""
OWN: dict[str, Any] = {"method": "mage-i-m", "guidance": {}, "temperature": 1.0}
"""What is served of the study without a recipe."""
SHORT = {"positive": 0.0, "short": 1.0}


def write(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


def searched(study: StudyFolder) -> dict[str, Any]:
    """As a search of this study would say where a recipe comes from."""
    return {
        "study": "tiny",
        "digest": study.study.digest,
        "prompts": "builtin: 16 searched on, 4 unseen",
        "algorithm": "nsga2",
        "metrics": ["hypervolume", "forwards"],
        "trials": 12,
        "trial": "00007",
        "seed": 0,
        "date": "2026-01-02 03:04 UTC",
        "versions": {},
        "confidence": 0.95,
        "searched": {},
        "unseen": {},
        "defaults": {},
        "gain": {},
    }


def generator_of(folder: StudyFolder, recipe: dict[str, Any]) -> Generator:
    study = Recipe.model_validate(recipe).applied(folder.study)
    return Generator(study, load_experts(folder, study), rows=6, length=400)


def told(server: Serving, **fields: Any) -> dict[str, Any]:
    """An answer to a request that names neither method nor constants nor sampling, but for the seed."""
    body = {"model": "tiny", "messages": PROMPT, "max_tokens": TOKENS, "seed": 7, "logprobs": True} | fields
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def first(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def expected(generator: Generator, recipe: dict[str, Any]) -> str:
    """The text of what ``told`` asks for."""
    sampling = Sampling(TOKENS, recipe["temperature"], recipe.get("top_p", 1.0), seed=7)
    return generator.generate([PROMPT[0]["content"]], [0.5, 0.5], recipe["method"], sampling=sampling)[0].text


def defaults(server: Serving) -> dict[str, Any]:
    return dict(server.get("/v1/objectives").json()["defaults"])


@pytest.fixture(scope="module")
def own(study: StudyFolder, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A copy of the study whose search has left a recipe."""
    place = tmp_path_factory.mktemp("own") / "study"
    shutil.copytree(study.path, place)
    folder = StudyFolder(place)
    write(folder.recipe, OURS | {"provenance": searched(folder)})
    return folder


@pytest.fixture(scope="module")
def local_server(own: StudyFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """As ``make serve`` starts it."""
    with serving(own.path, tmp_path_factory.mktemp("server"), "cpus=1", "length=400") as one:
        yield one


@pytest.fixture(scope="module")
def generator(own: StudyFolder) -> Generator:
    return generator_of(own, OURS)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.35, 0.65), (1.0, 0.0)])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"method": "bone-soup"},
        {"method": "mage-i-m", "strength": 1.4},
        {"candidates": 30, "temperature": 0.9, "top_p": 1.0},
        {"temperature": 0},
    ],
    ids=str,
)
def test_tokens_are_the_generators(
    local_server: Serving, generator: Generator, weights: tuple[float, float], given: dict[str, Any]
) -> None:
    preference = dict(zip(("positive", "short"), weights, strict=True))
    got = told(local_server, preference=preference, seed=11, **given)
    asked: dict[str, Any] = {"method": "mage-i-e", "temperature": 0.3, "top_p": 0.9} | given
    sampling = Sampling(TOKENS, asked.pop("temperature"), asked.pop("top_p"), seed=11)
    method = asked.pop("method")
    [want] = generator.generate([PROMPT[0]["content"]], preference, method, sampling=sampling, **asked)
    assert first(got) == want.text and got["usage"]["completion_tokens"] == len(want.ids) == TOKENS
    tokens = got["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in tokens] == [generator.chat.tokenizer.decode([id]) for id in want.ids]
    assert [token["logprob"] for token in tokens] == pytest.approx(want.logprobs, abs=1e-4)

    mage = got["mage"]
    strength = weights[0] * STRENGTH["positive"] + weights[1] * STRENGTH["short"]
    assert mage["method"] == method and mage["candidates"] == given.get("candidates", 17)
    assert mage["strength"] == pytest.approx(given.get("strength", strength))
    assert mage["guided_share"] == (0.0 if method == "bone-soup" else 0.5)


@pytest.mark.slow
def test_the_base_is_the_maps(local_server: Serving) -> None:
    for weights, lam in (((0, 1), CONTROL[0]), ((1, 0), CONTROL[2])):
        preference = dict(zip(("positive", "short"), weights, strict=True))
        base = told(local_server, preference=preference)["mage"]["rows"][0]["coefficients"]
        assert base == pytest.approx({"bone-positive": lam[0], "bone-short": lam[1]})


@pytest.mark.slow
def test_what_is_served_is_told(local_server: Serving, own: StudyFolder) -> None:
    answer = local_server.get("/v1/objectives")
    assert answer.json()["defaults"] == {
        "method": "mage-i-e",
        "strength": STRENGTH,
        "value_strength": 3.0,
        "candidates": 17,
        "temperature": 0.3,
        "top_p": 0.9,
        "max_tokens": 128,
    }
    assert answer.json()["recipe"] == {
        "method": "mage-i-e",
        "date": "2026-01-02 03:04 UTC",
        "algorithm": "nsga2",
        "metrics": ["hypervolume", "forwards"],
        "trials": 12,
    }
    assert str(own.path) not in answer.text
    lines = local_server.log.read_text().splitlines()
    assert [line for line in lines if "recipe" in line] == [
        f"recipe: {own.recipe} (--no-recipe: the study's own constants)"
    ]
    [curl] = [line for line in lines if line.startswith("curl ")]
    done = subprocess.run(["sh", "-c", f"{curl} --silent --max-time 60"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["mage"]["method"] == "mage-i-e"


@pytest.mark.slow
def test_the_playground_shows_and_uses_it(local_server: Serving, tmp_path: Path) -> None:
    with browsing(tmp_path / "profile") as context:
        page, faults = watched(context)
        page.goto(f"{local_server.url}/")
        expect(page.locator("#temperature")).to_have_attribute("placeholder", "0.3")
        panel = page.get_by_role("region", name="Panel B", exact=True)
        expect(panel.get_by_label("Method")).to_have_value("mage-i-e")
        expect(panel.get_by_label("Strength")).to_have_attribute("placeholder", "default")
        expect(panel.get_by_label("Candidates")).to_have_attribute("placeholder", "17")
        page.fill("#tokens", "10")
        page.keyboard.press("Control+Enter")
        expect(panel.locator("[data-figure=state]")).to_have_text("length", timeout=60_000)
        # At 0.2 and 0.8, where it begins.
        expect(panel.locator(".under")).to_contain_text("mage-i-e, strength 1.9, 17 candidates")
        assert faults == []


@pytest.mark.slow
def test_a_signal_has_it_read_again(local_server: Serving, own: StudyFolder, generator: Generator) -> None:
    server = local_server
    write(own.recipe, OURS | {"method": "mage-e-m"})
    server.process.send_signal(signal.SIGHUP)
    refusal = "recipe.method: got mage-e-m, allowed: one of reference,"
    until(lambda: refusal in server.log.read_text(), 60, "the refusal")
    assert first(told(server)) == expected(generator, OURS)

    own.recipe.unlink()
    server.process.send_signal(signal.SIGHUP)
    until(lambda: "deployed again" in server.log.read_text(), 120, "the reload")
    assert first(told(server)) == expected(generator_of(own, OWN), OWN) != expected(generator, OURS)
    assert defaults(server) | {"method": "mage-i-m", "strength": 1.0, "temperature": 1.0} == defaults(server)
    assert server.get("/v1/objectives").json()["recipe"] is None
    assert server.log.read_text().count(f"recipe: {own.recipe}") == 1


@pytest.mark.slow
def test_serve_deploy_takes_recipes_in_place(cluster: Serving, study: StudyFolder, tmp_path: Path) -> None:
    port = free_port()
    config = config_of(study.path, port)
    recipe = write(tmp_path / "one.yaml", OURS)
    longer = {"recipe": str(recipe), "length": 1024, "max_tokens": 900, "patience": 120}
    config["applications"][0]["args"] |= longer
    server = replace(cluster, url=f"http://127.0.0.1:{port}")
    generator = generator_of(study, OURS)
    revision = 0

    def deployed(**named: Any) -> None:
        nonlocal revision
        revision += 1
        deploy(cluster, config, {"revision": str(revision)} | named, tmp_path)

    def serves(wanted: dict[str, Any]) -> None:
        until(lambda: server.get("/v1/objectives").json()["revision"] == str(revision), 60, f"revision {revision}")
        assert defaults(server)["method"] == wanted["method"]

    def refuses(reason: str) -> None:
        until(lambda: any(_refusal(line, revision, reason) for log in server.logs() for line in log.splitlines()), 60)

    deployed()
    until(lambda: answers(server), 120, "the deployment")
    serves(OURS)
    assert first(told(server)) == expected(generator, OURS)
    [worker], replicas = server.actors("RowWorker"), server.actors("ServeReplica")
    many = {"max_tokens": 900, "n": 8}
    want = [choice["message"]["content"] for choice in told(server, **many)["choices"]]

    # What runs goes on with what it began with, whatever it is asked to change.
    write(recipe, FLAT)
    body = {"model": "tiny", "messages": PROMPT, "seed": 7, "stream": True} | many
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=120) as stream:
        events = (json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line.startswith("data: {"))
        begun = next(events)
        worker.suspend()  # else they may have ended before the new recipe is there
        try:
            deployed()
            serves(FLAT)
        finally:
            worker.resume()
        [id] = begun["mage"]["generations"]
        patched = httpx.patch(f"{server.url}/v1/generations/{id}", json={"preference": SHORT}, timeout=30)
        assert first(told(server)) == expected(generator_of(study, FLAT), FLAT) != expected(generator, OURS)
        got = [""] * 8
        for event in [begun, *events]:
            [choice] = event["choices"]
            got[choice["index"]] += choice["delta"].get("content", "")
    assert patched.status_code == 200
    assert patched.json()["mage"]["strength"] == STRENGTH["short"] and patched.json()["mage"]["method"] == "mage-i-e"
    changed = begun["choices"][0]["index"]
    assert [i for i in range(8) if got[i] != want[i]] == [changed]

    # What can't be served is logged, and the last one stays.
    other = searched(study) | {"digest": "another"}
    deployed(recipe=str(write(tmp_path / "two.yaml", OURS | {"provenance": other})))
    refuses("recipe: got one of study tiny (another), allowed: one of ")
    assert first(told(server)) == expected(generator_of(study, FLAT), FLAT)
    assert server.actors("RowWorker") == [worker]

    # Other experts need another worker.
    deployed(recipe=str(write(tmp_path / "three.yaml", SOUPS)))
    serves(SOUPS)
    assert first(told(server)) == expected(generator_of(study, SOUPS), SOUPS)
    until(lambda: len(server.actors("RowWorker")) == 1, 60, "the old gang's end")
    assert server.actors("RowWorker") != [worker] and server.actors("ServeReplica") == replicas


def _refusal(line: str, revision: int, reason: str) -> bool:
    if not line.startswith('{"time"'):
        return False
    said = json.loads(line)
    return said["event"] == "not reloaded" and said["revision"] == str(revision) and reason in said["reason"]


BAD = {
    "another study's": (
        {"provenance": {"digest": "another"}},
        "recipe: got one of study tiny (another), allowed: one of",
    ),
    "an unknown method": ({"method": "magic"}, "recipe.method: got magic, allowed: one of reference,"),
    "a method without its experts": ({"method": "mage-e-m"}, "recipe.method: got mage-e-m, allowed: one of reference,"),
    "an unknown base": (
        {"guidance": {"base": "stock"}},
        "recipe: guidance.base: got stock, allowed: one of bone, soup",
    ),
    "an unknown objective": (
        {"guidance": {"strength": {"funny": 1.0}}},
        "recipe: guidance.strength.funny: got funny, allowed: one of positive, short",
    ),
    "a strength below zero": ({"guidance": {"strength": -1.0}}, "one.yaml: guidance.strength: got -1.0, allowed:"),
    "a map of too few points": (
        {"guidance": {"base_map": {"degree": 2, "control": CONTROL[:2]}}},
        "guidance.base_map.control: got 2 points of 2, allowed: 3 points",
    ),
    "no temperature": ({"temperature": 0}, "one.yaml: temperature: got 0, allowed: greater than 0"),
    "an unknown field": ({"strength": 1.0}, "one.yaml: strength: got 1.0, allowed: fields here: version, method,"),
    "another version": ({"version": 2}, "one.yaml: version: got 2, allowed: 1"),
}


@pytest.mark.parametrize(("changes", "reason"), BAD.values(), ids=BAD)
def test_a_bad_recipe_is_refused_in_one_line(
    study: StudyFolder, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    if "provenance" in changes:
        changes = {"provenance": searched(study) | changes["provenance"]}
    recipe = write(tmp_path / "one.yaml", FLAT | changes)
    with pytest.raises(UserError) as caught:
        build({"study": str(study.path), "recipe": str(recipe)})
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_no_recipe_is_refused_in_one_line(study: StudyFolder, tmp_path: Path) -> None:
    for text in ("", "[1, 2", "- a list", "just text", "\x00"):
        (tmp_path / "none.yaml").write_text(text)
        with pytest.raises(UserError, match=r"^none\.yaml: .*") as caught:
            build({"study": str(study.path), "recipe": str(tmp_path / "none.yaml")})
        assert "\n" not in str(caught.value)


def test_the_options_recipe_is_a_file_by_its_absolute_path(
    study: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "one.yaml", FLAT)
    monkeypatch.chdir(tmp_path)
    assert parse_options({"study": study.path.as_posix()}).recipe is None
    assert parse_options({"study": study.path.as_posix(), "recipe": "one.yaml"}).recipe == str(tmp_path / "one.yaml")
    for missing in ("two.yaml", str(tmp_path), ""):
        with pytest.raises(UserError, match=r"^recipe: got .*, allowed: a recipe's file") as caught:
            parse_options({"study": study.path.as_posix(), "recipe": missing})
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^recipe: got 5, allowed:"):
        parse_options({"study": study.path.as_posix(), "recipe": 5})


def test_the_options_recipe_is_for_their_study_alone(study: StudyFolder, own: StudyFolder, tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.yaml", FLAT), write(tmp_path / "two.yaml", OURS)
    options = Options(study=str(study.path), recipe=str(one))
    served: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
        "nothing": ({}, FLAT),
        "the same study": ({"study": str(study.path)}, FLAT),
        "another study": ({"study": str(own.path)}, None),
        "another recipe": ({"recipe": str(two)}, OURS),
        "another study and recipe": ({"study": str(own.path), "recipe": str(two)}, OURS),
        "none": ({"recipe": None}, None),
    }
    for case, (config, recipe) in served.items():
        service = Service.configured(options, config)
        assert service.recipe == (None if recipe is None else Recipe.model_validate(recipe)), case
        assert service.folder.path == (own if config.get("study") == str(own.path) else study).path, case
    for config, reason in (
        ({"recipe": 5}, "recipe: got 5, allowed: a path"),
        ({"study": ["a", "b"]}, "study: got ['a', 'b'], allowed: a path"),
        ({"recipe": str(tmp_path / "none.yaml")}, "none.yaml: cannot be read as a recipe (No such file or directory)"),
        ({"recipe": str(tmp_path)}, "cannot be read as a recipe (Is a directory)"),
    ):
        with pytest.raises(UserError) as caught:
            Service.configured(options, config)
        assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_the_front_is_of_the_studys_own_constants(study: StudyFolder, tmp_path: Path) -> None:
    shutil.copytree(study.path, tmp_path / "study")
    folder = StudyFolder(tmp_path / "study")
    recipe = write(folder.recipe, OURS)
    service = Service.configured(Options(study=str(folder.path), recipe=str(recipe)), {})
    assert service.front()["note"] == "this study was not evaluated"
    folder.evaluation.mkdir()
    for cell in study_cells(folder.study, folder):
        pd.DataFrame({"reward/positive": [0.25, 0.75], "reward/short": [1.0, 2.0]}).to_parquet(cell.path(folder))
    front = service.front()
    assert set(front["methods"]) == set(folder.study.evaluation.methods)
    assert front["methods"]["mage-i-e"][0]["rewards"] == {"positive": 0.5, "short": 1.5}
    assert front["note"] == "with the study's own constants, not those of the recipe that is served"
    assert Service.configured(Options(study=str(folder.path)), {}).front() == front | {"note": ""}
    # A method that the evaluation names and nothing was trained for has no points; the others keep theirs.
    evaluation = folder.study.evaluation
    more = evaluation.model_copy(update={"methods": [*evaluation.methods, "morlhf"]})
    folder.claim(folder.study.model_copy(update={"evaluation": more}))
    assert Service.configured(Options(study=str(folder.path)), {}).front() == front | {"note": ""}


def test_a_studys_own_recipe_is_found(tmp_path: Path) -> None:
    assert local.study_recipe(tmp_path) is None
    written = write(tmp_path / "recipe.yaml", FLAT)
    assert local.study_recipe(tmp_path) == str(written)


def test_two_wishes_about_recipes_are_one_too_many(study: StudyFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert local.main(["--study", str(study.path), "--no-recipe", "recipe=one.yaml"]) == 2
    assert capsys.readouterr().err == "--no-recipe: got recipe=one.yaml as well, allowed: one of the two\n"
