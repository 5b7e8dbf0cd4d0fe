"""What people serve today: FastAPI around transformers' ``generate``, its guidance in a LogitsProcessor.

``python http_rival.py STUDY_FOLDER PORT THREADS`` answers streamed ``/v1/completions`` of MAGE-I-M, greedily, on
loopback. One request after another, as such servers do: requests of unequal preferences need unequal weights, and two
at a time would share the cores. Weights are merged on a preference's first request, and kept.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import Body, FastAPI
from fastapi.concurrency import iterate_in_threadpool, run_in_threadpool
from fastapi.responses import StreamingResponse
from rivals import MergedModels, generate_guided
from setting import BenchError, Prompt, load
from transformers import TextIteratorStreamer

from mage_ray.decoding.methods import plan_for
from mage_ray.decoding.plan import Plan
from mage_ray.folder import StudyFolder
from mage_ray.generator import bank_setup, load_experts
from mage_ray.models import load_tokenizer
from mage_ray.preference import named_preference

_START_SECONDS = 120


@contextmanager
def serving(folder: Path, threads: int) -> Iterator[str]:
    """The address of a rival that serves the study in ``folder``, in a process of its own.

    Raises BenchError when it doesn't come up.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(Path(__file__).resolve()), str(folder), str(port), str(threads)]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        # The threads that generate take their number from the environment.
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _wait(url, process)
            yield url
        except BenchError as error:
            log.seek(0)
            last = (log.read().strip().splitlines() or ["it printed nothing"])[-1]
            raise BenchError(f"{error}; the rival's last line: {last}") from None
        finally:
            process.kill()
            process.communicate()


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise BenchError(f"the rival ended with {process.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise BenchError(f"the rival was not ready within {_START_SECONDS} s")


class Rival:
    """A study's model, and the weights that were merged for its preferences."""

    def __init__(self, folder: Path) -> None:
        place = StudyFolder(folder)
        study = place.study
        experts = load_experts(place, study)
        self._names = study.objective_names
        self._setup = bank_setup(study, list(experts))
        self._tokenizer = load_tokenizer(study.model)
        self._models = MergedModels(load(study.model), [expert for members in experts.values() for expert in members])
        self._turn = asyncio.Lock()

    async def stream(self, question: dict[str, Any]) -> AsyncIterator[str]:
        """The server-sent events of one answer."""
        plan = plan_for("mage-i-m", named_preference(question["preference"], self._names), self._setup)
        async with self._turn:
            streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
            made: list[int] = []
            work = (plan, tuple(question["prompt"]), question["max_tokens"], streamer, made)
            thread = threading.Thread(target=self._generate, args=work)
            thread.start()
            async for piece in iterate_in_threadpool(streamer):
                yield _event({"choices": [{"index": 0, "text": piece, "finish_reason": None}]})
            await run_in_threadpool(thread.join)
        yield _event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        yield _event({"choices": [], "usage": {"completion_tokens": len(made)}})
        yield "data: [DONE]\n\n"

    def _generate(
        self, plan: Plan, prompt: Prompt, new_tokens: int, streamer: TextIteratorStreamer, made: list[int]
    ) -> None:
        """One answer's tokens into ``made``, and into ``streamer`` as they come."""
        try:
            made += generate_guided(self._models, plan, [prompt], new_tokens, streamer)[0]
        finally:
            # Also after a failure: the answer then counts no tokens, and nobody waits for ever.
            streamer.end()


def _event(what: dict[str, Any]) -> str:
    return f"data: {json.dumps(what)}\n\n"


def app(rival: Rival) -> FastAPI:
    """Its routes."""
    routes = FastAPI()

    @routes.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @routes.post("/v1/completions")
    def completions(question: Annotated[dict[str, Any], Body()]) -> StreamingResponse:
        return StreamingResponse(rival.stream(question), media_type="text/event-stream")

    return routes


def end_with_parent() -> None:
    """End this process once the one that started it is gone, however that came: it holds the other end of stdin."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    torch.set_num_threads(int(sys.argv[3]))
    uvicorn.run(app(Rival(Path(sys.argv[1]))), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
