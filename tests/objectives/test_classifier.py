"""Batched scores against plain transformers, one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_tiny_model, make_tiny_tokenizer

from mage_ray.errors import FieldError
from mage_ray.objectives import load, score
from mage_ray.objectives.classifier import Classifier

PROMPTS = [
    "Hi",
    "Tell me about the newts of Lake Garda, please.",
    "Why?",
    "Name a fruit.",
    "Hi",
    "A much longer prompt " * 6,
]
COMPLETIONS = ["Hello!", "No.", "Because the sky said so, and who am I to disagree with it?", "Fig", "", "x" * 150]
LABELS = {0: "dull", 1: "witty", 2: "rude"}


def hh(prompt: str, completion: str) -> str:
    return f"\n\nHuman: {prompt}\n\nAssistant: {completion}"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labels, byte-level tokens, and [CLS] a [SEP] b [SEP] around them."""
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = make_tiny_tokenizer()
    cls, sep = ("<|im_start|>", tokenizer.bos_token_id), ("<|im_end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{cls[0]} $A {sep[0]}", pair=f"{cls[0]} $A {sep[0]} $B:1 {sep[0]}:1", special_tokens=[cls, sep]
    )
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id, id2label=LABELS, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def make_reward_model(folder: Path, architecture: str, pad_token: bool, num_labels: int = 1) -> Path:
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        LlamaConfig,
        LlamaForSequenceClassification,
    )

    tokenizer = make_tiny_tokenizer()
    padding = tokenizer.pad_token_id if pad_token else None
    tokens: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": padding, "num_labels": num_labels}
    tokens |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if not pad_token:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    if architecture == "llama":
        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=512, initializer_range=0.3, **tokens,
        )  # fmt: skip
        LlamaForSequenceClassification(config).save_pretrained(folder)
    else:
        config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=512, initializer_range=0.3, **tokens)
        GPT2ForSequenceClassification(config).save_pretrained(folder)
    return folder


