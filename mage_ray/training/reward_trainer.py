"""The trainers of reward models: Bradley-Terry on pairs (TRL's), logistic regression on labelled texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mage_ray.models import load_classifier, load_tokenizer
from mage_ray.training.reward_data import Comparison, Labelled, Row
from mage_ray.training.run import Continued, Run, lora_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def reward_trainer(run: Run, done: int, arguments: Mapping[str, Any]) -> Any:
    """A trainer of a reward model for the steps after ``done``."""
    from transformers import set_seed

    spec, reward = run.spec, run.reward
    assert reward is not None
    rows = run.rows[done * spec.batch_size : spec.steps * spec.batch_size]
    tokenizer = load_tokenizer(run.study.model)
    data = _tokens(rows, tokenizer, reward.max_length)
    config = _arguments(run, arguments)
    dtype = "bfloat16" if arguments["bf16"] else "float32"
    set_seed(run.study.seed)
    model = tuned_classifier(run, dtype)
    make = _label_trainer if reward.label is not None else _pair_trainer
    trainer = make(model, config, data, tokenizer)
    trainer.done, trainer.steps = done, spec.steps
    return trainer


def tuned_classifier(run: Run, dtype: str) -> Any:
    """The run's model with a head that says 0, and LoRA around it: the head is trained whole."""
    from peft import get_peft_model

    assert run.reward is not None
    classifier = load_classifier(run.study.model, dtype, run.reward.layers)
    return get_peft_model(classifier, lora_config(run.spec.lora, "SEQ_CLS"))


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Their tokens as the ``classifier`` objective has them: the end of what is too long, special tokens kept."""
    tokenizer.truncation_side = "left"
    return list(tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"])


def _arguments(run: Run, arguments: Mapping[str, Any]) -> Any:
    """Before the model: with ZeRO-3 the arguments make from_pretrained partition the weights as it reads them."""
    from transformers import TrainingArguments
    from trl import RewardConfig

    assert run.reward is not None
    shared: dict[str, Any] = {**arguments, "train_sampling_strategy": "sequential"}
    if run.reward.label is not None:
        return TrainingArguments(**shared, remove_unused_columns=False, label_names=[])
    return RewardConfig(**shared, max_length=None, disable_dropout=run.spec.lora.dropout == 0)


def _pair_trainer(model: Any, config: Any, data: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    from trl import RewardTrainer

    class Trainer(Continued, RewardTrainer):
        pass

    return Trainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)


def _label_trainer(model: Any, config: Any, data: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits
    from transformers import Trainer

    padding = tokenizer.pad_token_id
    model.config.get_text_config().pad_token_id = padding  # where the last token is, which the head reads

    class LabelTrainer(Continued, Trainer):
        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """Of one share of a batch, whose means are averaged."""
            label_B = inputs.pop("label")
            outputs = model(**inputs, use_cache=False)
            loss = binary_cross_entropy_with_logits(outputs.logits.squeeze(-1).float(), label_B.float())
            return (loss, outputs) if return_outputs else loss

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["ids"]) for row in rows)
        return {
            "input_ids": torch.tensor([row["ids"] + [padding] * (longest - len(row["ids"])) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row["ids"]) + [0] * (longest - len(row["ids"])) for row in rows]),
            "label": torch.tensor([row["label"] for row in rows]),
        }

    return LabelTrainer(model=model, args=config, train_dataset=data, data_collator=collate)


def _tokens(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Any:
    """The rows' tokens as a data set; a row that comes again is encoded once."""
    from datasets import Dataset

    texts = list(dict.fromkeys(text for row in rows for text in row.texts))
    ids = dict(zip(texts, encode(texts, tokenizer, max_length), strict=True))
    found: list[dict[str, Any]] = []
    for row in rows:
        if isinstance(row, Comparison):
            found.append({"chosen_ids": ids[row.chosen], "rejected_ids": ids[row.rejected]})
        elif isinstance(row, Labelled):
            found.append({"ids": ids[row.text], "label": float(row.label)})
    return Dataset.from_list(found)
