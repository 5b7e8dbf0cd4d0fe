"""A server on this machine: ``python -m deployments.local --study runs/demo``, which ``make serve`` runs.

It listens on loopback, on a Ray cluster of its own that ends with it, unless RAY_ADDRESS names another one. It serves
the recipe in the study's folder where there is one. SIGHUP has it read the study and the recipe again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mage_ray.errors import UserError


@dataclass
class Running:
    """A server that answers at ``url``, and the arguments that it was built with."""

    url: str
    arguments: dict[str, Any]
    revision: int = 1

    def deploy(self, **options: Any) -> None:
        """Deploy anew, with these options in place of the old ones: new replicas read the study again, and the old ones
        end when the answers on their way have. Raises UserError."""
        from ray import serve

        from deployments.app import build

        self.arguments |= options
        application = build(self.arguments | {"revision": self.revision})
        self.revision += 1
        try:
            serve.run(application, name="mage_ray", route_prefix="/")
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"the server can't be started: {reason} (its log is under /tmp/ray)") from None


@contextmanager
def running(study: Path | str, port: int = 0, cluster_cpus: int | None = None, **options: Any) -> Iterator[Running]:
    """Within it, the study is served on loopback; ``options`` as of ``deployments.options.Options``.

    ``port`` 0 is any free one; ``cluster_cpus`` what the cluster is said to have. Raises UserError.
    """
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    from mage_ray.cluster import connected

    port = port or _free_port()
    with connected(cluster_cpus):
        try:
            serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
            started = Running(f"http://127.0.0.1:{port}", {"study": str(study), **options})
            started.deploy()
            yield started
        finally:
            if ray.is_initialized():
                serve.shutdown()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m deployments.local", description=__doc__)
    parser.add_argument("--study", required=True, help="a trained study's folder")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--cluster-cpus", type=int, help="what the cluster is said to have (default: this machine's)")
    parser.add_argument("--no-recipe", action="store_true", help="serve the study's own constants")
    parser.add_argument("options", nargs="*", metavar="name=value", help="further arguments of deployments.app:build")
    given = parser.parse_args(arguments)
    try:
        options = dict(option.split("=", 1) for option in given.options)
    except ValueError:
        print(f"options: got {' '.join(given.options)}, allowed: name=value", file=sys.stderr)
        return 2
    if given.no_recipe and "recipe" in options:
        print(f"--no-recipe: got recipe={options['recipe']} as well, allowed: one of the two", file=sys.stderr)
        return 2

    def found() -> dict[str, Any]:
        return {} if given.no_recipe or "recipe" in options else {"recipe": study_recipe(given.study)}

    print(f"starting: {given.study} on 127.0.0.1:{given.port} (some ten seconds)", flush=True)
    try:
        with running(given.study, given.port, given.cluster_cpus, **options, **found()) as server:
            # A signal is a byte to read: nothing is done within a handler. Not before Ray has set handlers of its own.
            signals, writing = os.pipe()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, lambda number, _: os.write(writing, bytes([number])))
            print(_recipe_line(server), _greeting(server.url, given.study), sep="", flush=True)
            while os.read(signals, 1)[0] == signal.SIGHUP:
                try:
                    server.deploy(**found())
                    print(_recipe_line(server), "deployed again", sep="", flush=True)
                except UserError as error:
                    print(error, file=sys.stderr, flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def study_recipe(study: Path | str) -> str | None:
    """The path of the recipe that is in a study's folder now, if one is."""
    from mage_ray.folder import StudyFolder

    folder = StudyFolder.open(study)
    return folder.shown(folder.recipe) if folder.recipe.exists() else None


def _recipe_line(server: Running) -> str:
    path = server.arguments.get("recipe")
    return "" if path is None else f"recipe: {path} (--no-recipe: the study's own constants)\n"


def _greeting(url: str, study: str) -> str:
    from mage_ray.folder import StudyFolder

    spec = StudyFolder.open(study).study
    names = spec.objective_names
    body = {
        "model": spec.name,
        "messages": [{"role": "user", "content": "How was your day?"}],
        "max_tokens": 40,
        "preference": {name: round(1 / len(names), 4) for name in names},
    }
    key = " -H 'authorization: Bearer '\"$KEY\"" if os.environ.get("MAGE_RAY_API_KEYS") else ""
    return (
        f"playground: {url}/\n"
        f"curl {url}/v1/chat/completions -H 'content-type: application/json'{key} -d '{json.dumps(body)}'\n"
        "Ctrl+C ends it"
    )


if __name__ == "__main__":
    sys.exit(main())
