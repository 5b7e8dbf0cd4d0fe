"""The files for ``serve deploy``, their README and the dashboard say what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.schema import ServeDeploySchema

from deployments import app
from deployments.metrics import Metrics
from deployments.options import Options, parse_options

DEPLOYMENTS = Path(app.__file__).parent
CONFIGS = sorted((DEPLOYMENTS / "config").glob("*.yaml"))
README = (DEPLOYMENTS / "config" / "README.md").read_text()
DASHBOARD = json.loads((DEPLOYMENTS / "grafana" / "mage_ray.json").read_text())

BUNDLES = re.compile(r"^# On a node of (\d+) CPUs a replica takes (\[.*\])\.$", re.MULTILINE)
# Counters by their names, gauges too, histograms by their buckets: what PromQL asks for.
SUFFIXES = {"counter": "_total", "gauge": "", "histogram": "_bucket"}


@pytest.fixture(params=CONFIGS, ids=lambda path: path.name)
def config(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def application(config: Path) -> dict[str, Any]:
    [found] = yaml.safe_load(config.read_text())["applications"]
    return dict(found)


def options(config: Path, study: Path) -> Options:
    """What the file asks for, of a study that is there."""
    (study / "study.yaml").touch()
    return parse_options(application(config)["args"] | {"study": str(study)})


def test_serve_understands_all_of_a_config(config: Path) -> None:
    written = yaml.safe_load(config.read_text())
    read = ServeDeploySchema.model_validate(written)
    # Serve ignores fields that it doesn't know: what it read must be all that is written.
    assert json.loads(read.model_dump_json(exclude_unset=True)) == written
    assert read.http_options.host == "127.0.0.1"
    assert read.applications[0].import_path == f"{app.__name__}:{app.build.__name__}"


def test_a_config_overrides_nothing_that_build_decides(config: Path) -> None:
    assert application(config)["deployments"] == [{"name": "mage_ray", "user_config": {"revision": "1"}}]
    assert not re.search(r"^[^#]*(key|env_vars)", config.read_text(), re.MULTILINE | re.IGNORECASE)


def test_a_config_takes_what_its_comment_says(config: Path, tmp_path: Path) -> None:
    [(cpus, bundles)] = BUNDLES.findall(config.read_text())
    assert options(config, tmp_path).bundles(int(cpus)) == yaml.safe_load(bundles)


def test_options_that_are_commented_out_are_valid_too(config: Path, tmp_path: Path) -> None:
    plain = options(config, tmp_path)
    offered = re.findall(r"^      # (\w+: \S+)", config.read_text(), re.MULTILINE)
    assert offered
    for line in offered:
        changed = yaml.safe_load(line)
        if "guide_study" in changed:
            changed["guide_study"] = str(tmp_path)
        if "recipe" in changed:
            changed["recipe"] = str(tmp_path / "study.yaml")
        given = application(config)["args"] | {"study": str(tmp_path)} | changed
        assert parse_options(given) != plain


def test_the_configs_differ_as_their_names_say(tmp_path: Path) -> None:
    fused, split, gpus, auto = (
        options(DEPLOYMENTS / "config" / f"{name}.yaml", tmp_path)
        for name in ("cpu_fused", "cpu_split", "gpus_split", "autoscaled")
    )
    assert (fused.workers, split.workers, gpus.workers) == (1, 2, 2)
    assert gpus.gpus == gpus.guide_gpus == 1  # whole ones, so that the step goes over nccl
    assert fused.max_replicas is None and auto.max_replicas is not None
    assert auto.cpus > 0  # else the first replica would take a node, and there were no room for the second


def test_the_readme_lists_every_config_and_every_option_with_its_default() -> None:
    assert sorted(re.findall(r"^\| `(\w+\.yaml)`", README, re.MULTILINE)) == [path.name for path in CONFIGS]
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| \S", README, re.MULTILINE)
    expected = {
        name: "required" if field.is_required() else "none" if field.default is None else str(field.default).lower()
        for name, field in Options.model_fields.items()
    }
    assert dict(rows) == expected
    assert len(rows) == len(expected)


def test_the_readmes_reload_is_one_that_serve_takes() -> None:
    [block] = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    changed = application(DEPLOYMENTS / "config" / "cpu_fused.yaml") | yaml.safe_load(block)
    [deployment] = ServeDeploySchema.model_validate({"applications": [changed]}).applications[0].deployments
    assert deployment.user_config == {"revision": "2"}


def test_the_dashboard_shows_all_that_a_replica_measures_and_nothing_else() -> None:
    asked = {
        metric
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
        for metric in re.findall(r"\bray_\w+", target["expr"])
    }
    families = text_string_to_metric_families(Metrics().text().decode())
    made = {f"ray_{family.name}{SUFFIXES[family.type]}" for family in families if not family.name.endswith("_created")}
    assert asked == made


def test_the_dashboards_panels_are_whole() -> None:
    [variable] = DASHBOARD["templating"]["list"]
    assert variable["type"] == "datasource"
    ids, places = set(), set()
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"]["uid"] == f"${{{variable['name']}}}"
        ids.add(panel["id"])
        places |= {(panel["gridPos"]["x"], panel["gridPos"]["y"])}
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
    assert len(ids) == len(places) == len(DASHBOARD["panels"])
