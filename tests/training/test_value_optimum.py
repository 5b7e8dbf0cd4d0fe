"""Trained values against those of a task that is solved exactly: three letters out of four, drawn from a tiny model.

A value model learns ``V(s) = E_base[f(r) | s]``. With ``f(r) = exp(r / eta)`` that is the exponential of the soft value
``V*(s) / eta`` of the KL-regularised optimum ``pi*(y) ~ pi_base(y) exp(r(y) / eta)`` (docs/method.md).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_tiny_model
from training_pools import valued_study
from transformers import AutoModelForCausalLM

from mage_ray.chat import Chat
from mage_ray.decoding.engine import Engine
from mage_ray.decoding.plan import Plan, Row
from mage_ray.decoding.request import Request, Sampling
from mage_ray.decoding.runner import RowRunner
from mage_ray.folder import StudyFolder
from mage_ray.merging.adapter import load_adapter
from mage_ray.merging.bank import AdapterBank
from mage_ray.merging.value_head import Kind
from mage_ray.models import load_model, load_tokenizer
from mage_ray.training.pairs import Sample
from mage_ray.training.ray_train import fit
from mage_ray.training.run import Example, Run

pytestmark = pytest.mark.slow

LETTERS, HORIZON, ETA = 4, 3, 1.0
TEXT = "ab"
ANSWERS = list(itertools.product(range(LETTERS), repeat=HORIZON))
STEPS, BATCH, RATE = 400, 32, 5e-3
COUNT = 4000

Answer = tuple[int, ...]
Values = Mapping[Answer, float]


def make_letters_model(folder: Path) -> Path:
    """A tiny model whose whole vocabulary is four letters: none of them ends an answer, none is left out."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    # A padding token's embedding would be zeros, on which no head can tell that token's value.
    make_tiny_model(folder, vocab_size=LETTERS, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    letters = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate("abcd")}, merges=[]))
    bare = "{{ messages[0]['content'] }}"
    PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="d", chat_template=bare).save_pretrained(folder)
    return folder


class Task:
    """The model's probability of every answer, in float64, a reward of each, and what follows from them."""

    def __init__(self, model: Path) -> None:
        self.model = model
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        self.prompt = Chat(load_tokenizer(str(model)), whole).encode(TEXT)
        with torch.inference_mode():
            logprobs_NTV = whole(torch.tensor([[*self.prompt, *y] for y in ANSWERS])).logits.log_softmax(-1)
        drawn_NT = logprobs_NTV[:, len(self.prompt) - 1 : -1].gather(-1, torch.tensor(ANSWERS)[:, :, None])[:, :, 0]
        self.base = {y: float(p) for y, p in zip(ANSWERS, drawn_NT.sum(-1).exp(), strict=True)}
        dice = np.random.default_rng(5)
        part = {s: float(dice.normal()) * 0.35 for s in prefixes()}
        self.reward = {y: sum(part[y[:t]] for t in range(1, HORIZON + 1)) for y in ANSWERS}

    def probability(self, prefix: Answer) -> float:
        """That an answer begins so."""
        return sum(p for y, p in self.base.items() if y[: len(prefix)] == prefix)

    def value(self, of: Callable[[float], float]) -> dict[Answer, float]:
        """``E_base[of(r) | s]`` of every prefix."""
        return {
            s: sum(self.base[y] * of(self.reward[y]) for y in ANSWERS if y[: len(s)] == s) / self.probability(s)
            for s in prefixes()
        }

    def guided(self, values: Values) -> dict[Answer, float]:
        """What ``pi(a | s) ~ pi_base(a | s) exp(values[s + a] / eta)`` makes of every answer."""
        found = dict.fromkeys(ANSWERS, 1.0)
        for y in ANSWERS:
            for t in range(HORIZON):
                each = [(*y[:t], a) for a in range(LETTERS)]
                weights = [self.probability(s) * np.exp(values[s] / ETA) for s in each]
                found[y] *= weights[y[t]] / sum(weights)
        return found

    def miss(self, got: Values, of: Callable[[float], float]) -> float:
        """The root mean squared error of values in units of their own spread, prefixes by their probability."""
        values = self.value(of)
        weight = np.array([self.probability(s) for s in got])
        want = np.array([values[s] for s in got])
        error = np.average((np.array(list(got.values())) - want) ** 2, weights=weight)
        spread = np.average((want - np.average(want, weights=weight)) ** 2, weights=weight)
        return float(np.sqrt(error / spread))


def prefixes() -> list[Answer]:
    return [s for t in range(HORIZON + 1) for s in itertools.product(range(LETTERS), repeat=t)]


def plain(reward: float) -> float:
    return reward


def soft(reward: float) -> float:
    return float(np.exp(reward / ETA))


