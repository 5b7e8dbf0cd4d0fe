"""DPO on pairs of tokens as they were sampled (TRL's trainer; arXiv:2305.18290)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mage_ray.models import load_model, load_tokenizer
from mage_ray.training.pairs import Pair
from mage_ray.training.run import Continued, Run, lora_config

if TYPE_CHECKING:
    from mage_ray.chat import Chat


def dpo_trainer(run: Run, done: int, arguments: Mapping[str, Any]) -> Any:
    """A DPOTrainer for the steps after ``done``. ``kl_strength`` is DPO's beta.

    The reference's log-probabilities come with the data, so that no step has to run the reference model. A pair's
    margin is part of them: ``beta (log-ratio difference) - margin`` is DPO's logit with the chosen answer's reference
    raised by ``margin / beta``.
    """
    from datasets import Dataset
    from transformers import set_seed
    from trl import DPOConfig, DPOTrainer

    from mage_ray.chat import Chat

    _score_answers_alone()

    class Trainer(Continued, DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset  # It holds tokens; TRL would add an end to those that were cut short.

    spec = run.spec
    # Before the model: with ZeRO-3 the arguments make from_pretrained partition the weights as it reads them.
    own: dict[str, Any] = {"beta": spec.kl_strength, "disable_dropout": spec.lora.dropout == 0}
    config = DPOConfig(**arguments, **own, max_length=None, train_sampling_strategy="sequential")
    dtype = "bfloat16" if arguments["bf16"] else "float32"
    model, tokenizer = load_model(run.study.model, dtype), load_tokenizer(run.study.model)
    pairs = run.pairs[done * spec.batch_size : spec.steps * spec.batch_size]
    data = Dataset.from_list(list(_tokens(pairs, Chat(tokenizer, model, run.study.system), run)))
    set_seed(run.study.seed)  # All experts of a study start from one LoRA initialisation: their merge rests on it.
    trainer = Trainer(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora_config(spec.lora)
    )
    trainer.precompute_ref_logps = True
    trainer.done, trainer.steps = done, spec.steps
    return trainer


def _score_answers_alone() -> None:
    """Let TRL put only the answers' positions through the LM head on CPUs, too.

    It does so on GPUs; elsewhere it scores the prompts and the padding as well, which takes a quarter of a step here.
    """
    from trl.trainer import utils

    on_gpu = getattr(utils, "_use_triton", None)
    if on_gpu is not None:  # Another TRL is as right, and slower.
        utils._use_triton = lambda device: device.type == "cpu" or on_gpu(device)


def _tokens(pairs: Iterable[Pair], chat: Chat, run: Run) -> Iterable[dict[str, Any]]:
    prompts: dict[str, list[int]] = {}
    for pair in pairs:
        text = pair.chosen.prompt
        if text not in prompts:
            prompts[text] = list(chat.encode(text))
        yield {
            "prompt_ids": prompts[text],
            "chosen_ids": list(pair.chosen.ids),
            "rejected_ids": list(pair.rejected.ids),
            "ref_chosen_logps": run.reference[pair.chosen] + pair.margin / run.spec.kl_strength,
            "ref_rejected_logps": run.reference[pair.rejected],
        }