def one_by_one(folder: Path, inputs: list[dict[str, Any]]) -> np.ndarray:
    """Logits [N, labels] of transformers itself: one text, no padding; ``inputs`` go to the tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for arguments in inputs:
        encoded = tokenizer(return_tensors="pt", return_token_type_ids=model.config.model_type == "bert", **arguments)
        with torch.no_grad():
            rows.append(model(**encoded).logits[0].double().numpy())
    return np.array(rows)


def given(folder: Path, template: str, **options: Any) -> np.ndarray:
    objective = load("it", "classifier", {"model": str(folder), "template": template, **options})
    return score("it", objective, PROMPTS, COMPLETIONS)


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("template", ["pair", "completion", "hh"])
def test_encoder_batches_equal_one_by_one(bert: Path, template: str, batch_size: int) -> None:
    pairs = list(zip(PROMPTS, COMPLETIONS, strict=True))
    inputs = {
        # In lists, as transformers takes an empty second text for none at all otherwise.
        "pair": [{"text": [p], "text_pair": [c]} for p, c in pairs],
        "completion": [{"text": c} for _, c in pairs],
        "hh": [{"text": hh(p, c)} for p, c in pairs],
    }[template]
    truth = one_by_one(bert, inputs)[:, 1]
    assert np.ptp(truth) > 0.1
    np.testing.assert_allclose(given(bert, template, label="witty", batch_size=batch_size), truth, atol=2e-5)


@pytest.mark.parametrize("label", [0, "dull", 2, "rude"])
def test_label_by_name_or_index_and_probability(bert: Path, label: str | int) -> None:
    truth = one_by_one(bert, [{"text": c} for c in COMPLETIONS])
    index = {"dull": 0, "rude": 2}.get(label, label)
    np.testing.assert_allclose(given(bert, "completion", label=label), truth[:, index], atol=1e-5)
    found = given(bert, "completion", label=label, output="probability")
    np.testing.assert_allclose(found, softmax(truth)[:, index], atol=1e-5)


@pytest.mark.parametrize("label", [None, "funny", 3, -1])
def test_an_unknown_label_lists_the_labels(bert: Path, label: str | int | None) -> None:
    with pytest.raises(FieldError) as caught:
        given(bert, "completion", label=label)
    assert caught.value.field == "objectives.it.label"
    assert "0 (dull), 1 (witty), 2 (rude)" in str(caught.value)


def test_a_chat_template_that_is_not_there(bert: Path) -> None:
    with pytest.raises(FieldError) as caught:
        given(bert, "chat", label=0)
    assert caught.value.field == "objectives.it.template"


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("pad_token", [True, False], ids=["pad", "no-pad"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_decoder_reward_model_equals_one_by_one(
    tmp_path: Path, architecture: str, pad_token: bool, batch_size: int
) -> None:
    """GPT-2 has absolute positions: padding on the left, as this tokenizer would do, changes its values."""
    folder = make_reward_model(tmp_path, architecture, pad_token)
    truth = one_by_one(folder, [{"text": hh(p, c)} for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])[:, 0]
    assert np.ptp(truth) > 0.05
    np.testing.assert_allclose(given(folder, "hh", batch_size=batch_size), truth, atol=2e-5)


def test_chat_template_shows_both_turns_once(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path, "llama", pad_token=False)
    texts = [
        f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n{c}<|im_end|>\n"
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    truth = one_by_one(folder, [{"text": t, "add_special_tokens": False} for t in texts])[:, 0]
    np.testing.assert_allclose(given(folder, "chat"), truth, atol=2e-5)


def test_matrix_products_in_bfloat16_are_near_and_nothing_else_changes(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path / "model", "llama", pad_token=True)
    exact = score("r", Classifier(str(folder), "hh"), PROMPTS, COMPLETIONS)
    lower = score("r", Classifier(str(folder), "hh", precision="bfloat16"), PROMPTS, COMPLETIONS)
    assert not np.array_equal(exact, lower)
    np.testing.assert_allclose(lower, exact, atol=0.05 * np.std(exact) + 0.02)
    with pytest.raises(FieldError, match=r"classifier\.precision: got int8, allowed: one of float32, bfloat16"):
        Classifier(str(folder), "hh", precision="int8")


def test_one_label_as_a_probability_is_the_sigmoid(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path, "llama", pad_token=True)
    logits = given(folder, "hh", label=0)
    np.testing.assert_allclose(given(folder, "hh", output="probability"), 1 / (1 + np.exp(-logits)), atol=1e-6)


def test_an_empty_completion_alone_has_a_value(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path, "llama", pad_token=False)
    truth = one_by_one(folder, [{"text": "<|im_start|>"}])[0, 0]
    found = given(folder, "completion")
    assert found[COMPLETIONS.index("")] == pytest.approx(truth, abs=1e-5)


def test_what_is_too_long_loses_its_beginning(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path, "llama", pad_token=True)
    truth = one_by_one(folder, [{"text": hh(p, c)[-20:]} for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])[:, 0]
    np.testing.assert_allclose(given(folder, "hh", max_length=20), truth, atol=2e-5)


def test_a_template_of_ones_own_is_cut_where_the_completion_is_not(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path, "llama", pad_token=True)
    for template, part in (("Q {prompt} A {completion}", slice(-20, None)), ("{completion} | {prompt}", slice(20))):
        texts = [
            template.replace("{prompt}", p).replace("{completion}", c)
            for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
        ]
        truth = one_by_one(folder, [{"text": text[part]} for text in texts])[:, 0]
        np.testing.assert_allclose(given(folder, template, max_length=20), truth, atol=2e-5)


def test_the_declared_range_follows_the_output() -> None:
    assert (Classifier("a/b", "hh").low, Classifier("a/b", "hh").high) == (-np.inf, np.inf)
    probability = Classifier("a/b", "hh", output="probability")
    assert (probability.low, probability.high) == (0, 1)


def test_a_language_model_without_a_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match=r"no weights for score\.weight") as caught:
        given(make_tiny_model(tmp_path / "lm"), "hh", label=0)
    assert caught.value.field == "objectives.it.model"


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path, "llama", pad_token=True)
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FieldError) as caught:
        given(folder, "hh")
    assert caught.value.field == "objectives.it.model"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["/no/such/folder", "./nothing", "a/b/c"])
def test_a_folder_that_is_not_there(model: str) -> None:
    with pytest.raises(FieldError) as caught:
        score("it", load("it", "classifier", {"model": model, "template": "hh"}), ["a"], ["b"])
    assert caught.value.field == "objectives.it.model"
