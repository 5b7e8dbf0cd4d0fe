"""Pools and studies for the tests of training, on the tiny model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mage_ray.folder import StudyFolder
from mage_ray.study import Study
from mage_ray.training.pairs import Sample, training_order
from mage_ray.training.run import Example, Run

END = 258
"""The tiny tokenizer's ``<|im_end|>``."""


def early(prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
    """The share of letters a..m."""
    return np.array([sum("a" <= x <= "m" for x in text) / max(len(text), 1) for text in completions])


def late(prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
    """The share of letters n..z."""
    return np.array([sum("n" <= x <= "z" for x in text) / max(len(text), 1) for text in completions])


def make_pool(prompts: int = 12, samples: int = 4, seed: int = 0) -> pd.DataFrame:
    """``reward/early`` is the share of letters a..m in the answer, ``reward/late`` that of n..z; both normalised."""
    random = np.random.default_rng(seed)
    rows = []
    for prompt in range(prompts):
        for sample in range(samples):
            share = (sample + 0.5) / samples
            early = random.random(8) < share
            letters = [int(random.integers(97, 110) if first else random.integers(110, 123)) for first in early]
            finished = bool(random.random() < 0.5)
            rows.append(
                {
                    "prompt_id": f"p{prompt:03d}",
                    "prompt": f"say {prompt}",
                    "sample": sample,
                    "completion": bytes(letters).decode(),
                    "ids": letters + [END] * finished,
                    "tokens": len(letters) + finished,
                    "finished": finished,
                    "raw/early": sum(x < 110 for x in letters) / len(letters),
                    "raw/late": sum(x >= 110 for x in letters) / len(letters),
                }
            )
    pool = pd.DataFrame(rows)
    for name in ("early", "late"):
        pool[f"reward/{name}"] = (pool[f"raw/{name}"] - pool[f"raw/{name}"].mean()) / pool[f"raw/{name}"].std(ddof=0)
    return pool


def make_study(model: Path, **training: Any) -> Study:
    """Two objectives that no test calls unless it trains with GRPO."""
    settings: dict[str, Any] = {
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "checkpoint_every": 2,
        "lora": {"rank": 4, "alpha": 8},
        "precision": "float32",
        "backbones": {"soup": {}},
    }
    objectives = {
        name: {"type": "function", "path": f"training_pools:{name}", "direction": "maximise"}
        for name in ("early", "late")
    }
    return Study.model_validate(
        {
            "model": str(model),
            "objectives": objectives,
            "rollouts": {"max_new_tokens": 8},
            "guidance": {"base": "soup", "guide": "soup"},
            "training": settings | training,
        }
    )


VALUES: dict[str, Any] = {
    "steps": 60,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "rank": 4,
    "lora": {"rank": 4, "alpha": 8},
}


def valued_study(model: Path, training: Mapping[str, Any] | None = None, **values: Any) -> Study:
    """The same with value models."""
    study = make_study(model, **(training or {}))
    return Study.model_validate(study.model_dump(mode="json") | {"values": {"final": VALUES | values}})


def value_run(study: Study, pool: pd.DataFrame, home: Path, name: str = "early") -> Run:
    """The run of one value model on all answers of ``pool``."""
    spec = study.values["final"]
    answers = [
        Example(Sample(prompt, tuple(ids)), float(reward))
        for prompt, ids, reward in zip(pool["prompt"], pool["ids"], pool[f"reward/{name}"], strict=True)
    ]
    order = training_order(len(answers), spec.steps * spec.batch_size, study.seed)
    examples = [answers[i] for i in order]
    return Run(f"final-{name}", study, StudyFolder(home), {name: 1.0}, examples=examples, values=spec)


def make_folder(path: Path, study: Study, pool: pd.DataFrame) -> StudyFolder:
    """A study folder as sampling leaves it."""
    from mage_ray.objectives import Normaliser

    folder = StudyFolder.create(path, study)
    folder.rollouts.mkdir()
    names = study.objective_names
    pool = pool.assign(logprob=reference_logprobs(study, pool))
    raw_NM = pool[[f"raw/{name}" for name in names]].to_numpy()
    pool.drop(columns=[f"reward/{name}" for name in names]).to_parquet(folder.rollouts / "shard-00000.parquet")
    folder.normalisation.write_text(Normaliser.fit(names, ["maximise"] * len(names), raw_NM).to_json())
    return folder


def reference_logprobs(study: Study, pool: pd.DataFrame) -> list[float]:
    from mage_ray.chat import Chat
    from mage_ray.models import load_model, load_tokenizer
    from mage_ray.training.reference import sample_logps

    model = load_model(study.model)
    samples = [Sample(prompt, tuple(ids)) for prompt, ids in zip(pool["prompt"], pool["ids"], strict=True)]
    return sample_logps(model, Chat(load_tokenizer(study.model), model), samples)
