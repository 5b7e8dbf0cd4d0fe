"""What can be seen to be wrong with a comparison before hours are spent on its training."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mage_ray.comparison.settings import Constants, constants_that_matter, settings, with_constants
from mage_ray.comparison.tuning import matched_methods, validation_prompts
from mage_ray.comparison.variants import CHANCE, Variant, compared_methods, shuffled_methods, study_variants
from mage_ray.decoding.methods import PER_PREFERENCE, Setup
from mage_ray.errors import FieldError
from mage_ray.evaluation.strategies import way_to
from mage_ray.folder import StudyFolder
from mage_ray.generator import bank_setup
from mage_ray.preference import preference_label
from mage_ray.specs import BaselineSpec
from mage_ray.study import Study


def check_comparison(study: Study, folder: StudyFolder) -> None:
    """Raises UserError for what would end a comparison later: all its plans are made, over sets yet to be trained."""
    from mage_ray.models import resolve_model
    from mage_ray.training.baselines import check_baselines
    from mage_ray.training.experts import check_training
    from mage_ray.training.rewards import check_rewards
    from mage_ray.training.rollouts import search_prompts
    from mage_ray.training.values import check_values

    methods, spec = compared_methods(study), study.compare
    validation_prompts(study)
    if any(not own.decided for own in study.training.backbones.values()):
        search_prompts(study)
    check_training(study)
    for part, check in (
        (study.values, check_values),
        (study.baselines, check_baselines),
        (study.rewards, check_rewards),
    ):
        if part:
            check(study)
    if not all(map(math.isfinite, study.reference_point())):
        raise FieldError("evaluation.reference_point", study.evaluation.reference_point, "finite numbers")
    for field in ("base", "guide", "values"):
        known = list(study.values if field == "values" else study.training.backbones)
        for name in getattr(spec.space, field) or ():
            if name not in known:
                raise FieldError(f"compare.space.{field}", name, f"one of {', '.join(known) or 'none: there are none'}")
    for name in matched_methods(study):
        if name not in methods:
            raise FieldError("compare.matched", name, f"one of {', '.join(methods)}")
    _check_policies(study, methods)
    _check_controls(study, methods)
    if spec.judge is not None:
        try:
            resolve_model(spec.judge.model)
        except FieldError as error:
            raise FieldError(f"compare.judge.{error.field}", error.value, error.allowed) from None
    first = {name: own.betas[0] for name, own in study.training.backbones.items() if own.betas and not own.decided}
    for variant in study_variants(study.with_betas(first), folder):
        _check_plans(variant)


def drawn_on(study: Study, methods: Sequence[str]) -> dict[str, BaselineSpec]:
    """The sets of baselines that these methods draw on, the first of each kind."""
    kinds = {"arm" if method == "genarm" else method for method in methods}
    found: dict[str, str] = {}
    for name in study.guidance.baselines or study.baselines:
        if study.baselines[name].kind in kinds:
            found.setdefault(study.baselines[name].kind, name)
    return {name: study.baselines[name] for name in found.values()}


def _check_policies(study: Study, methods: Sequence[str]) -> None:
    """Policies that were trained each for one preference must be there for all of the test."""
    for name, own in drawn_on(study, methods).items():
        asked = [preference_label(mu) for mu in study.evaluation_grid()]
        missing = [label for label in asked if label not in study.members(name)]
        if own.kind in PER_PREFERENCE and missing:
            allowed = f"a grid that has all preferences of the test, {missing[0]} for one"
            raise FieldError(f"baselines.{name}.grid", own.grid, allowed)


def _check_controls(study: Study, methods: Sequence[str]) -> None:
    shuffled, training = shuffled_methods(study), study.training
    if shuffled and (training.method != "dpo" or training.rounds > 1):
        allowed = "nothing, where training scores its own samples (grpo, or several rounds): only the pool is shuffled"
        raise FieldError("compare.shuffled", shuffled, allowed)
    if shuffled and not {*CHANCE} & {*methods}:
        raise FieldError("compare.methods", ", ".join(methods), f"{' or '.join(CHANCE)} among them, beside shuffled")
    if study.compare.judge is not None and "reference" not in methods:
        raise FieldError("compare.methods", ", ".join(methods), "reference among them, where there is a judge")


def _check_plans(variant: Variant) -> None:
    """Make the plans of all settings of all methods, at the preferences where they will be wanted."""
    study = variant.study
    sets = [*study.training.backbones, *study.values, *(study.guidance.baselines or study.baselines)]

    def setup_of(constants: Constants) -> Setup:
        return bank_setup(with_constants(study, constants), sets)

    for method in variant.methods:
        names = constants_that_matter(study, method, setup_of, study.validation_grid())
        tried = settings(study, method, names)
        chosen = len(tried) > 1 or (not variant.name and method in matched_methods(study))
        for constants in tried:
            for mu in [*study.evaluation_grid(), *(study.validation_grid() if chosen else ())]:
                way_to(method, mu, setup_of(constants), study)
