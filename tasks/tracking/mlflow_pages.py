"""Addresses of MLflow's pages, and what its experiment page shows of variants: columns and charts.

MLflow's table of runs shows no metric by default, and its page that compares runs begins with the
first parameters by the alphabet. A shared view is a tag of the experiment that names columns,
order, filter and charts; the address of the page names the view.
"""

import json
from collections.abc import Mapping
from typing import Any

from foldstack.tasks.environment.redaction import redacted
from foldstack.tasks.tracking.run_record import PREFIX

LOCAL_SERVER = "http://127.0.0.1:5000"
"""Where `foldstack ui` serves a file that has no server."""
VIEW = "foldstack"
COLUMNS = (
    "attributes.`Created`",
    "params.`method.name`",
    "params.`sparsity`",
    "metrics.`quality/bits_per_byte`",
    "metrics.`quality/perplexity`",
    "metrics.`size/realised_sparsity`",
    "metrics.`size/parameters`",
    "metrics.`speed/decode_speedup`",
    f"tags.`{PREFIX}grade`",
)
DECIDES = "what decides"
"""The section of our charts; MLflow adds one chart for each other metric, below."""
FOLDED = (
    "quality", "before_recovery", "beside_dense", "forecast", "size", "speed", "time", "recovery",
    "track", "engines",
)  # fmt: skip
"""Sections of MLflow's own charts, which are opened by a click."""


def _chart(number: int, kind: str, **settings: Any) -> dict[str, Any]:
    common = {"deleted": False, "isGenerated": False, "metricSectionId": DECIDES}
    return {"type": kind, "uuid": f"{VIEW}-{number}", "runsCountToCompare": 100} | common | settings


def _axis(metric: str) -> dict[str, str]:
    return {"key": metric, "type": "METRIC"}


def _line(metric: str) -> dict[str, Any]:
    return {
        "metricKey": metric, "selectedMetricKeys": [metric], "xAxisKey": "step",
        "xAxisScaleType": "linear", "scaleType": "linear", "lineSmoothness": 0, "range": {},
        "yAxisKey": "metric", "yAxisExpressions": [], "selectedXAxisMetricKey": "",
        "ignoreOutliers": False, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True,
    }  # fmt: skip


QUALITY = _axis("quality/bits_per_byte")
CHARTS = (
    _chart(1, "SCATTER", xaxis=_axis("size/parameters"), yaxis=QUALITY),
    _chart(2, "SCATTER", xaxis=_axis("speed/decode_speedup"), yaxis=QUALITY),
    _chart(3, "BAR", metricKey="beside_dense/bits_per_byte_difference"),
    _chart(4, "LINE", **_line("recovery/loss")),
)


def view_tag(sweep: str = "") -> tuple[str, str]:
    """Name and value of the experiment's tag that makes a view: of all variants, or of a sweep's.

    Args:
        sweep: digest of a sweep, as it stands in the tag of its variants.
    """
    which = f"tags.`{PREFIX}kind` = 'variant'"
    if sweep:
        which += f" and tags.`{PREFIX}sweeps` LIKE '%{sweep}%'"
    sections = [_section(DECIDES, is_open=True), *(_section(name) for name in FOLDED)]
    view = {
        "selectedColumns": COLUMNS,
        "searchFilter": which,
        "orderByKey": "metrics.`quality/bits_per_byte`",
        "orderByAsc": True,
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": CHARTS,
        "compareRunSections": sections,
        "isAccordionReordered": True,  # or ours would come in the order of the alphabet
    }
    return f"mlflow.sharedViewState.{_key(sweep)}", json.dumps(view, separators=(",", ":"))


def _section(name: str, *, is_open: bool = False) -> Mapping[str, Any]:
    flags = {"isReordered": False, "deleted": False, "isGenerated": not is_open}
    return {"uuid": name, "name": name, "display": is_open} | flags


def _key(sweep: str) -> str:
    return f"{VIEW}-{sweep}" if sweep else VIEW


def pages(uri: str, experiment_id: str, sweep: str) -> dict[str, str]:
    """The experiment in our view, and the charts of a sweep's variants, by their titles."""
    has_address = uri.startswith(("http://", "https://"))
    server = redacted(uri).rstrip("/") if has_address else LOCAL_SERVER
    table = f"{server}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    return {
        "mlflow runs": f"{table}&viewStateShareKey={VIEW}",
        "mlflow compare": f"{table}&viewStateShareKey={_key(sweep)}&compareRunsMode=CHART",
    }
