"""The manifests for Kubernetes: pods by Kubernetes' schemas, the rest by those who read it, all by KubeRay's own."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deployments.options import Options
from mage_ray.cli import _parser

PLACE = Path(__file__).resolve().parents[2] / "deployments" / "kuberay"
CRDS = os.environ.get("KUBERAY_CRDS")
"""A folder with KubeRay's ray.io_*.yaml, which are not ours to keep here."""


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((PLACE / name).read_text())
    return content


def pods() -> Iterator[dict[str, Any]]:
    for name, part in (("job.yaml", "rayClusterSpec"), ("service.yaml", "rayClusterConfig")):
        cluster = load(name)["spec"][part]
        yield cluster["headGroupSpec"]["template"]
        yield from (group["template"] for group in cluster["workerGroupSpecs"])


@pytest.mark.parametrize("pod", pods())
def test_its_pods_are_pods(pod: dict[str, Any]) -> None:
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **pod}
    kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)
    for container in pod["spec"]["containers"]:
        assert container["resources"]["requests"] == container["resources"]["limits"]
        # Nothing secret stands in a manifest.
        assert "env" not in container and all(set(source) == {"secretRef"} for source in container["envFrom"])


def test_the_jobs_entrypoint_is_a_command_of_ours() -> None:
    spec = load("job.yaml")["spec"]
    command, *arguments = shlex.split(spec["entrypoint"])
    options = _parser().parse_args(arguments)
    assert command == "mage-ray" and options.folder.startswith("s3://") and options.study.startswith("/studies/")


def test_the_service_is_an_application_of_ours() -> None:
    applications = ServeDeploySchema.model_validate(
        yaml.safe_load(load("service.yaml")["spec"]["serveConfigV2"])
    ).applications
    [application] = applications
    assert application.import_path == "deployments.app:build"
    options = Options.model_validate(application.args)
    cluster = load("service.yaml")["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"} and cluster["gcsFaultToleranceOptions"]["redisAddress"]
    # The gang fits on a worker.
    has = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    wanted = options.bundles(8)
    assert sum(bundle["CPU"] for bundle in wanted) <= float(has["cpu"])
    assert sum(bundle["GPU"] for bundle in wanted) <= float(has["nvidia.com/gpu"])


@pytest.mark.skipif(CRDS is None, reason="KUBERAY_CRDS names no folder with KubeRay's schemas")
@pytest.mark.parametrize(("name", "kind"), [("job.yaml", "rayjobs"), ("service.yaml", "rayservices")])
def test_they_are_what_the_operator_takes(name: str, kind: str) -> None:
    definition = yaml.safe_load(Path(str(CRDS), f"ray.io_{kind}.yaml").read_text())
    [schema] = [one["schema"]["openAPIV3Schema"] for one in definition["spec"]["versions"] if one["name"] == "v1"]
    closed(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    takes = jsonschema.Draft202012Validator(schema)
    manifest = load(name)
    assert takes.is_valid(manifest), [error.message for error in takes.iter_errors(manifest)]
    manifest["spec"]["unknown"] = 1
    assert not takes.is_valid(manifest)


def closed(schema: Any) -> None:
    """Refuse what a schema doesn't know, as the operator drops it silently."""
    if isinstance(schema, dict):
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("type", None)
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        closed(part)
