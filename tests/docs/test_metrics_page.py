"""The page of metrics has the table of the code, and no dashboard, alert or page names a metric that does not exist.

``python -m tests.docs.test_metrics_page`` writes the table anew.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.telemetry.metrics.families import FAMILIES, ZERO, Family
from tests.docs.blocks import ROOT
from tests.telemetry.scrape import promtool

PAGE = ROOT / "docs/metrics.md"
DEPLOY = ROOT / "deploy"
DASHBOARD, ALERTS = DEPLOY / "grafana-dashboard.json", DEPLOY / "prometheus-alerts.yaml"
TABLE = re.compile(r"(?<=<!-- metrics -->\n).*?(?=<!-- /metrics -->)", re.DOTALL)
NAME = re.compile(r"\blastcall_[a-z_]+\b")
NO_METRICS = {"lastcall_client"}
"""Names of other things that look like metrics."""


def table() -> str:
    rows = ["| Name | Kind, labels | What it is |", "|---|---|---|"]
    for family in FAMILIES:
        kind = ", ".join([family.kind, *(f"`{label}`" for label in family.labels)])
        rows.append(f"| `{family.name}` | {kind} | {family.help} |")
    return "\n".join(rows) + "\n"


def names_of(family: Family) -> set[str]:
    if family.kind != "histogram":
        return {family.name}
    return {family.name, *(f"{family.name}_{part}" for part in ("bucket", "sum", "count"))}


KNOWN = {name for family in FAMILIES for name in names_of(family)}


def test_the_page_has_the_table_of_the_code() -> None:
    found = TABLE.search(PAGE.read_text())
    assert found is not None
    assert found[0] == table()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda it: it.name)
def test_a_name_says_the_kind_and_the_unit(family: Family) -> None:
    assert family.name.endswith("_total") == (family.kind == "counter")
    assert family.kind != "histogram" or (family.name.endswith("_seconds") and family.bounds)
    assert list(family.bounds) == sorted(set(family.bounds))
    assert all(len(labels) == len(family.labels) for labels in family.starts)
    assert not family.help.endswith(".")


@pytest.mark.parametrize(
    "path", [DASHBOARD, ALERTS, DEPLOY / "prometheus-alerts-test.yaml", PAGE, ROOT / "docs/operations.md"]
)
def test_each_metric_that_is_named_exists(path: Path) -> None:
    named = {*NAME.findall(path.read_text())} - NO_METRICS
    assert named
    assert named - KNOWN == set()


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def test_each_counter_that_must_stay_zero_has_an_alert() -> None:
    watched = {name for alert in alerts() for name in NAME.findall(alert["expr"])}
    assert {family.name for family in ZERO} - watched == set()


def test_each_alert_says_what_to_do_and_where_that_is() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    for alert in alerts():
        name = alert["alert"]
        assert {"summary", "runbook"} <= alert["annotations"].keys(), name
        assert alert["labels"]["severity"] in ("page", "ticket"), name
        assert f"| `{name}` |" in page, name
    told = re.findall(r"^\| `(Lastcall\w+)` \|", page, re.MULTILINE)
    assert sorted(told) == sorted(alert["alert"] for alert in alerts())


def test_what_callers_and_users_can_mend_pages_nobody() -> None:
    table = (ROOT / "docs/failures.md").read_text().split("<!-- failures -->")[1].split("<!-- /failures -->")[0]
    theirs = {*re.findall(r"^\| `(\w+)` \|.*\| (?:caller|user)[^|]*\|$", table, re.MULTILINE)}
    assert theirs
    left_out = {
        alert["alert"]: {*"|".join(re.findall(r'!~"([^"]*)"', alert["expr"])).split("|")} - {"ok", "abandoned"}
        for alert in alerts()
        if alert["alert"] in ("LastcallTurnsFail", "LastcallUpstreamFails")
    }
    assert left_out == {"LastcallTurnsFail": theirs, "LastcallUpstreamFails": theirs}


def panels(of: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in of.get("panels", ()):
        yield panel
        yield from panels(panel)


def test_the_dashboard_shows_each_counter_that_must_stay_zero_and_its_places_do_not_overlap() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    shown = {
        name for panel in panels(dashboard) for it in panel.get("targets", ()) for name in NAME.findall(it["expr"])
    }
    assert {family.name for family in ZERO} - shown == set()
    taken: set[tuple[int, int]] = set()
    for panel in panels(dashboard):
        at = panel["gridPos"]
        places = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not places & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= places
    ids = [panel["id"] for panel in panels(dashboard)]
    assert len(ids) == len(set(ids))


def run_promtool(*arguments: str) -> str:
    done = subprocess.run([promtool(), *arguments], capture_output=True, cwd=DEPLOY, timeout=60, check=False)
    told = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, told
    return told


def test_promtool_takes_the_alerts() -> None:
    assert f"{len(alerts())} rules found" in run_promtool("check", "rules", ALERTS.name)


def test_each_alert_fires_when_it_should_and_not_before() -> None:
    run_promtool("test", "rules", "prometheus-alerts-test.yaml")
    tests = yaml.safe_load((DEPLOY / "prometheus-alerts-test.yaml").read_text())["tests"]
    fired = {it["alertname"] for test in tests for it in test["alert_rule_test"] if it.get("exp_alerts")}
    assert fired == {alert["alert"] for alert in alerts()}


def test_promtool_takes_each_expression_of_the_dashboard(tmp_path: Path) -> None:
    """As rules, because promtool checks no dashboards."""
    expressions = {
        it["expr"].replace("$__rate_interval", "5m").replace("$__range", "1h").replace("$instance", ".*")
        for panel in panels(json.loads(DASHBOARD.read_text()))
        for it in panel.get("targets", ())
    }
    rules = [{"record": f"a:{number}", "expr": it} for number, it in enumerate(sorted(expressions))]
    as_rules = tmp_path / "dashboard.yaml"
    as_rules.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in run_promtool("check", "rules", str(as_rules))


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text()))
