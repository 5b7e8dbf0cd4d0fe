"""GRPO, online reinforcement learning with one reward function for each objective (TRL's trainer; arXiv:2402.03300)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mage_ray.chat import conversation
from mage_ray.folder import StudyFolder
from mage_ray.models import load_model, load_tokenizer
from mage_ray.objectives import Normaliser, load, score
from mage_ray.specs import ObjectiveSpec
from mage_ray.training.run import Continued, Run, lora_config


def grpo_trainer(run: Run, done: int, arguments: Mapping[str, Any]) -> Any:
    """A GRPOTrainer for the steps after ``done``, with the expert's row of the mix as ``reward_weights``."""
    from datasets import Dataset
    from transformers import set_seed
    from trl import GRPOConfig, GRPOTrainer

    class Trainer(Continued, GRPOTrainer):
        pass

    study, spec = run.study, run.spec
    config = GRPOConfig(
        **arguments,
        beta=spec.kl_strength,
        disable_dropout=spec.lora.dropout == 0,
        num_generations=spec.generations_per_prompt,
        max_completion_length=study.rollouts.max_new_tokens,
        temperature=study.rollouts.temperature,
        top_p=study.rollouts.top_p,
        reward_weights=list(run.weights.values()),
        shuffle_dataset=False,
    )
    dtype = "bfloat16" if arguments["bf16"] else "float32"
    model, tokenizer = load_model(study.model, dtype), load_tokenizer(study.model)
    per_step = spec.batch_size // spec.generations_per_prompt
    prompts = run.prompts[done * per_step : spec.steps * per_step]
    normaliser = Normaliser.from_json(run.normalisation, study.objective_names)
    set_seed(study.seed)  # All experts of a study start from one LoRA initialisation: their merge rests on it.
    trainer = Trainer(
        model=model,
        args=config,
        reward_funcs=[reward_function(name, study.objectives[name], normaliser, run.home) for name in run.weights],
        train_dataset=Dataset.from_list([{"prompt": conversation(text, run.study.system)} for text in prompts]),
        processing_class=tokenizer,
        peft_config=lora_config(spec.lora),
    )
    trainer.done, trainer.steps = done, spec.steps
    return trainer


def reward_function(
    name: str, spec: ObjectiveSpec, normaliser: Normaliser, folder: StudyFolder
) -> Callable[..., list[float | None]]:
    """An objective as TRL calls it: conversations in, normalised rewards out. ``folder`` is the study's."""
    objective = load(name, spec.type, spec.options, spec.direction, folder)
    place = normaliser.names.index(name)

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float | None]:
        asked = [turns[-1]["content"] for turns in prompts]
        raw = score(name, objective, asked, [turns[0]["content"] for turns in completions])
        normalised = (raw * normaliser.sign[place] - normaliser.mean[place]) / normaliser.std[place]
        return [float(value) for value in normalised]

    reward.__name__ = name
    return reward
