"""Random LoRA adapters, made and saved by PEFT itself, for a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def make_adapter(model: Path, out: Path, seed: int = 0, scale: float = 0.3, **lora: Any) -> Path:
    """Save a PEFT adapter with random A and B (both of standard deviation ``scale``); ``lora`` goes to LoraConfig."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(**settings))
    dice = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=dice) * scale
    peft_model.save_pretrained(out)
    return out
