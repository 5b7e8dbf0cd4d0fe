from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console
from training_pools import make_study

from mage_ray.errors import FieldError, UserError
from mage_ray.folder import StudyFolder
from mage_ray.training.checkpoint import STATE, TrainingState, load_state, save_state
from mage_ray.training.experts import check_training, study_experts
from mage_ray.training.progress import Standing, read_metrics, shown


def test_rows_that_two_sets_share_are_one_expert(tmp_path: Path) -> None:
    study = make_study(tmp_path, backbones={"bone": {"beta": 0.7}, "soup": {}, "pure": {"beta": 1.0}})
    experts = study_experts(study, StudyFolder(tmp_path))
    assert [(expert.name, len(expert.places)) for expert in experts] == [
        ("bone-early", 1),
        ("bone-late", 1),
        ("soup-early", 2),
        ("soup-late", 2),
    ]
    assert experts[0].weights == pytest.approx({"early": 0.7, "late": 0.3})
    assert [place.name for place in experts[3].places] == ["soup-late", "pure-late"]


@pytest.mark.parametrize(
    ("training", "field"),
    [
        ({"batch_size": 6, "workers": 4}, "training.batch_size"),
        ({"kl_strength": 0}, "training.kl_strength"),
        ({"method": "grpo", "batch_size": 6, "generations_per_prompt": 4}, "training.batch_size"),
        ({"method": "grpo", "rounds": 2}, "training.rounds"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(tmp_path: Path, training: dict, field: str) -> None:
    with pytest.raises(FieldError) as error:
        check_training(make_study(tmp_path, **training))
    assert error.value.field == field
    check_training(make_study(tmp_path))


def test_metrics_survive_a_half_written_line_and_the_later_of_two_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == {} and Standing.of(path, 10).seconds_left is None
    entries = [{"step": 1, "seconds": 9.0, "loss": 1.0}, {"step": 2, "seconds": 2.0}, {"step": 1, "seconds": 4.0}]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 3, "sec')
    assert read_metrics(path) == {1: entries[2], 2: entries[1]}
    assert Standing.of(path, 10).step == 2
    assert Standing.of(path, 10).seconds_left == pytest.approx(8 * (4 + 2) / 2)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_on_any_console(tmp_path: Path, terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    path = tmp_path / "metrics.jsonl"
    with shown(console, {"bone-funny": (path, 4)}):
        path.write_text(json.dumps({"step": 4, "seconds": 1.0, "loss": 0.5, "rewards/margins": 1.25}) + "\n")
        time.sleep(0.1)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "bone-funny" in text and "4/4" in text and "loss 0.500" in text and "margin 1.250" in text


def test_state_comes_back_and_a_damaged_one_is_one_line(tmp_path: Path) -> None:
    state = TrainingState(7, 2, {"loss": 0.25})
    save_state(tmp_path, state)
    assert load_state(tmp_path) == state
    (tmp_path / STATE).write_text('{"step": 7')
    with pytest.raises(UserError, match=STATE):
        load_state(tmp_path)
