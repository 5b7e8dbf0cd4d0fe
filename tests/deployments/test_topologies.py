"""Where a plan's rows live changes no token; and a guide may be another model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Tiny
from servers import PROMPT, Serving, serving
from studies import add_value_models, trained_study
from tiny import make_tiny_model

from mage_ray.decoding.methods import METHODS
from mage_ray.decoding.request import Sampling
from mage_ray.folder import StudyFolder
from mage_ray.generator import Generator, load_experts

pytestmark = pytest.mark.slow

OBJECTIVES = {"positive": {"type": "positivity"}, "short": {"type": "brevity"}}
TOKENS = 12


def answers(server: Serving, preference: dict[str, float]) -> dict[str, list[tuple[str, float]]]:
    """The greedy answer by every method, token by token with its log-probability."""
    got = {}
    for method in METHODS:
        fields = {"max_tokens": TOKENS, "logprobs": True, "preference": preference, "method": method}
        choice = server.post(**fields).json()["choices"][0]
        got[method] = [(token["token"], token["logprob"]) for token in choice["logprobs"]["content"]]
    return got


@pytest.fixture(scope="module")
def real(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """The embedded model with random experts and value models of both kinds of head."""
    guidance = {"head": "scalar", "value_strength": 0.5}
    values = {"final": {"head": "vocabulary", "rank": 3}}
    folder = trained_study(
        tmp_path_factory.mktemp("real") / "study",
        real_model,
        objectives=OBJECTIVES,
        values=values,
        guidance=guidance,
    )
    add_value_models(folder, real_model, 576, 0.2)
    return folder


def test_split_gives_the_tokens_of_fused_on_the_real_model(real: StudyFolder, tmp_path: Path) -> None:
    preference = {"positive": 0.35, "short": 0.65}
    by_topology = []
    for topology in (("fused", "cpus=1"), ("split", "cpus=1"), ("split", "cpus=1", "guides=2")):
        options = (f"topology={topology[0]}", *topology[1:], "length=200", "rows=12", "--cluster-cpus", "3")
        with serving(real.path, tmp_path, *options) as server:
            assert server.get("/v1/objectives").json()["topology"] == topology[0]
            by_topology.append(answers(server, preference))
    fused, *others = by_topology
    assert list(fused) == list(METHODS) and all(len(tokens) > 4 for tokens in fused.values())
    for split in others:
        for method, tokens in fused.items():
            assert [token for token, _ in split[method]] == [token for token, _ in tokens], method
            assert [p for _, p in split[method]] == pytest.approx([p for _, p in tokens], abs=2e-3), method
    assert len({tuple(token for token, _ in tokens) for tokens in fused.values()}) > 3


def of_study(folder: StudyFolder) -> Tiny:
    """The float64 oracle over a study's experts."""
    oracle = Tiny.__new__(Tiny)
    oracle.folder = Path(folder.study.model)
    oracle.adapters = [adapter for members in load_experts(folder, folder.study).values() for adapter in members]
    oracle._merged = {}
    return oracle


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudyFolder]:
    """A study of the same objectives over a wider and deeper model of the same tokenizer."""
    place = tmp_path_factory.mktemp("larger")
    model = make_tiny_model(place / "model", seed=8, hidden_size=48, num_hidden_layers=3)
    yield trained_study(place / "study", model, objectives=OBJECTIVES)


