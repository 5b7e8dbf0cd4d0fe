"""Service: a study as it is served: what may be asked for, and the plans and requests that come of it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from deployments.answers import Mage, plan_rows
from deployments.options import Options
from deployments.protocol import Asked, PatchRequest, Prompt, check_preferences, check_served
from deployments.workers import Part
from mage_ray.chat import Chat
from mage_ray.decoding.methods import EXPLICIT, KNOWN, Strength, plan_for, planned_at
from mage_ray.decoding.plan import Plan
from mage_ray.decoding.request import Request, Sampling
from mage_ray.decoding.seeds import derived_seed
from mage_ray.errors import FieldError, UserError
from mage_ray.folder import StudyFolder
from mage_ray.generator import bank_setup, load_experts, needed_sets, set_digests
from mage_ray.models import load_tokenizer, tokenizer_fingerprint
from mage_ray.objectives.reward import RECORDS
from mage_ray.preference import Preference, named_preference
from mage_ray.search.recipe import load_recipe
from mage_ray.storage.store import is_url

DEFAULT_METHOD = "mage-i-m"
"""Where no recipe says another one."""


@dataclass(frozen=True)
class Setting:
    """What a client may turn while its answer is written; None where the study's constant holds."""

    preference: Preference
    method: str
    strength: float | None = None
    candidates: int | None = None


