"""`foldstack export`: a model folder in the form that another program loads."""

from pathlib import Path
from typing import get_args

from foldstack.compression.checkpoints.model_folder import resolve
from foldstack.compression.errors import InputError
from foldstack.compression.export.exported import ExportReport, Target, export_model


def export_command(
    model: str, target: str, out: Path, quantise: str | None, engine_python: str | None
) -> ExportReport:
    """Write the model for another program, checked there where it is installed.

    Raises:
        InputError: there is no such model, or it has no such form.
    """
    known: dict[str, Target] = {name: name for name in get_args(Target)}
    if target not in known:
        raise InputError(f"--to {target} is not known: give one of {', '.join(known)}")
    return export_model(
        resolve(model), known[target], out, quantise=quantise, engine_python=engine_python
    )


def sentences(report: ExportReport, out: Path) -> list[str]:
    """What was written and what its engine said, for a person."""
    grew = report.parameters_after / report.parameters_before - 1
    size = "as many parameters" if abs(grew) < 5e-4 else f"{grew:+.1%} parameters"
    lines = [f"{out / report.file if report.target != 'stock' else out}: {report.form}, {size}"]
    if report.checked_with is None:
        lines.append(f"not checked, for llama.cpp is not here: {report.unchecked}")
        return lines
    same = {True: "the same", False: "OTHER"}
    lines.append(
        f"checked with {report.checked_with}: log-probabilities differ by at most "
        f"{report.difference:.2g} nats, {same[bool(report.greedy_is_equal)]} greedy text, "
        f"{same[bool(report.tokens_are_equal)]} tokens"
    )
    if report.tokens_per_second is not None:
        lines.append(f"{report.tokens_per_second:.0f} tokens per second of decoding there")
    return lines
