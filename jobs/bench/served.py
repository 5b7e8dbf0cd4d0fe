"""What is served: a study of random experts over a model that never stops; requests for it, and the server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from setting import BETA, CANDIDATES, RANK, RELATIVE_DELTA, STRENGTH, TINY, Prompt, load, random_experts

from mage_ray.folder import StudyFolder
from mage_ray.merging.adapter import save_adapter
from mage_ray.models import load_tokenizer
from mage_ray.quiet import quiet_transformers
from mage_ray.study import parse_study

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "serving-benchmark"
OBJECTIVES = ("positive", "short")
METHOD = "mage-i-m"
MIXED = tuple(((i + 0.5) / 16, 1 - (i + 0.5) / 16) for i in range(16))
"""Sixteen preferences, none at a corner: each has a base and a guide of its own."""

CHUNK = 512
"""Prompt tokens between two steps of those who decode: sixteen requests that come at once are the load here."""


def make_study(folder: Path, model: str, relative: float = RELATIVE_DELTA) -> StudyFolder:
    """A study's folder as training leaves it, with random experts, and with a model that has no end token.

    So every answer has as many tokens as it may. The model lies in the folder, its weights those of ``model``.
    """
    own = folder / "model"
    loaded = load(model)
    for config in (loaded.config, loaded.config.get_text_config()):
        config.eos_token_id = None
    with quiet_transformers():
        loaded.save_pretrained(own)
    tokenizer = _tiny_tokenizer(loaded.config.vocab_size) if model == TINY else load_tokenizer(model)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(own)
    backbones = {"bone": {"beta": BETA}, "soup": {}}
    study = {
        "name": NAME,
        "model": str(own.absolute()),
        "objectives": {"positive": {"type": "positivity"}, "short": {"type": "brevity"}},
        "training": {"backbones": backbones, "lora": {"rank": RANK, "alpha": 2 * RANK, "targets": "all-linear"}},
        "guidance": {"base": "bone", "guide": "soup", "strength": STRENGTH, "candidates": CANDIDATES},
    }
    place = StudyFolder.create(folder, parse_study(yaml.safe_dump(study)))
    experts = random_experts(loaded, len(backbones) * len(OBJECTIVES), relative)
    for (backbone, objective), expert in zip(product(backbones, OBJECTIVES), experts, strict=True):
        save_adapter(expert, place.expert(backbone, objective))
    normalisation = {"names": OBJECTIVES, "sign": [1, 1], "mean": [0.1, -5.0], "std": [0.1, 3.0]}
    place.rollouts.mkdir(exist_ok=True)
    place.normalisation.write_text(json.dumps(normalisation))
    return place


def _tiny_tokenizer(size: int) -> PreTrainedTokenizerBase:
    """One character for each token, so that a text tells its tokens."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    characters = {chr(0x4E00 + i): i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token=chr(0x4E00)))
    tokenizer.decoder = decoders.Fuse()
    # Any token does: nothing is padded.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def questions(
    prompts: Sequence[Prompt], preferences: Sequence[Sequence[float]], new_tokens: int
) -> list[dict[str, Any]]:
    """Bodies of ``/v1/completions``: each prompt, as tokens, at its preference; greedy, streamed."""
    return [
        {
            "model": NAME,
            "prompt": list(prompt),
            "max_tokens": new_tokens,
            "temperature": 0.0,
            "preference": dict(zip(OBJECTIVES, preference, strict=True)),
            "method": METHOD,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for prompt, preference in zip(prompts, preferences, strict=True)
    ]


@contextmanager
def server(folder: Path, rows: int, length: int, threads: int) -> Iterator[str]:
    """The address of the server under test, which serves a study's folder on this machine while the context lasts."""
    from deployments.local import running

    with running(folder, rows=rows, length=length, cpus=threads, chunk=CHUNK) as started:
        yield started.url
