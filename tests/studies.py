"""A small study on the tiny model, trained or not, made on the spot."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from adapters import make_adapter

from mage_ray.folder import StudyFolder
from mage_ray.study import parse_study


def tiny_study(model: Path, **changes: Any) -> str:
    """The YAML of a study that takes seconds: two objectives, two backbone sets, a handful of prompts."""
    study: dict[str, Any] = {
        "name": "tiny",
        "model": str(model),
        "objectives": {
            "even": {"type": "function", "path": "rewards:even", "direction": "maximise", "low": 0, "high": 1},
            "short": {"type": "function", "path": "rewards:spread", "direction": "minimise", "low": 0, "high": 1},
        },
        "prompts": {"train": 6, "evaluation": 4},
        "rollouts": {"samples_per_prompt": 4, "max_new_tokens": 12, "prompts_per_shard": 3},
        "training": {
            "steps": 4,
            "batch_size": 4,
            "learning_rate": 0.01,
            "lora": {"rank": 4, "alpha": 8},
            "checkpoint_every": 2,
        },
        "evaluation": {"grid": 3, "max_new_tokens": 12, "resamples": 50},
    }
    training = study["training"] | changes.pop("training", {})
    return yaml.safe_dump(study | {"training": training} | changes, sort_keys=False)


REWARDS = '''
import math

def even(prompts, completions):
    """The share of characters with an even code; 0 for no characters."""
    return [sum(ord(c) % 2 == 0 for c in t) / max(1, len(t)) for t in completions]

def spread(prompts, completions):
    """The mean of the codes' remainders by 5, over 4."""
    return [sum(ord(c) % 5 for c in t) / max(1, 4 * len(t)) for t in completions]

def raises(prompts, completions):
    raise RuntimeError("broken\\nover two lines")

def too_few(prompts, completions):
    return [0.0] * (len(completions) + 1)

def nan_at_last(prompts, completions):
    """Fine when it is tried out, NaN on a real batch."""
    return [math.nan if len(completions) > 1 else 0.5 for _ in completions]
'''


def trained_study(place: Path, model: Path, **changes: Any) -> StudyFolder:
    """A study folder as training leaves it, with random experts by PEFT. The second objective is to be minimised."""
    study = parse_study(tiny_study(model, **changes))
    folder = StudyFolder.create(place, study)
    for i, (backbone, name) in enumerate(product(study.training.backbones, study.objectives)):
        make_adapter(model, folder.expert(backbone, name), seed=i, scale=0.2)
    normalisation = {"names": study.objective_names, "sign": [1, -1], "mean": [0.1, -5.0], "std": [0.1, 3.0]}
    folder.rollouts.mkdir()
    folder.normalisation.write_text(json.dumps(normalisation))
    return folder


def add_value_models(folder: StudyFolder, model: Path, hidden: int = 32, scale: float = 1.0) -> None:
    """Value models of rank 3 for all of the study's sets, as training leaves them, but random."""
    import torch
    from safetensors.torch import save_file

    from mage_ray.merging.adapter import HEAD_FILE, ORIGIN_FILE
    from mage_ray.training.experts import model_origin

    dice = torch.Generator().manual_seed(4)
    shapes = {"weight": (hidden,), "bias": (1,), "down": (3, hidden), "up": (hidden, 3)}
    for i, (name, objective) in enumerate(product(folder.study.values, folder.study.objectives)):
        place = make_adapter(model, folder.value(name, objective), seed=10 + i)
        head = {part: scale * torch.randn(shape, generator=dice) for part, shape in shapes.items()}
        save_file(head, place / HEAD_FILE)
        (place / ORIGIN_FILE).write_text(json.dumps(model_origin(str(model))))


def add_baselines(folder: StudyFolder, model: Path) -> None:
    """All of the study's sets of baselines, as training leaves them, but random."""
    study = folder.study
    places = [folder.baseline(name, member) for name in study.baselines for member in study.members(name)]
    for i, place in enumerate(places):
        make_adapter(model, place, seed=50 + i, scale=0.2)
