"""Beta is chosen by hypervolume after a part of the steps, and the winner trains on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pymoo.indicators.hv import HV
from rich.console import Console
from safetensors.numpy import load_file
from studies import REWARDS, tiny_study

from mage_ray import jobs
from mage_ray.errors import FieldError
from mage_ray.folder import StudyFolder
from mage_ray.generator import bank_setup
from mage_ray.search.beta import choose_betas
from mage_ray.study import parse_study

QUIET = Console(quiet=True)


def study_text(model: Path, **bone: object) -> str:
    training = {"backbones": {"bone": bone, "soup": {}}, "steps": 6, "early": 0.3}
    return tiny_study(model, training=training, search={"prompts": 4, "grid": 3})


def test_an_undecided_set_has_no_mix(tiny_model_folder: Path) -> None:
    study = parse_study(study_text(tiny_model_folder, betas=[0.6, 0.8]))
    with pytest.raises(FieldError, match=r"betas: got \[0.6, 0.8\], allowed: a set whose beta has been chosen"):
        bank_setup(study, ["bone", "soup"])
    assert bank_setup(study.with_betas({"bone": 0.8}), ["bone"]).sets["bone"].mix[0, 0] == 0.8


@pytest.mark.parametrize(
    ("bone", "message"),
    [
        ({"betas": [0.6]}, "training.backbones.bone.betas: got"),
        ({"betas": [0.6, 0.5]}, "training.backbones.bone.beta: got 0.5, allowed: an invertible mix"),
        ({"betas": [0.6, 0.7], "beta": 0.8}, "training.backbones.bone.beta: got 0.8, allowed: one of betas"),
        ({"betas": [0.6, 0.7], "matrix": [[1, 0], [0, 1]]}, "give beta or matrix, not both"),
    ],
)
def test_what_cannot_be_chosen_among_is_refused(tiny_model_folder: Path, bone: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=r"training\.backbones\.bone") as caught:
        parse_study(study_text(tiny_model_folder, **bone))
    assert message in str(caught.value)


@pytest.mark.slow
def test_the_best_beta_is_taken_and_its_training_goes_on(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "study.yaml").write_text(study_text(tiny_model_folder, betas=[0.6, 0.8, 1.0]))
    study, folder = jobs.open_study(tmp_path / "study.yaml", tmp_path / "run")
    jobs.train(study, folder, QUIET)

    choice = folder.choices()["bone"]
    assert choice["steps"] == 2
    for beta in (0.6, 0.8, 1.0):  # each by brute force from its samples
        place = StudyFolder(folder.checkpoints / "early" / f"bone-{beta:g}")
        samples = pd.concat([pd.read_parquet(path) for path in place.evaluation.glob("*.parquet")])
        assert samples["prompt_id"].nunique() == 4
        points = samples.groupby("point")[["reward/even", "reward/short"]].mean().to_numpy()
        expected = HV(ref_point=np.array([2.0, 2.0]))(-points)
        assert choice["hypervolume"][f"{beta:g}"]["value"] == pytest.approx(expected)
    best = max(choice["hypervolume"], key=lambda name: choice["hypervolume"][name]["value"])
    assert choice["beta"] == float(best)
    assert folder.study.training.backbones["bone"].beta == float(best)

    # The same study with that beta from the start arrives at the same experts.
    (tmp_path / "plain.yaml").write_text(study_text(tiny_model_folder, beta=float(best)))
    _, plain = jobs.open_study(tmp_path / "plain.yaml", tmp_path / "plain")
    jobs.train(plain.study, plain, QUIET)
    for name in ("bone-even", "bone-short", "soup-even"):
        ours, theirs = (load_file(place.experts / name / "adapter_model.safetensors") for place in (folder, plain))
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-6)

    # Decided is decided: the YAML of the user still lists all, and nothing is trained again.
    again, _ = jobs.open_study(tmp_path / "study.yaml", tmp_path / "run")
    assert again.training.backbones["bone"].beta == float(best)
    assert choose_betas(again, folder) is again