class Service:
    """A study's folder and the options of its deployment, without its weights.

    ``study`` has the recipe's constants, where there is one. Raises UserError, one line, for what can't be served.
    """

    def __init__(self, options: Options, study: str, recipe: str | None = None) -> None:
        self.options = options
        self.folder = StudyFolder.open(study)
        self.recipe = None if recipe is None else load_recipe(recipe)
        self.study = self.folder.study if self.recipe is None else self.recipe.applied(self.folder.study)
        self.objectives = self.study.objective_names
        self._sets = tuple(needed_sets(self.folder, self.study))
        self._setup = bank_setup(self.study, self._sets)
        self.experts = [f"{name}-{member}" for name in self._sets for member in self.study.members(name)]
        self.chat = Chat(load_tokenizer(self.study.model), None, self.study.system)
        self._encoding = Lock()  # which may set a tokenizer up anew, and so not in two threads at once
        self._guides: Service | None = None
        if options.guide_study is not None and study != options.guide_study:
            self._guides = Service(options, options.guide_study)
            if self._guides.objectives != self.objectives:
                names = ", ".join(self._guides.objectives)
                raise FieldError("guide_study", f"objectives {names}", ", ".join(self.objectives))
            if tokenizer_fingerprint(self._guides.chat.tokenizer) != tokenizer_fingerprint(self.chat.tokenizer):
                raise FieldError("guide_study", "a model with another tokenizer", "one whose tokens are the same")
            self._setup = replace(self._setup, guides=self._guides._setup)
        self.vocabulary = len(self.chat.tokenizer)
        self.methods = self._methods()
        self.method, self.temperature, self.top_p = DEFAULT_METHOD, 1.0, 1.0
        if self.recipe is not None:
            self.method, self.temperature, self.top_p = self.recipe.method, self.recipe.temperature, self.recipe.top_p
        if self.method not in self.methods:
            raise FieldError("recipe.method", self.method, f"one of {', '.join(self.methods)}")
        self.topology: Any = "split" if options.split else "fused"

    @classmethod
    def configured(cls, options: Options, config: Mapping[str, Any]) -> Service:
        """What a ``user_config`` names: a study and a recipe, which may be null for none.

        What it doesn't name is the options'; their recipe is for their own study alone.
        """
        for field in ("study", "recipe"):
            if not isinstance(config.get(field), str | None):
                raise FieldError(field, config[field], "a path")
        study = config.get("study") or options.study
        return cls(options, study, config.get("recipe", options.recipe if study == options.study else None))

    def _methods(self) -> dict[str, Plan]:
        """Those that this study has the experts for, each with its plan at equal weights, or where it has one."""
        equal = (1 / len(self.objectives),) * len(self.objectives)
        plans = {}
        for name in KNOWN:
            try:
                preferences = planned_at(name, self._setup) or [equal]
                plans[name] = self.plan(Setting(preferences[0], name))
            except FieldError as error:
                if error.field != "method":
                    raise
        return plans

    def check_experts(self) -> None:
        """Raises UserError for an expert that is missing or corrupt."""
        load_experts(self.folder, self.study, self._sets)
        if self._guides is not None:
            self._guides.check_experts()

    @cached_property
    def _digests(self) -> dict[str, list[list[str]]]:
        """What each of its sets holds. Read once, so that workers that are replaced are those of the beginning."""
        return {name: set_digests(self.folder, self.study, name) for name in self._sets}

    def parts(self) -> list[Part]:
        """What its gang's workers load."""
        options = self.options
        cpus = [int(bundle.get("CPU", 1)) for bundle in options.bundles(node_cpus(options.selectors[0]))]
        guides = self._guides or self
        services = [self, *[guides] * (len(cpus) - 1)]
        return [
            Part(s.folder.place, s._digests, options.rows, options.length, options.memory, threads)
            for s, threads in zip(services, cpus, strict=True)
        ]

    def content(self) -> Any:
        """What its workers hold: equal for services that can share them."""
        guides = None if self._guides is None else self._guides.content()
        return self.folder.place, self.study.model, self.study.dtype, self._sets, self._digests, guides

    def plan(self, setting: Setting) -> Plan:
        """The plan of a setting, its rows placed in the gang. Raises FieldError."""
        setup = self._setup.given(setting.strength, setting.candidates)
        plan = plan_for(setting.method, setting.preference, setup)
        guides = self.options.workers - 1
        if self._guides is None:
            away = list(range(1, len(plan.rows)))
        else:  # The guides have another bank: what is over this one's experts stays here.
            away = [i for i, row in enumerate(plan.rows) if row.home > 0]
        home = {i: 1 + n % guides for n, i in enumerate(away)} if guides else {}
        return plan.placed(lambda i: home.get(i, 0))

    def _setting(self, asked: Asked) -> tuple[Setting, tuple[tuple[int, Setting], ...]]:
        """What a request asks for, and what it wants changed later on. Raises FieldError, or ApiError 404."""
        check_served(asked, self.study.name, list(self.methods), self.vocabulary)
        preference, schedule = check_preferences(asked, self.objectives)
        first = Setting(preference, asked.method or self.method, asked.strength, asked.candidates)
        return first, tuple((at, replace(first, preference=later)) for at, later in schedule)

    def check(self, patch: PatchRequest) -> None:
        """Raises FieldError for a change that can't be made here."""
        check_served(patch, self.study.name, list(self.methods), self.vocabulary)
        named_preference(patch.preference, self.objectives)

    def changed(self, setting: Setting, patch: PatchRequest) -> Setting:
        """The setting with what a patch changes. Raises FieldError."""
        self.check(patch)
        given = {name: getattr(patch, name) for name in ("method", "strength", "candidates")}
        given = {name: value for name, value in given.items() if value is not None}
        return replace(setting, preference=named_preference(patch.preference, self.objectives), **given)

    def requests(self, asked: Asked) -> tuple[list[Request], dict[Plan, Setting]]:
        """A request for each answer, ``n`` to a prompt, of different seeds, and the setting of each of their plans.

        The first setting is the one that they begin with. A long prompt takes its time: not for an event loop. Raises
        FieldError, or ApiError 404.
        """
        options = self.options
        for field, value, most in (
            ("n", asked.n, options.choices),
            ("max_tokens", asked.max_tokens, options.max_tokens),
        ):
            if value is not None and value > most:
                raise FieldError(field, value, f"at most {most}")
        setting, schedule = self._setting(asked)
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        sampling = Sampling(
            asked.max_tokens or options.default_max_tokens,
            self.temperature if asked.temperature is None else asked.temperature,
            self.top_p if asked.top_p is None else asked.top_p,
            stop=asked.stop,
        )
        plan, later = self.plan(setting), [(at, self.plan(other), other) for at, other in schedule]
        plans = tuple((at, planned) for at, planned, _ in later)
        with self._encoding:
            encoded = [self._encode(prompt) for prompt in asked.prompts]
        prompts = [tokens for tokens in encoded for _ in range(asked.n)]
        requests = [
            Request(prompt, plan, replace(sampling, seed=derived_seed(seed, 0, i)), schedule=plans)
            for i, prompt in enumerate(prompts)
        ]
        return requests, {plan: setting, **{planned: other for _, planned, other in later}}

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return self.chat.encode_text(prompt)
        if isinstance(prompt, tuple):
            return prompt
        return self.chat.encode_messages(prompt)

    def mage(self, setting: Setting, generations: Sequence[str], **rest: Any) -> Mage:
        """The block ``mage`` of an answer at this setting."""
        setup = self._setup
        strength = setup.strength_at(setting.preference, setting.method in EXPLICIT)
        guides = None if self._guides is None else self._guides.experts
        return Mage(
            self.named(setting.preference),
            setting.method,
            strength if setting.strength is None else setting.strength,
            setup.candidates if setting.candidates is None else setting.candidates,
            self.topology,
            generations,
            plan_rows(self.plan(setting), self.experts, guides),
            **rest,
        )

    def named(self, preference: Sequence[float]) -> dict[str, float]:
        """A preference by the objectives' names."""
        return dict(zip(self.objectives, preference, strict=True))

    def described(self, length: int, rows: int, revision: str) -> dict[str, Any]:
        """What ``/v1/objectives`` says."""
        study, options = self.study, self.options
        signs = json.loads(self.folder.normalisation.read_text())["sign"]
        return {
            "object": "objectives",
            "study": study.name,
            "model": Path(study.model).name if is_url(study.model) or Path(study.model).is_absolute() else study.model,
            "objectives": [
                {"name": name, "type": spec.type, "direction": "maximise" if sign > 0 else "minimise"}
                for (name, spec), sign in zip(study.objectives.items(), signs, strict=True)
            ],
            "methods": [self._described(name, plan) for name, plan in self.methods.items()],
            "defaults": {
                "method": self.method,
                "strength": self._told(self._setup.strength),
                "value_strength": self._told(self._setup.value_strength),
                "candidates": self._setup.candidates,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "max_tokens": options.default_max_tokens,
            },
            "limits": {
                "length": length,
                "max_tokens": options.max_tokens,
                "n": options.choices,
                "rows": rows,
                "queue": options.queue,
            },
            "recipe": self.provenance(),
            "topology": self.topology,
            "revision": revision,
        }

    def _described(self, method: str, plan: Plan) -> dict[str, Any]:
        """A method; with the preferences that it is for, where these are not all."""
        told: dict[str, Any] = {"name": method, "guided": bool(plan.values), "rows": len(plan.rows)}
        if (preferences := planned_at(method, self._setup)) is not None:
            told["preferences"] = [self.named(preference) for preference in preferences]
        return told

    def provenance(self) -> dict[str, Any] | None:
        """The recipe's method and, where a search wrote it, what is to be told of that; None without a recipe."""
        if self.recipe is None:
            return None
        source = self.recipe.provenance
        told = ("date", "algorithm", "metrics", "trials")
        return {"method": self.recipe.method, **{name: getattr(source, name, None) for name in told}}

    def _told(self, strength: Strength | None) -> Any:
        """One number, or one for each objective by its name."""
        return self.named(strength) if isinstance(strength, tuple) else strength

    def front(self) -> Mapping[str, Any]:
        """What ``/v1/front`` says: the evaluated front of each method with the study's own constants, as the report."""
        from mage_ray.evaluation.evaluate import evaluated_front

        scored_by = [self.folder.rewards / name / file for name in self.study.reward_models for file in RECORDS]
        with suppress(UserError):  # what was there the last time
            self.folder.fetch(self.folder.evaluation, *scored_by, patient=False)
        methods = evaluated_front(self.folder.study, self.folder)
        note = "" if self.recipe is None else "with the study's own constants, not those of the recipe that is served"
        note = note if methods else "this study was not evaluated"
        return {
            "object": "front",
            "objectives": self.objectives,
            "methods": {
                method: [
                    {"preference": self.named(p) if p else {}, "rewards": self.named(rewards)} for p, rewards in points
                ]
                for method, points in methods.items()
            },
            "note": note,
        }


def node_cpus(labels: Mapping[str, str]) -> int:
    """CPUs of the largest node that has these labels. Raises UserError where none has."""
    import os

    import ray

    from mage_ray.cluster import nodes_with

    if not ray.is_initialized():
        return os.cpu_count() or 1
    return int(max(node.get("CPU", 0) for node in nodes_with(labels))) or 1
