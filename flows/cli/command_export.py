"""`foldstack export`: a model folder in the form that another program loads."""

from pathlib import Path

from foldstack.compression.checkpoints.model_folder import resolve
from foldstack.compression.export.export_report import ExportReport
from foldstack.compression.export.exported import export_model
from foldstack.compression.export.forms import MLX_CODE, Form


def export_command(
    model: str, to: str, out: Path, quantise: str | None, engine_python: str | None
) -> ExportReport:
    """Write the model for another program, checked there where it is installed.

    Raises:
        InputError: there is no such model, or it has no such form.
    """
    form = Form.of(f"{to}-{quantise}" if quantise else to)
    return export_model(resolve(model), form, out, engine_python=engine_python)


def sentences(report: ExportReport, out: Path) -> list[str]:
    """What was written and what its engines said, for a person."""
    grew = report.parameters_after / report.parameters_before - 1
    size = "as many parameters" if abs(grew) < 5e-4 else f"{grew:+.1%} parameters"
    where = "the folder as it is" if not report.file else str(out / report.file)
    lines = [f"{where}: {report.form}, {size}"]
    if report.needs_trust:
        lines.append(
            f"mlx-lm runs {MLX_CODE} in it: mlx_lm.generate --model {out} --trust-remote-code "
            "--prompt ...; to run no code of ours, export to stock"
        )
    same = {True: "the same", False: "OTHER"}
    for check in report.checks:
        tokens = check.tokens_are_equal
        lines.append(
            f"checked with {check.version}: log-probabilities differ by at most "
            f"{check.difference:.2g} nats, {same[check.greedy_is_equal]} greedy text"
            + ("" if tokens is None else f", {same[tokens]} tokens")
        )
    return lines + [f"not checked: {sentence}" for sentence in report.unchecked]
