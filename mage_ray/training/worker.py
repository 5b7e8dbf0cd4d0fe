"""What each worker of a Ray Train job does: model, LoRA, trainer, checkpoints on the way."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mage_ray.specs import TrainingSpec
from mage_ray.training.checkpoint import (
    TrainingState,
    load_adapter_weights,
    load_optimiser,
    load_state,
    save_adapter,
    save_optimiser,
    save_state,
)
from mage_ray.training.dpo import dpo_trainer
from mage_ray.training.grpo import grpo_trainer
from mage_ray.training.reward_trainer import reward_trainer
from mage_ray.training.run import Run
from mage_ray.training.value_trainer import value_trainer
from mage_ray.training.zero import full_weights, prepare_deepspeed, zero_config

_PUBLISHED_EVERY = 2.0
"""Seconds between two times that metrics are published."""
_MICRO_BATCH = 8
"""Pairs, completions or texts at once on one worker; a larger share of the batch is accumulated."""


def train(config: Mapping[str, Run]) -> None:
    """Ray Train's train function. Reports a checkpoint now and then, and the last holds what was trained."""
    import ray.train
    import torch

    run = config["run"]
    spec = run.spec
    _calm()
    torch.set_num_threads(spec.cpus_per_worker)
    # In-process (ScalingConfig(num_workers=0)) there is no process group, and nothing for ZeRO to share out.
    distributed = torch.distributed.is_initialized()
    if distributed:
        prepare_deepspeed()
    rank = ray.train.get_context().get_world_rank()
    workers = ray.train.get_context().get_world_size()
    last = ray.train.get_checkpoint()
    if last is None:
        _train_from(run, None, rank, workers, distributed)
    else:
        with last.as_directory() as place:
            _train_from(run, Path(place), rank, workers, distributed)


def _train_from(run: Run, last: Path | None, rank: int, workers: int, distributed: bool) -> None:
    from transformers import PrinterCallback

    spec = run.spec
    run.home.fetch(run.metrics, *run.needs)
    done = 0 if last is None else load_state(last).step
    if done >= run.end:
        return
    make = {"dpo": dpo_trainer, "grpo": grpo_trainer}[spec.method]
    if run.values is not None:
        make = value_trainer
    elif run.reward is not None:
        make = reward_trainer
    with tempfile.TemporaryDirectory(prefix="mage_ray-") as scratch:
        arguments = trainer_arguments(spec, run.study.seed, run.end - done, workers, distributed, scratch)
        trainer = make(run, done, arguments)
        start = last if last is not None or run.start is None else run.home.at(run.start)
        if start is not None:
            load_adapter_weights(start, trainer.model)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_watch(trainer, run, done, last, rank, workers))
        trainer.train()


def trainer_arguments(
    spec: TrainingSpec, seed: int, steps: int, workers: int, distributed: bool, scratch: str
) -> dict[str, Any]:
    """The arguments that all trainers share, for this many steps."""
    import torch

    share = spec.batch_size // workers
    micro = max(size for size in range(1, min(share, _MICRO_BATCH) + 1) if share % size == 0)
    bfloat16 = uses_bfloat16(spec)
    return {
        "output_dir": scratch,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
        "max_steps": steps,
        "learning_rate": spec.learning_rate,
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
        "bf16": bfloat16,
        "use_cpu": not spec.gpus_per_worker or not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "seed": seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "deepspeed": zero_config(spec.zero_stage, bfloat16) if distributed else None,
    }


def uses_bfloat16(spec: TrainingSpec) -> bool:
    """Whether to compute in bfloat16. "auto": on GPUs that have it; on CPUs float32 was as fast."""
    if spec.precision != "auto":
        return spec.precision == "bfloat16"
    import torch

    return bool(spec.gpus_per_worker) and torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _watch(trainer: Any, run: Run, done: int, last: Path | None, rank: int, workers: int) -> Any:
    """The callback that restores the optimiser, seeds each step, writes metrics down and reports checkpoints."""
    import ray.train
    from transformers import TrainerCallback, set_seed

    spec = run.spec

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.started = self.published = time.monotonic()

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if last is not None:
                load_optimiser(last, trainer.optimizer, rank)
            self.started = time.monotonic()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # Dropout and sampling depend on the step alone, so a resumed run draws what an unbroken one would have.
            key = [run.study.seed, done + state.global_step, rank]
            set_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logs = kwargs["logs"]
            if "loss" not in logs:  # The summary at the end.
                return
            step = done + state.global_step
            metrics = {key: float(value) for key, value in logs.items() if isinstance(value, int | float)}
            if rank == 0:
                run.folder.mkdir(parents=True, exist_ok=True)
                now = time.monotonic()
                with open(run.metrics, "a") as file:
                    file.write(json.dumps({"step": step, "seconds": round(now - self.started, 3)} | metrics) + "\n")
                self.started = now
                if step == run.end or now > self.published + _PUBLISHED_EVERY:
                    run.home.publish(run.metrics)
                    self.published = now
            if step % spec.checkpoint_every == 0 or step == run.end:
                self.checkpoint(step, metrics)

        def checkpoint(self, step: int, metrics: dict[str, float]) -> None:
            folder = Path(tempfile.mkdtemp(prefix="mage_ray-"))
            weights = full_weights(trainer.model)  # All ranks take part.
            if rank == 0:
                config = trainer.model.peft_config["default"]
                config.base_model_name_or_path = run.study.model
                save_adapter(folder, weights, config)
                save_state(folder, TrainingState(step, workers, metrics))
            save_optimiser(folder, trainer.optimizer, rank)
            ray.train.report(
                metrics | {"step": step},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                delete_local_checkpoint_after_upload=True,
            )

    return Watch()


def _calm() -> None:
    """Libraries that neither phone home nor fill the log with what nobody asked for."""
    import warnings

    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.filterwarnings("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
