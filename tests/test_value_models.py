"""A study's value models where it is served: what can't be used is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from studies import add_value_models, trained_study
from tiny import make_tiny_model

from mage_ray.decoding.request import Sampling
from mage_ray.errors import UserError
from mage_ray.folder import StudyFolder
from mage_ray.generator import Generator
from mage_ray.merging.adapter import HEAD_FILE, ORIGIN_FILE
from mage_ray.training.experts import model_origin

EVEN = {"even": 0.7, "short": 0.3}


@pytest.fixture(scope="module")
def trained(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A study with value models as training leaves them, but random."""
    values: dict[str, Any] = {"final": {"head": "vocabulary", "rank": 3}}
    folder = trained_study(tmp_path_factory.mktemp("valued") / "study", tiny_model_folder, values=values)
    add_value_models(folder, tiny_model_folder)
    return folder


@pytest.fixture
def own(trained: StudyFolder, tmp_path: Path) -> StudyFolder:
    """A copy to damage."""
    shutil.copytree(trained.path, tmp_path / "study")
    return StudyFolder(tmp_path / "study")


def answer(folder: StudyFolder, method: str) -> int:
    """How many tokens of an answer were guided."""
    generator = Generator.open(folder.path, rows=8, length=100)
    [found] = generator.generate(["hello"], EVEN, method, candidates=5, sampling=Sampling(4, seed=1))
    return found.guided


def test_the_whole_study_serves(trained: StudyFolder) -> None:
    """What is damaged below was sound before."""
    assert answer(trained, "mage-e-m") > 0 and answer(trained, "mage-e-e") > 0


def edit_head(folder: StudyFolder, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder.value("final", "short") / HEAD_FILE
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def edit_origin(folder: StudyFolder, **content: str) -> None:
    path = folder.value("final", "short") / ORIGIN_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | content))


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {"weight": torch.zeros(33), "down": torch.zeros(3, 33), "up": torch.zeros(33, 3)}


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["down"], tensors["up"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit_origin(f, base_model="0123456789abcdef"), "adapter final-short: got one of another base model"),
        (lambda f: edit_origin(f, tokenizer="0123456789abcdef"), "adapter final-short: got one of another tokenizer"),
        (lambda f: (f.value("final", "short") / ORIGIN_FILE).write_text("{"), "mage_ray.json is not readable JSON"),
        (
            lambda f: (f.value("final", "short") / HEAD_FILE).unlink(),
            r"values/final-short: a value model without its head",
        ),
        (
            lambda f: (f.value("final", "short") / HEAD_FILE).write_bytes(b"\x08" * 99),
            r"value_head\.safetensors is corrupt",
        ),
        (lambda f: (f.value("final", "short") / HEAD_FILE).write_bytes(b""), r"value_head\.safetensors is corrupt"),
        (lambda f: edit_head(f, lambda t: t["up"][5].fill_(torch.nan)), "value head final-short: got NaN or infinity"),
        (lambda f: edit_head(f, lambda t: t["bias"].fill_(torch.inf)), "value head final-short: got NaN or infinity"),
        (lambda f: edit_head(f, lambda t: t.pop("bias")), r"value head final-short: got \['down', 'up', 'weight'\]"),
        (lambda f: edit_head(f, widen), "value head final-short: got one of hidden size 33, allowed: 32"),
    ],
)
def test_a_damaged_value_model_is_refused(damage: Callable[[StudyFolder], Any], message: str, own: StudyFolder) -> None:
    damage(own)
    with pytest.raises(UserError, match=message) as caught:
        Generator.open(own.path)
    assert "\n" not in str(caught.value)


def test_a_value_model_of_another_backbone_is_refused_though_all_its_shapes_fit(
    own: StudyFolder, tmp_path: Path
) -> None:
    """As it was recorded, by the content of what it was trained from."""
    other = make_tiny_model(tmp_path / "other", seed=1)
    (own.value("final", "even") / ORIGIN_FILE).write_text(json.dumps(model_origin(str(other))))
    with pytest.raises(UserError, match="adapter final-even: got one of another base model"):
        Generator.open(own.path)


@pytest.mark.parametrize("method", ["mage-e-m", "mage-e-e"])
def test_methods_ask_for_the_value_models_they_need(method: str, own: StudyFolder) -> None:
    edit_head(own, narrow)
    with pytest.raises(UserError, match="a vocabulary row over expert final-short, which has a scalar head") as caught:
        answer(own, method)
    assert "\n" not in str(caught.value)
    shutil.rmtree(own.value("final", "short"))
    with pytest.raises(UserError, match=r"method: got one guided by explicit values, allowed: a study with value mod"):
        answer(own, method)
    assert answer(own, "mage-i-m") > 0
    study = own.study.model_copy(update={"values": {}})
    shutil.rmtree(own.path / "values")
    StudyFolder.create(own.path, study)
    with pytest.raises(UserError, match=r"method: got one guided by explicit values, allowed: a study with value mod"):
        answer(own, method)
