"""The dashboard draws the metrics that there are, and all of them."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from sdbatch.batch import metrics

DASHBOARD = json.loads((Path(__file__).parents[2] / "cluster" / "grafana.json").read_text())
QUERIES = [t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]]
OURS = {
    *(f"ray_sdbatch_{name}_total" for name in metrics.COUNTERS),
    *(f"ray_sdbatch_{name}" for name in metrics.GAUGES),
    "ray_sdbatch_stage_seconds_bucket",
}


def drawn():
    """Return the metrics that the dashboard's queries name."""
    queries = [*QUERIES, DASHBOARD["templating"]["list"][1]["definition"]]
    return {name for query in queries for name in re.findall(r"\bray_\w+", query)}


def test_every_metric_of_a_run_is_drawn_and_no_other():
    assert {name for name in drawn() if "sdbatch" in name} == OURS


def test_rays_own_metrics_are_those_that_its_own_dashboard_draws():
    spec = importlib.util.find_spec("ray.dashboard.modules.metrics.dashboards")
    panels = Path(spec.submodule_search_locations[0]) / "default_dashboard_panels.py"
    others = drawn() - OURS
    assert others
    assert others <= set(re.findall(r"\bray_\w+", panels.read_text()))


@pytest.mark.parametrize("query", QUERIES)
def test_queries_have_their_brackets_closed(query):
    for opening, closing in ("()", "{}", "[]"):
        assert query.count(opening) == query.count(closing)


def test_counters_are_drawn_as_rates_and_gauges_are_not():
    for query in QUERIES:
        counters = len(re.findall(r"_total\b|_bucket\b", query))
        assert len(re.findall(r"rate\(ray_sdbatch_\w+(_total|_bucket)\b", query)) == counters


def test_panels_do_not_lie_over_each_other():
    places = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) < 24  # Grafana's columns
