"""`foldstack compress`: one model made smaller, without a recipe; the same flow underneath."""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import yaml
from rich.console import Console

from foldstack.compression.checkpoints.model_folder import gguf_of, locate, quantization_of, resolve
from foldstack.compression.errors import InputError
from foldstack.compression.storage.digest import digest_folder
from foldstack.compression.text.corpus import SELF
from foldstack.compression.text.text_files import is_text_file
from foldstack.flows.cli.command_run import link_of
from foldstack.flows.cli.output import print_json
from foldstack.flows.comparison.result import Comparison, Row
from foldstack.flows.comparison.tables import benchmarks_in
from foldstack.flows.comparison.terminal import print_result
from foldstack.flows.config.model_recipe import Wishes, method_for, recipe_for
from foldstack.flows.config.run_config import RunConfig, parse_config
from foldstack.flows.planning.machine_rates import operations_per_second
from foldstack.flows.running.progress import console_on
from foldstack.tasks.environment.home import foldstack_home, store_url

MIB = 1 << 20
SIZES = ("parameters", "bytes", "flops_per_token", "kv_bytes_per_token")
PLAN_FILE = "plan.json"
HEADER = "# What `foldstack compress {model}` stands for: `foldstack run FILE` does the same.\n"


@dataclass(frozen=True)
class Recipe:
    """A config, and the text that it is written as."""

    config: RunConfig
    text: str


def recipe_command(wishes: Wishes, save_to: Path | None = None) -> Recipe:
    """The recipe that the wishes stand for, kept in a file where one is named.

    Raises:
        InputError: the model or a text cannot be had, a wish is out of range, or the file cannot
            be written.
    """
    folder = _plain_folder(wishes)
    chosen = method_for(wishes, folder, partial(operations_per_second, wishes.device))
    data = recipe_for(wishes, folder, chosen)
    config = parse_config(data, where="compress")
    why = f"# {chosen.method}: {chosen.why}.\n" if chosen.why else ""
    text = HEADER.format(model=wishes.model) + why + yaml.safe_dump(data, sort_keys=False)
    if save_to is not None:
        _write(save_to, text)
    return Recipe(config, text)


def _plain_folder(wishes: Wishes) -> Path:
    """Where the model's config and tokenizer are: quantised weights are dequantised by now."""
    place = locate(wishes.model, wishes.revision)
    if gguf_of(place) is None and quantization_of(place) is None:
        return resolve(wishes.model, wishes.revision)
    from foldstack.tasks.dequantize_model import find_model
    from foldstack.tasks.running.worker_pool import worker_processes
    from foldstack.tasks.store.artifacts import ArtifactStore

    home = wishes.home.expanduser().resolve() if wishes.home else foldstack_home()
    dtype: Any = wishes.dtype
    with worker_processes():  # the memory of what is read is given back with the process
        store = ArtifactStore(home / "store", store_url())
        return find_model(store, wishes.model, wishes.revision, dtype).folder


def _write(file: Path, text: str) -> None:
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except OSError as error:
        raise InputError(f"the recipe cannot be written to {file}: {error.strerror}") from error


def check_out(out: Path | None, *, is_front: bool = False) -> None:
    """Refuse a place for the model before anything is computed.

    Raises:
        InputError: there is a file, or a folder with something else than a compressed model in it;
            or a front makes several models.
    """
    if out is not None and is_front:
        raise InputError(
            "--front makes several models and --out is a folder for one: leave --out away, and the "
            "end of the front says which command writes the point that you pick"
        )
    if out is None or not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"--out must be a folder that is new or empty, and {out} is a file")
    if any(out.iterdir()) and not (out / PLAN_FILE).is_file():
        raise InputError(
            f"--out must be a folder that is new or empty, and {out} holds other files"
        )


