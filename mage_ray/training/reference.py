"""The reference model's log-probabilities of samples: computed once, shared by all experts that train on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mage_ray.cluster import Progress, counted, run_shards
from mage_ray.errors import UserError
from mage_ray.files import atomic_path
from mage_ray.folder import StudyFolder
from mage_ray.models import load_model, load_tokenizer
from mage_ray.study import Study
from mage_ray.training.pairs import Sample
from mage_ray.training.worker import uses_bfloat16

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import PreTrainedModel

    from mage_ray.chat import Chat

_SHARD = 128
_ROWS = 8
"""Sequences at once; each brings its logits over the whole vocabulary with it."""


def pool_logps(study: Study, pool: DataFrame) -> dict[Sample, float]:
    """The same for samples of the reference's own pool, which were scored as they were drawn.

    Empty where training computes in another precision than decoding: the policy then starts with a log-ratio to its
    reference that is rounding alone, so it has to be computed anew.
    """
    if uses_bfloat16(study.training) != (study.dtype == "bfloat16"):
        return {}
    columns = zip(pool["prompt"], pool["ids"], pool["logprob"], strict=True)
    return {Sample(str(prompt), tuple(map(int, ids))): float(logprob) for prompt, ids, logprob in columns}


def reference_logps(
    study: Study, folder: StudyFolder, samples: Sequence[Sample], progress: Progress | None = None
) -> dict[Sample, float]:
    """Natural-log probability of each sample's answer given its prompt, over Ray workers; kept beside the checkpoints.

    Killed and started again, it computes what is missing. Ray must be connected. Raises UserError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    # Neighbours of one length waste little on padding.
    unique = sorted(set(samples), key=lambda sample: (len(sample.prompt) + len(sample.ids), sample))
    digest = hashlib.sha256(
        json.dumps([study.model, study.system, study.training.precision, unique]).encode()
    ).hexdigest()[:16]
    place = folder.checkpoints / f"reference-{digest}"
    shards = [
        (f"shard-{i:05d}.safetensors", unique[i * _SHARD : (i + 1) * _SHARD]) for i in range(-(-len(unique) // _SHARD))
    ]
    folder.fetch(place)
    missing = [shard for shard in shards if not (place / shard[0]).exists()]
    run_shards(
        _shards_logps,
        missing,
        (study, folder, folder.name_of(place)),
        folder=folder,
        writes=place,
        workers=study.rollouts.workers,
        gpus_per_worker=study.training.gpus_per_worker,
        labels=study.cluster.selector,
        on_progress=counted(progress, len(unique) - sum(len(part) for _, part in missing), len(unique)),
    )
    logps: dict[Sample, float] = {}
    for file, part in shards:
        try:
            values = load_file(place / file)["logps"].tolist()
            logps |= dict(zip(part, values, strict=True))
        except (OSError, SafetensorError, KeyError, ValueError):
            raise UserError(f"{place / file}: damaged; delete it, and the next run makes it again") from None
    return logps


def _shards_logps(
    study: Study, folder: StudyFolder, part: str, shards: Sequence[tuple[str, Sequence[Sample]]]
) -> Iterator[int]:
    """In a Ray worker: one file for each shard, in this part of the folder."""
    import torch
    from safetensors.torch import save_file

    from mage_ray.chat import Chat

    device = "cuda" if study.training.gpus_per_worker > 0 else None
    model = load_model(study.model, "bfloat16" if uses_bfloat16(study.training) else "float32", device)
    chat = Chat(load_tokenizer(study.model), model, study.system)
    for file, samples in shards:
        values = torch.tensor(sample_logps(model, chat, samples), dtype=torch.float64)
        with atomic_path(folder.at(part) / file) as partial:
            save_file({"logps": values}, partial)
        yield len(samples)


def sample_logps(model: PreTrainedModel, chat: Chat, samples: Sequence[Sample]) -> list[float]:
    """``log pi(answer | prompt)`` of each sample under ``model``, summed over the answer's tokens."""
    import torch

    logps: list[float] = []
    for start in range(0, len(samples), _ROWS):
        rows = [(list(chat.encode(sample.prompt)), list(sample.ids)) for sample in samples[start : start + _ROWS]]
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
        mask_BT, answer_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids_BT[row, :end] = torch.tensor(prompt + answer)
            mask_BT[row, :end] = 1
            answer_BT[row, len(prompt) : end] = True
        ids_BT, mask_BT, answer_BT = (t.to(model.device) for t in (ids_BT, mask_BT, answer_BT))
        with torch.inference_mode():
            logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1]
            picked_NV = logits_BTV[answer_BT[:, 1:]].float()
            picked_N = picked_NV.gather(1, ids_BT[:, 1:][answer_BT[:, 1:]][:, None])[:, 0] - picked_NV.logsumexp(1)
        at_B = answer_BT[:, 1:].sum(1).tolist()
        logps += [float(part.sum()) for part in picked_N.split(at_B)]
    return logps
