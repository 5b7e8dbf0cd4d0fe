"""The alerts: over numbers that replicas report, and each explained."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deployments.errors import ApiError
from deployments.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deployments" / "grafana" / "alerts.yaml"
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_each_alert_is_over_numbers_that_are_reported() -> None:
    text = Metrics().text().decode()
    reported = {name.removesuffix("_total") for name in re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)}
    for rule in ALERTS:
        names = {re.sub(r"_(bucket|total)$", "", name) for name in re.findall(r"ray_(mage_ray_\w+)", rule["expr"])}
        assert names and names <= reported, rule["alert"]
    kinds = {kind for rule in ALERTS for kind in re.findall(r'kind="(\w+)"', rule["expr"])}
    assert kinds <= {ApiError.of(status, "x", "x", "x").type for status in (400, 401, 429, 500, 503)}


def test_each_alert_has_its_place_in_the_runbook() -> None:
    told = re.findall(r"^### (\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    assert told == [rule["alert"] for rule in ALERTS]
    assert all(rule["labels"]["severity"] in ("page", "ticket") and rule["annotations"]["summary"] for rule in ALERTS)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_them() -> None:
    done = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
