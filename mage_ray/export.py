"""Write a soup as files that PEFT or transformers loads, from experts' folders or from a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mage_ray.decoding.methods import plan_for
from mage_ray.errors import FieldError, UserError
from mage_ray.folder import StudyFolder
from mage_ray.generator import bank_setup, load_experts
from mage_ray.merging.adapter import Adapter, load_adapter, save_adapter
from mage_ray.merging.export import merge_into, save_full, soup
from mage_ray.models import load_model, load_tokenizer, model_fingerprint, tokenizer_fingerprint
from mage_ray.preference import parse_preference
from mage_ray.search.recipe import load_recipe


def export_experts(
    experts: Sequence[Path | str], coefficients: Sequence[float], out: Path, full: bool, model: str | None = None
) -> None:
    """Merge adapters by the given coefficients into ``out``: a PEFT adapter, or with ``full`` the merged model.

    Raises FieldError or UserError: ``out`` exists, an adapter is unusable, or not of ``model``.
    """
    check_free(out)
    merged = soup([load_adapter(expert) for expert in experts], coefficients, out.name)
    write_soup(merged, out, full, model)


def export_study(
    study: Path | str, preference: str, method: str | None, out: Path, full: bool, recipe: Path | str | None = None
) -> None:
    """Merge a study's experts for a preference, by a method that runs one row, with the constants of a ``recipe``.

    Without a method it is the recipe's, or ``bone-soup`` where that one is guided. Raises FieldError or UserError.
    """
    check_free(out)
    folder = StudyFolder.open(study)
    chosen = None if recipe is None else load_recipe(recipe)
    spec = folder.study if chosen is None else chosen.applied(folder.study)
    experts = load_experts(folder, spec)
    mu = parse_preference(preference, spec.objective_names)
    setup = bank_setup(spec, list(experts))
    if method is None:
        own = None if chosen is None else plan_for(chosen.method, mu, setup)
        method = chosen.method if chosen is not None and own is not None and len(own.rows) == 1 else "bone-soup"
    plan = plan_for(method, mu, setup)
    if len(plan.rows) != 1:
        raise FieldError("method", method, "a method of one row (rewarded-soup, bone-soup, extrapolated-soup)")
    adapters = [adapter for members in experts.values() for adapter in members]
    write_soup(soup(adapters, plan.rows[0].coefficients, out.name), out, full, spec.model)


def check_free(out: Path) -> None:
    """Raises FieldError when ``out`` exists: an export never overwrites."""
    if out.exists():
        raise FieldError("--out", str(out), "a folder that isn't there yet")


def write_soup(merged: Adapter, out: Path, full: bool, model: str | None) -> None:
    """Write the merged adapter, or the full model that it makes of its base."""
    if not full:
        save_adapter(merged, out)
        return
    name = model or merged.base_name
    if name is None:
        raise UserError("--model: got nothing, allowed: the base model, since the experts don't name theirs")
    base, tokenizer = load_model(name), load_tokenizer(name)
    merged.check_origin(model_fingerprint(base), tokenizer_fingerprint(tokenizer))
    merge_into(base, merged)
    save_full(base, tokenizer, out)
