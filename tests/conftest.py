"""Fixtures that every test file shares. Variants of the tiny model: ``from tiny import make_tiny_model``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported anywhere: more threads than this only make tests that run side by side slower.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "2")
# No test may reach for the hub: a missing file must fail at once, not after retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tiny import make_tiny_model  # noqa: E402


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level ChatML tokenizer, as a local folder. Read only."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The folder of the embedded model, converted on first use. Mark tests that use it ``slow``."""
    from mage_ray.models import embedded_model_folder

    return embedded_model_folder()
