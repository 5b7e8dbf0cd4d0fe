"""A study's trained baselines where they answer: the library, the command line, exports and the server's side of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from studies import add_baselines, trained_study

from deployments.options import Options
from deployments.protocol import parse_patch, parse_request
from deployments.service import Service, Setting
from mage_ray.cli import main
from mage_ray.decoding.methods import EXPLICIT, METHODS
from mage_ray.decoding.request import Request
from mage_ray.errors import FieldError
from mage_ray.folder import StudyFolder
from mage_ray.generator import Generator
from mage_ray.merging.adapter import load_adapter

BASELINES = {"m": {"kind": "morlhf", "grid": 2}, "o": {"kind": "modpo", "grid": [[0.6, 0.4]]}, "arm": {"kind": "arm"}}


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    made = trained_study(tmp_path_factory.mktemp("baselines") / "study", tiny_model_folder, baselines=BASELINES)
    add_baselines(made, tiny_model_folder)
    return made


def service(folder: StudyFolder) -> Service:
    return Service(Options(study=str(folder.path)), str(folder.path))


def test_each_preference_has_the_policy_that_was_trained_for_it(folder: StudyFolder) -> None:
    generator = Generator.open(folder.path, rows=4, length=100)
    cases = (([0, 1], "morlhf", "m-0-1"), ([1, 0], "morlhf", "m-1-0"), ([0.6, 0.4], "modpo", "o-0.6-0.4"))
    for mu, method, name in cases:
        [row] = generator.plan(mu, method).rows
        assert {e: c for e, c in zip(generator.runner.heads, row.coefficients, strict=True) if c} == {name: 1.0}


def test_the_command_line_answers_and_refuses(folder: StudyFolder, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", "hello", "--study", str(folder.path), "--max-new-tokens", "5"]
    assert main([*asked, "--preference", "even=1", "--method", "morlhf"]) == 0
    assert main([*asked, "--preference", "even=0.3,short=0.7", "--method", "genarm", "--strength", "0.5"]) == 0
    assert capsys.readouterr().out.count("\n") >= 2
    assert main([*asked, "--preference", "even=0.3,short=0.7", "--method", "modpo"]) == 2
    [*_, error] = capsys.readouterr().err.splitlines()
    assert error == "mage-ray: preference: got (0.3, 0.7), allowed: those that modpo was trained for: (0.6, 0.4)"


def test_an_exported_policy_is_its_adapter(folder: StudyFolder, tmp_path: Path) -> None:
    asked = ["export", "--study", str(folder.path), "--method", "modpo", "--preference", "even=0.6,short=0.4"]
    assert main([*asked, "--out", str(tmp_path / "one")]) == 0
    exported, own = load_adapter(tmp_path / "one"), load_adapter(folder.baseline("o", "0.6-0.4"))
    assert exported.factors.keys() == own.factors.keys()
    for name, factors in exported.factors.items():
        assert (factors.delta() - own.factors[name].delta()).abs().max() < 1e-6


def test_the_server_offers_what_is_trained_where_it_is_trained(folder: StudyFolder) -> None:
    served = service(folder)
    plain = [method for method in METHODS if method not in EXPLICIT]
    assert list(served.methods) == [*plain, "morlhf", "modpo", "genarm"]
    told = {one["name"]: one for one in served.described(100, 8, "r")["methods"]}
    assert told["morlhf"] == {
        "name": "morlhf", "guided": False, "rows": 1,
        "preferences": [{"even": 0.0, "short": 1.0}, {"even": 1.0, "short": 0.0}],
    }  # fmt: skip
    assert told["genarm"] == {"name": "genarm", "guided": True, "rows": 3}

    def asked(method: str, even: float) -> tuple[Request, Setting]:
        [request], settings = served.requests(parse_request("chat", body(method, even)))
        return request, settings[request.plan]

    _, setting = asked("modpo", 0.6)
    block = served.mage(setting, ["g"]).block()
    assert block["rows"] == [{"weight": 1.0, "coefficients": {"o-0.6-0.4": 1.0}, "head": None, "home": 0}]
    with pytest.raises(FieldError, match=r"^preference: got \(0.5, 0.5\), allowed: those that modpo was trained for"):
        asked("modpo", 0.5)
    _, setting = asked("morlhf", 1.0)
    patch = parse_patch({"preference": {"even": 0.4, "short": 0.6}})
    with pytest.raises(FieldError, match=r"^preference: got \(0.4, 0.6\), allowed: those that morlhf was trained for"):
        served.plan(served.changed(setting, patch))


def body(method: str, even: float) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {"model": "tiny", "messages": messages, "method": method, "preference": {"even": even, "short": 1 - even}}


def test_what_is_not_trained_or_not_chosen_is_not_offered(folder: StudyFolder, tmp_path: Path) -> None:
    copy = StudyFolder(shutil.copytree(folder.path, tmp_path / "copy"))
    shutil.rmtree(copy.baseline("m", "1-0"))
    assert list(service(copy).methods)[-2:] == ["modpo", "genarm"]
    with pytest.raises(FieldError, match=r"^method: got morlhf, allowed: one of reference, .*, genarm$"):
        service(copy).requests(parse_request("chat", body("morlhf", 1.0)))
    with pytest.raises(FieldError, match=r"^method: got one that needs morlhf, allowed: a study whose morlhf is"):
        Generator.open(copy.path, rows=4, length=100).plan([1, 0], "morlhf")
    study = copy.study
    none = study.guidance.model_copy(update={"baselines": []})
    StudyFolder.create(copy.path, study.model_copy(update={"guidance": none}))
    assert list(service(copy).methods)[-1] == "mage-i-e"
    assert len(service(copy).experts) == 4
