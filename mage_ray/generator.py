"""Generator: a study's model and experts, ready to answer any prompt at any preference. The library's front door."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mage_ray.chat import Chat
from mage_ray.decoding.engine import Engine
from mage_ray.decoding.methods import PER_PREFERENCE, Backbones, Setup, Strength, plan_for
from mage_ray.decoding.plan import Cadence, Plan, Row
from mage_ray.decoding.request import Generation, Request, Sampling
from mage_ray.decoding.runner import RowRunner
from mage_ray.errors import FieldError, UserError
from mage_ray.folder import StudyFolder
from mage_ray.merging.adapter import WEIGHTS_FILE, Adapter, load_adapter, load_value_model
from mage_ray.merging.bank import AdapterBank
from mage_ray.models import load_model, load_tokenizer, model_fingerprint, tokenizer_fingerprint
from mage_ray.preference import check_preference, named_preference
from mage_ray.search.recipe import load_recipe
from mage_ray.study import Study

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Weights = Mapping[str, float] | Sequence[float]


class Generator:
    """Decodes with a model and the backbone sets of a study.

    ``rows`` rows of up to ``length`` tokens (prompt and answer) run at once; a request needs as many as its plan has.
    ``method`` and ``sampling`` are those of requests that name none.
    """

    def __init__(
        self,
        study: Study,
        experts: Mapping[str, Sequence[Adapter]],
        *,
        rows: int = 64,
        length: int = 1024,
        device: str | None = None,
        method: str = "mage-i-m",
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    ) -> None:
        self.study = study
        self.method, self.sampling = method, sampling
        self.runner, self.chat = load_rows(study, experts, rows, length, device=device)
        self.engine = Engine(self.runner, self.chat.stop, self.chat.decode)
        self.setup = bank_setup(study, list(experts))

    @classmethod
    def open(
        cls,
        folder: Path | str,
        *,
        recipe: Path | str | None = None,
        rows: int = 64,
        length: int = 1024,
        device: str | None = None,
    ) -> Generator:
        """The generator of a trained study's folder, with the constants of a ``recipe`` where one is named.

        Raises UserError, one line: files missing or corrupt, experts of another model or tokenizer, or a recipe of
        another study.
        """
        place = StudyFolder.open(folder)
        study = place.study
        if recipe is None:
            return cls(study, load_experts(place, study), rows=rows, length=length, device=device)
        chosen = load_recipe(recipe)
        study = chosen.applied(study)
        sampling = Sampling(temperature=chosen.temperature, top_p=chosen.top_p)
        experts = load_experts(place, study)
        return cls(study, experts, rows=rows, length=length, device=device, method=chosen.method, sampling=sampling)

    def plan(
        self,
        preference: Weights,
        method: str | None = None,
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
        return plan_for(method or self.method, mu, self.setup.given(strength, candidates, cadence, valued))

    def request(
        self,
        prompt: str,
        preference: Weights,
        method: str | None = None,
        *,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> Request:
        """A prompt as one request for ``run``. Options as of ``plan``. Raises FieldError."""
        return Request(self.chat.encode(prompt), self.plan(preference, method, **options), sampling or self.sampling)

    def generate(
        self, prompts: Sequence[str], preference: Weights, method: str | None = None, **options: Any
    ) -> list[Generation]:
        """One answer to each prompt, all in one batch. Options as of ``request``. Raises FieldError."""
        return self.run([self.request(prompt, preference, method, **options) for prompt in prompts])

    def stream(self, prompt: str, preference: Weights, method: str | None = None, **options: Any) -> Iterator[str]:
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
        reference = Row((0.0,) * self.setup.size)
        scores: list[list[float]] = []
        for begin in range(0, len(sequences), _SCORED_AT_ONCE):
            chunk = sequences[begin : begin + _SCORED_AT_ONCE]
            tokens = [[*prompt, *answer] for prompt, answer in chunk]
            scores += [s.tolist() for s in self.runner.score(reference, tokens, [len(prompt) for prompt, _ in chunk])]
        return scores


def load_rows(
    study: Study,
    experts: Mapping[str, Sequence[Adapter]],
    rows: int,
    length: int,
    *,
    memory: int | None = None,
    device: str | None = None,
) -> tuple[RowRunner, Chat]:
    """Rows of a study's model over these experts, as ``RowRunner`` has them but no longer than the model allows.

    Raises UserError, one line, for a model that can't be loaded or experts of another one.
    """
    model, tokenizer = load_model(study.model, study.dtype, device), load_tokenizer(study.model)
    bank = checked_bank(experts, model, tokenizer)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    runner = RowRunner(model, bank, rows, min(length, limit), memory=memory)
    return runner, Chat(tokenizer, model, study.system)


def checked_bank(
    experts: Mapping[str, Sequence[Adapter]], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> AdapterBank:
    """The bank of these sets' experts, one set after the other. Raises UserError for one of another model."""
    adapters = [adapter for members in experts.values() for adapter in members]
    if adapters:
        origin = model_fingerprint(model), tokenizer_fingerprint(tokenizer)
        for adapter in adapters:
            adapter.check_origin(*origin)
    return AdapterBank(adapters)


