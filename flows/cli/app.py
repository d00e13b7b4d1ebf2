"""The command line: `foldstack run CONFIG [key=value ...]` and its neighbours."""

import io
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from foldstack.compression.errors import InputError
from foldstack.flows.cli.completion import complete_kind, complete_override, complete_recipe
from foldstack.flows.cli.output import exit_code, output_for_result, print_facts, print_json
from foldstack.flows.cli.quick_imports import importing
from foldstack.tasks.environment.inherited import own_environment
from foldstack.tasks.environment.redaction import hide_in_logs, without_secrets

if TYPE_CHECKING:
    from foldstack.flows.comparison.result import Comparison
    from foldstack.flows.comparison.unchanged import Question
    from foldstack.flows.config.model_recipe import Wishes
    from foldstack.flows.config.run_config import RunConfig

QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "MPLBACKEND": "agg",
    # Prefect's pages get everything; the terminal shows our own lines.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}
INTERRUPTED = 130


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\n\n".join(["Examples:", *(f"$ {line}" for line in lines)])


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make a language model structurally smaller, and see what it cost.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache = typer.Typer(no_args_is_help=True, help="What the store holds, and why a stage hits.")
app.add_typer(cache, name="cache")

Config = Annotated[
    str,
    typer.Argument(help="YAML file, or name of a recipe.", autocompletion=complete_recipe),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="e.g. recovery.steps=0", autocompletion=complete_override
    ),
]
Home = Annotated[
    Path | None, typer.Option(help="Where results are; by default FOLDSTACK_HOME, else runs/.")
]
DryRun = Annotated[
    bool, typer.Option("--dry_run", "--dry-run", help="Only say what would be done.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"foldstack {metadata.version('foldstack')}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog=examples(
        "foldstack run demo",
        "foldstack run local-model model=DIR sparsities=[0.1,0.2]",
        "foldstack run demo recovery.steps=0 --json",
    )
)
def run(
    config: Config,
    overrides: Overrides = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Compress, recover, evaluate and compare, as CONFIG says; what was done before is reused."""
    if dry_run:
        plan(config, overrides, as_json)
        return
    from foldstack.flows.comparison.unchanged import Question, found_before

    started = time.monotonic()
    question = Question.of(config, overrides or [])
    with output_for_result() as output:
        comparison = None if question is None else found_before(question)
        if comparison is None:
            comparison = _swept(lambda: _load(config, overrides), question)
        else:
            when = f"{comparison.made_at:%Y-%m-%d %H:%M}" if comparison.made_at else "then"
            print(f"nothing has changed since this was found, {when} UTC", file=sys.stderr)
            comparison = comparison.model_copy(update={"seconds": time.monotonic() - started})
        code = _show_comparison(comparison, as_json, output)
    raise typer.Exit(code)


@app.command()
def compress(
    model: Annotated[
        str, typer.Argument(help="Directory, GGUF file, hub id, or reference.", show_default=False)
    ],
    sparsity: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fraction of the parameters to remove [0.2].")
    ] = None,
    to: Annotated[
        float | None, typer.Option(min=0, max=1, help="Or the fraction that stays: --to 0.8.")
    ] = None,
    front: Annotated[
        bool,
        typer.Option("--front", help="Several sizes up to that (0.5), with their speeds, to pick."),
    ] = False,
    method: Annotated[
        str,
        typer.Option(
            help="See `foldstack ls methods`. [search, or modegpt where that takes too long here]"
        ),
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Folder for the model; new or empty.")] = None,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="FILE_OR_DATASET",
            help="File with text, dataset (NAME or NAME:SUBSET), or self: what the model writes. "
            "[self]",
        ),
    ] = "",
    test: Annotated[
        str, typer.Option(metavar="FILE_OR_DATASET", help="Text to measure on. [self]")
    ] = "",
    recover: Annotated[int, typer.Option(min=0, help="Steps of training afterwards.")] = 0,
    evaluate: Annotated[
        str, typer.Option(metavar="TASKS|none", help="lm-eval tasks, separated by commas.")
    ] = "none",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Of a model on the hub.")] = None,
    home: Home = None,
    save_recipe: Annotated[
        Path | None,
        typer.Option("--save_recipe", "--save-recipe", help="File for the recipe that is run."),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make MODEL smaller: without a recipe, and without a text if there is none."""
    from foldstack.flows.config.model_recipe import Wishes, sparsity_of

    wishes = Wishes(
        model=model,
        revision=revision,
        sparsity=sparsity_of(sparsity, to),
        front=front,
        method=method,
        calibration=calibration,
        test=test,
        recover=recover,
        benchmarks=_names_in(evaluate) if evaluate != "none" else (),
        dtype=dtype,
        device=device,
        home=home,
    )
    code = _compress(wishes, out, save_recipe, dry_run, as_json)
    raise typer.Exit(code)


def _compress(
    wishes: "Wishes", out: Path | None, save_recipe: Path | None, dry_run: bool, as_json: bool
) -> int:
    """The exit code of `compress`."""
    from foldstack.flows.cli import command_compress as parts

    parts.check_out(out, is_front=wishes.front)
    with output_for_result() as output:
        recipe = parts.recipe_command(wishes, save_recipe)
        if not as_json:
            parts.print_recipe(recipe, sys.stderr)
        if dry_run:
            _print_plan(recipe.config, as_json, output)
            return 0
        comparison = _swept(lambda: recipe.config)
        if wishes.front:
            parts.show_front(comparison, recipe, _command_line(), output, as_json=as_json)
        elif (row := parts.compressed_row(comparison)) is not None:
            parts.show_model(comparison, row, recipe, out, output, as_json=as_json)
        else:
            return _show_comparison(comparison, False, output)
        return exit_code(comparison)


@app.command(
    epilog=examples(
        "foldstack plan demo",
        "foldstack plan qwen3-0.6b sparsities=[0.3]",
        "foldstack plan run.yaml --on h200 --devices 8 statistics.shards=8",
    )
)
def plan(
    config: Config,
    overrides: Overrides = None,
    as_json: AsJson = False,
    on: Annotated[
        str,
        typer.Option(
            "--on",
            help="h100 or h200: on such a machine, by what was measured on one; of the model there "
            "need be no more than a folder with its config.json.",
        ),
    ] = "",
    devices: Annotated[int, typer.Option("--devices", min=1, help="How many, with --on.")] = 1,
) -> None:
    """Say what a run would do: sizes, what is in the store already, time and memory."""
    with output_for_result() as output:
        loaded = _load(config, overrides)
        if not on:
            _print_plan(loaded, as_json, output)
            return
        from foldstack.flows.planning.on_paper import plan_on_paper, print_paper
        from foldstack.flows.running.progress import console_on

        paper = plan_on_paper(loaded, on, devices)
        if as_json:
            print_json(paper.model_dump(mode="json"), output)
        else:
            print_paper(paper, console_on(output))


@app.command()
def schema() -> None:
    """Print the JSON schema of config files."""
    from foldstack.flows.cli.listing import schema_text

    print(schema_text(), end="")


@app.command("ls", epilog=examples("foldstack ls methods", "foldstack ls recipes --json"))
def list_things(
    what: Annotated[
        str,
        typer.Argument(
            help="methods, architectures or recipes; nothing: how to list each.",
            autocompletion=complete_kind,
            show_default=False,
        ),
    ] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what there is: methods, architectures or recipes."""
    from foldstack.flows.cli.listing import kinds, listing, markdown_table

    entries = listing(what) if what else kinds()
    if markdown:
        print("\n".join(markdown_table(what, entries)))
        return
    if as_json:
        print(json.dumps(entries, indent=1))
        return
    width = max((len(name) for name in entries), default=0)
    for name, meaning in entries.items():
        print(f"{name:<{width}}  {meaning}".rstrip())


@cache.command("ls", epilog=examples("foldstack cache ls"))
def cache_list(home: Home = None, as_json: AsJson = False) -> None:
    """List the artifacts in the store, the last used first."""
    from foldstack.flows.cli.command_cache import list_command

    print(list_command(home, as_json))


@cache.command("explain", epilog=examples("foldstack cache explain demo recovery.steps=8"))
def cache_explain(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say for every stage of CONFIG whether it hits, and if not, what changed."""
    with output_for_result() as output:
        from foldstack.flows.cli.command_cache import explain_command, told_of

        explained = explain_command(_load(config, overrides))
        if as_json:
            print_json({"stages": [entry.as_dict() for entry in explained]}, output)
        else:
            print(told_of(explained), file=output)


@cache.command(
    "gc",
    epilog=examples(
        "foldstack cache gc --dry_run", "foldstack cache gc --keep SWEEP --max_gib 50 --upload"
    ),
)
def cache_gc(
    keep_days: Annotated[
        float, typer.Option("--keep_days", "--keep-days", help="Keep what was used since.")
    ] = 30.0,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Keep this too: a sweep's folder, or how a fingerprint begins."),
    ] = None,
    max_gib: Annotated[
        float | None,
        typer.Option("--max_gib", "--max-gib", min=0, help="More goes, until this is left."),
    ] = None,
    upload: Annotated[
        bool,
        typer.Option(help="Hand weights that only the store has, and an alias needs, to MLflow."),
    ] = False,
    without_mlflow: Annotated[
        bool,
        typer.Option(
            "--without_mlflow",
            "--without-mlflow",
            help="Do not ask MLflow what its aliases point to: such models may go as well.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", "--dry-run", help="Only say what would go.")
    ] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Remove what no run has used for a while, and what killed runs left behind."""
    from foldstack.flows.cli.command_cache import gc_command

    text = gc_command(
        home,
        keep_days=keep_days,
        keep=keep or [],
        max_gib=max_gib,
        upload=upload,
        without_mlflow=without_mlflow,
        dry_run=dry_run,
        as_json=as_json,
    )
    print(text)


@app.command(
    epilog=examples(
        "foldstack evaluate runs/models/NAME --against DENSE",
        "foldstack evaluate DIR --tasks arc_easy,hellaswag --limit 200",
    )
)
def evaluate(
    model: Annotated[str, typer.Argument(help="Directory, GGUF file, hub id, or reference.")],
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")] = "",
    against: Annotated[str, typer.Option(help="Dense model, compared item by item.")] = "",
    config: Annotated[str, typer.Option(help="Config whose evaluation section counts.")] = "demo",
    limit: Annotated[int | None, typer.Option(help="Items per task.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a model on the hub.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure one model: perplexity, bits per byte and benchmarks."""
    with output_for_result() as output:
        from foldstack.flows.cli.command_measure import config_for, evaluate_command

        chosen = config_for(
            config, model, revision=revision, benchmarks=_names_in(tasks), limit=limit
        )
        print_facts(evaluate_command(chosen, against), output, as_json)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Directory, hub id, or reference.")],
    to: Annotated[
        str,
        typer.Option(
            help="gguf (llama.cpp; gguf-q4_k_m and other schemes), vllm (as it is), deci, openelm, "
            "mlx (mlx-lm), stock (the family's own class)."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="New folder. [exports/NAME-TO]")] = None,
    quantise: Annotated[
        str, typer.Option(metavar="SCHEME", help="With gguf: q8_0, q4_k_m, ... by llama.cpp.")
    ] = "",
    engine_python: Annotated[
        str,
        typer.Option(
            "--engine_python",
            "--engine-python",
            metavar="FILE",
            help="A Python that has the engine. [that of FOLDSTACK_..._PYTHON, or this one]",
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Write a model in the form of another program, load it there, and compare."""
    with output_for_result() as output:
        with importing():
            from foldstack.flows.cli.command_export import export_command, sentences

        folder = out or Path("exports") / f"{Path(model).name}-{to}"
        report = export_command(model, to, folder, quantise or None, engine_python or None)
        if as_json:
            print_json(asdict(report), output)
        else:
            print(*sentences(report, folder), sep="\n", file=output)


@app.command(epilog=examples("foldstack bench runs/models/NAME --against DENSE"))
def bench(
    model: Annotated[str, typer.Argument(help="Directory, GGUF file, hub id, or reference.")],
    against: Annotated[str, typer.Option(help="Dense model, measured in turn with it.")] = "",
    config: Annotated[str, typer.Option(help="Config whose speed section counts.")] = "demo",
    as_json: AsJson = False,
) -> None:
    """Measure how fast a model is, in turn with the dense one."""
    with output_for_result() as output:
        from foldstack.flows.cli.command_measure import bench_command, config_for

        print_facts(bench_command(config_for(config, model), against), output, as_json)


@app.command(
    epilog="Examples:\n\n"
    "foldstack compare demo --sparsity 0.3 --sort -speed --out at30.csv\n\n"
    "foldstack compare runs/sweeps/a runs/sweeps/b --where 'speed>1' --columns model,quality,speed"
)
def compare(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SWEEP]...",
            help="Names of models or sweeps, or folders of sweeps; by default all in the home.",
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="Only rows for which NAME OP VALUE holds, like speed>1 or method~share; may be "
            "given several times."
        ),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method; may be given several times.")
    ] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="Only this sparsity; may be given several times.")
    ] = None,
    sort: Annotated[
        str, typer.Option(help="Columns to sort by, with commas; -NAME from high to low.")
    ] = "",
    columns: Annotated[
        str, typer.Option(help="Columns to show, with commas; by default as many as fit.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Write the rows to a file too: .csv, .parquet, .md, .json or .html."),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Print the results of any number of sweeps as one table, and write it to a file."""
    with output_for_result() as output:
        from foldstack.flows.cli import command_compare
        from foldstack.flows.running.progress import console_on

        choice = command_compare.Choice(
            where or (), method or (), sparsity or (), _names_in(sort), _names_in(columns)
        )
        compared = command_compare.compare_command(what or (), home, choice)
        if out is not None:
            command_compare.write_compared(compared, choice, out)
        if as_json:
            print_json(command_compare.as_json(compared), output)
        else:
            command_compare.print_compared(compared, choice, console_on(output))
    for sentence in compared.damaged:
        print(f"foldstack: left out: {sentence}", file=sys.stderr)
    if out is not None:
        print(f"foldstack: {len(compared.frame)} rows are in {out}", file=sys.stderr)


@app.command(
    epilog=examples(
        "foldstack ui", "foldstack ui --prefect_port 4300 --mlflow_port 5100 --home /data/foldstack"
    )
)
def ui(
    prefect_port: Annotated[int, typer.Option("--prefect_port", "--prefect-port")] = 4200,
    mlflow_port: Annotated[int, typer.Option("--mlflow_port", "--mlflow-port")] = 5000,
    home: Home = None,
) -> None:
    """Start the Prefect and the MLflow server on this machine, until Ctrl-C."""
    from functools import partial

    from foldstack.flows.cli.servers import mlflow, prefect, serve
    from foldstack.tasks.environment.home import foldstack_home
    from foldstack.tasks.tracking.tracking_database import ARTIFACTS, follow_home, make_database

    folder = (home or foldstack_home()).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
    make_database(uri)  # whole: a sweep may open it while the server starts
    follow_home(uri, folder)
    servers = [prefect(prefect_port), mlflow(mlflow_port, uri, folder / ARTIFACTS)]
    serve(servers, folder, partial(print, flush=True))


def _swept(config: Callable[[], "RunConfig"], question: "Question | None" = None) -> "Comparison":
    """What a sweep came to, shown while it runs; `config` is called once it can be read."""
    from foldstack.flows.running.prefect_server import TemporaryServer

    # The server needs seconds to start: it does so while the libraries are imported here.
    with TemporaryServer() as server:
        with importing():
            from foldstack.flows.cli.command_run import run_command

        return run_command(config(), server, _command_line(), question)


def _show_comparison(comparison: "Comparison", as_json: bool, output: TextIO) -> int:
    """Print the table, or all of it as JSON; gives the exit code."""
    from foldstack.flows.comparison.findings import findings
    from foldstack.flows.comparison.terminal import print_result
    from foldstack.flows.running.progress import console_on

    code = exit_code(comparison)
    if as_json:
        print_json({"findings": findings(comparison), **comparison.model_dump(mode="json")}, output)
    else:
        print_result(comparison, console_on(output))
    return code


def _load(config: str, overrides: list[str] | None) -> "RunConfig":
    from foldstack.flows.config.run_config import load_config

    return load_config(config, overrides or [])


def _print_plan(config: "RunConfig", as_json: bool, output: TextIO) -> None:
    from foldstack.flows.planning.forecast import dry_run, print_dry_run
    from foldstack.flows.running.progress import console_on

    expected = dry_run(config)
    if as_json:
        print_json(expected.model_dump(mode="json"), output)
    else:
        print_dry_run(expected, console_on(output))


def _names_in(text: str) -> list[str]:
    """Names that are separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _command_line() -> str:
    return " ".join(["foldstack", *sys.argv[1:]])


def main() -> None:
    """Run the command line; a mistake of the user's is one sentence and exit code 2."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    own_environment()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a sign is no failure
    hide_in_logs()
    try:
        with without_secrets():
            app()
    except InputError as error:
        print(f"foldstack: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"foldstack: stopped; to go on: {_command_line()}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        from foldstack.tasks.environment.home import disk_full, is_disk_full

        if not is_disk_full(error):
            raise
        said = disk_full(getattr(error, "filename", None) or "the results")
        print(f"foldstack: {said}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
