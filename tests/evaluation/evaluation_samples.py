"""Synthetic generations in the long form that ``summarise`` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

GRID_2 = [(round(1 - step / 10, 1), round(step / 10, 1)) for step in range(11)]
GRID_3 = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.2, 0.2, 0.6), (0.6, 0.2, 0.2), (0.2, 0.6, 0.2), (1 / 3, 1 / 3, 1 / 3)]


def front(strength: float, grid: Sequence[Sequence[float]]) -> np.ndarray:
    """A concave front on which more weight always gives more reward."""
    return strength * np.sqrt(np.asarray(grid, dtype=float)) - 0.3


def make_samples(
    means: Mapping[str, np.ndarray],
    grid: Sequence[Sequence[float]],
    *,
    prompts: int = 12,
    seeds: int = 2,
    prompt_noise: float = 0.3,
    noise: float = 0.1,
    seed: int = 0,
    text: str = "all is well that ends well",
) -> pd.DataFrame:
    """One row per (method, point, prompt, seed); a prompt's own effect is shared by all methods and points.

    A method whose mean array has one row has no preference axis and carries no preference.
    """
    rng = np.random.default_rng(seed)
    n = len(grid[0])
    effect = prompt_noise * rng.standard_normal((prompts, n))
    rows = []
    for method, points in means.items():
        for point, mean in enumerate(points):
            for prompt in range(prompts):
                for sample_seed in range(seeds):
                    reward = mean + effect[prompt] + noise * rng.standard_normal(n)
                    rows.append(
                        {
                            "method": method,
                            "point": point,
                            "preference": list(grid[point]) if len(points) > 1 else None,
                            "prompt_id": f"p{prompt}",
                            "seed": sample_seed,
                            "prompt": f"Prompt {prompt}: {text}",
                            "completion": f"Completion {prompt}/{sample_seed}: {text}",
                            "tokens": 20 + int(rng.integers(10)),
                            "kl": 0.0 if len(points) == 1 else abs(float(mean.sum())) / 10 + 0.01 * rng.random(),
                            **{f"reward/o{i}": value for i, value in enumerate(reward)},
                            **{f"raw/o{i}": 2 * value + 1 for i, value in enumerate(reward)},
                        }
                    )
    return pd.DataFrame(rows)
