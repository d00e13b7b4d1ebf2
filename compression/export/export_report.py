"""What was exported, what its engines make of it beside transformers, and the card that says so."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from foldstack.compression.checkpoints.model_card import Program, programs_table
from foldstack.compression.export.forms import MLX_CODE

REPORT_FILE = "export.json"


@dataclass(frozen=True)
class Check:
    """What an engine makes of the form beside transformers."""

    engine: str
    version: str
    difference: float
    """Largest difference of a token's log-probability, in nats."""
    greedy_is_equal: bool
    tokens_are_equal: bool | None = None
    """None where the engine reads text with the folder's own tokenizer."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what its engines make of it beside transformers."""

    target: str
    scheme: str | None
    file: str
    """What an engine is given: a file in the new folder, "." for the folder itself, or empty for
    the model's own folder, where nothing had to be written."""
    form: str
    """The class or the architecture that the engine loads."""
    source: str
    """Fingerprint of the folder that it was made from."""
    parameters_before: int
    parameters_after: int
    bytes: int
    vocabulary: int
    checks: tuple[Check, ...] = ()
    unchecked: tuple[str, ...] = ()
    """How it can be checked in engines that are not here, a sentence each."""

    @property
    def needs_trust(self) -> bool:
        """Whether mlx-lm runs a file of ours that lies in the folder."""
        return self.form.endswith(MLX_CODE)

    @classmethod
    def load(cls, out: Path) -> "ExportReport":
        """What was written into `out`."""
        stored = json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))
        checks = tuple(Check(**check) for check in stored.pop("checks"))
        unchecked = tuple(stored.pop("unchecked"))
        return cls(**stored, checks=checks, unchecked=unchecked)

    def save(self, out: Path, name: str) -> None:
        """Write `export.json`, and a card (README.md) of what was made from the model `name`."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        (out / REPORT_FILE).write_text(text, encoding="utf-8")
        (out / "README.md").write_text(_card(self, out.name, name), encoding="utf-8")

    def path(self, out: Path, folder: Path) -> Path:
        """What an engine is given: it lies in `out`, or is the model's own `folder`."""
        return out / self.file if self.file else folder


def _card(report: ExportReport, folder: str, name: str) -> str:
    form = report.target if report.scheme is None else f"{report.target}-{report.scheme}"
    rows = [_checked(check, report) for check in report.checks]
    rows += [Program("", "", f"unchecked: {sentence}") for sentence in report.unchecked]
    grew = report.parameters_after / report.parameters_before - 1
    return f"""# {name} as {form}

{report.form}, {report.parameters_after:,} parameters ({grew:+.1%} over the folder that it was made
from), {report.bytes:,} bytes of weights.

{programs_table(tuple(rows), folder if report.file else name)}

Made by foldstack from `{report.source}`.
"""


def _checked(check: Check, report: ExportReport) -> Program:
    file = f"{{name}}/{report.file}" if report.target == "gguf" else "{name}"
    flag = " --trust-remote-code" if report.needs_trust else ""
    commands = {
        "llama.cpp": f"`llama-cli -m {file}`",
        "vLLM": "`vllm serve {name} --trust-remote-code`",
        "mlx-lm": f"`mlx_lm.generate --model {{name}}{flag}`",
        "transformers": '`AutoModelForCausalLM.from_pretrained("{name}")`',
    }
    greedy = "the same" if check.greedy_is_equal else "other"
    state = (
        f"checked with {check.version}: log-probabilities within {check.difference:.1e} nats, "
        f"{greedy} greedy text"
    )
    return Program(check.engine, commands[check.engine], state)
