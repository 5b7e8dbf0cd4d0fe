"""Guidance by explicit value models: the models, an engine that has them, its arms, and the time of a step.

Legend: T states, E hidden size, V vocabulary, r rank of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from arms import Arm, ours
from naive import NaiveReference
from setting import (
    CANDIDATES,
    EXPERTS,
    HEAD_RANK,
    LOOKED_AT,
    PREFERENCES,
    RELATIVE_DELTA,
    SPREAD,
    Prompts,
    random_experts,
    setup,
)
from timing import Steps, time_steps
from transformers import PreTrainedModel

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.methods import Backbones, Setup, plan_for
from mage_ray.decoding.plan import Plan
from mage_ray.decoding.runner import RowRunner
from mage_ray.merging.adapter import Adapter
from mage_ray.merging.bank import AdapterBank
from mage_ray.merging.value_head import Kind, ValueHead


@torch.no_grad()
def random_values(model: PreTrainedModel, count: int, relative: float = RELATIVE_DELTA) -> list[Adapter]:
    """``count`` value models: experts as the policies are, from other seeds, each with a vocabulary head.

    Such a head has a V, too, so they serve as scalar ones as well.
    """
    embedding_VE = model.get_input_embeddings().weight
    assert isinstance(embedding_VE, torch.Tensor)
    ids = torch.randint(len(embedding_VE), (1, 64), generator=torch.Generator().manual_seed(0))
    # The first token's state is an outlier in many models.
    hidden_TE = model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state[0, 1:]
    backbones = random_experts(model, count, relative, first=EXPERTS)
    return [
        replace(backbone, name=f"value-{i}", head=_random_head(1000 + i, hidden_TE, embedding_VE))
        for i, backbone in enumerate(backbones)
    ]


def _random_head(seed: int, hidden_TE: torch.Tensor, embedding_VE: torch.Tensor) -> ValueHead:
    """A vocabulary head whose values differ by ``SPREAD`` over these states, and from token to token in each."""
    dice = torch.Generator(hidden_TE.device).manual_seed(seed)
    size = hidden_TE.shape[1]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=dice, device=hidden_TE.device)

    weight_E, bias = normal(size), float(normal(1))
    down_rE, up_Er = normal(HEAD_RANK, size) / size**0.5, normal(size, HEAD_RANK)
    weight_E *= SPREAD / (hidden_TE @ weight_E).std()
    up_Er *= SPREAD / (hidden_TE @ down_rE.t() @ up_Er.t() @ embedding_VE.t()).std(-1).mean()
    return ValueHead(weight_E, bias, down_rE, up_Er)


def value_setup(head: Kind, candidates: int) -> Setup:
    """``setup`` with three value models behind its experts."""
    policies, n = setup(), len(PREFERENCES[0])
    values = Backbones(tuple(range(policies.size, policies.size + n)), np.eye(n), value_models=True)
    return replace(
        policies,
        size=policies.size + n,
        sets={**policies.sets, "values": values},
        values="values",
        head=head,
        candidates=candidates,
    )


def guided_by_q(candidates: int) -> Plan:
    """MAGE-E-M: the soup, and the merged value models' Q of its candidates; two rows, one forward."""
    return plan_for("mage-e-m", PREFERENCES[0], value_setup("vocabulary", candidates))


def guided_by_v(candidates: int) -> Plan:
    """MAGE-E-M: the soup, and the merged value models' V behind each candidate; a second forward, over all of them."""
    return plan_for("mage-e-m", PREFERENCES[0], value_setup("scalar", candidates))


def value_engine(model: PreTrainedModel, experts: Sequence[Adapter], batch: int, length: int) -> Engine:
    """An engine for ``batch`` of these plans of up to ``length`` tokens, the candidates not counted."""
    runner = RowRunner(copy.deepcopy(model), AdapterBank(experts), rows=2 * batch, length=length + LOOKED_AT)
    return Engine(runner, stop=[])


def make_value_arms(engine: Engine, new_tokens: int, batches: Sequence[int], only: Collection[str]) -> list[Arm]:
    """The arms named in ``only``, all for ``PREFERENCES[0]``; the unguided one at batch 1 alone."""
    plain = plan_for("bone-soup", PREFERENCES[0], value_setup("vocabulary", CANDIDATES))
    arms = [ours("unguided_k6", engine, [plain], new_tokens)]
    for batch in batches:
        arms += [
            ours("explicit_q", engine, [guided_by_q(CANDIDATES)] * batch, new_tokens),
            ours("value_v20", engine, [guided_by_v(LOOKED_AT)] * batch, new_tokens),
        ]
    return [arm for arm in arms if arm.name in only]


def value_steps(
    engine: Engine, prompts: Prompts, naive: NaiveReference, rounds: int, prompt_tokens: int, new_tokens: int
) -> dict[str, Steps]:
    """``timing.time_steps`` at batch 1, guided by V and by Q of equally many candidates."""
    plans = {"value_v20": guided_by_v(LOOKED_AT), "value_q20": guided_by_q(LOOKED_AT)}
    return time_steps(engine, plans, 1, rounds, prompts, prompt_tokens, new_tokens, naive)


def v_over_q(steps: Mapping[str, Steps], statistic: Callable[[Sequence[float]], float]) -> float:
    """The time of a step guided by V over that of one guided by Q."""
    return statistic(steps["value_v20"].seconds) / statistic(steps["value_q20"].seconds)
