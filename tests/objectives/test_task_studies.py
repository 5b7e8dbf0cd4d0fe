"""The studies of the paper's tasks: tiny random stand-ins for the hub's models are asked as those were trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from mage_ray.comparison.variants import compared_methods
from mage_ray.decoding.methods import KNOWN
from mage_ray.evaluation.strategies import STRATEGIES as WAYS
from mage_ray.folder import StudyFolder
from mage_ray.objectives import score
from mage_ray.study import Study, parse_study
from mage_ray.training.reward_data import HUMAN
from mage_ray.training.rollouts import load_objectives, study_prompts

PROMPTS = ["How are you?", "Tell me of the newts of Lake Garda, please.", "Why? {completion} and {prompt}"]
ANSWERS = ["Fine.", "No, I would rather not. {prompt}", "Because."]
STUDIES = resources.files("mage_ray") / "data" / "studies"


def shipped(name: str) -> Study:
    return parse_study((STUDIES / f"{name}.yaml").read_text(), name)


def save(folder: Path, architecture: str, config: Any, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random classifier of a named architecture, wide enough that texts differ."""
    import transformers

    torch.manual_seed(0)
    getattr(transformers, f"{architecture}ForSequenceClassification")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    """One number, no padding token, as the hub's GPT-2 reward models; its only special token is ``<|endoftext|>``."""
    from transformers import GPT2Config

    tokenizer = make_tiny_tokenizer()
    tokenizer.pad_token = None
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=1024, initializer_range=0.3,
        num_labels=1, bos_token_id=end, eos_token_id=end, pad_token_id=None,
    )  # fmt: skip
    return save(folder, "GPT2", config, tokenizer)


def segmented(begin: str, between: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with special tokens around one segment, or around two, as encoders have them."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tiny_tokenizer()
    names = {"[CLS]": "<|im_start|>", "[SEP]": "<|im_end|>"}
    single, pair = (text.replace("[CLS]", names["[CLS]"]).replace("[SEP]", names["[SEP]"]) for text in (begin, between))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names.values()],
    )
    return tokenizer


def distilbert(folder: Path) -> Path:
    from transformers import DistilBertConfig

    tokenizer = segmented("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]")
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, hidden_dim=64, n_layers=2, n_heads=2, initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id, id2label={0: "NO_HUMOR", 1: "HUMOR"}, label2id={"NO_HUMOR": 0, "HUMOR": 1},
    )  # fmt: skip
    return save(folder, "DistilBert", config, tokenizer)


def deberta(folder: Path) -> Path:
    from transformers import DebertaV2Config

    tokenizer = segmented("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]")
    config = DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, initializer_range=0.5, num_labels=1, type_vocab_size=0,
        pad_token_id=tokenizer.pad_token_id, relative_attention=True, pos_att_type=["p2c", "c2p"],
    )  # fmt: skip
    return save(folder, "DebertaV2", config, tokenizer)


def bart(folder: Path) -> Path:
    """Its head reads the last end token: a text must have as many as the others of its batch."""
    from transformers import BartConfig

    tokenizer = segmented("[CLS] $A [SEP]", "[CLS] $A [SEP] [SEP] $B [SEP]")
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=1024, init_std=0.5,
        # Named: two labels without names are three, once a config of BART has been saved and loaded.
        id2label={0: "hallucinated", 1: "faithful"}, label2id={"hallucinated": 0, "faithful": 1},
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return save(folder, "Bart", config, tokenizer)


def longformer(folder: Path) -> Path:
    from transformers import LongformerConfig

    tokenizer = segmented("[CLS] $A [SEP]", "[CLS] $A [SEP] [SEP] $B [SEP]")
    config = LongformerConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=1026, attention_window=16, initializer_range=0.5, num_labels=1, type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return save(folder, "Longformer", config, tokenizer)


Shown = Callable[[str, str], Mapping[str, Any]]
"""What an objective's model must see of a prompt and a completion: arguments of its tokenizer."""


def question(prompt: str, completion: str) -> Mapping[str, Any]:
    return {"text": f"question: {prompt} answer: {completion}"}


def dialogue(prompt: str, completion: str) -> Mapping[str, Any]:
    return {"text": f"\n\nHuman: {prompt}\n\nAssistant: {completion}"}


TASKS: dict[str, dict[str, tuple[Callable[[Path], Path], int, Shown]]] = {
    "helpful-assistant": {
        "helpful": (gpt2, 0, dialogue),
        "harmless": (gpt2, 0, dialogue),
        "humor": (distilbert, 1, lambda prompt, completion: {"text": completion}),
    },
    "reddit-summary": {
        "summary": (gpt2, 0, lambda prompt, completion: {"text": f"{completion} <|endoftext|> {prompt}"}),
        "preference": (deberta, 0, lambda prompt, completion: {"text": prompt, "text_pair": completion}),
        "faithful": (bart, 1, lambda prompt, completion: {"text": completion, "text_pair": prompt}),
    },
    "long-form-qa": dict.fromkeys(("relevance", "factuality", "completeness"), (longformer, 0, question)),
}


def one_by_one(folder: Path, label: int, shown: Shown) -> list[float]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt, completion in zip(PROMPTS, ANSWERS, strict=True):
        encoded = tokenizer(return_tensors="pt", return_token_type_ids=False, **shown(prompt, completion))
        with torch.no_grad():
            found.append(float(model(**encoded).logits[0, label]))
    return found


@pytest.mark.parametrize("task", TASKS)
def test_a_tasks_reward_models_are_asked_as_they_were_trained(task: str, tmp_path: Path) -> None:
    study = shipped(task)
    assert list(study.objectives) == list(TASKS[task])
    standing = {name: make(tmp_path / name) for name, (make, _, _) in TASKS[task].items()}
    objectives = {
        name: spec.model_copy(update={"model": str(standing[name])}) for name, spec in study.objectives.items()
    }
    # A file stands for the hub's prompts, in the columns that they have there.
    column = study.prompts.column or "chosen"
    texts = [f"prompt {i}" if study.prompts.column else f"{HUMAN}prompt {i}\n\nAssistant: x" for i in range(9)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    prompts = study.prompts.model_copy(update={"source": str(tmp_path / "prompts.jsonl"), "train": 6, "evaluation": 3})
    study = study.model_copy(update={"objectives": objectives, "prompts": prompts})
    train, evaluation = study_prompts(study)
    assert {prompt.text for prompt in train + evaluation} == {f"prompt {i}" for i in range(9)}
    for name, objective in load_objectives(study, StudyFolder(tmp_path)).items():
        _, label, shown = TASKS[task][name]
        truth = one_by_one(standing[name], label, shown)
        assert np.ptp(truth) > 1e-3, name
        np.testing.assert_allclose(score(name, objective, PROMPTS, ANSWERS), truth, atol=5e-5, err_msg=name)


def test_the_comparisons_study_trains_all_that_can_be_compared() -> None:
    study = shipped("hh-two")
    assert list(study.rewards) == list(study.objectives) == ["helpful", "harmless"]
    assert {*compared_methods(study)} == {*KNOWN, *WAYS}
    assert len(study.evaluation_grid()) == 11


def test_the_local_study_trains_the_reward_models_that_its_objectives_name() -> None:
    study = shipped("hh-local")
    assert [spec.type for spec in study.objectives.values()] == ["reward"] * 3
    assert list(study.rewards) == list(study.objectives) == ["helpful", "harmless", "humor"]
    assert [spec.template for spec in study.rewards.values()] == ["hh", "hh", "completion"]
    assert study.rewards["harmless"].data == "data/hh-harmless.jsonl.gz"
