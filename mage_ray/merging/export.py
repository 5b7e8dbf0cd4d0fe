"""A soup as files: a plain PEFT adapter by concatenation, or merged full weights. Both exact (docs/method.md)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mage_ray.errors import FieldError, UserError
from mage_ray.files import atomic_path
from mage_ray.merging.adapter import Adapter, Factors
from mage_ray.merging.bank import linear_shapes
from mage_ray.merging.value_head import merged_head


def soup(experts: Sequence[Adapter], coefficients: Sequence[float], name: str = "soup") -> Adapter:
    """The adapter whose delta is ``sum_i lam_i s_i B_i A_i``, by concatenating ranks (docs/method.md, exact).

    Experts of coefficient 0 are left out. Raises FieldError: a coefficient that isn't finite, all of them 0, another
    number of coefficients than experts, or experts of different bases.
    """
    if len(coefficients) != len(experts):
        raise FieldError("coefficients", list(coefficients), f"{len(experts)} numbers, one for each expert")
    if not np.isfinite(coefficients).all() or not np.any(coefficients):
        raise FieldError("coefficients", list(coefficients), "finite numbers, not all 0")
    first = experts[0]
    for expert in experts[1:]:
        if first.base_model and first.tokenizer:
            expert.check_origin(first.base_model, first.tokenizer)
        if expert.fan_in_fan_out != first.fan_in_fan_out:
            raise FieldError(f"adapter {expert.name}", "another layout of weights", "adapters of one base model")
    factors: dict[str, Factors] = {}
    for module in sorted({module for expert in experts for module in expert.factors}):
        parts = [
            (expert.factors[module], lam)
            for expert, lam in zip(experts, coefficients, strict=True)
            if lam != 0 and module in expert.factors
        ]
        shapes = {(f.down.shape[1], f.up.shape[0]) for f, _ in parts}
        if len(shapes) > 1:
            raise FieldError("experts", f"{module} of shapes {sorted(shapes)}", "adapters of one base model")
        if parts:
            down = torch.cat([f.down.float() for f, _ in parts])
            up = torch.cat([(lam * f.scale * f.up.double()).float() for f, lam in parts], dim=1)
            factors[module] = Factors(down, up, 1.0)
    notes = {"soup of": [e.name for e in experts], "coefficients": [float(c) for c in coefficients]}
    head = merged_head([expert.head for expert in experts], coefficients)
    origin = (first.base_name, first.base_model, first.tokenizer, first.fan_in_fan_out)
    return Adapter(name, factors, *origin, head, notes)


@torch.no_grad()
def merge_into(model: PreTrainedModel, adapter: Adapter) -> None:
    """Add an adapter's delta to the model's own weights, summed in float64 and rounded once.

    Raises FieldError when the adapter doesn't fit the model.
    """
    adapter.check_fits(linear_shapes(model))
    for name, f in adapter.factors.items():
        module = model.get_submodule(name)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        delta = f.delta() if isinstance(module, nn.Linear) else f.delta().T
        weight.copy_((weight.double() + delta.to(weight.device)).to(weight.dtype))


def save_full(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
    """Write model and tokenizer as a folder that transformers loads; all of it or nothing.

    Raises UserError or OSError when it can't be written.
    """
    with atomic_path(Path(folder)) as partial:
        try:
            model.save_pretrained(partial)
        except SafetensorError as error:
            raise UserError(f"{folder}: cannot be written ({' '.join(str(error).split())})") from None
        tokenizer.save_pretrained(partial)
