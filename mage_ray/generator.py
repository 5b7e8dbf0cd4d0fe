"""Generator: a study's model and experts, ready to answer any prompt at any preference. The library's front door."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mage_ray.chat import Chat
from mage_ray.decoding.engine import Engine
from mage_ray.decoding.plan import Backbones, Cadence, Plan, Row, Setup, plan_for
from mage_ray.decoding.request import Generation, Request, Sampling
from mage_ray.decoding.runner import RowRunner
from mage_ray.errors import FieldError, UserError
from mage_ray.merging.adapter import HEAD_FILE, Adapter, load_adapter
from mage_ray.merging.bank import AdapterBank
from mage_ray.models import load_model, load_tokenizer, model_fingerprint, tokenizer_fingerprint
from mage_ray.preference import check_preference, named_preference
from mage_ray.study import Study, StudyFolder

Weights = Mapping[str, float] | Sequence[float]


class Generator:
    """Decodes with a model and the backbone sets of a study.

    ``rows`` rows of up to ``length`` tokens (prompt and answer) run at once; a request needs as many as its plan has.
    """

    def __init__(
        self,
        study: Study,
        experts: Mapping[str, Sequence[Adapter]],
        *,
        rows: int = 64,
        length: int = 1024,
        device: str | None = None,
    ) -> None:
        self.study = study
        model = load_model(study.model, study.dtype, device)
        tokenizer = load_tokenizer(study.model)
        adapters = [adapter for members in experts.values() for adapter in members]
        if adapters:
            origin = model_fingerprint(model), tokenizer_fingerprint(tokenizer)
            for adapter in adapters:
                adapter.check_origin(*origin)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        runner = RowRunner(model, AdapterBank(adapters), rows, min(length, limit or length))
        self.chat = Chat(tokenizer, model, study.system)
        self.engine = Engine(runner, self.chat.stop, self.chat.decode)
        self.setup = bank_setup(study, list(experts))

    @classmethod
    def open(cls, folder: Path | str, *, rows: int = 64, length: int = 1024, device: str | None = None) -> Generator:
        """The generator of a trained study's folder.

        Raises UserError, one line: files missing or corrupt, or experts of another model or tokenizer.
        """
        place = StudyFolder(folder)
        study = place.study
        return cls(study, load_experts(place, study), rows=rows, length=length, device=device)

    def plan(
        self,
        preference: Weights,
        method: str,
        *,
        strength: float | None = None,
        candidates: int | None = None,
        cadence: Cadence | None = None,
        valued: bool = False,
    ) -> Plan:
        """The plan of a method at a preference, given by name or in the objectives' order.

        What isn't given is the study's; ``valued`` reports the guide's scores. Raises FieldError.
        """
        names = self.study.objective_names
        named = isinstance(preference, Mapping)
        mu = named_preference(preference, names) if named else check_preference(preference, names)  # type: ignore[arg-type]
        given = {"strength": strength, "candidates": candidates, "cadence": cadence}
        setup = replace(self.setup, valued=valued, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
        return plan_for(method, mu, setup)

    def request(
        self,
        prompt: str,
        preference: Weights,
        method: str = "mage-i-m",
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        **options: Any,
    ) -> Request:
        """A prompt as one request for ``run``. Options as of ``plan``. Raises FieldError."""
        return Request(self.chat.encode(prompt), self.plan(preference, method, **options), sampling)

    def generate(
        self, prompts: Sequence[str], preference: Weights, method: str = "mage-i-m", **options: Any
    ) -> list[Generation]:
        """One answer to each prompt, all in one batch. Options as of ``request``. Raises FieldError."""
        return self.run([self.request(prompt, preference, method, **options) for prompt in prompts])

    def stream(self, prompt: str, preference: Weights, method: str = "mage-i-m", **options: Any) -> Iterator[str]:
        """The answer to one prompt, piece by piece. Options as of ``request``. Raises FieldError."""
        request = self.request(prompt, preference, method, **options)
        return (token.text for token in self.engine.stream(request) if token.text)

    def run(self, requests: Sequence[Request]) -> list[Generation]:
        """Requests of any plans, in one continuous batch. Raises FieldError, before anything runs, for a bad one."""
        for index, request in enumerate(requests):
            try:
                self.engine.check(request)
            except FieldError as error:
                raise FieldError(f"requests.{index}.{error.field}", error.value, error.allowed) from None
        return [generation.require() for generation in self.engine.generate(requests)]

    def reference_logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """The reference model's log-probability of every answer token, for (prompt, answer) token sequences."""
        runner = self.engine.runner
        reference = Row((0.0,) * self.setup.size)
        scores: list[list[float]] = []
        for begin in range(0, len(sequences), _SCORED_AT_ONCE):
            chunk = sequences[begin : begin + _SCORED_AT_ONCE]
            tokens = [[*prompt, *answer] for prompt, answer in chunk]
            scores += [s.tolist() for s in runner.score(reference, tokens, [len(prompt) for prompt, _ in chunk])]
        return scores


_SCORED_AT_ONCE = 16
"""Sequences in one scoring forward, which holds the logits of all their tokens: 16 of 50 tokens take 160 MB."""


VALUES = "values"
"""The set of explicit value models, beside the backbone sets, which can't have this name."""


def trained_sets(folder: StudyFolder, study: Study) -> list[str]:
    """The sets that a study's methods draw on: its backbones, and its value models where they are trained."""
    valued = study.values is not None and all(folder.value(name).is_dir() for name in study.objective_names)
    return [*study.training.backbones, *([VALUES] if valued else [])]


def bank_setup(study: Study, sets: Sequence[str]) -> Setup:
    """What a study's methods draw on, with a bank that holds the experts of ``sets``, one set after the other."""
    n = len(study.objectives)
    mixes = [np.eye(n) if name == VALUES else study.training.backbones[name].mix(n) for name in sets]
    return Setup(
        size=n * len(sets),
        sets={
            name: Backbones(tuple(range(i * n, (i + 1) * n)), mix)
            for i, (name, mix) in enumerate(zip(sets, mixes, strict=True))
        },
        base=study.guidance.base,
        guide=study.guidance.guide,
        strength=study.guidance.strength,
        candidates=study.guidance.candidates,
        extrapolation=tuple(study.extrapolation()),
        cadence=study.guidance.cadence,
        values=VALUES if VALUES in sets else None,
        head=study.values.head if study.values is not None else "vocabulary",
    )


def load_experts(folder: StudyFolder, study: Study) -> dict[str, list[Adapter]]:
    """The adapters of each set, in the order of the objectives. Raises UserError when one is missing or has no head."""
    experts: dict[str, list[Adapter]] = {}
    for name in trained_sets(folder, study):
        experts[name] = []
        for objective in study.objective_names:
            path = folder.value(objective) if name == VALUES else folder.expert(name, objective)
            if not path.is_dir():
                raise UserError(f"{path}: there is no expert, allowed: a study that was trained (mage-ray train)")
            expert = load_adapter(path)
            if name == VALUES and expert.head is None:
                raise UserError(f"{path}: a value model without its head ({HEAD_FILE}); delete it to train it anew")
            experts[name].append(expert)
    return experts
