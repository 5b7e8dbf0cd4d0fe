"""AdapterBank: the experts of a study, stacked once into the model that serves them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mage_ray.errors import FieldError
from mage_ray.merging.adapter import Adapter
from mage_ray.merging.mixed_linear import Layout, MixedLinear, RowMix


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The model's linears by name, each as (in, out) features. Conv1D, as GPT-2 has it, is a linear, too."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (int(module.weight.shape[0]), int(module.weight.shape[1]))
    return shapes


class AdapterBank:
    """K experts in the order given; a coefficient vector [K] over them picks a merged model.

    Experts may differ in rank, in scale and in which modules they touch.
    """

    def __init__(self, experts: Sequence[Adapter]) -> None:
        self.experts = tuple(experts)
        names = [expert.name for expert in self.experts]
        for name in names:
            if names.count(name) > 1:
                raise FieldError("experts", name, "each expert once")

    def __len__(self) -> int:
        return len(self.experts)

    def install(self, model: PreTrainedModel) -> RowMix:
        """Put a MixedLinear in place of every linear that an expert touches; from then on the model is the bank's.

        Raises FieldError when an expert doesn't fit the model.
        """
        linears = linear_shapes(model)
        for expert in self.experts:
            expert.check_fits(linears)
        mix = RowMix()
        layouts: dict[tuple[tuple[int, ...], tuple[float, ...]], Layout] = {}
        for name in linears:
            owners = [(k, expert.factors[name]) for k, expert in enumerate(self.experts) if name in expert.factors]
            if not owners:
                continue
            base = model.get_submodule(name)
            assert isinstance(base.weight, torch.Tensor)
            experts = tuple(k for k, f in owners for _ in range(f.down.shape[0]))
            scales = tuple(f.scale for _, f in owners for _ in range(f.down.shape[0]))
            if (experts, scales) not in layouts:
                layouts[experts, scales] = Layout(list(experts), list(scales), like=base.weight)
            down = torch.cat([f.down for _, f in owners], dim=0).to(base.weight)
            up = torch.cat([f.up for _, f in owners], dim=1).to(base.weight)
            model.set_submodule(name, MixedLinear(base, down, up, layouts[experts, scales], mix))
        return mix
