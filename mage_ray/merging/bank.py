"""AdapterBank: the experts of a study, stacked once into the model that serves them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mage_ray.errors import FieldError
from mage_ray.merging.adapter import Adapter
from mage_ray.merging.mixed_linear import Layout, MixedLinear, RowMix, SharedInput, weight_oi
from mage_ray.merging.packed import can_pack


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The model's linears by name, each as (in, out) features. Conv1D, as GPT-2 has it, is a linear, too."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (int(module.weight.shape[0]), int(module.weight.shape[1]))
    return shapes


def is_plain(module: nn.Module) -> bool:
    """Whether a module computes W x + b; quantised ones, for example, inherit from Linear and do another thing."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def shared_inputs(model: nn.Module) -> list[tuple[str, ...]]:
    """The model's linears in groups of one input, in the order of their calls, as seen in a forward of one token.

    Only linears that it calls exactly once are in it, so none when the model can't run such a forward. Those of a
    group got the same tensor object, with no change in place between them.
    """
    names = {module: name for name, module in model.named_modules() if is_plain(module)}
    calls: list[tuple[nn.Module, torch.Tensor, int]] = []

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        # The tensors are kept until the end: an id of one that is gone may come again.
        if args:
            calls.append((module, args[0], args[0]._version))

    hooks = [module.register_forward_pre_hook(record) for module in names]
    try:
        device = next(model.parameters()).device
        # Inference tensors don't count their changes.
        with torch.inference_mode(False), torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False, logits_to_keep=1)
    except Exception:  # a forward of a kind we don't know: then each linear stands alone
        return []
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(module for module, _, _ in calls)
    groups: dict[tuple[object, ...], list[str]] = {}
    for module, x, version in calls:
        if times[module] == 1:
            weight = weight_oi(module)
            key = (id(x), version, weight.dtype, weight.device, weight.shape[1])
            groups.setdefault(key, []).append(names[module])
    return [tuple(group) for group in groups.values()]


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
        """Build the experts into the model and lay out its linears for decoding; from then on the model is the bank's.

        Linears of one input become one product (SharedInput), on the CPU in a layout of their own (packed.py), whether
        experts touch them or not: a bank of no experts is the way to decode fast with the bare model. Their own weights
        are freed, but for those that another module uses, too. The model must be on its device already, and it can't be
        trained any more.

        Raises FieldError when an expert doesn't fit the model.
        """
        linears = linear_shapes(model)
        for expert in self.experts:
            expert.check_fits(linears)
        touched = {name for expert in self.experts for name in expert.factors}
        for name in touched:
            if not is_plain(model.get_submodule(name)):
                kind = type(model.get_submodule(name)).__name__
                raise FieldError("experts", f"module {name}, a {kind}", "linears whose result is W x + b")
        model.requires_grad_(False)
        seen = shared_inputs(model)
        alone = touched.difference(*seen)
        mix = RowMix(model)
        layouts: dict[tuple[tuple[int, ...], tuple[float, ...]], Layout] = {}
        for names in [*seen, *((name,) for name in linears if name in alone)]:
            bases = [model.get_submodule(name) for name in names]
            factors = [{k: e.factors[n] for k, e in enumerate(self.experts) if n in e.factors} for n in names]
            if len(names) > 1 or factors[0] or can_pack(weight_oi(bases[0])):
                group = SharedInput(bases, factors, layouts, mix)
                for member, (name, base) in enumerate(zip(names, bases, strict=True)):
                    model.set_submodule(name, MixedLinear(base, group, member))
        return mix
