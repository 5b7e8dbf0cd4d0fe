"""DeepSpeed's ZeRO: its configuration, the op that it compiles, and weights put together from their partitions."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mage_ray.embedded import cache_folder
from mage_ray.files import locked

if TYPE_CHECKING:
    import torch

# Where DeepSpeed's optimisers for stage 3, stages 1 and 2, and bfloat16 without ZeRO keep what torch's one updates.
_PARTITIONS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")


def zero_config(stage: int, bfloat16: bool) -> dict[str, Any]:
    """The configuration for ``TrainingArguments(deepspeed=...)``; "auto" is filled in from those arguments.

    Torch's AdamW stays the optimiser: DeepSpeed's own would have to be compiled on every machine.
    """
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        # The defaults are for models of many GB: they'd set aside buffers larger than a small model.
        zero |= {"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
        zero["stage3_param_persistence_threshold"] = "auto"
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bfloat16},
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "steps_per_print": 2**31 - 1,
    }


def extensions_folder() -> Path:
    """Where compiled ops are kept; not torch's common folder, so that no other program's lock can hold us up."""
    return cache_folder() / "torch_extensions"


def prepare_deepspeed() -> None:
    """Import DeepSpeed with the op that it wants on CPUs (``deepspeed_shm_comm``) compiled and loaded.

    Torch guards a build with a file that a killed process leaves behind, on which all later ones then wait for ever.
    So every build and load happens here, one process of a machine at a time under a lock that dies with its holder; a
    guard file seen while holding that lock is a dead process's, and is removed. The first call takes about 40 s.
    Without a compiler the op is left out, and DeepSpeed's communication goes through gloo alone.
    """
    folder = extensions_folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    # The compile needs ninja, which lies beside python in a virtual environment that nobody activated.
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    with _quiet_output():
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
        if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
            return
        with locked(folder.with_name(".torch_extensions.lock")):
            for guard in folder.glob(f"**/{builder.NAME}/lock"):
                guard.unlink(missing_ok=True)
            try:
                # The builder keeps it for this process: DeepSpeed's own load, later and without our lock, finds it.
                builder.load(verbose=False)
            except (RuntimeError, OSError):
                deepspeed.ops.__compatible_ops__[builder.NAME] = False


@contextmanager
def _quiet_output() -> Iterator[None]:
    """Without the banner lines that DeepSpeed and the compiler's driver print."""
    import logging

    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(max(level, logging.WARNING))


def full_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trainable parameters by name, whole, float32, on the CPU. With ZeRO all ranks must call it together.

    Where ZeRO keeps float32 masters of low-precision weights, it is the masters that come back.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        whole = None
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            from deepspeed.utils import safe_get_full_fp32_param

            whole = safe_get_full_fp32_param(parameter)
        weights[name] = (parameter if whole is None else whole).detach().float().cpu().clone().contiguous()
    return weights


def optimiser_tensors(optimiser: Any) -> tuple[Any, list[torch.Tensor]]:
    """Torch's own optimiser inside whatever wraps it, and the tensors that it updates on this rank.

    Those are the parameters themselves or, with ZeRO, this rank's float32 partitions of them.
    """
    while not type(optimiser).__module__.startswith("torch.optim"):
        for partitions in _PARTITIONS:
            if hasattr(optimiser, partitions):
                return optimiser.optimizer, list(getattr(optimiser, partitions))
        optimiser = optimiser.optimizer
    return optimiser, [tensor for group in optimiser.param_groups for tensor in group["params"]]