def divergence(one: Values, other: Values) -> float:
    """KL(one || other), in nats."""
    return sum(p * float(np.log(p / other[y])) for y, p in one.items())


def distance(one: Values, other: Values) -> float:
    """Total variation."""
    return sum(abs(p - other[y]) for y, p in one.items()) / 2


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return Task(make_letters_model(tmp_path_factory.mktemp("letters") / "model"))


@pytest.fixture(scope="module")
def train(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains the value model of ``of(r)`` on answers that the model itself would give; each but once."""

    @cache
    def model(of: Callable[[float], float], target: str, head: Kind, steps: int = STEPS) -> Path:
        how = {"target": target, "lam": 0.7, "head": head, "lora": {"rank": 8, "alpha": 16}, "learning_rate": RATE}
        study = valued_study(task.model, {"checkpoint_every": steps}, steps=steps, batch_size=BATCH, **how)
        drawn = np.random.default_rng(6).choice(len(ANSWERS), steps * BATCH, p=list(task.base.values()))
        examples = [Example(Sample(TEXT, ANSWERS[i]), of(task.reward[ANSWERS[i]])) for i in drawn]
        home = StudyFolder(tmp_path_factory.mktemp("home"))
        run = Run("value-early", study, home, {"early": 1.0}, examples=examples, values=study.values["final"])
        return fit(run, in_process=True)

    return model


def make_runner(task: Task, checkpoint: Path) -> RowRunner:
    return RowRunner(load_model(str(task.model)), AdapterBank([load_adapter(checkpoint)]), len(ANSWERS), 32)


def read(task: Task, checkpoint: Path, kind: Kind) -> dict[Answer, float]:
    """What a value model says of every prefix but, with a vocabulary head, which says ``Q(s, a)``, the empty one."""
    runner = make_runner(task, checkpoint)
    if kind == "scalar":
        found = runner.values(Row((1.0,)), [[*task.prompt, *y] for y in ANSWERS], [len(task.prompt)] * len(ANSWERS))
        return {y[:t]: float(v[t]) for y, v in zip(ANSWERS, found, strict=True) for t in range(HORIZON + 1)}
    row, values = runner.start(Row((1.0,), "vocabulary")), {}
    for prefix in prefixes():
        if len(prefix) < HORIZON:
            runner.rewind(row, 0)
            scores_1V = runner.feed([row], [[*task.prompt, *prefix]]).scores([0])
            values |= {(*prefix, a): float(q) for a, q in enumerate(scores_1V[0])}
    return values


@pytest.mark.parametrize(("target", "head"), [("final", "vocabulary"), ("td", "scalar")])
def test_trained_values_approach_the_expected_reward(
    task: Task, train: Callable[..., Path], target: str, head: Kind
) -> None:
    late, soon = train(plain, target, head), train(plain, target, head, STEPS // 20)
    for kind in dict.fromkeys(("scalar", head)):
        missed, before = (task.miss(read(task, checkpoint, kind), plain) for checkpoint in (late, soon))
        assert missed < 0.25 and missed < 0.4 * before


@pytest.mark.parametrize(("target", "head"), [("final", "scalar"), ("td", "vocabulary")])
def test_soft_values_are_learnt_and_guide_to_the_optimum(
    task: Task, train: Callable[..., Path], target: str, head: Kind
) -> None:
    best = {y: p * soft(task.reward[y]) for y, p in task.base.items()}
    optimum = {y: p / sum(best.values()) for y, p in best.items()}
    exact = task.guided({s: ETA * np.log(v) for s, v in task.value(soft).items()})
    assert exact == pytest.approx(optimum)
    for kind in dict.fromkeys(("scalar", head)):
        said = read(task, train(soft, target, head), kind)
        assert task.miss(said, soft) < 0.25
        reached = task.guided({s: ETA * np.log(v) for s, v in said.items()})
        assert divergence(optimum, reached) < 0.1 * divergence(optimum, task.base)


@pytest.mark.parametrize("kind", ["scalar", "vocabulary"])
def test_what_trained_values_sample_is_near_what_exact_ones_would(
    task: Task, train: Callable[..., Path], kind: Kind
) -> None:
    engine = Engine(make_runner(task, train(plain, "final", "vocabulary")), stop=[])
    plan = Plan.guided((0.0,), [(Row((1.0,), kind), 1.0)], 1 / ETA, candidates=LETTERS)
    asked = [Request(task.prompt, plan, Sampling(HORIZON, 1.0, seed=s)) for s in range(COUNT)]
    counts = Counter(answer.require().ids for answer in engine.generate(asked))
    exact = task.guided(task.value(plain))
    assert distance({y: counts[y] / COUNT for y in ANSWERS}, exact) < 0.3 * distance(task.base, exact)
