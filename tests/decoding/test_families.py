"""Model families against transformers' own generate: plain, and with PEFT adapters merged in float64 by PEFT itself.

Nothing is tolerated in the tokens; that this is fair is checked, too: generate's own logits have no near-ties.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import make_adapter
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.plan import Plan
from mage_ray.decoding.request import Generation, Request, Sampling
from mage_ray.decoding.runner import RowRunner
from mage_ray.merging.adapter import load_adapter
from mage_ray.merging.bank import AdapterBank

VOCABULARY, LENGTH, NEW = 97, 72, 20
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GQA: dict[str, Any] = {"num_key_value_heads": 2}
ALTERNATING = ["sliding_attention", "full_attention"]
GEMMA: dict[str, Any] = GQA | {"head_dim": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GQA),
    "qwen2": ("qwen2", GQA),
    "qwen2-window": (
        "qwen2",
        GQA | {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "qwen3": ("qwen3", GQA | {"head_dim": 8}),
    "mistral": ("mistral", GQA | {"sliding_window": None}),
    "mistral-window": ("mistral", GQA | {"sliding_window": 7}),
    "gemma": ("gemma", GEMMA),
    "gemma2": (
        "gemma2",
        GEMMA | {"sliding_window": 8, "layer_types": ALTERNATING, "attn_implementation": "eager"},
    ),
    "gemma3": ("gemma3_text", GEMMA | {"sliding_window": 6, "layer_types": ALTERNATING}),
    "phi": ("phi", {}),
    "phi3": ("phi3", GQA),
    "phi3-window": ("phi3", GQA | {"sliding_window": 10}),
    "gpt2": ("gpt2", {"n_inner": 48}),
    "smollm3": ("smollm3", GQA | {"no_rope_layers": [1, 0]}),
    "olmo2": ("olmo2", GQA),
}
FAST = ("llama", "gemma2", "gpt2")
every_family = pytest.mark.parametrize(
    "family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)

dice = np.random.default_rng(3)
PROMPTS = [tuple(dice.integers(1, VOCABULARY, n).tolist()) for n in (1, 4, 11, 17, 33)]
COEFFICIENTS = ((0.0, 0.0), (1.0, 0.0), (0.6, 0.7), (1.75, -0.75), (-0.3, 0.4))
"""One for each prompt; the first is the plain model."""


@cache
def tiny_family(family: str, root: Path) -> Path:
    kind, own = FAMILIES[family]
    folder = root / family
    settings = COMMON | own
    kernel = settings.pop("attn_implementation", "sdpa")
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), attn_implementation=kernel)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which start as zeros
            parameter.data = torch.randn_like(parameter) * 0.3
        elif "norm" in name or "ln_" in name:
            parameter.data += torch.randn_like(parameter) * 0.2
    model.get_output_embeddings().weight.data *= 4  # logits further apart
    model.save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    kernel = "eager" if folder.name == "gemma2" else "sdpa"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=kernel).eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def two_experts(folder: Path) -> list[Path]:
    own = {"fan_in_fan_out": True} if folder.name == "gpt2" else {}
    return [
        out if out.exists() else make_adapter(folder, out, seed=i, scale=0.15, r=2 + i, **own)
        for i, out in enumerate((folder / "e0", folder / "e1"))
    ]


def merged_by_peft(folder: Path, experts: list[Path], lam: tuple[float, ...]) -> PreTrainedModel:
    """``W + sum_k lam_k s_k B_k A_k`` in float64, each merged by PEFT with its scaling times ``lam_k``."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model = load(folder, torch.float64)
    for expert, coefficient in zip(experts, lam, strict=True):
        wrapped = PeftModel.from_pretrained(model, expert, autocast_adapter_dtype=False)
        layers = [module for module in wrapped.modules() if isinstance(module, LoraLayer)]
        assert layers
        for layer in layers:
            for part in (*layer.lora_A.values(), *layer.lora_B.values()):
                part.to(torch.float64)
            layer.scaling["default"] *= coefficient
        model = wrapped.merge_and_unload()
    return model


def plan(lam: tuple[float, ...]) -> Plan:
    return Plan.of([(lam, 1.0)])


def guided(base: tuple[float, ...], guide: tuple[float, ...], candidates: int | None = 20) -> Plan:
    return Plan.guided(base, [(guide, 1.0), ((0.0, 0.0), -1.0)], 1.2, candidates)


def generated(model: PreTrainedModel, prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Greedy generate of a left-padded batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.logits).float().topk(2, dim=-1).values
    assert float((best[..., 0] - best[..., 1]).min()) > 1e-4, "a near-tie: choose another seed"
    drawn = out.sequences[:, longest:]
    assert drawn.shape[1] == NEW
    return [tuple(row) for row in drawn.tolist()]


def greedy(prompt: tuple[int, ...], how: Plan) -> Request:
    return Request(prompt, how, Sampling(NEW, 0.0))


def engine(folder: Path, experts: list[Path], rows: int = 12, **more: Any) -> Engine:
    bank = AdapterBank([load_adapter(e) for e in experts]) if experts else None
    return Engine(RowRunner(load(folder), bank, rows=rows, length=LENGTH, **more), [], chunk=5)


