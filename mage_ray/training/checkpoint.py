"""What a run needs to go on where it was: LoRA weights, AdamW's moments, the step. Safetensors and JSON only.

A checkpoint is a folder: a PEFT adapter (``adapter_model.safetensors``, ``adapter_config.json``), ``state.json`` and
one ``optimiser-<rank>.safetensors`` for each worker, since ZeRO gives each its own part.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mage_ray.errors import UserError
from mage_ray.files import atomic_path
from mage_ray.merging.adapter import CONFIG_FILE, HEAD_FILE, ORIGIN_FILE, WEIGHTS_FILE
from mage_ray.training.zero import optimiser_tensors

if TYPE_CHECKING:
    import torch

STATE = "state.json"
BACKBONE, HEAD = "backbone.", "head."
"""What the names of a value model's parameters begin with."""


@dataclass(frozen=True)
class TrainingState:
    """After how many steps a checkpoint was made, by how many workers, and what the last step measured."""

    step: int
    workers: int
    metrics: dict[str, float] = field(default_factory=dict)


def save_adapter(folder: Path, weights: Mapping[str, torch.Tensor], config: Any) -> None:
    """A PEFT adapter: ``weights`` by PEFT's parameter names (with the adapter's name in them), and its LoraConfig.

    A value model's head among them goes into a file of its own.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    head = {name.removeprefix(HEAD): tensor for name, tensor in weights.items() if name.startswith(HEAD)}
    lora = {_lora_name(name): tensor for name, tensor in weights.items() if not name.startswith(HEAD)}
    save_file(lora, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if head:
        save_file(head, folder / HEAD_FILE, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _lora_name(parameter: str) -> str:
    return parameter.removeprefix(BACKBONE).replace(".default.", ".")


def export_checkpoint(checkpoint: Path, place: Path, record: Mapping[str, Any]) -> None:
    """Put a finished run's adapter, with its head where it has one, into ``place``, all at once, with its record."""
    with atomic_path(place) as partial:
        partial.mkdir()
        for name in (WEIGHTS_FILE, CONFIG_FILE, HEAD_FILE):
            if (checkpoint / name).exists():
                shutil.copyfile(checkpoint / name, partial / name)
        (partial / ORIGIN_FILE).write_text(json.dumps(record, indent=2) + "\n")


def load_adapter_weights(folder: Path, model: torch.nn.Module) -> None:
    """Put an adapter's weights into a PEFT model's trainable parameters. Before DeepSpeed partitions them.

    Raises UserError when the file is damaged or is of another model.
    """
    import torch

    stored = _read(folder / WEIGHTS_FILE)
    if (folder / HEAD_FILE).exists():
        stored |= {HEAD + name: tensor for name, tensor in _read(folder / HEAD_FILE).items()}
    parameters = {_lora_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    if stored.keys() != parameters.keys():
        raise UserError(f"{folder}: not an adapter of this study's model; delete it, and the next run makes it again")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])


def save_optimiser(folder: Path, optimiser: Any, rank: int) -> None:
    """This rank's float32 weights, moments and step counts."""
    from safetensors.torch import save_file

    inner, tensors = optimiser_tensors(optimiser)
    stored: dict[str, torch.Tensor] = {}
    for place, tensor in enumerate(tensors):
        stored[f"{place}/weight"] = tensor.detach().float().cpu().clone().contiguous()
        for name, value in inner.state.get(tensor, {}).items():
            stored[f"{place}/{name}"] = value.detach().cpu().clone().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / f"optimiser-{rank}.safetensors")


def load_optimiser(folder: Path, optimiser: Any, rank: int) -> None:
    """Bring back what ``save_optimiser`` stored, into an optimiser that has made no step."""
    import torch

    stored = _read(folder / f"optimiser-{rank}.safetensors")
    inner, tensors = optimiser_tensors(optimiser)
    for place, tensor in enumerate(tensors):
        with torch.no_grad():
            tensor.copy_(stored.pop(f"{place}/weight"))
        # AdamW counts its steps on the CPU, whatever the device of its moments.
        inner.state[tensor] = {
            key.partition("/")[2]: value if value.dim() == 0 else value.to(tensor.device)
            for key, value in stored.items()
            if key.partition("/")[0] == str(place)
        }


def save_state(folder: Path, state: TrainingState) -> None:
    (folder / STATE).write_text(json.dumps(asdict(state)))


def load_state(folder: Path) -> TrainingState:
    """Raises UserError when it is damaged."""
    try:
        return TrainingState(**json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, TypeError):
        raise _damaged(folder / STATE) from None


def _read(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError):
        raise _damaged(path) from None


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: missing or damaged; delete its folder, and the next run makes it again")