def test_another_model_guides(study: StudyFolder, larger: StudyFolder, tmp_path: Path) -> None:
    preference, strength, candidates = {"positive": 0.3, "short": 0.7}, 1.5, 20
    with serving(study.path, tmp_path, f"guide_study={larger.path}", "cpus=1", "length=200") as server:
        fields = {"max_tokens": TOKENS, "logprobs": True, "strength": strength, "candidates": candidates}
        got = server.post(preference=preference, **fields).json()
        unguided = server.post(preference=preference, method="mod", max_tokens=TOKENS).json()
    assert got["mage"]["topology"] == "split" and [row["home"] for row in got["mage"]["rows"]] == [0, 1, 1]
    own, other = Generator.open(study.path, rows=4, length=200), of_study(larger)
    sampling = Sampling(TOKENS, 0.0)
    [want] = own.generate([PROMPT[0]["content"]], preference, "mod", sampling=sampling)
    assert unguided["choices"][0]["message"]["content"] == want.text
    sequence = list(own.chat.encode(PROMPT[0]["content"]))
    base = own.plan(preference, "bone-soup")
    guide = Generator.open(larger.path, rows=4, length=200).plan(preference, "rewarded-soup")
    reference = Generator.open(larger.path, rows=4, length=200).plan(preference, "reference")
    expected = []
    for _ in range(TOKENS):
        base_V = of_study(study).rows(base, sequence)[0, -1]
        ratio_V = other.rows(guide, sequence)[0, -1] - other.rows(reference, sequence)[0, -1]
        allowed = base_V.topk(candidates).indices
        scores_V = torch.full_like(base_V, -torch.inf)
        scores_V[allowed] = (base_V + strength * ratio_V)[allowed]
        token = int(scores_V.argmax())
        expected.append(float(scores_V.log_softmax(-1)[token]))
        sequence.append(token)
    logprobs = [token["logprob"] for token in got["choices"][0]["logprobs"]["content"]]
    assert logprobs == pytest.approx(expected, abs=1e-3)
    assert got["choices"][0]["message"]["content"] == own.chat.decode(sequence[-TOKENS:])


def test_only_the_guides_rows_go_to_another_model(study: StudyFolder, larger: StudyFolder) -> None:
    from deployments.options import Options
    from deployments.service import Service, Setting

    def homes(method: str, **options: Any) -> list[int]:
        service = Service(Options(study=str(study.path), **options), str(study.path))
        return [row.home for row in service.plan(Setting((0.3, 0.7), method)).rows]

    other: dict[str, Any] = {"guide_study": str(larger.path), "guides": 2}
    assert homes("mod", **other) == [0, 0] and homes("mod", guides=2) == [0, 1]
    assert homes("mage-i-e", **other) == homes("mage-i-e", guides=2) == [0, 1, 2, 1]
    assert homes("mage-i-e") == [0, 0, 0, 0] and homes("bone-soup", **other) == [0]


def test_a_guide_with_another_tokenizer_is_refused(study: StudyFolder, tmp_path: Path) -> None:
    import json

    model = make_tiny_model(tmp_path / "model", seed=9)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    other = trained_study(tmp_path / "study", model, objectives=OBJECTIVES)
    with (
        pytest.raises(AssertionError, match="guide_study: got a model with another tokenizer"),
        serving(study.path, tmp_path, f"guide_study={other.path}", "cpus=1", "length=200"),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("topology=both",), "topology: got both, allowed: 'auto', 'fused' or 'split'"),
        (("rows=0",), "rows: got 0, allowed: "),
        (("speed=9",), "speed: got 9, allowed: fields here: study"),
        (("guide_gpus=1",), "gpus: got 0, allowed: more than 0"),
        (("topology=fused", "guide_study=x"), "topology: got fused, allowed: split or auto"),
        (("guide_study=/nowhere",), "guide_study: got /nowhere, allowed: the folder of a trained study"),
        (("max_replicas=1", "replicas=2"), "max_replicas: got 1, allowed: replicas"),
    ],
)
def test_options_that_cannot_be_are_one_line(study: StudyFolder, options: tuple[str, ...], message: str) -> None:
    from deployments.options import parse_options
    from mage_ray.errors import UserError

    with pytest.raises(UserError) as told:
        parse_options({"study": str(study.path)} | dict(option.split("=") for option in options))
    assert str(told.value).startswith(message) and "\n" not in str(told.value)
