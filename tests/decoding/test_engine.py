"""The engine against transformers' own generate, a batch against one by one, and fakes with known logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import make_adapter
from tiny import make_tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.methods import Backbones, Setup, plan_for
from mage_ray.decoding.plan import Plan, Row
from mage_ray.decoding.request import Generation, Request, Sampling
from mage_ray.decoding.runner import RowRunner
from mage_ray.errors import FieldError
from mage_ray.export import export_experts
from mage_ray.merging.adapter import load_adapter
from mage_ray.merging.bank import AdapterBank
from mage_ray.merging.coefficients import circulant_mix

PROMPTS = ["hello there, world", "abc", "z", "a somewhat longer prompt than the others, to be sure"]
PLAIN = Plan.of([((0.0,) * 4, 1.0)])


@pytest.fixture(scope="module")
def experts(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("experts")
    return [make_adapter(tiny_model_folder, place / f"e{i}", seed=i, scale=0.2, r=2 + i) for i in range(4)]


@pytest.fixture(scope="module")
def engine(tiny_model_folder: Path, experts: list[Path]) -> Engine:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    bank = AdapterBank([load_adapter(e) for e in experts])
    return Engine(RowRunner(model, bank, rows=24, length=200), stop=[258])


@pytest.fixture(scope="module")
def setup() -> Setup:
    sets = {"bone": Backbones((0, 1), circulant_mix(2, 0.7)), "soup": Backbones((2, 3), np.eye(2))}
    return Setup(4, sets, "bone", "soup", strength=1.3, candidates=12, extrapolation=(0.5, 0.5))


def ids(text: str) -> tuple[int, ...]:
    return tuple(make_tiny_tokenizer()(text)["input_ids"])


def requests(setup: Setup, new: int = 12) -> list[Request]:
    """Every method at several preferences, prompts, temperatures and lengths."""
    made = []
    methods = [
        "reference",
        "rewarded-soup",
        "bone-soup",
        "extrapolated-soup",
        "mod",
        "proxy-tuning",
        "mage-i-m",
        "mage-i-e",
    ]
    for i, method in enumerate(methods * 2):
        mu = ((1.0, 0.0), (0.25, 0.75), (0.5, 0.5))[i % 3]
        sampling = Sampling(new - i % 4, (1.0, 0.0, 0.7)[i % 3], (1.0, 0.9)[i % 2], seed=i)
        made.append(Request(ids(PROMPTS[i % 4]), plan_for(method, mu, setup), sampling))
    return made


def test_greedy_decoding_is_transformers_generate_with_left_padding(tiny_model_folder: Path, engine: Engine) -> None:
    tokenizer = make_tiny_tokenizer()
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    assert batch.attention_mask.min() == 0  # there is padding, and it is on the left
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    expected = model.generate(**batch, max_new_tokens=30, do_sample=False)[:, batch.input_ids.shape[1] :]
    got = engine.generate([Request(ids(p), PLAIN, Sampling(30, 0.0)) for p in PROMPTS])
    for generation, row in zip(got, expected.tolist(), strict=True):
        assert list(generation.ids) == row[: len(generation.ids)]
        assert generation.finished == ("stop" if 258 in row else "length")
        assert len(generation.ids) == (row.index(258) + 1 if 258 in row else 30)


def test_a_merged_row_is_generate_of_the_merged_model(
    tiny_model_folder: Path, experts: list[Path], engine: Engine, setup: Setup, tmp_path: Path
) -> None:
    mu = (0.9, 0.1)
    plan = plan_for("bone-soup", mu, setup)
    export_experts(experts[:2], plan.rows[0].coefficients[:2], tmp_path / "full", True, str(tiny_model_folder))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    [got] = engine.generate([Request(ids(PROMPTS[0]), plan, Sampling(25, 0.0))])
    expected = merged.generate(torch.tensor([ids(PROMPTS[0])]), max_new_tokens=25, do_sample=False)[0]
    assert list(got.ids) == expected[len(ids(PROMPTS[0])) :][: len(got.ids)].tolist()


def direct_logprob(model_of: Callable[[Row], PreTrainedModel], request: Request, drawn: Generation) -> list[float]:
    """The guided log-probability of each drawn token, from whole forwards in float64 and the formula."""
    sequence = torch.tensor([[*request.prompt, *drawn.ids]])
    plan, start = request.plan, len(request.prompt) - 1
    with torch.inference_mode():
        rows = [model_of(row)(sequence).logits[0].log_softmax(-1) for row in plan.rows]
    expected = []
    for t, token in enumerate(drawn.ids):
        scores = sum(w * row[start + t] for w, row in zip(plan.weights, rows, strict=True))
        assert isinstance(scores, torch.Tensor)
        if plan.candidates is not None:
            allowed = rows[0][start + t].topk(plan.candidates).indices
            assert token in allowed
            scores = torch.full_like(scores, -torch.inf).index_copy(0, allowed, scores[allowed])
        expected.append(float(scores.log_softmax(-1)[token]))
    return expected


def test_logprobs_of_every_method_are_the_formula_over_separately_merged_float64_models(
    tiny_model_folder: Path, experts: list[Path], engine: Engine, setup: Setup, tmp_path: Path
) -> None:
    deltas = [load_adapter(e) for e in experts]
    made: dict[Row, PreTrainedModel] = {}

    def model_of(row: Row) -> PreTrainedModel:
        if row not in made:
            model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).double().eval()
            for lam, adapter in zip(row.coefficients, deltas, strict=True):
                for name, factors in adapter.factors.items():
                    model.get_submodule(name).weight.data += lam * factors.delta()
            made[row] = model
        return made[row]

    asked = requests(setup)
    for request, drawn in zip(asked, engine.generate(asked), strict=True):
        np.testing.assert_allclose(drawn.logprobs, direct_logprob(model_of, request, drawn), atol=2e-4)


def test_bfloat16_weights_give_the_same_numbers_to_their_rounding(
    tiny_model_folder: Path, experts: list[Path], engine: Engine, setup: Setup
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.bfloat16)
    runner = RowRunner(model, AdapterBank([load_adapter(e) for e in experts]), rows=24, length=200)
    row = plan_for("bone-soup", (0.7, 0.3), setup).rows[0]
    sequence = ids(PROMPTS[3])
    [rounded], [exact] = (r.score(row, [sequence], [20]) for r in (runner, engine.runner))
    assert 0 < float((rounded - exact).abs().max()) < 0.3
    assert abs(float((rounded - exact).mean())) < 0.05
    [drawn] = Engine(runner, [258]).generate([Request(sequence, plan_for("mage-i-e", (0.7, 0.3), setup), Sampling(10))])
    assert len(drawn.ids) > 0


def test_a_mixed_batch_draws_what_each_request_draws_alone(engine: Engine, setup: Setup) -> None:
    """24 rows for 16 requests of up to 4: they also wait for each other, join late and move between slots."""
    asked = requests(setup)
    together = engine.generate(asked)
    for request, drawn in zip(asked, together, strict=True):
        [alone] = engine.generate([request])
        assert drawn.ids == alone.ids
        np.testing.assert_allclose(drawn.logprobs, alone.logprobs, atol=1e-4)
    assert engine.runner.live == 0


def test_equal_prompts_share_their_prefill_and_differ_by_seed(engine: Engine) -> None:
    asked = [Request(ids(PROMPTS[0]), PLAIN, Sampling(8, 1.0, seed=s)) for s in (1, 2, 3, 1)]
    drawn = engine.generate(asked)
    assert drawn[0].ids == drawn[3].ids
    assert len({d.ids for d in drawn}) == 3


def test_strength_0_is_the_base_exactly(engine: Engine, setup: Setup) -> None:
    from dataclasses import replace

    mu = (0.3, 0.7)
    base = plan_for("bone-soup", mu, setup)
    guided = plan_for("mage-i-m", mu, replace(setup, strength=0.0, candidates=260))
    for sampling in (Sampling(15, 1.0, seed=5), Sampling(15, 0.0), Sampling(15, 0.8, 0.9, seed=6)):
        a, b = engine.generate([Request(ids("hey"), base, sampling), Request(ids("hey"), guided, sampling)])
        assert a.ids == b.ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_scores_are_those_of_a_whole_forward(tiny_model_folder: Path, engine: Engine) -> None:
    sequences = [ids(p) + ids(" and more")[: 3 + i] for i, p in enumerate(PROMPTS)]
    starts = [len(ids(p)) for p in PROMPTS]
    got = engine.runner.score(Row((0.0,) * 4), sequences, starts)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).double()
    for sequence, start, scores in zip(sequences, starts, got, strict=True):
        with torch.inference_mode():
            logprobs = model(torch.tensor([sequence])).logits[0].log_softmax(-1)
        expected = [float(logprobs[t - 1, sequence[t]]) for t in range(start, len(sequence))]
        np.testing.assert_allclose(scores.numpy(), expected, atol=1e-4)
    assert engine.runner.live == 0


def test_leaving_a_stream_frees_its_rows(engine: Engine, setup: Setup) -> None:
    stream = engine.stream(Request(ids("hey"), plan_for("mage-i-e", (0.5, 0.5), setup), Sampling(50)))
    next(stream)
    assert engine.runner.live > 1
    stream.close()  # type: ignore[attr-defined]
    assert engine.runner.live == 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), PLAIN), "prompt"),
        (Request((1,) * 190, PLAIN, Sampling(20)), "at most 200 together"),
        (Request((1,), Plan.of([((float(i), 0, 0, 0), 1.0) for i in range(25)])), "at most 24"),
        (Request((1,), Plan.of([((1.0,), 1.0)])), "4 numbers"),
        (Request((1, 260), PLAIN), "token ids 0 to 259"),
        (Request((1,), PLAIN, Sampling(5, stop=("x",))), "no tokenizer"),
    ],
)
def test_a_request_that_cannot_run_is_refused_alone(engine: Engine, request_: Request, message: str) -> None:
    fine = Request((1,), PLAIN, Sampling(3, 0.0))
    before, refused, after = engine.generate([fine, request_, fine])
    assert (refused.finished, refused.ids) == ("error", ())
    assert message in str(refused.error)
    assert before.ids == after.ids == engine.generate([fine])[0].ids
    with pytest.raises(FieldError, match=message):
        list(engine.stream(request_))
    assert engine.runner.live == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("max_new_tokens", 0),
        ("seed", -1),
    ],
)
def test_unusable_sampling_is_refused(field: str, value: float) -> None:
    with pytest.raises(FieldError, match=field):
        Sampling(**{field: value})  # type: ignore[arg-type]


VETO = -1e30
"""An adapter bias that the fake turns into -inf; -inf itself would make NaN of a coefficient of 0."""


class Fake(nn.Module):
    """A model of four tokens whose logits are known: the base's, plus each adapter's bias times its coefficient.

    The bank's mix reaches it by way of a linear from a constant to the vocabulary.
    """

    def __init__(self, base: list[float]) -> None:
        super().__init__()
        from transformers import LlamaConfig

        self.config = LlamaConfig(vocab_size=4, num_hidden_layers=1, max_position_embeddings=64)
        self.head = nn.Linear(1, 4, bias=False)
        self.head.weight.data = torch.tensor(base)[:, None]
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int = 1, **_: object) -> object:
        from types import SimpleNamespace

        logits = self.head(torch.ones(*input_ids.shape, 1))[:, -logits_to_keep:]
        return SimpleNamespace(logits=torch.where(logits < VETO / 2, -torch.inf, logits))


def fake_engine(base: list[float], *biases: list[float]) -> Engine:
    from mage_ray.merging.adapter import Adapter, Factors

    bank = [
        Adapter(f"a{i}", {"head": Factors(torch.ones(1, 1), torch.tensor(bias)[:, None], 1.0)})
        for i, bias in enumerate(biases)
    ]
    return Engine(RowRunner(Fake(base), AdapterBank(bank), rows=8, length=64), stop=[3])  # type: ignore[arg-type]


def guided(weight: float) -> Plan:
    return Plan.of([((0.0, 0.0), 1.0), ((1.0, 0.0), weight), ((0.0, 1.0), -weight)], candidates=4)


def counts(engine: Engine, plan: Plan) -> np.ndarray:
    drawn = engine.generate([Request((0,), plan, Sampling(1, seed=s)) for s in range(400)])
    return np.bincount([d.ids[0] for d in drawn], minlength=4) / 400


def test_fake_guide_that_always_agrees_changes_nothing() -> None:
    engine = fake_engine([2.0, 1.0, 0.0, -1.0], [0.5, 0.5, -1.0, 2.0], [0.5, 0.5, -1.0, 2.0])
    np.testing.assert_array_equal(counts(engine, guided(3.0)), counts(engine, Plan.of([((0.0, 0.0), 1.0)])))


def test_fake_guide_that_always_vetoes_a_token_removes_it() -> None:
    engine = fake_engine([2.0, 1.0, 0.0, -1.0], [VETO, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0])
    assert counts(engine, Plan.of([((0.0, 0.0), 1.0)]))[0] > 0.5
    assert counts(engine, Plan.of([((0.0, 0.0), 1.0), ((1.0, 0.0), 1.0)], candidates=4))[0] == 0


def test_a_request_whose_every_candidate_is_vetoed_ends_alone() -> None:
    engine = fake_engine([2.0, 1.0, 0.0, -1.0], [VETO] * 4, [0.0] * 4)
    vetoed, fine = engine.generate(
        [
            Request((0,), Plan.of([((0.0, 0.0), 1.0), ((1.0, 0.0), 1.0)], 4), Sampling(5)),
            Request((0,), Plan.of([((0.0, 0.0), 1.0)], 4), Sampling(5, 0.0)),
        ]
    )
    assert (vetoed.finished, vetoed.ids) == ("vetoed", ())
    assert (fine.finished, fine.ids) == ("length", (0,) * 5)
