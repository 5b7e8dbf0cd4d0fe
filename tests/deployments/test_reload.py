"""New experts and new replicas under load: what runs goes on with what it began with, and nothing is lost."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx2 as httpx
import pytest
from adapters import make_adapter
from clusters import free_port
from servers import PROMPT, ROOT, Serving, answers, config_of, deploy, serving, until
from test_faults import text

from mage_ray.decoding.request import Sampling
from mage_ray.folder import StudyFolder
from mage_ray.generator import Generator

pytestmark = pytest.mark.slow

HALF = {"positive": 0.5, "short": 0.5}


@pytest.fixture
def own(study: StudyFolder, tmp_path: Path) -> StudyFolder:
    """A copy of the study that a test may change."""
    shutil.copytree(study.path, tmp_path / "own")
    return StudyFolder(tmp_path / "own")


def greedy(folder: StudyFolder, tokens: int = 24) -> str:
    generator = Generator.open(folder.path, rows=6, length=400)
    return generator.generate([PROMPT[0]["content"]], HALF, sampling=Sampling(tokens, 0.0))[0].text


def told(server: Serving, **fields: object) -> str:
    return str(server.post(max_tokens=24, preference=HALF, **fields).json()["choices"][0]["message"]["content"])


def test_new_experts_are_served_and_running_answers_keep_the_old(own: StudyFolder, tmp_path: Path) -> None:
    before = greedy(own)
    with serving(own.path, tmp_path, "length=400", "max_tokens=300", "cpus=1") as server:
        client = server.client()
        assert told(server) == before
        want = text(client, 7, method="mage-i-m")
        reloaded = threading.Event()

        def reload() -> None:
            make_adapter(Path(own.study.model), own.expert("bone", "short"), seed=99, scale=0.4)
            server.process.send_signal(signal.SIGHUP)
            reloaded.set()

        got = text(client, 7, 3, reload, method="mage-i-m")
        assert reloaded.is_set() and got == want
        after = greedy(own)
        assert after != before
        until(lambda: told(server) == after, 60, "the new expert")
        assert server.get("/v1/objectives").json()["revision"] == "2"
        until(lambda: len(server.actors("RowWorker")) == 1, 60, "the old gang's end")

        # A study that can't be served is refused, and the last one stays.
        kept = told(server)
        shutil.rmtree(own.expert("soup", "short"))
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "there is no expert" in server.log.read_text(), 60, "the refusal")
        assert told(server) == kept


def test_a_redeploy_under_load_loses_none(study: StudyFolder, tmp_path: Path) -> None:
    script = str(ROOT / "tests" / "deployments" / "redeploying.py")
    with serving(study.path, tmp_path, script=script) as server:
        client = server.client()
        want = {seed: text(client, seed, method="mage-i-m") for seed in range(4)}
        replica = server.actors("ServeReplica")[0].pid
        stop, got, failed = threading.Event(), [0], []

        def load(seed: int) -> None:
            while not stop.is_set():
                answer = text(server.client(), seed, method="mage-i-m")
                got[0] += 1
                if answer != want[seed]:
                    failed.append((seed, answer))

        threads = [threading.Thread(target=load, args=(seed,)) for seed in want]
        for thread in threads:
            thread.start()
        time.sleep(1)
        for _ in range(2):
            server.process.send_signal(signal.SIGUSR1)
            seen = server.log.read_text().count("deployed again")
            until(lambda seen=seen: server.log.read_text().count("deployed again") > seen, 120, "the redeploy")  # type: ignore[misc]
        time.sleep(1)
        stop.set()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
        assert not failed and got[0] >= 8
        assert server.actors("ServeReplica")[0].pid != replica


@pytest.fixture
def two(study: StudyFolder, tmp_path: Path) -> Iterator[Serving]:
    options = ("cpus=1", "replicas=2", "length=400", "max_tokens=300", "--cluster-cpus", "2")
    with serving(study.path, tmp_path, *options) as server:
        yield server


def test_any_replica_changes_any_generation(two: Serving) -> None:
    """A change may arrive at a replica that doesn't own what it is for."""
    client = two.client()
    asked = {"model": "tiny", "messages": PROMPT, "max_tokens": 300, "temperature": 1.0, "seed": 5, "stream": True}
    gangs, statuses = set(), []
    for _ in range(12):
        with client.chat.completions.create(**asked) as stream:  # type: ignore[call-overload]
            id = next(stream).model_extra["mage"]["generations"][0]
            gangs.add(id.split("-")[1])
            answer = httpx.patch(f"{two.url}/v1/generations/{id}", json={"preference": {"short": 1}}, timeout=30)
            statuses.append(answer.status_code)
            assert answer.json()["mage"]["preference"] == {"positive": 0, "short": 1}
    assert len(gangs) == 2 and set(statuses) == {200}


def test_serve_deploy_with_a_new_revision_reloads_in_place(cluster: Serving, own: StudyFolder, tmp_path: Path) -> None:
    port = free_port()
    config = config_of(own.path, port)
    server = replace(cluster, url=f"http://127.0.0.1:{port}")
    deploy(cluster, config, {"revision": "1"}, tmp_path)
    until(lambda: answers(server), 120, "the deployment")
    client, before = server.client(), told(server)
    want = text(client, 7, method="mage-i-m")
    replica = server.actors("ServeReplica")[0].pid

    def reload() -> None:
        make_adapter(Path(own.study.model), own.expert("bone", "short"), seed=99, scale=0.4)
        threading.Thread(target=deploy, args=(cluster, config, {"revision": "2"}, tmp_path)).start()

    assert text(client, 7, 3, reload, method="mage-i-m") == want
    until(lambda: server.get("/v1/objectives").json()["revision"] == "2", 90, "the new revision")
    assert told(server) == greedy(own) != before
    until(lambda: len(server.actors("RowWorker")) == 1, 60, "the old gang's end")

    # Other constants need no other workers.
    [worker] = server.actors("RowWorker")
    file = own.study_file
    file.write_text(file.read_text().replace("strength: 1.0", "strength: 2.5"))
    deploy(cluster, config, {"revision": "3"}, tmp_path)
    until(lambda: server.get("/v1/objectives").json()["defaults"]["strength"] == 2.5, 60, "the new strength")
    assert told(server) == greedy(own)
    assert [one.pid for one in server.actors("RowWorker")] == [worker.pid]

    # What can't be served is logged, and the last one stays.
    kept = told(server)
    shutil.rmtree(own.expert("soup", "short"))
    deploy(cluster, config, {"revision": "4"}, tmp_path)
    time.sleep(5)
    assert told(server) == kept and server.get("/v1/objectives").json()["revision"] == "3"
    assert [one.pid for one in server.actors("ServeReplica")] == [replica]
