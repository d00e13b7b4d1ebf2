"""Addresses of MLflow's pages, and the columns in which its experiment page shows variants.

MLflow's table of runs shows no metric by default. A shared view is a tag of the experiment that
names columns, order and filter; the address of the page names the view.
"""

import json
from collections.abc import Sequence

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
VIEW_TAG = (
    f"mlflow.sharedViewState.{VIEW}",
    json.dumps(
        {
            "selectedColumns": COLUMNS,
            "searchFilter": f"tags.`{PREFIX}kind` = 'variant'",
            "orderByKey": "metrics.`quality/bits_per_byte`",
            "orderByAsc": True,
        }
    ),
)
"""Name and value of the tag that makes the view."""


def pages(uri: str, experiment_id: str, run_ids: Sequence[str]) -> dict[str, str]:
    """The experiment in our view, and the page that compares the given runs, by their titles."""
    has_address = uri.startswith(("http://", "https://"))
    server = redacted(uri).rstrip("/") if has_address else LOCAL_SERVER
    runs = json.dumps(list(run_ids), separators=(",", ":"))
    table = f"experiments/{experiment_id}/runs?workflowType=machine_learning"
    return {
        "mlflow runs": f"{server}/#/{table}&viewStateShareKey={VIEW}",
        "mlflow compare": f"{server}/#/compare-runs?runs={runs}"
        f"&experiments={json.dumps([experiment_id])}",
    }
