"""What every arm of the benchmark shares: model, experts, preferences, plans and prompts. All seeded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel

from mage_ray.decoding.methods import Backbones, Setup, plan_for
from mage_ray.decoding.plan import Plan
from mage_ray.merging.adapter import Adapter, Factors
from mage_ray.merging.bank import linear_shapes
from mage_ray.merging.coefficients import circulant_mix

EXPERTS = 3
RANK = 16
RELATIVE_DELTA = 0.08
"""Frobenius norm of an expert's delta over that of its weight. Texts stay texts, and change from the first words on."""
STRENGTH = 1.0
CANDIDATES = 50
BETA = 0.7
HEAD_RANK = 32
LOOKED_AT = 20
"""Candidates that a scalar value head looks at, in one forward."""
SPREAD = 2.0
"""Standard deviation of one head's V over states, and of its Q over tokens; of a merge's some 0.6 of that.

So at strength 1 the values and the base's log-probabilities both have a say in what is chosen.
"""
PREFERENCES = (
    (0.5, 0.3, 0.2),
    (0.2, 0.5, 0.3),
    (0.3, 0.2, 0.5),
    (0.7, 0.2, 0.1),
    (0.1, 0.7, 0.2),
    (0.2, 0.1, 0.7),
    (0.4, 0.4, 0.2),
    (0.45, 0.1, 0.45),
)
TINY = "tiny"

Prompt = tuple[int, ...]


class BenchError(Exception):
    """The benchmark can't give a figure that means anything. The message is one line."""


def load(name: str) -> PreTrainedModel:
    """The model that ``name`` leads to (``mage_ray.models.load_model``), or a tiny random one; float32, never stops."""
    if name == TINY:
        config = LlamaConfig(
            vocab_size=160,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
        )
        return without_stops(random_model(config, torch.device("cpu"), torch.float32))
    from mage_ray.models import load_model

    return without_stops(load_model(name))


def random_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this shape with random weights, made on the device itself."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def without_stops(model: PreTrainedModel) -> PreTrainedModel:
    """The same model; its ``generate`` no longer ends, or changes its choice, at any token."""
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, use_cache=True)
    return model


@torch.no_grad()
def random_experts(
    model: PreTrainedModel, count: int, relative: float = RELATIVE_DELTA, first: int = 0
) -> list[Adapter]:
    """``count`` rank-16 experts on all linears but the head, drawn from seeds ``first`` and up, one each.

    Each delta has ``relative`` times the Frobenius norm of the weight that it is added to.
    """
    head = model.get_output_embeddings()
    experts = []
    for seed in range(first, first + count):
        dice = torch.Generator(model.device).manual_seed(seed)
        factors = {}
        for name, (features_in, features_out) in linear_shapes(model).items():
            module = model.get_submodule(name)
            if module is head:
                continue
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            down = torch.randn(RANK, features_in, generator=dice, device=weight.device) / math.sqrt(features_in)
            up = torch.randn(features_out, RANK, generator=dice, device=weight.device)
            # |up @ down| is sqrt(out * r) on average, for unit entries of up and down of norm 1 a row.
            up *= relative * float(weight.float().norm()) / math.sqrt(features_out * RANK)
            # As a training would leave it: alpha = 2 r, so a scale of 2 outside the factors.
            factors[name] = Factors(down.to(weight.dtype), (up / 2).to(weight.dtype), 2.0)
        experts.append(Adapter(f"expert-{seed}", factors))
    return experts


def setup() -> Setup:
    """Three experts, served as Bone Soup's backbones for the base and as a plain soup for the guide.

    So a preference's base coefficients ``lam(mu)``, guide coefficients ``mu`` and 0 are three distinct rows.
    """
    n = len(PREFERENCES[0])
    everyone = tuple(range(n))
    sets = {"bone": Backbones(everyone, circulant_mix(n, BETA)), "soup": Backbones(everyone, np.eye(n))}
    return Setup(n, sets, base="bone", guide="soup", strength=STRENGTH, candidates=CANDIDATES)


def unguided(preference: Sequence[float]) -> Plan:
    """One row: the three experts merged for a preference."""
    return plan_for("bone-soup", preference, setup())


def guided(preference: Sequence[float]) -> Plan:
    """MAGE-I-M: three rows, 50 candidates, strength 1."""
    return plan_for("mage-i-m", preference, setup())


class Prompts:
    """Fresh prompts: windows at random places of one text, none twice at the same length.

    Fresh, so that no arm finds a prompt that an earlier run has left in a cache.
    """

    def __init__(self, ids: Sequence[int], seed: int = 0) -> None:
        self._ids = list(ids)
        self._dice = np.random.default_rng(seed)
        self._places: dict[int, list[int]] = {}

    @classmethod
    def of(cls, model: str) -> Prompts:
        """From the words of this project's own prompt list; random tokens for the tiny model."""
        if model == TINY:
            return cls.random(160)
        from mage_ray.models import load_tokenizer
        from mage_ray.prompts import load_prompts

        text = "\n".join(prompt.text for prompt in load_prompts("builtin"))
        return cls(load_tokenizer(model)(text)["input_ids"])

    @classmethod
    def random(cls, vocabulary: int) -> Prompts:
        """From random tokens."""
        return cls(np.random.default_rng(1).integers(0, vocabulary, 8192).tolist())

    def take(self, count: int, length: int) -> list[Prompt]:
        """``count`` prompts of ``length`` tokens. A text that is too short goes round."""
        taken = []
        for _ in range(count):
            places = self._places.get(length)
            if not places:
                places = self._places[length] = self._dice.permutation(len(self._ids)).tolist()
            place = places.pop()
            taken.append(tuple(self._ids[(place + i) % len(self._ids)] for i in range(length)))
        return taken
