"""The trainer of a value model: regression of rewards on the pool's answers (FUDGE, arXiv:2104.05218; VAS)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from mage_ray.models import load_model, load_tokenizer
from mage_ray.training.run import Continued, Example, Run, lora_config

if TYPE_CHECKING:
    from mage_ray.chat import Chat


def value_trainer(run: Run, done: int, arguments: Mapping[str, Any]) -> Any:
    """A Trainer of a ValueModel for the steps after ``done``."""
    import torch
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments, set_seed

    from mage_ray.chat import Chat
    from mage_ray.training.value_model import ValueModel

    class ValueTrainer(Continued, Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    values, spec = run.values, run.spec
    assert values is not None
    # Before the model: with ZeRO-3 the arguments make from_pretrained partition the weights as it reads them.
    config = TrainingArguments(**arguments, remove_unused_columns=False, label_names=[])
    model = load_model(run.study.model, "bfloat16" if arguments["bf16"] else "float32")
    chat = Chat(load_tokenizer(run.study.model), model, run.study.system)
    size = model.config.get_text_config().hidden_size
    set_seed(initial_seed(run))
    backbone = get_peft_model(model, lora_config(spec.lora))
    rank = values.rank if values.head == "vocabulary" else None
    tokens = fmean(len(example.sample.ids) for example in run.examples)
    trainer = ValueTrainer(
        model=ValueModel(backbone, size, rank, values.lam if values.target == "td" else None, tokens),
        args=config,
        train_dataset=_tokens(run.examples[done * spec.batch_size : spec.steps * spec.batch_size], chat),
        data_collator=collate,
    )
    trainer.done, trainer.steps = done, spec.steps
    return trainer


def initial_seed(run: Run) -> int:
    """What LoRA and head start from: one seed for all value models of a set, since their merge rests on it, or each its
    own, to see how much."""
    assert run.values is not None
    if run.values.initialisation == "common":
        return run.study.seed
    place = run.study.objective_names.index(next(iter(run.weights)))
    return int(np.random.SeedSequence([run.study.seed, 6, place]).generate_state(1)[0])


def _tokens(examples: Sequence[Example], chat: Chat) -> Any:
    from datasets import Dataset

    prompts = {example.sample.prompt: list(chat.encode(example.sample.prompt)) for example in examples}
    return Dataset.from_list(
        [
            {
                "prompt_ids": prompts[example.sample.prompt],
                "answer_ids": list(example.sample.ids),
                "reward": example.reward,
            }
            for example in examples
        ]
    )


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A ValueModel's inputs, padded on the left, so that all answers end with the last position."""
    import torch

    longest = max(len(row["prompt_ids"]) + len(row["answer_ids"]) for row in rows)
    ids, mask, answer = [], [], []
    for row in rows:
        own = [*row["prompt_ids"], *row["answer_ids"]]
        padding = longest - len(own)
        ids.append([0] * padding + own)
        mask.append([0] * padding + [1] * len(own))
        answer.append([0] * (longest - len(row["answer_ids"])) + [1] * len(row["answer_ids"]))
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "answer": torch.tensor(answer),
        "reward": torch.tensor([row["reward"] for row in rows]),
    }
