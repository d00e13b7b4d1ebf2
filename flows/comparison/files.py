"""The files of a sweep's comparison, and all the comparisons in a home."""

import json
from pathlib import Path

from foldstack.compression.errors import InputError
from foldstack.flows.comparison.plots import plot_quality
from foldstack.flows.comparison.result import Comparison
from foldstack.flows.comparison.tables import markdown, write_csv
from foldstack.tasks.environment.home import foldstack_home, in_this_home


def save(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write comparison.json, .csv, .md and, where there is something to show, the plot."""
    files = save_texts(comparison, folder)
    if plot_quality(comparison, folder / "quality_against_size.png"):
        files["quality_against_size.png"] = folder / "quality_against_size.png"
    return files


def save_texts(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write comparison.json, .csv and .md."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "comparison.json": comparison.model_dump_json(indent=1),
        "comparison.csv": write_csv(comparison),
        "comparison.md": markdown(comparison) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return {name: folder / name for name in texts}


def load(folder: Path) -> Comparison:
    """The comparison that `save` wrote; its models where they are now, if the home was moved."""
    data = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    home = folder.resolve().parents[1]
    for row in data["rows"]:
        row["folder"] = str(in_this_home(row["folder"], home) or row["folder"])
    return Comparison.model_validate(data)


def comparisons_in(home: Path | None, model: str = "") -> list[Comparison]:
    """The comparisons in the home, the newest last.

    Raises:
        InputError: there is none, of this model.
    """
    folder = (home or foldstack_home()) / "sweeps"
    files = sorted(folder.glob("*/comparison.json"), key=lambda file: file.stat().st_mtime)
    comparisons = [load(file.parent) for file in files]
    chosen = [entry for entry in comparisons if not model or is_of(entry, model)]
    if not chosen:
        known = sorted({entry.model for entry in comparisons})
        which = f" of {model}; there are sweeps of {', '.join(known)}" if known and model else ""
        raise InputError(f"no sweep{which} in {folder}; run one with `foldstack run CONFIG`")
    return chosen


def is_of(comparison: Comparison, model: str) -> bool:
    """True for the model's name as it stands in the config, or for its last part."""
    return model in (comparison.model, Path(comparison.model).name)
