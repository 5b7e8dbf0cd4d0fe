"""DeepSpeed's ZeRO: its configuration, its import, and weights put together from their partitions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def prepare_deepspeed() -> None:
    """Import DeepSpeed in a process group's worker, and keep it from compiling.

    On CPUs it would build ``deepspeed_shm_comm`` on first use: that takes a compiler and about 40 s, and a process
    killed meanwhile leaves a file on which all later ones wait for ever. The op serves ``inference_all_reduce`` alone,
    which training never calls, so it is declared unavailable, as it is on other systems than Linux.
    """
    import logging

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import torch

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Now, not with the first engine: ZeRO-3 partitions the model while it is loaded, and must know all ranks by then.
    deepspeed.init_distributed(torch.distributed.get_backend(), verbose=False)


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