@every_family
def test_plain_greedy_decoding_is_generate(family: str, root: Path) -> None:
    """Without a bank; the rows wait for each other, too: there are fewer slots than prompts."""
    folder = tiny_family(family, root)
    expected = generated(load(folder), PROMPTS)
    assert len({token for row in expected for token in row}) > 8  # the model says more than one thing
    running = engine(folder, [], rows=3)
    got = running.generate([greedy(p, plan(())) for p in PROMPTS])
    assert [g.ids for g in got] == expected
    assert running.runner.live == 0


@every_family
@pytest.mark.parametrize("fixed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_merged_rows_are_generate_of_separately_merged_models(family: str, root: Path, fixed: bool) -> None:
    """In one batch with each other, with guided requests and with the plain model, prefilled in chunks of 5."""
    folder = tiny_family(family, root)
    experts = two_experts(folder)
    asked: list[Request] = []
    for prompt, lam in zip(PROMPTS, COEFFICIENTS, strict=True):
        asked += [greedy(prompt, plan(lam)), Request(prompt, guided(lam, (0.9, 0.2)), Sampling(NEW - 9, seed=1))]
    drawn = engine(folder, experts, fixed=fixed).generate(asked)
    plain = generated(load(folder), PROMPTS)
    assert drawn[0].ids == plain[0]
    for i, (prompt, lam) in enumerate(zip(PROMPTS, COEFFICIENTS, strict=True)):
        if i > 0:
            [expected] = generated(merged_by_peft(folder, experts, lam).float(), [prompt])
            assert drawn[2 * i].ids == expected, lam
            assert expected != plain[i]  # the adapters matter


def formula(
    models: Callable[[tuple[float, ...]], PreTrainedModel], request: Request, drawn: Generation
) -> tuple[list[float], list[int]]:
    """Guided log-probabilities of the drawn tokens from whole forwards, and which token was the most likely."""
    sequence = torch.tensor([[*request.prompt, *drawn.ids]])
    start, how = len(request.prompt) - 1, request.plan
    with torch.inference_mode():
        rows = [models(row.coefficients)(sequence).logits[0].log_softmax(-1) for row in how.rows]
    logprobs, best = [], []
    for t, token in enumerate(drawn.ids):
        scores = torch.stack([w * row[start + t] for w, row in zip(how.weights, rows, strict=True)]).sum(0)
        if how.candidates is not None:
            allowed = rows[0][start + t].topk(how.candidates).indices
            scores = torch.full_like(scores, -torch.inf).index_copy(0, allowed, scores[allowed])
        logprobs.append(float(scores.log_softmax(-1)[token]))
        best.append(int(scores.argmax()))
    return logprobs, best


@pytest.mark.parametrize("family", ["gemma2", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_guided_logprobs_are_the_formula_over_float64_models(family: str, root: Path) -> None:
    folder = tiny_family(family, root)
    experts = two_experts(folder)
    made: dict[tuple[float, ...], PreTrainedModel] = {}

    def models(lam: tuple[float, ...]) -> PreTrainedModel:
        if lam not in made:
            made[lam] = merged_by_peft(folder, experts, lam)
        return made[lam]

    asked = [
        Request(prompt, guided((0.6, 0.4), guide, candidates), Sampling(NEW, temperature, seed=7))
        for prompt, guide, candidates, temperature in zip(
            PROMPTS,
            ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.5, -0.5), (1.0, 0.0)),
            (None, 20, None, 20, 20),
            (0.0, 0.0, 1.0, 1.0, 0.0),
            strict=True,
        )
    ]
    for request, drawn in zip(asked, engine(folder, experts).generate(asked), strict=True):
        logprobs, best = formula(models, request, drawn)
        np.testing.assert_allclose(drawn.logprobs, logprobs, atol=3e-4)
        if request.sampling.temperature == 0:
            assert list(drawn.ids) == best


def test_bfloat16_logprobs_are_those_of_the_rounded_weights(root: Path) -> None:
    """A plain row: the weights are bfloat16's, the numbers within its rounding of float64 over the same weights."""
    folder = tiny_family("llama", root)
    experts = two_experts(folder)
    model = load(folder, torch.bfloat16)
    runner = RowRunner(model, AdapterBank([load_adapter(e) for e in experts]), rows=12, length=LENGTH)
    asked = [greedy(p, plan((0.0, 0.0))) for p in PROMPTS]
    asked += [greedy(p, guided((0.6, 0.4), (1.0, 0.0))) for p in PROMPTS[:2]]
    drawn = Engine(runner, [], chunk=5).generate(asked)
    exact = load(folder, torch.bfloat16).double()
    for request, got in zip(asked[: len(PROMPTS)], drawn, strict=False):
        logprobs, _ = formula(lambda lam: exact, request, got)
        error = np.abs(np.array(got.logprobs) - logprobs)
        assert 0 < error.max() < 0.4
        assert error.mean() < 0.08
    assert all(len(got.ids) == NEW for got in drawn)
