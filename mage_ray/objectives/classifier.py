"""Any sequence classifier or reward model of the Hugging Face kind as an objective."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mage_ray.errors import FieldError
from mage_ray.objectives.base import Direction, check_choice, check_count
from mage_ray.objectives.batches import Tokens, by_length, load_model, pad_right

if TYPE_CHECKING:
    import torch

TEMPLATES = ("chat", "pair", "completion", "hh", "reversed-pair")
_LAYOUTS = {"completion": "{completion}", "hh": "\n\nHuman: {prompt}\n\nAssistant: {completion}"}
_PLACES = re.compile(r"\{(prompt|completion)\}")
OUTPUTS = ("logit", "probability")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class _Loaded:
    model: Any
    tokenizer: Any
    label: int
    padding: int | None
    """The padding token that the model itself knows."""


@dataclass(frozen=True)
class Classifier:
    """One label of a sequence classifier, or the number that a reward model gives.

    - ``model``: a local folder or a hub id, safetensors only.
    - ``template``: how the model was trained to see a pair: ``chat`` (its tokenizer's chat template, user then
      assistant), ``pair`` (two segments, as in natural language inference), ``reversed-pair`` (the completion first),
      ``completion`` (the prompt is not shown), ``hh`` (``\\n\\nHuman: ... \\n\\nAssistant: ...``), or any text with
      ``{completion}`` in it, and ``{prompt}``. It has no default: the wrong one gives numbers, but senseless ones.
    - ``label``: a name or an index; needed unless the model has one output, as reward models do.
    - ``output``: ``logit`` (range all numbers) or ``probability`` (range [0, 1]: softmax over the labels; the
      sigmoid for one output or a multi-label model).
    - ``precision``: ``float32``, or ``bfloat16`` for the matrix products on a CPU, faster on processors that have them.
    - ``max_length``: in tokens; the beginning is cut off, so that the completion's end stays, or the end where the
      completion comes first.

    Each value is what the model gives for that text alone: neither the batch nor the padding changes it, up to
    floating point. The model is loaded on the first call. Raises FieldError ``<field>.<option>``.
    """

    model: str
    template: str
    field: str = "objectives.classifier"
    direction: Direction = "maximise"
    label: str | int | None = None
    output: str = "logit"
    batch_size: int = 32
    max_length: int = 1024
    precision: str = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise FieldError(f"{self.field}.model", self.model, "a local folder or a hub id")
        if not isinstance(self.template, str) or "{completion}" not in self.template:
            choices = (*TEMPLATES, "a text with {completion}")
            check_choice(self.template, f"{self.field}.template", choices)
        check_choice(self.output, f"{self.field}.output", OUTPUTS)
        check_choice(self.precision, f"{self.field}.precision", PRECISIONS)
        if self.label is not None and (isinstance(self.label, bool) or not isinstance(self.label, str | int)):
            raise FieldError(f"{self.field}.label", self.label, "the name or the index of a label")
        check_count(self.batch_size, f"{self.field}.batch_size")
        check_count(self.max_length, f"{self.field}.max_length")

    @property
    def low(self) -> float:
        return 0.0 if self.output == "probability" else -math.inf

    @property
    def high(self) -> float:
        return 1.0 if self.output == "probability" else math.inf

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        import torch

        model, label = self._loaded.model, self._loaded.label
        rows = self._tokens(prompts, completions)
        values = np.zeros(len(rows))
        for indices in by_length(rows, self.batch_size):
            batch = [rows[i] for i in indices]
            filler = self._loaded.padding
            if filler is None:
                # A decoder reads its answer off the last token that isn't padding; one that knows no padding token
                # takes one text at a time. Any token that ends none of these texts can be its padding for now.
                ends = {row["input_ids"][-1] for row in batch}
                filler = next(token for token in range(len(ends) + 1) if token not in ends)
                model.config.get_text_config().pad_token_id = filler
            lower = self.precision == "bfloat16" and model.device.type == "cpu"
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=lower):
                logits_BC = model(**pad_right(batch, filler, model.device)).logits.double()
            values[indices] = self._read(logits_BC)[:, label].cpu().numpy()
        return values

    @cached_property
    def _loaded(self) -> _Loaded:
        from transformers import AutoModelForSequenceClassification

        model, tokenizer = load_model(AutoModelForSequenceClassification, self.model, f"{self.field}.model")
        if self.template == "chat" and not tokenizer.chat_template:
            allowed = "pair, completion or hh: this model's tokenizer has no chat template"
            raise FieldError(f"{self.field}.template", self.template, allowed)
        layout = _LAYOUTS.get(self.template, self.template)
        begins = layout == "reversed-pair" or "{prompt}" in layout.partition("{completion}")[2]
        tokenizer.truncation_side = "right" if begins else "left"
        padding = model.config.get_text_config().pad_token_id
        if padding is not None and padding < 0:  # How some old decoders say that they have none.
            padding = None
        return _Loaded(model, tokenizer, self._label_index(model.config), padding)

    def _label_index(self, config: Any) -> int:
        names = [str(config.id2label[i]) for i in range(config.num_labels)]
        if self.label is None and len(names) == 1:
            return 0
        if self.label in names:
            return names.index(str(self.label))
        if isinstance(self.label, int) and 0 <= self.label < len(names):
            return self.label
        listed = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
        raise FieldError(f"{self.field}.label", "nothing" if self.label is None else self.label, f"one of {listed}")

    def _tokens(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Tokens]:
        tokenizer, config = self._loaded.tokenizer, self._loaded.model.config.get_text_config()
        known = [self.max_length, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
        how = {
            "truncation": True,
            "max_length": min(limit for limit in known if limit),
            "return_attention_mask": True,
            # By what the model was trained with: a tokenizer's default may give too much or too little.
            "return_token_type_ids": (getattr(config, "type_vocab_size", 0) or 0) > 1,
        }
        if self.template == "pair":
            encoded = tokenizer(list(prompts), list(completions), **how)
        elif self.template == "reversed-pair":
            encoded = tokenizer(list(completions), list(prompts), **how)
        elif self.template == "chat":
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": p}, {"role": "assistant", "content": c}], tokenize=False
                )
                for p, c in zip(prompts, completions, strict=True)
            ]
            # The template writes the special tokens itself.
            encoded = tokenizer(texts, add_special_tokens=False, **how)
        else:
            encoded = tokenizer([self._text(p, c) for p, c in zip(prompts, completions, strict=True)], **how)
        rows = [{key: encoded[key][i] for key in encoded} for i in range(len(prompts))]
        # A tokenizer without special tokens gives nothing for an empty text, and no model can read nothing.
        start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), 0)
        nothing = {"input_ids": [start], "attention_mask": [1], "token_type_ids": [0]}
        return [row if row["input_ids"] else {key: nothing[key] for key in row} for row in rows]

    def _text(self, prompt: str, completion: str) -> str:
        parts = {"prompt": prompt, "completion": completion}
        return _PLACES.sub(lambda place: parts[place[1]], _LAYOUTS.get(self.template, self.template))

    def _read(self, logits_BC: torch.Tensor) -> torch.Tensor:
        config = self._loaded.model.config
        if self.output == "logit":
            return logits_BC
        if config.num_labels == 1 or config.problem_type == "multi_label_classification":
            return logits_BC.sigmoid()
        return logits_BC.softmax(dim=-1)
