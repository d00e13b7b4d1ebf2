"""`foldstack compare`: the sweeps that were run in a home, side by side."""

from pathlib import Path

from foldstack.compression.errors import InputError
from foldstack.flows.comparison import Comparison, load
from foldstack.tasks.home import foldstack_home


def compare_command(model: str, home: Path | None = None) -> list[Comparison]:
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
