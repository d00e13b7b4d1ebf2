"""The command line: `foldstack run CONFIG [key=value ...]` and its neighbours."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from foldstack.compression.errors import InputError
from foldstack.flows.cli.quick_imports import importing
from foldstack.tasks.environment.redaction import hide_in_logs, without_secrets

if TYPE_CHECKING:
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

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make a language model structurally smaller, and see what it cost.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache = typer.Typer(no_args_is_help=True, help="What the store holds, and why a stage hits.")
app.add_typer(cache, name="cache")

Config = Annotated[str, typer.Argument(help="YAML file, or name of a recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. recovery.steps=0")
]
Home = Annotated[
    Path | None, typer.Option(help="Where results are; by default FOLDSTACK_HOME, else runs/.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    as_json: AsJson = False,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", "--dry-run", help="Only say what would be done.")
    ] = False,
) -> None:
    """Compress, recover, evaluate and compare, as CONFIG says; what was done before is reused."""
    if dry_run:
        plan(config, overrides, as_json)
        return
    from foldstack.flows.running.prefect_server import TemporaryServer

    # The server needs seconds to start: it does so while the libraries are imported here.
    with _output_for_result() as output, TemporaryServer() as server:
        with importing():
            from foldstack.flows.cli.command_run import exit_code, run_command
            from foldstack.flows.comparison.terminal import print_result
            from foldstack.flows.running.progress import console_on

        comparison = run_command(_load(config, overrides), server, _command_line())
        code = exit_code(comparison)
        if as_json:
            _print_json(comparison.model_dump(mode="json"), output)
        else:
            print_result(comparison, console_on(output))
    raise typer.Exit(code)


@app.command()
def plan(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a run would do: sizes, what is in the store already, time and memory."""
    with _output_for_result() as output:
        from foldstack.flows.planning.forecast import dry_run, print_dry_run
        from foldstack.flows.running.progress import console_on

        expected = dry_run(_load(config, overrides))
        if as_json:
            _print_json(expected.model_dump(mode="json"), output)
        else:
            print_dry_run(expected, console_on(output))


@app.command()
def schema() -> None:
    """Print the JSON schema of config files."""
    from foldstack.flows.config.run_config import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command("ls")
def list_things(
    what: Annotated[str, typer.Argument(help="methods, architectures or recipes")],
    as_json: AsJson = False,
) -> None:
    """List what there is: methods, architectures or recipes."""
    from foldstack.flows.cli.listing import listing

    entries = listing(what)
    if as_json:
        print(json.dumps(entries, indent=1))
        return
    width = max((len(name) for name in entries), default=0)
    for name, meaning in entries.items():
        print(f"{name:<{width}}  {meaning}".rstrip())


@cache.command("ls")
def cache_list(home: Home = None, as_json: AsJson = False) -> None:
    """List the artifacts in the store, the last used first."""
    from foldstack.flows.cli.command_cache import list_command

    print(list_command(home, as_json))


@cache.command("explain")
def cache_explain(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say for every stage of CONFIG whether it hits, and if not, what changed."""
    with _output_for_result() as output:
        from foldstack.flows.cli.command_cache import explain_command

        explained = explain_command(_load(config, overrides))
        if as_json:
            _print_json({"stages": [entry.as_dict() for entry in explained]}, output)
        else:
            print("\n".join(str(entry) for entry in explained), file=output)


@cache.command("gc")
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
        dry_run=dry_run,
        as_json=as_json,
    )
    print(text)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Directory, hub id, or reference.")],
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")] = "",
    against: Annotated[str, typer.Option(help="Dense model, compared item by item.")] = "",
    config: Annotated[str, typer.Option(help="Config whose evaluation section counts.")] = "demo",
    limit: Annotated[int | None, typer.Option(help="Items per task.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a model on the hub.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure one model: perplexity, bits per byte and benchmarks."""
    with _output_for_result() as output:
        from foldstack.flows.cli.command_measure import config_for, evaluate_command

        benchmarks = [name.strip() for name in tasks.split(",") if name.strip()]
        chosen = config_for(config, model, revision=revision, benchmarks=benchmarks, limit=limit)
        _print_facts(evaluate_command(chosen, against), output, as_json)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="Directory, hub id, or reference.")],
    against: Annotated[str, typer.Option(help="Dense model, measured in turn with it.")] = "",
    config: Annotated[str, typer.Option(help="Config whose speed section counts.")] = "demo",
    as_json: AsJson = False,
) -> None:
    """Measure how fast a model is, in turn with the dense one."""
    with _output_for_result() as output:
        from foldstack.flows.cli.command_measure import bench_command, config_for

        _print_facts(bench_command(config_for(config, model), against), output, as_json)


@app.command(
    epilog="foldstack compare demo --sparsity 0.3 --sort -speed --out at30.csv   |   "
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
    with _output_for_result() as output:
        from foldstack.flows.cli import command_compare
        from foldstack.flows.running.progress import console_on

        choice = command_compare.Choice(
            where or (), method or (), sparsity or (), _split(sort), _split(columns)
        )
        compared = command_compare.compare_command(what or (), home, choice)
        if out is not None:
            command_compare.write_compared(compared, choice, out)
        if as_json:
            _print_json(command_compare.as_json(compared), output)
        else:
            command_compare.print_compared(compared, choice, console_on(output))
    for sentence in compared.damaged:
        print(f"foldstack: left out: {sentence}", file=sys.stderr)
    if out is not None:
        print(f"foldstack: {len(compared.frame)} rows are in {out}", file=sys.stderr)


@app.command()
def ui(
    prefect_port: Annotated[int, typer.Option("--prefect_port", "--prefect-port")] = 4200,
    mlflow_port: Annotated[int, typer.Option("--mlflow_port", "--mlflow-port")] = 5000,
    home: Home = None,
) -> None:
    """Start the Prefect and the MLflow server on this machine, until Ctrl-C."""
    from foldstack.flows.cli.servers import mlflow, prefect, serve
    from foldstack.tasks.environment.home import foldstack_home
    from foldstack.tasks.tracking.tracking_database import ARTIFACTS, follow_home, make_database

    folder = (home or foldstack_home()).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
    make_database(uri)  # whole: a sweep may open it while the server starts
    follow_home(uri, folder)
    servers = [prefect(prefect_port), mlflow(mlflow_port, uri, folder / ARTIFACTS)]
    serve(servers, folder / "logs", print)


def _load(config: str, overrides: list[str] | None) -> "RunConfig":
    from foldstack.flows.config.run_config import load_config

    return load_config(config, overrides or [])


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _command_line() -> str:
    return " ".join(["foldstack", *sys.argv[1:]])


def _print_facts(facts: dict[str, Any], output: TextIO, as_json: bool) -> None:
    if as_json:
        _print_json(facts, output)
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"{name:<{width}}  {text}", file=output)


@contextmanager
def _output_for_result() -> Iterator[TextIO]:
    """Standard output, for the result alone: whatever else prints meanwhile goes to standard error.

    Libraries print, also from C; so the file descriptor itself is turned round.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(kept, "w") as output:
        try:
            yield output
        finally:
            output.flush()
            sys.stdout.flush()
            os.dup2(output.fileno(), 1)


def _print_json(value: Any, output: TextIO) -> None:
    print(json.dumps(value, indent=1), file=output)


def main() -> None:
    """Run the command line; a mistake of the user's is one sentence and exit code 2."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
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
