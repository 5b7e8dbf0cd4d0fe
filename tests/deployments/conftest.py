"""A tiny study, and a server of it that the tests of one session share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import READY, cluster_command, free_port
from safetensors.torch import load_file, save_file
from servers import Serving, serving, started
from studies import trained_study
from tiny import make_tiny_model

from mage_ray.folder import StudyFolder

LENGTH = 1024


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A trained study with the demo's objectives, named ``tiny``, whose answers don't end early. Read only."""
    place = tmp_path_factory.mktemp("served")
    model = make_tiny_model(place / "model", max_position_embeddings=LENGTH)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][258] = 0.0  # <|im_end|>, which is never among the 50 best then
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    objectives = {"positive": {"type": "positivity"}, "short": {"type": "brevity"}}
    return trained_study(place / "study", model, objectives=objectives)


@pytest.fixture(scope="session")
def server(study: StudyFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server of it, all rows in one worker."""
    place = tmp_path_factory.mktemp("server")
    with serving(study.path, place, f"length={LENGTH}", "max_tokens=900", "queue=16") as one:
        yield one


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Serving]:
    """A Ray cluster with a dashboard, which ``serve deploy`` talks to; its ``url`` is that one's."""
    port = free_port()
    with started(cluster_command(port), f"http://127.0.0.1:{port}", tmp_path, ready=READY) as one:
        yield one
