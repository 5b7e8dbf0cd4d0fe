"""Peak memory of a process that serves a batch of 8, guided or not: each in a fresh process, which runs this file.

``python memory.py MODEL unguided|guided NEW_TOKENS PROMPT_TOKENS THREADS`` prints the two peaks as JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

BATCH = 8


def peaks(model: str, kind: str, new_tokens: int, prompt_tokens: int, threads: int) -> dict[str, int | None]:
    """``measure`` in a fresh process. Raises CalledProcessError when that fails; its stderr is shown."""
    numbers = [str(new_tokens), str(prompt_tokens), str(threads)]
    command = [sys.executable, str(Path(__file__).resolve()), model, kind, *numbers]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(model: str, kind: str, new_tokens: int, prompt_tokens: int) -> dict[str, int | None]:
    """Peak resident bytes of this process: ``serving`` (while it decodes) and ``process`` (since it started).

    The engine has as many rows as the batch needs. ``serving`` is None where the kernel doesn't let a process reset
    its peak. ``process`` holds the loading of the model, too, which is alike in both kinds.
    """
    from arms import ours
    from setting import EXPERTS, PREFERENCES, Prompts, guided, load, random_experts, unguided

    from mage_ray.decoding.engine import Engine
    from mage_ray.decoding.runner import RowRunner
    from mage_ray.merging.bank import AdapterBank

    plan = guided(PREFERENCES[0]) if kind == "guided" else unguided(PREFERENCES[0])
    loaded = load(model)
    bank = AdapterBank(random_experts(loaded, EXPERTS))
    rows, length = BATCH * len(plan.rows), prompt_tokens + new_tokens
    engine = Engine(RowRunner(loaded, bank, rows=rows, length=length), stop=[])
    prompts = Prompts.of(model).take(BATCH, prompt_tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resettable = _reset_peak()
    ours(kind, engine, [plan] * BATCH, new_tokens).run(prompts)
    serving = _peak()
    return {"serving": serving if resettable else None, "process": max(before, serving)}


def _reset_peak() -> bool:
    """Whether the kernel has forgotten this process's peak (Linux: proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    import torch

    torch.set_num_threads(int(sys.argv[5]))
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
