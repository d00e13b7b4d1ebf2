"""The files of a sweep's comparison, and all the comparisons in a home."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from foldstack.compression.errors import InputError
from foldstack.compression.storage.durable import write_whole
from foldstack.flows.comparison.findings import findings
from foldstack.flows.comparison.plots import plot_quality
from foldstack.flows.comparison.result import Comparison
from foldstack.flows.comparison.tables import arranged, markdown
from foldstack.tasks.environment.home import foldstack_home, in_this_home

COMPARISON = "comparison.json"
PLOT = "quality_against_size.png"


@dataclass(frozen=True)
class Comparisons:
    """What the sweeps of a home found."""

    readable: list[Comparison]
    """The newest last."""
    damaged: list[str]
    """A sentence on each file that could not be read."""


def save(comparison: Comparison, folder: Path, *, is_drawn: bool = False) -> dict[str, Path]:
    """Write comparison.json, .csv and .md and, where there is something to show, the plot; it is
    there already if `is_drawn`."""
    files = save_texts(comparison, folder)
    if (folder / PLOT).is_file() if is_drawn else plot_quality(comparison, folder / PLOT):
        files[PLOT] = folder / PLOT
    return files


def save_texts(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write comparison.json, .csv and .md, each of them whole or not at all."""
    from foldstack.flows.comparison.frame import csv_text

    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        COMPARISON: comparison.model_dump_json(indent=1),
        "comparison.csv": csv_text(comparison.frame()),
        "comparison.md": summary(comparison),
    }
    for name, text in texts.items():
        write_whole(folder / name, text)
    return {name: folder / name for name in texts}


def summary(comparison: Comparison) -> str:
    """What was found in words, and the table, as a page of Markdown."""
    words = [f"- {sentence}" for sentence in (*findings(comparison), *comparison.missed)]
    return "\n".join([*words, "", markdown(arranged(comparison.frame())), ""])


def load(folder: Path) -> Comparison:
    """The comparison that `save` wrote; its models where they are now, if the home was moved.

    Raises:
        InputError: it is not there, or not whole.
    """
    file = folder / COMPARISON
    try:
        comparison = Comparison.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{folder} holds no {COMPARISON}: it is not a sweep's folder") from None
    except (ValidationError, OSError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise InputError(
            f"{file} is damaged ({reason}); run that sweep again, which computes nothing that is "
            "in the store, or remove its folder"
        ) from None
    home = file.resolve().parents[2]
    rows = tuple(
        row.model_copy(update={"folder": str(in_this_home(row.folder, home) or row.folder)})
        for row in comparison.rows
    )
    return comparison.model_copy(update={"rows": rows})


def comparisons_in(home: Path | None, model: str = "") -> Comparisons:
    """The comparisons in the home; a damaged one is named and left out.

    Raises:
        InputError: there is none, of this model.
    """
    folder = (home or foldstack_home()) / "sweeps"
    comparisons, damaged = [], []
    for file in sorted(folder.glob(f"*/{COMPARISON}"), key=lambda file: file.stat().st_mtime):
        try:
            comparisons.append(load(file.parent))
        except InputError as error:
            damaged.append(str(error))
    chosen = [entry for entry in comparisons if not model or is_of(entry, model)]
    if not chosen:
        known = sorted({entry.model for entry in comparisons})
        which = f" of {model}; there are sweeps of {', '.join(known)}" if known and model else ""
        told = "".join(f"; {sentence}" for sentence in damaged)
        raise InputError(f"no sweep{which} in {folder}; run one with `foldstack run CONFIG`{told}")
    return Comparisons(chosen, damaged)


def is_of(comparison: Comparison, model: str) -> bool:
    """True for the model's name as it stands in the config, or for its last part."""
    return model in (comparison.model, Path(comparison.model).name)
