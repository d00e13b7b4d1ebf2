"""What a model made of each item of its benchmarks, as a table: MLflow lays those of several models
side by side.
"""

from foldstack.compression.evaluation.paired import Item
from foldstack.flows.comparison.tables import SHOWN_METRICS
from foldstack.tasks.evaluate_model import load_evaluation
from foldstack.tasks.store.artifacts import Artifact

ITEMS_TABLE = "items_table.json"
COLUMNS = ("item", "metric", "score", "answer", "target")
SHOWN_CHARACTERS = 200


def item_table(evaluated: Artifact) -> dict[str, list[object]]:
    """Columns by their names: one row per item, which has the same name for every model."""
    items = load_evaluation(evaluated).items
    rows = [row for item in items if (row := _row(item)) is not None]
    return {name: [row[place] for row in rows] for place, name in enumerate(COLUMNS)}


def _row(item: Item) -> tuple[object, ...] | None:
    """None for an item that has no score of its own, like one text of many."""
    numbers = {k: v for k, v in item.metrics.items() if isinstance(v, int | float)}
    metric = next((name for name in (*SHOWN_METRICS, *numbers) if name in numbers), None)
    if metric is None:
        return None
    read = "" if item.filter == "none" else f" {item.filter}"
    name = f"{item.benchmark} {item.doc_id}{read}"
    return name, metric, numbers[metric], answer_of(item), item.target


def answer_of(item: Item) -> str:
    """What the model said, or the number of the choice that it finds most likely."""
    if item.responses:
        return item.responses[0][:SHOWN_CHARACTERS]
    choices = item.loglikelihoods
    return str(max(range(len(choices)), key=choices.__getitem__)) if len(choices) > 1 else ""
