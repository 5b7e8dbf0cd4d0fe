"""One expert as one Ray Train job."""

from __future__ import annotations

import os
from pathlib import Path

from mage_ray.errors import UserError
from mage_ray.training.run import Run
from mage_ray.training.worker import train

_RESTARTS = 2
"""How often a job whose worker died goes on from its last checkpoint before it is given up."""


def fit(run: Run, in_process: bool = False) -> Path:
    """Train, and return the folder of the last checkpoint (``mage_ray.training.checkpoint``), which is a PEFT adapter.

    A job that was killed goes on from its last checkpoint. ``in_process`` trains here, without workers. Raises
    UserError, one line with the root cause.
    """
    # How often the controller looks: a checkpoint counts from then on, and a report waits for the one before it.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    spec = run.spec
    gpu = spec.gpus_per_worker > 0
    resources = {"CPU": float(spec.cpus_per_worker)} | ({"GPU": spec.gpus_per_worker} if gpu else {})
    trainer = TorchTrainer(
        train,
        train_loop_config={"run": run},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=0 if in_process else spec.workers, use_gpu=gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=run.name,
            storage_path=str(run.checkpoints),
            failure_config=ray.train.FailureConfig(max_failures=_RESTARTS),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise UserError(f"expert {run.name}: training failed: {_root_cause(error)}") from error
    if result.checkpoint is None:
        raise UserError(f"expert {run.name}: training ended without a checkpoint")
    return Path(result.checkpoint.path)


def _root_cause(error: Exception) -> str:
    """The last line of the innermost error's message: its type and what it says."""
    failures = getattr(error, "worker_failures", None)
    innermost: BaseException = next(iter(failures.values())) if failures else error
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(innermost).__name__
