"""The table of samples, one row per generation, as arrays; every gap in it is an error that names its place.

Columns: ``method, point, preference, prompt_id, seed, prompt, completion, tokens, kl, reward/<objective>,
raw/<objective>``. A cell is one prompt with one seed at one point of a method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mage_ray.errors import UserError
from mage_ray.evaluation.measures import Floats, distinct, repetition

if TYPE_CHECKING:
    import pandas as pd


def check_columns(samples: pd.DataFrame, objectives: Sequence[str]) -> None:
    """``UserError`` if a column that the measures need is not there, or no row is."""
    needed = ["method", "point", "preference", "prompt_id", "seed", "completion", "tokens", "kl"]
    absent = [name for name in [*needed, *(f"reward/{name}" for name in objectives)] if name not in samples.columns]
    if absent:
        raise UserError(f"samples: missing columns {', '.join(absent)}")
    if samples.empty:
        raise UserError("samples: there is no row")


def mean_cells(name: str, frame: pd.DataFrame, objectives: Sequence[str], prompts: Any, seeds: Any) -> Floats:
    """[points, prompts, K] means over seeds; K is the objectives' rewards, then KL, tokens and repetition."""
    import pandas as pd

    columns = [*(f"reward/{objective}" for objective in objectives), "kl", "tokens"]
    keyed = frame.set_index(["point", "prompt_id", "seed"])[columns].astype(float)
    keyed["repetition"] = [repetition(text) for text in frame["completion"]]
    for problem, rows in (("more than once", keyed.index.duplicated()), ("not a number", keyed.isna().any(axis=1))):
        if rows.any():
            point, prompt, seed = keyed.index[rows][0]
            raise UserError(f"samples: method {name}, point {point}: prompt {prompt} with seed {seed} is {problem}")
    points = sorted(frame["point"].unique())
    wanted = pd.MultiIndex.from_product([points, prompts, seeds])
    missing = wanted[~wanted.isin(keyed.index)]
    if len(missing):
        point, prompt, seed = missing[0]
        raise UserError(
            f"samples: method {name}, point {point}: no generation for prompt {prompt} with seed {seed} "
            f"({len(missing)} of {len(wanted)} cells of this method are missing)"
        )
    cells = keyed.reindex(wanted).to_numpy(dtype=np.float64)
    return cells.reshape(len(points), len(prompts), len(seeds), -1).mean(axis=2)


def distinct_by_prompt(frame: pd.DataFrame, prompts: Any) -> tuple[float, Floats]:
    """distinct-2 of each point's answers, the mean over the points; and [prompts] the same without each prompt's."""
    points = []
    for _, own in frame.groupby("point"):
        texts = own.groupby("prompt_id", sort=False)["completion"].agg(list)
        points.append(distinct([texts[prompt] for prompt in prompts]))
    return float(np.mean([value for value, _ in points])), np.mean([without for _, without in points], axis=0)


def shared_grid(frames: Mapping[str, pd.DataFrame], n: int) -> dict[int, Floats]:
    """Preference of each point, from the methods that have a preference axis (from all of them when none has)."""
    with_axis = {name: frame for name, frame in frames.items() if frame["point"].nunique() > 1} or dict(frames)
    grid: dict[int, Floats] = {}
    for name, frame in with_axis.items():
        for point, preference in zip(sorted(frame["point"].unique()), own_preferences(name, frame, n), strict=True):
            if np.isnan(preference).any():
                raise UserError(f"samples: method {name}, point {point}: there is no preference")
            known = grid.setdefault(int(point), preference)
            if not np.allclose(known, preference, atol=1e-6):
                raise UserError(
                    f"samples: method {name}, point {point}: its preference is {_numbers(preference)}, "
                    f"elsewhere that point's is {_numbers(known)}"
                )
    return grid


def own_preferences(name: str, frame: pd.DataFrame, n: int) -> Floats:
    """[points, N]; a row of nan for a point without a preference."""
    first = frame.drop_duplicates("point").sort_values("point")
    rows = []
    for point, preference in zip(first["point"], first["preference"], strict=True):
        row = np.full(n, np.nan) if np.ndim(preference) == 0 else np.asarray(preference, dtype=np.float64)
        if row.shape != (n,):
            raise UserError(f"samples: method {name}, point {point}: preference has {row.size} weights, not {n}")
        rows.append(row)
    return np.stack(rows)


def _numbers(values: Floats) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
