"""LoRA adapters in PEFT's file format, read and written without PEFT.

Legend: in/out a linear's features, r an adapter's rank in one module.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from mage_ray.errors import FieldError, UserError
from mage_ray.files import atomic_path, write_atomic
from mage_ray.merging.value_head import ValueHead

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ORIGIN_FILE = "mage_ray.json"
"""What the adapter was trained from, by content; beside PEFT's files, which have no place for it."""

HEAD_FILE = "value_head.safetensors"
"""A value model's head, beside its adapter."""

_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")

# Variants whose delta is not scale * B A, or that change more than linears; they can't be merged exactly.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "megatron_config": (None,),
}


@dataclass(frozen=True)
class Factors:
    """One module's low-rank delta: ``scale * up @ down``, with down [r, in] and up [out, r]."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def delta(self) -> torch.Tensor:
        """The delta of the weight, [out, in], in float64."""
        return self.scale * (self.up.double() @ self.down.double())


@dataclass(frozen=True)
class Adapter:
    """A LoRA expert: ``factors`` by the module's name in the base model.

    ``base_model`` and ``tokenizer`` are content fingerprints of what it was trained from, None where unknown (an
    adapter that another program made); ``base_name`` is the name PEFT records.
    """

    name: str
    factors: Mapping[str, Factors]
    base_name: str | None = None
    base_model: str | None = None
    tokenizer: str | None = None
    fan_in_fan_out: bool = False
    head: ValueHead | None = None
    """A value model's head; None for a policy."""
    notes: Mapping[str, Any] = field(default_factory=dict)

    def check_origin(self, base_model: str, tokenizer: str) -> None:
        """Raises FieldError when the adapter was trained from another base model or tokenizer, as far as it says."""
        for what, mine, theirs in (
            ("base model", self.base_model, base_model),
            ("tokenizer", self.tokenizer, tokenizer),
        ):
            if mine is not None and mine != theirs:
                raise FieldError(f"adapter {self.name}", f"one of another {what} ({mine})", f"{what} {theirs}")

    def check_fits(self, linears: Mapping[str, tuple[int, int]]) -> None:
        """Raises FieldError when a module is missing among ``linears`` (name -> (in, out)) or has another shape."""
        for module, f in self.factors.items():
            shape = linears.get(module)
            if shape is None:
                raise FieldError(f"adapter {self.name}", f"module {module}", "linear modules of this base model")
            if (f.down.shape[1], f.up.shape[0]) != shape:
                got = f"{module} of {f.down.shape[1]} to {f.up.shape[0]} features"
                raise FieldError(f"adapter {self.name}", got, f"{shape[0]} to {shape[1]}, as in this base model")


def load_adapter(folder: Path | str, name: str | None = None) -> Adapter:
    """The adapter in a PEFT folder.

    Raises UserError, one line: files missing or corrupt, weights not finite, or a kind of adapter whose delta isn't
    ``scale * B A`` on linears (DoRA, trained biases, whole modules), since such a one can't be merged exactly.
    """
    folder = Path(folder)
    name = name or folder.name
    config = read_json(folder / CONFIG_FILE, name)
    if config.get("peft_type") != "LORA":
        raise FieldError(f"adapter {name}: peft_type", config.get("peft_type"), "LORA")
    for key, plain in _UNSUPPORTED.items():
        if config.get(key) not in plain:
            raise FieldError(f"adapter {name}: {key}", config[key], f"{plain[0]} (others can't be merged exactly)")
    origin = read_json(folder / ORIGIN_FILE, name) if (folder / ORIGIN_FILE).exists() else {}
    return Adapter(
        name=name,
        factors=_factors(_read_tensors(folder / WEIGHTS_FILE, name), config, name),
        base_name=config.get("base_model_name_or_path"),
        base_model=origin.get("base_model"),
        tokenizer=origin.get("tokenizer"),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        head=ValueHead.of(_read_tensors(folder / HEAD_FILE, name), name) if (folder / HEAD_FILE).exists() else None,
        notes=origin,
    )


def load_value_model(folder: Path) -> Adapter:
    """``load_adapter``, and a head must be there. Raises UserError when it isn't."""
    adapter = load_adapter(folder)
    if adapter.head is None:
        raise UserError(f"{folder}: a value model without its head ({HEAD_FILE}); delete it to train it anew")
    return adapter


def save_adapter(adapter: Adapter, folder: Path | str) -> None:
    """Write the adapter as a folder that PEFT loads; all of it or nothing. Raises OSError when it can't be written.

    Every module gets its own rank and alpha, with ``alpha / r`` its scale.
    """
    ranks = {module: int(f.down.shape[0]) for module, f in adapter.factors.items()}
    largest = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_name,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(ranks),
        "rank_pattern": {re.escape(module): rank for module, rank in ranks.items()},
        "alpha_pattern": {re.escape(module): ranks[module] * f.scale for module, f in adapter.factors.items()},
    }
    tensors = {}
    for module, f in adapter.factors.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = f.down.contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = f.up.contiguous()
    origin = {"base_model": adapter.base_model, "tokenizer": adapter.tokenizer, **adapter.notes}
    with atomic_path(Path(folder)) as partial:
        partial.mkdir()
        write_atomic(partial / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
        if adapter.head is not None:
            write_atomic(partial / HEAD_FILE, save(adapter.head.tensors()))
        write_atomic(partial / CONFIG_FILE, json.dumps(config, indent=1))
        write_atomic(partial / ORIGIN_FILE, json.dumps({k: v for k, v in origin.items() if v is not None}, indent=1))


def _factors(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], name: str) -> dict[str, Factors]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if not match or tensor.ndim != 2:
            raise FieldError(f"adapter {name}: weights", key, "lora_A and lora_B matrices of linear modules alone")
        if not torch.isfinite(tensor).all():
            raise FieldError(f"adapter {name}: {key}", "NaN or infinity", "finite weights")
        parts.setdefault(match["module"], {})[match["part"]] = tensor
    if not parts:
        raise FieldError(f"adapter {name}: weights", "none", "lora_A and lora_B of at least one module")
    factors = {}
    for module, part in parts.items():
        if set(part) != {"A", "B"} or part["A"].shape[0] != part["B"].shape[1]:
            raise FieldError(
                f"adapter {name}: {module}", sorted(part), "lora_A [r, in] and lora_B [out, r] of one rank"
            )
        factors[module] = Factors(part["A"], part["B"], _scale(module, int(part["A"].shape[0]), config))
    return factors


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """PEFT's scaling: alpha / r, or alpha / sqrt(r) when rank-stabilised; a pattern may give a module its own alpha."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read_json(path: Path, name: str) -> dict[str, Any]:
    """What one of the JSON files of adapter ``name`` holds. Raises UserError when it isn't there or is damaged."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"adapter {name}: {path} is missing, allowed: a PEFT adapter folder") from None
    except (OSError, ValueError):
        raise UserError(f"adapter {name}: {path} is not readable JSON, allowed: a PEFT adapter folder") from None
    if not isinstance(content, dict):
        raise UserError(f"adapter {name}: {path} holds no JSON object, allowed: a PEFT adapter folder")
    return content


def _read_tensors(path: Path, name: str) -> dict[str, torch.Tensor]:
    if not path.exists():
        raise UserError(f"adapter {name}: {path} is missing, allowed: safetensors weights")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter {name}: {path} is corrupt ({' '.join(str(error).split())[:80]})") from None
