"""One model as one Ray Train job, and several side by side."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mage_ray.cluster import nodes_with
from mage_ray.errors import UserError
from mage_ray.study import Study
from mage_ray.training.progress import shown
from mage_ray.training.run import Run
from mage_ray.training.worker import train

if TYPE_CHECKING:
    from rich.console import Console

_log = logging.getLogger("mage_ray")

_RESTARTS = 2
"""How often a job whose worker died goes on from its last checkpoint before it is given up."""


def fit(run: Run, in_process: bool = False) -> Path:
    """Train, and return the folder of the last checkpoint (``mage_ray.training.checkpoint``), which is a PEFT adapter.

    A job that was killed goes on from its last checkpoint. ``in_process`` trains here, without workers. Raises
    UserError, one line with the root cause.
    """
    # How often the controller looks: a checkpoint counts from then on, and a report waits for the one before it.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    if ray.is_initialized() and len(ray.nodes()) == 1:
        # An actor for each job that watches for nodes about to go: here none goes without the job itself.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

    files, place = run.home.for_ray(run.checkpoints)
    run.home.publish(*run.needs)
    spec = run.spec
    gpu = spec.gpus_per_worker > 0
    resources = {"CPU": float(spec.cpus_per_worker)} | ({"GPU": spec.gpus_per_worker} if gpu else {})
    trainer = TorchTrainer(
        train,
        train_loop_config={"run": run},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]  # typed as the older version's
            num_workers=0 if in_process else spec.workers,
            use_gpu=gpu,
            resources_per_worker=resources,
            placement_strategy="PACK",
            label_selector=run.study.cluster.selector or None,
        ),
        run_config=ray.train.RunConfig(
            name=run.name,
            storage_path=place,
            storage_filesystem=files,
            failure_config=ray.train.FailureConfig(max_failures=_RESTARTS),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise UserError(f"{run.title}: training failed: {_root_cause(error)}") from error
    if result.checkpoint is None:
        raise UserError(f"{run.title}: training ended without a checkpoint")
    if files is None:
        return Path(result.checkpoint.path)
    last = run.folder / ".last"  # not published, by its name
    shutil.rmtree(last, ignore_errors=True)
    return Path(result.checkpoint.to_directory(str(last)))


def fit_all(
    runs: Sequence[Run], at_once: int, finished: Callable[[Run, Path], None], console: Console | None = None
) -> None:
    """``fit`` all of these, ``at_once`` at a time, and hand each one's last checkpoint to ``finished``, in its thread.

    ``console`` is shown the progress. Raises UserError: the first failure, after all others have ended.
    """
    failures: list[UserError] = []

    def work(run: Run) -> None:
        try:
            finished(run, fit(run))
        except UserError as error:
            failures.append(error)
            _log.error("%s", error)

    if console is not None and runs:
        names = ", ".join(run.name for run in runs)
        console.print(f"training {names}, {at_once} at a time: workers are starting", highlight=False)
    watched = {run.name: (run.metrics, run.end) for run in runs}

    def refresh() -> None:
        for run in runs:
            with suppress(UserError):  # the training will say it
                run.home.fetch(run.metrics, patient=False)

    with shown(console, watched, refresh):
        threads = ThreadPoolExecutor(at_once)
        try:
            for future in [threads.submit(work, run) for run in runs]:
                future.result()
        except BaseException:
            # They end when Ray does, which is soon; to wait for them first would be to train to the end.
            threads.shutdown(wait=False, cancel_futures=True)
            raise
        threads.shutdown()
    if failures:
        raise failures[0]


def room(study: Study) -> int:
    """How many of a study's models the cluster can train at once. Raises UserError when it can't even one.

    More than that would only wait for each other, with Ray Train's start timeouts ticking.
    """
    spec, nodes = study.training, nodes_with(study.cluster.selector)
    have = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    need = {"CPU": spec.workers * spec.cpus_per_worker, "GPU": spec.workers * spec.gpus_per_worker}
    places = spec.parallel_experts
    for kind, amount in need.items():
        if amount > have[kind]:
            raise UserError(
                f"training: an expert takes {amount:g} {kind}s (workers x {kind.lower()}s_per_worker), allowed: at "
                f"most the {have[kind]:g} that the Ray cluster has"
            )
        if amount:
            places = min(places, int(have[kind] // amount))
    return places


def _root_cause(error: Exception) -> str:
    """The last line of the innermost error's message: its type and what it says."""
    failures = getattr(error, "worker_failures", None)
    innermost: BaseException = next(iter(failures.values())) if failures else error
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(innermost).__name__