def copy_out(folder: Path, out: Path) -> None:
    """Copy the model from the store: all of it or nothing. A folder that holds it already stays.

    Raises:
        InputError: there is another model by now.
    """
    if out.is_dir() and any(out.iterdir()):
        if digest_folder(out) == digest_folder(folder):
            return
        raise InputError(
            f"{out} holds another model, which is left alone; the new one is in {folder}: name "
            "another folder, and the same command only copies"
        )
    part = out.with_name(f".{out.name}.{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(folder, part)
        if out.is_dir():
            out.rmdir()
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def compressed_row(comparison: Comparison) -> Row | None:
    """The model that was made; None where that failed."""
    return next((r for r in comparison.rows if not r.is_dense and r.state == "done"), None)


def show_front(
    comparison: Comparison, recipe: Recipe, command: str, output: TextIO, *, as_json: bool
) -> None:
    """The end of `compress --front`: the points, and how one of them is picked."""
    points = points_of(comparison, recipe.config)
    if as_json:
        told = comparison.model_dump(mode="json")
        print_json({"points": points, "recipe": recipe.text, "comparison": told}, output)
        return
    console = console_on(output)
    print_result(comparison, console)
    print_points(points, command, console)


def show_model(
    comparison: Comparison,
    row: Row,
    recipe: Recipe,
    out: Path | None,
    output: TextIO,
    *,
    as_json: bool,
) -> None:
    """The end of `compress`: the model, copied to where it was wanted."""
    folder, link = Path(row.folder), link_of(recipe.config, row)
    if out is not None:
        copy_out(folder, out)
        folder = out.absolute()
    elif link.exists() and link.samefile(folder):
        folder = link  # shorter, and the same
    if as_json:
        facts = {"folder": str(folder), **facts_of(comparison, row)}
        use, told = usage_of(row, folder), comparison.model_dump(mode="json")
        print_json({**facts, "use": use, "recipe": recipe.text, "comparison": told}, output)
    else:
        print_end(comparison, row, folder, recipe.config, console_on(output))


def usage_of(row: Row, folder: Path) -> list[str]:
    """Three lines of Python that write with the model, wherever transformers is installed."""
    trust = ", trust_remote_code=True" if row.structure.get("grade") == "portable" else ""
    return [
        "from transformers import pipeline",
        f'write = pipeline("text-generation", "{folder}"{trust})',
        'print(write("Once upon a time")[0]["generated_text"])',
    ]


def facts_of(comparison: Comparison, row: Row) -> dict[str, Any]:
    """Sizes and what was lost, as data: values of the dense model, of the smaller one, and their
    difference with its standard error."""
    dense = comparison.dense
    assert dense is not None, comparison
    measures = ["bits_per_byte", "perplexity"]
    benchmarks = benchmarks_in({f"quality/{name}" for name in row.final})
    measures += [f"{name}/{metric}" for name, metric in benchmarks.items()]
    return {
        "sparsity": row.structure.get("realised_sparsity"),
        **{
            name: {"dense": dense.structure.get(name), "compressed": row.structure.get(name)}
            for name in SIZES
        },
        "lost": {
            name: {
                "dense": dense.number(name),
                "compressed": row.number(name),
                **({"before_recovery": row.number(name, "before")} if row.after else {}),
                "difference": row.number(f"{name}_difference", "beside_dense"),
                "stderr": row.number(f"{name}_difference_stderr", "beside_dense"),
            }
            for name in measures
            if row.number(name) is not None
        },
    }


def points_of(comparison: Comparison, config: RunConfig) -> list[dict[str, Any]]:
    """The models of a front, each with its folder, its sizes, what it lost and how fast it is."""
    points = []
    for row in comparison.rows:
        if row.is_dense or row.state != "done":
            continue
        link = link_of(config, row)
        folder = link if link.exists() and link.samefile(row.folder) else Path(row.folder)
        facts = facts_of(comparison, row)
        points.append({"asked": row.sparsity, "folder": str(folder), **facts, "speed": row.speed})
    return points


def print_points(points: Sequence[dict[str, Any]], command: str, console: Console) -> None:
    """Where each model of a front is, and how one of them is picked."""
    lines = ["", "The points, each a finished model:"]
    lines += [f"{1 - point['sparsity']:.1%} of the parameters: {point['folder']}"
              for point in points]  # fmt: skip
    if points:
        told = "To pick one, use its folder, or have it written to one of yours (no model is made "
        lines += [f"{told}again):", "  " + picking(command, points[len(points) // 2]["asked"])]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def picking(command: str, sparsity: float) -> str:
    """The command that writes one point of a front, made from the one that made the front."""
    without = re.sub(r" --(?:sparsity|to)[ =]\S+| --json(?!\S)", "", command)
    return without.replace(" --front", f" --sparsity {sparsity:g} --out FOLDER")


def print_end(
    comparison: Comparison, row: Row, folder: Path, config: RunConfig, console: Console
) -> None:
    """Folder, size, loss, and how to use it."""
    facts = facts_of(comparison, row)
    before, after = facts["parameters"]["dense"], facts["parameters"]["compressed"]
    sizes = [facts["bytes"][which] / MIB for which in ("dense", "compressed")]
    lines = [
        f"folder: {folder}",
        f"size: {after:,} of {before:,} parameters ({1 - after / before:.1%} gone), "
        f"{sizes[1]:,.1f} of {sizes[0]:,.1f} MiB",
        *(f"{name}: {_loss(loss)}" for name, loss in facts["lost"].items()),
        f"measured on: {_text_of(config)}",
    ]
    if not config.recovery.steps:
        lines.append("none of it is trained back: --recover 100 does that for so many steps")
    if page := comparison.links.get("page"):
        lines.append(f"page: {page}")
    counts = f"{comparison.num_cached} of {comparison.num_stages} stages from the store"
    lines += [f"{counts}, {comparison.seconds:.1f} s", "", *usage_of(row, folder)]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _loss(loss: dict[str, float | None]) -> str:
    text = f"{loss['dense']:.4g} -> {loss['compressed']:.4g}"
    if loss["difference"] is not None:
        text += f" ({loss['difference']:+.4f}"
        text += f" ±{loss['stderr']:.4f})" if loss["stderr"] is not None else ")"
    if loss.get("before_recovery") is not None:
        text += f", before recovery {loss['before_recovery']:.4g}"
    return text


def _text_of(config: RunConfig) -> str:
    source = config.evaluation.perplexity.source
    if source.corpus == SELF:
        return "text that the dense model wrote; --test FILE_OR_DATASET measures on yours"
    return source.corpus if is_text_file(source.corpus) else f"{source.corpus} {source.split}"


def print_recipe(recipe: Recipe, stream: TextIO) -> None:
    """The recipe, before it is run."""
    print(recipe.text, file=stream, flush=True)