_SCORED_AT_ONCE = 16
"""Sequences in one scoring forward, which holds the logits of all their tokens: 16 of 50 tokens take 160 MB."""


def needed_sets(folder: StudyFolder, study: Study) -> list[str]:
    """The sets that a study's methods draw on, value models and baselines only where they are trained."""
    n = len(study.objectives)
    backbones = study.training.backbones
    single = [name for name, spec in backbones.items() if np.array_equal(spec.mix(n), np.eye(n))][:1]
    wanted = {study.guidance.base, study.guidance.guide, *single}
    valued = [] if study.value_set is None else [study.value_set]
    chosen = study.guidance.baselines
    more = [*valued, *(study.baselines if chosen is None else chosen)]
    return [name for name in backbones if name in wanted] + [name for name in more if is_trained(folder, study, name)]


def is_trained(folder: StudyFolder, study: Study, name: str) -> bool:
    """Whether all experts of a set are there."""
    return all((place / WEIGHTS_FILE).is_file() for place in set_places(folder, study, name))


def bank_setup(study: Study, sets: Sequence[str]) -> Setup:
    """What a study's methods draw on, with a bank that holds the experts of ``sets``, one set after the other."""
    n, guidance = len(study.objectives), study.guidance
    members: dict[str, Backbones] = {}
    size = 0
    for name in sets:
        mix, baseline = np.eye(n), None
        if name in study.training.backbones:
            mix = study.training.backbones[name].mix(n)
        elif name in study.baselines:
            baseline = study.baselines[name].kind
            mix = np.array(study.baseline_grid(name)) if baseline in PER_PREFERENCE else mix
        members[name] = Backbones(tuple(range(size, size + len(mix))), mix, name in study.values, baseline)
        size += len(mix)
    spec = study.value_spec
    return Setup(
        size=size,
        sets=members,
        base=guidance.base,
        guide=guidance.guide,
        strength=_strength(study, guidance.strength),
        value_strength=_strength(study, guidance.value_strength),
        candidates=guidance.candidates,
        extrapolation=study.by_objective(guidance.extrapolation),
        base_extrapolation=study.by_objective(guidance.base_extrapolation),
        base_map=None if guidance.base_map is None else guidance.base_map.map(n, "guidance.base_map"),
        guide_map=None if guidance.guide_map is None else guidance.guide_map.map(n, "guidance.guide_map"),
        cadence=guidance.cadence,
        values=study.value_set if study.value_set in members else None,
        head=guidance.head or (spec.head if spec is not None else "vocabulary"),
    )


def _strength(study: Study, given: float | Mapping[str, float]) -> Strength:
    return study.by_objective(given) if isinstance(given, Mapping) else given


def load_experts(folder: StudyFolder, study: Study, sets: Sequence[str] | None = None) -> dict[str, list[Adapter]]:
    """The adapters of each of ``sets`` (those that the study needs), in the order of ``Study.members``.

    Raises UserError when one is missing or has no head.
    """
    experts: dict[str, list[Adapter]] = {}
    for name in needed_sets(folder, study) if sets is None else sets:
        experts[name] = []
        for path in set_places(folder, study, name):
            if not path.is_dir():
                raise UserError(f"{path}: there is no expert, allowed: a study that was trained (mage-ray train)")
            experts[name].append(load_value_model(path) if name in study.values else load_adapter(path))
    return experts


def set_places(folder: StudyFolder, study: Study, name: str) -> list[Path]:
    """Where the experts of a set lie, in the order of ``Study.members``."""
    place = folder.value if name in study.values else folder.baseline if name in study.baselines else folder.expert
    return [place(name, member) for member in study.members(name)]


def sets_places(folder: StudyFolder, study: Study, sets: Iterable[str]) -> list[Path]:
    """The same of several sets, one after the other."""
    return [place for name in sets for place in set_places(folder, study, name)]


def set_digests(folder: StudyFolder, study: Study, name: str) -> list[list[str]]:
    """The contents of a set, expert by expert: digests of its weights and, where it has one, its head."""
    return [
        [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(place.glob("*.safetensors"))]
        for place in set_places(folder, study, name)
    ]
