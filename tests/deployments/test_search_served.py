"""From a search to the endpoint: the winner gives over HTTP the texts that the search chose it by."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pandas as pd
import pytest
from servers import serving
from studies import trained_study

from mage_ray.search.recipe import load_recipe
from mage_ray.search.trial import read_records
from mage_ray.training.rollouts import draw_seed

pytestmark = pytest.mark.slow

SEARCH: dict[str, Any] = {
    "space": {
        "strength": {"positive": {"low": 0, "high": 3}, "short": {"low": 0, "high": 3}},
        "extrapolation": {"low": 0, "high": 1},
        "temperature": {"low": 0.4, "high": 1.0},
        "coefficients": {"of": ["base", "guide"], "spread": 0.2},
    },
    "trials": 5,
    "population": 4,
    "prompts": 3,
    "grid": 3,
}


def test_the_winner_gives_over_http_the_tokens_of_its_search(tiny_model_folder: Path, tmp_path: Path) -> None:
    objectives = {"positive": {"type": "positivity"}, "short": {"type": "brevity"}}
    folder = trained_study(tmp_path / "study", tiny_model_folder, objectives=objectives, search=SEARCH)
    command = [sys.executable, "-m", "mage_ray", "search", "--study", str(folder.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    recipe = load_recipe(folder.recipe)
    assert recipe.provenance is not None
    [best] = [record for record in read_records(folder) if record["trial"] == recipe.provenance.trial]
    cells = [pd.read_parquet(path) for path in (folder.search / "cells").glob("*.parquet")]
    samples = pd.concat(cells, ignore_index=True).assign(served=False)
    spec = folder.study.evaluation
    with serving(folder.path, tmp_path, "cpus=1", "length=400") as server:  # its recipe, since it is there
        for place, preference in enumerate(folder.study.search_grid()):
            for prompt in samples.drop_duplicates("prompt_id").itertuples():
                seed = draw_seed(folder.study.seed, prompt.prompt_id, 0)
                body = {
                    "model": "tiny",
                    "messages": [{"role": "user", "content": prompt.prompt}],
                    "max_tokens": spec.max_new_tokens,
                    "seed": seed,
                    "preference": dict(zip(folder.study.objective_names, preference, strict=True)),
                }
                answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
                text = answer["choices"][0]["message"]["content"]
                chosen = samples[(samples.point == place) & (samples.prompt_id == prompt.prompt_id)]
                own = chosen[chosen["completion"] == text]
                assert len(own), (text, list(chosen["completion"]))
                # Of all settings' samples it is the winner's, by which its front was measured.
                samples.loc[own.index, "served"] = True
    served = samples[samples["served"]]
    means = served.groupby(["point", "prompt_id"])[["reward/positive", "reward/short"]].first().groupby("point").mean()
    assert means.to_numpy() == pytest.approx(pd.DataFrame(best["points"]).to_numpy())
