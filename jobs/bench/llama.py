"""llama.cpp's server as an arm: adapters loaded once, their scales set by each request. Not yet run: README.md.

It serves merged rows alone (it knows no guidance), so its arms stand beside ``unguided``.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arms import Arm
from setting import PREFERENCES, BenchError, Prompt, unguided

from mage_ray.decoding.plan import Plan

_START_SECONDS = 120


def why_not(gguf: Path | None, loras: Sequence[Path], experts: int) -> str | None:
    """Why there are no llama-server arms; None when they can run."""
    if shutil.which("llama-server") is None:
        return "no llama-server on the PATH"
    if gguf is None or len(loras) != experts:
        return f"needs --llama-gguf and {experts} times --llama-lora: the same weights in GGUF, float32"
    return None


@contextmanager
def server(gguf: Path, loras: Sequence[Path], threads: int, slots: int, length: int) -> Iterator[str]:
    """A running llama-server's address, on loopback. Raises BenchError when it doesn't come up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["llama-server", "-m", str(gguf), "--lora-init-without-apply"]
    for lora in loras:
        command += ["--lora", str(lora)]
    command += ["-t", str(threads), "-tb", str(threads), "-np", str(slots), "-c", str(slots * length)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait(address, process)
            yield address
        except BenchError as error:
            log.seek(0)
            last = (log.read().strip().splitlines() or ["it printed nothing"])[-1]
            raise BenchError(f"{error}; its last line: {last}") from None
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def make_llama_arms(address: str, new_tokens: int) -> list[Arm]:
    """One preference at batch 1 and 8, and eight preferences at once."""
    one = unguided(PREFERENCES[0])
    return [
        _arm("llama_server", address, [one], new_tokens),
        _arm("llama_server", address, [one] * 8, new_tokens),
        _arm("llama_server_mixed8", address, [unguided(p) for p in PREFERENCES], new_tokens),
    ]


def _arm(name: str, address: str, plans: Sequence[Plan], new_tokens: int) -> Arm:
    def run(prompts: Sequence[Prompt]) -> list[list[int]]:
        with ThreadPoolExecutor(len(plans)) as pool:
            return list(pool.map(lambda plan, prompt: complete(address, plan, prompt, new_tokens), plans, prompts))

    return Arm(name, tuple(plans), run)


def complete(address: str, plan: Plan, prompt: Prompt, new_tokens: int) -> list[int]:
    """One greedy request's new tokens. ``ignore_eos`` bars the end token, so a text that would end differs from ours.

    Raises BenchError for an answer without its tokens.
    """
    [row] = plan.rows
    question: dict[str, Any] = {
        "prompt": list(prompt),
        "n_predict": new_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": False,
        "return_tokens": True,
        "lora": [{"id": i, "scale": scale} for i, scale in enumerate(row.coefficients)],
    }
    body = json.dumps(question).encode()
    call = urllib.request.Request(f"{address}/completion", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(call, timeout=600) as answer:
            tokens = json.loads(answer.read()).get("tokens")
    except (OSError, ValueError) as error:
        raise BenchError(f"llama-server: {error}") from None
    if not tokens:
        raise BenchError("llama-server: an answer without tokens (too old for return_tokens?)")
    return [int(token) for token in tokens]


def _wait(address: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise BenchError(f"llama-server ended with {process.returncode}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise BenchError(f"llama-server was not ready within {_START_SECONDS} s")
