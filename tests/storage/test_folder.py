"""A study's folder at a URL, and two nodes that have it."""

from __future__ import annotations

import pickle
import uuid
from pathlib import Path

import fsspec
import pytest
from studies import trained_study

from mage_ray.cli import main
from mage_ray.errors import UserError
from mage_ray.folder import StudyFolder
from mage_ray.generator import load_experts, needed_sets
from mage_ray.storage.store import Store


@pytest.fixture
def url(tiny_model_folder: Path, tmp_path: Path) -> str:
    """A trained study's."""
    made = trained_study(tmp_path / "made", tiny_model_folder)
    url = f"memory://{uuid.uuid4().hex}/study"
    folder = StudyFolder.create(url, made.study)
    for path in made.path.rglob("*"):
        if path.is_file():
            to = folder.path / path.relative_to(made.path)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
    folder.publish(*folder.results)
    return url


@pytest.fixture(autouse=True)
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, tmp_path, "one")


def on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, node: str) -> None:
    monkeypatch.setenv("MAGE_RAY_CACHE", str(tmp_path / node))


def test_what_travels_to_another_node_is_that_nodes_copy_there(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StudyFolder.open(url)
    inside = folder.within(folder.comparison / "variants" / "10", "rewards", "rollouts")
    sent = pickle.dumps((folder, inside, folder.name_of(folder.expert("bone", "even"))))
    on(monkeypatch, tmp_path, "two")
    there, within, name = pickle.loads(sent)
    assert there.path.is_relative_to(tmp_path / "two") and not there.path.exists()
    there.fetch(there.at(name))
    assert (there.expert("bone", "even") / "adapter_model.safetensors").exists()
    assert not there.expert("bone", "short").exists()
    assert within.path == there.comparison / "variants" / "10" and within.experts == within.path / "experts"
    assert within.rollouts == there.rollouts and within.normalisation == there.normalisation
    within.fetch(within.normalisation)
    assert there.normalisation.exists()
    assert there.shown(there.recipe) == f"{url}/recipe.yaml"


def test_who_looks_again_and_again_connects_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = StudyFolder.open(url)
    connected = []
    connect = fsspec.core.url_to_fs
    monkeypatch.setattr(
        fsspec.core, "url_to_fs", lambda *given, **how: (connected.append(given), connect(*given, **how))[1]
    )
    for _ in range(3):
        folder.fetch(folder.search, patient=False)
        folder.fetch(folder.search)
    assert len(connected) == 1  # the patient one was there


def test_a_study_at_a_url_is_opened_anywhere(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, tmp_path, "two")
    folder = StudyFolder.open(url)
    experts = load_experts(folder, folder.study)
    assert [*experts] == needed_sets(folder, folder.study) == ["bone", "soup"]
    other = folder.study.model_copy(update={"seed": 5})
    with pytest.raises(UserError, match="its study differs in seed"):
        StudyFolder.create(url, other)
    with pytest.raises(UserError, match="cannot be read as a study"):
        _ = StudyFolder.open("memory://nothing/here").study


def test_parts_are_removed_wherever_they_lie(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = StudyFolder.open(url)
    on(monkeypatch, tmp_path, "two")
    assert main(["remove", "--study", url, "experts/bone-even"]) == 0
    assert not Store(url).find("experts/bone-even") and Store(url).find("experts/bone-short")
    assert mine.expert("bone", "even").exists()
    mine.fetch(mine.experts)
    assert not mine.expert("bone", "even").exists() and needed_sets(mine, mine.study) == ["bone", "soup"]
    for part in ("study.yaml", "..", "experts/../study.yaml", "experts/none", "/etc/passwd"):
        assert main(["remove", "--study", url, part]) == 2
        assert capsys.readouterr().err.startswith(f"mage-ray: part: got {part}, allowed: ")
    # The same in a folder at a path.
    here = tmp_path / "made"
    assert main(["remove", "--study", str(here), "experts/bone-even"]) == 0
    assert not (here / "experts" / "bone-even").exists() and (here / "experts" / "bone-short").exists()
