"""Base models and tokenizers: where a name leads, how they are loaded, and how to tell one from another by content."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mage_ray.embedded import EMBEDDED, embedded_model_folder
from mage_ray.errors import FieldError, UserError
from mage_ray.quiet import quiet_transformers
from mage_ray.storage.downloads import local_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "EMBEDDED",
    "embedded_model_folder",
    "fingerprint",
    "load_classifier",
    "load_model",
    "load_tokenizer",
    "model_fingerprint",
    "resolve_model",
    "tokenizer_fingerprint",
]

DTYPES = ("float32", "bfloat16", "float16")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What tells architectures apart beyond their parameters' shapes. A fixed list: newer transformers add keys to configs.
_CONFIG_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_SAMPLES_PER_TENSOR = 64
# Digits, runs of spaces, an apostrophe, accents, another script: where tokenizers with one vocabulary part ways.
_PROBE = "It's  2024:\n\n\tCafé naïve, 12345.67 — don't! 東京 🙂 <tag attr='x'>"


def resolve_model(name: str) -> str:
    """Where ``name`` leads: the embedded model's folder, a local one, a node's copy of a URL, or a hub id as it is.

    A folder must hold a decoder-only model that transformers knows, with safetensors weights; anything else
    raises ``FieldError("model", ...)``. A hub id is looked up only when it is loaded.
    """
    if name == EMBEDDED:
        return str(embedded_model_folder())
    folder = local_path(name)
    if name and folder.is_dir():
        _check_folder(name, folder)
        return str(folder)
    if _HUB_ID.fullmatch(name) and not folder.exists():
        return name
    raise FieldError("model", name, f"{EMBEDDED}, an existing folder, or a hub id like org/name")


def load_model(name: str, dtype: str = "float32", device: str | torch.device | None = None) -> PreTrainedModel:
    """The decoder-only model that ``name`` leads to (see ``resolve_model``), in eval mode, on the CPU or ``device``.

    Safetensors only, never remote code. Raises ``FieldError`` for a name, a model or a dtype that cannot be used and
    ``UserError`` when the model cannot be fetched or its files are damaged or incomplete.
    """
    from transformers import AutoModelForCausalLM

    model = _load(AutoModelForCausalLM, name, dtype).eval()
    return model if device is None else model.to(device)


def load_classifier(name: str, dtype: str = "float32", layers: int | None = None) -> PreTrainedModel:
    """The same with a new head ``score`` of one output in place of its LM head, as reward models have; it says 0.

    With ``layers`` it has the lowest layers alone. Raises what ``load_model`` does, and ``FieldError`` for more layers
    than the model has, or an architecture of which transformers has no classifier.
    """
    from transformers import AutoModelForSequenceClassification

    fewer = {} if layers is None else {"num_hidden_layers": layers}
    try:
        model = _load(AutoModelForSequenceClassification, name, dtype, new="score.weight", num_labels=1, **fewer)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise FieldError("model", name, "a model of which transformers has a sequence classifier") from None
    _fill_with_zeros(model.score.weight)
    return model.eval()


def _load(auto_class: Any, name: str, dtype: str, new: str | None = None, **options: Any) -> Any:
    """The model by one of transformers' auto classes; of its tensors only ``new`` may be missing in the files."""
    import torch
    from safetensors import SafetensorError
    from transformers import PreTrainedConfig

    if dtype not in DTYPES:
        raise FieldError("dtype", dtype, ", ".join(DTYPES))
    source = resolve_model(name)
    with quiet_transformers():
        try:
            config, _ = PreTrainedConfig.get_config_dict(source)
            _check_decoder_only(name, config)
            wanted, has = options.get("num_hidden_layers"), config.get("num_hidden_layers")
            if wanted is not None and not (isinstance(has, int) and wanted <= has):
                raise FieldError("layers", wanted, f"up to {has}, those of {name}")
            loaded: Any = auto_class.from_pretrained(
                source,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        except (OSError, SafetensorError) as error:
            raise _cannot_load("model", name, error) from error
    model, loading = loaded
    # transformers would fill them with random numbers and only warn.
    if missing := sorted(set(loading["missing_keys"]) - {new}):
        raise UserError(f"cannot load the model {name}: its files lack {len(missing)} tensors, {missing[0]} for one")
    return model


def _fill_with_zeros(parameter: torch.nn.Parameter) -> None:
    """Of all its parts, where ZeRO-3 has dealt it out while it was loaded: all ranks take part then."""
    import torch

    if hasattr(parameter, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters([parameter], modifier_rank=0):
            torch.nn.init.zeros_(parameter)
    else:
        torch.nn.init.zeros_(parameter)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that ``name`` leads to; it pads on the left, with its end token if it has no other.

    Raises ``FieldError`` and ``UserError`` as ``load_model`` does.
    """
    from transformers import AutoTokenizer

    source = resolve_model(name)
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, padding_side="left")
        except (OSError, ValueError) as error:
            raise _cannot_load("tokenizer", name, error) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise FieldError("model", name, "a model whose tokenizer has an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits of the model's content: architecture, parameter names and shapes, and a sample of every tensor.

    The samples are hashed as bfloat16, so one checkpoint has one fingerprint in float32 and in bfloat16 (float16 loses
    small values of a bfloat16 checkpoint and may differ). Take it before adapters wrap the model or a sharded optimiser
    empties its tensors. Content alone counts: a name, a folder or a date does not.
    """
    config = model.config.get_text_config()
    parts: list[Any] = [{key: getattr(config, key, None) for key in _CONFIG_KEYS}]
    for name, tensor in sorted(model.named_parameters()):
        parts += [[name, list(tensor.shape)], _sample_bytes(tensor).hex()]
    return _digest(parts)


def fingerprint(name: str) -> str:
    """``model_fingerprint`` of the model that ``name`` leads to. Loads it: where it is loaded, use that one."""
    return model_fingerprint(load_model(name, dtype="bfloat16"))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits of what a tokenizer does: vocabulary, special tokens, chat template, and how it cuts a probe text.

    The padding token and side are left out: they are settings of a run, not of the tokens.
    """
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token]
    cuts = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return _digest([sorted(tokenizer.get_vocab().items()), special, tokenizer.chat_template, cuts])


def _digest(parts: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode()).hexdigest()[:16]


def _sample_bytes(tensor: torch.Tensor) -> bytes:
    """Evenly spaced elements of ``tensor``, first and last included, as bfloat16 bytes."""
    import torch

    flat = tensor.detach().flatten()
    count = min(flat.numel(), _SAMPLES_PER_TENSOR)
    at = torch.linspace(0, max(flat.numel() - 1, 0), count, dtype=torch.float64).long().to(flat.device)
    return flat[at].to(torch.bfloat16).cpu().view(torch.uint8).numpy().tobytes()


def _check_folder(name: str, folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise FieldError("model", name, "a folder with a model's config.json")
    _check_decoder_only(name, config)
    # As many as shards; an adapter's file is not the model's.
    if not any((folder / file).is_file() for file in ("model.safetensors", "model.safetensors.index.json")):
        pickled = any(folder.glob("pytorch_model*.bin"))
        raise FieldError(
            "model", name, "a folder with safetensors weights" + (" (.bin files are pickles)" if pickled else "")
        )


def _check_decoder_only(name: str, config: Mapping[str, Any]) -> None:
    """Refuse what would load with a random head (an encoder, a classifier) or not decode alone (an encoder-decoder)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    known = {arch for value in CAUSAL.values() for arch in ([value] if isinstance(value, str) else value)}
    architectures = config.get("architectures") or ()
    if (
        config.get("model_type") not in CAUSAL
        or config.get("is_encoder_decoder")
        or (architectures and known.isdisjoint(architectures))
    ):
        what = ", ".join(architectures) or config.get("model_type")
        raise FieldError("model", f"{name} ({what})", "a decoder-only language model that transformers knows")


def _cannot_load(what: str, name: str, error: Exception) -> UserError:
    return UserError(f"cannot load the {what} {name}: {' '.join(str(error).split())[:300]}")
