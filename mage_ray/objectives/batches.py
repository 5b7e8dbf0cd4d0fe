"""Token sequences of unequal length through a model: found, batched, padded, put back in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mage_ray.errors import FieldError
from mage_ray.objectives.base import describe_error
from mage_ray.quiet import quiet_transformers
from mage_ray.storage.downloads import local_path
from mage_ray.storage.store import is_url

if TYPE_CHECKING:
    import torch

Tokens = Mapping[str, Sequence[int]]
"""One text as a tokenizer gives it: ``input_ids``, ``attention_mask`` and, for some models, ``token_type_ids``."""


def load_model(auto_class: Any, source: str, field: str) -> tuple[Any, Any]:
    """A model and its tokenizer from a local folder or a hub id: in evaluation mode, on the GPU where there is one.

    On a GPU the weights keep the type they were saved in; on a CPU they are float32. Safetensors only, no code from
    the model's repository. Raises FieldError ``field`` when it can't be loaded, or when weights are missing (a model
    without a trained head would otherwise score at random).
    """
    import torch
    from transformers import AutoTokenizer

    source = str(local_path(source)) if is_url(source) else source
    if not Path(source).expanduser().is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise FieldError(field, source, "a folder that exists, or a hub id such as owner/model")
    source = str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "auto" if device.type == "cuda" else torch.float32
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model, report = auto_class.from_pretrained(
                source, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, KeyError) as error:
        allowed = f"a folder or hub id with a tokenizer and safetensors weights ({describe_error(error)})"
        raise FieldError(field, source, allowed) from None
    if report["missing_keys"]:
        allowed = f"a model that has been trained for this (it has no weights for {min(report['missing_keys'])})"
        raise FieldError(field, source, allowed)
    return model.to(device).eval(), tokenizer


def by_length(rows: Sequence[Tokens], batch_size: int) -> Iterator[list[int]]:
    """Batches of indices into ``rows``, longest first: little padding, and memory runs out at once or never."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad_right(rows: Sequence[Tokens], filler: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Rows to tensors of shape [batch, longest]: ``input_ids`` filled with ``filler``, everything else with 0.

    On the right, whatever the tokenizer would do: positions count from the first token, so a row's tokens
    have the positions that they have alone.
    """
    import torch

    width = max(len(row["input_ids"]) for row in rows)
    return {
        key: torch.tensor(
            [[*row[key], *([filler if key == "input_ids" else 0] * (width - len(row[key])))] for row in rows],
            device=device,
        )
        for key in rows[0]
    }
