"""The engines that load what is exported, each in a process of its own: found, and asked."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from foldstack.compression.errors import InputError
from foldstack.compression.export.forms import ENGINES_OF, MLX_CODE, Form

SCRIPT = Path(__file__).with_name("in_engine.py")
CODE = (
    Path(__file__).parents[1] / "structure" / "modeling_foldstack.py",
    Path(__file__).with_name("configuration_nemotron_nas.py"),
    Path(__file__).with_name(MLX_CODE),
)
"""The code that folders of ours bring for those who load them."""


@dataclass(frozen=True)
class Engine:
    """A program that runs models, as a Python package."""

    name: str
    package: str
    """What it is installed by."""
    module: str
    variable: str
    """The environment variable that names a Python that has it."""
    command: str
    """How a person runs a model in it; {model} is the folder or the file."""

    def python(self, given: str | None = None) -> str | None:
        """A Python that has the engine: the one given, that of the variable, or this one."""
        for candidate in (given, os.environ.get(self.variable), sys.executable):
            if candidate and version_in(candidate, self.module):
                return candidate
        return None

    def version(self, given: str | None = None) -> str:
        """The package and its version where `python` finds it; empty where it finds none."""
        python = self.python(given)
        return f"{self.package} {version_in(python, self.module)}" if python else ""

    @property
    def how_to_have_it(self) -> str:
        """A sentence for whoever lacks it."""
        return (
            f"{self.name} is not here: pip install {self.package}, or name a Python that has it in "
            f"{self.variable} or by --engine_python"
        )


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "llama.cpp",
            "llama-cpp-python",
            "llama_cpp",
            "FOLDSTACK_LLAMA_CPP_PYTHON",
            "llama-cli -m {model}",
        ),
        Engine(
            "vLLM",
            "vllm",
            "vllm",
            "FOLDSTACK_VLLM_PYTHON",
            "vllm serve {model} --trust-remote-code",
        ),
        Engine(
            "mlx-lm",
            "mlx-lm",
            "mlx_lm",
            "FOLDSTACK_MLX_PYTHON",
            "mlx_lm.generate --model {model} --trust-remote-code --prompt ...",
        ),
    )
}
_FIND = """
import importlib.metadata as m, importlib.util, sys
module = sys.argv[1]
if importlib.util.find_spec(module):
    names = m.packages_distributions().get(module, [])
    print(m.version(names[0]) if names else __import__(module).__version__)
"""


@cache
def version_in(python: str, module: str) -> str:
    """The version of a package that a Python has; empty where it has none.

    Raises:
        InputError: there is no such Python.
    """
    try:
        finished = subprocess.run(
            [python, "-P", "-c", _FIND, module], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise InputError(f"{python} is no Python that can be run: {error}") from None
    return finished.stdout.strip()


def brings_our_code(model: str) -> bool:
    """Whether a folder has code in it, all of which is this version's, byte for byte.

    An engine is told to trust no other: a model may come from anywhere.
    """
    ours = {code.name: code.read_bytes() for code in CODE}
    theirs = list(Path(model).rglob("*.py")) if Path(model).is_dir() else []
    return bool(theirs) and all(code.read_bytes() == ours.get(code.name) for code in theirs)


def _trusted(request: dict[str, Any]) -> list[str]:
    models = [*request.get("models", {}).values(), request.get("model", "")]
    return [model for model in models if model and brings_our_code(model)]


def ask(
    engine: Engine, python: str, requests: Sequence[dict[str, Any]], threads: int = 0
) -> list[dict[str, Any]]:
    """The engine's answers, all from one process; one that has "error" says why there is none.

    With `threads` it computes with so many, else with as many as it takes.
    """
    requests = [request | {"trusted": _trusted(request)} for request in requests]
    finished = subprocess.run(
        [python, "-P", str(SCRIPT), engine.name],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}),
    )
    answers: list[dict[str, Any]] = [json.loads(line) for line in finished.stdout.splitlines()]
    last = (finished.stderr.strip().splitlines() or ["it said nothing"])[-1]
    missing = len(requests) - len(answers)
    return (
        answers + [{"error": f"{engine.name} ended with {finished.returncode}: {last}"}] * missing
    )


def answer_of(
    engine: Engine, python: str, request: dict[str, Any], threads: int = 0
) -> dict[str, Any]:
    """The engine's answer.

    Raises:
        RuntimeError: it has none.
    """
    (answer,) = ask(engine, python, [request], threads)
    if "error" in answer:
        raise RuntimeError(f"{engine.name}: {answer['error']}")
    return answer


def engine_of(form: Form) -> Engine | None:
    """The first engine that loads the form and is here."""
    found = (ENGINES[name] for name in ENGINES_OF[form.target])
    return next((engine for engine in found if engine.python() is not None), None)


def rates_in_turns(
    engine: Engine,
    models: dict[str, Path],
    tokens: Sequence[int],
    *,
    generate: int,
    turns: int,
    threads: int = 0,
) -> dict[str, list[float]]:
    """Tokens per second of greedy decoding of each model in every turn, in one process.

    Raises:
        RuntimeError: the engine does not run one of them.
    """
    python = engine.python()
    assert python is not None
    request = {
        "do": "speed", "models": {name: str(path) for name, path in models.items()},
        "tokens": list(tokens), "generate": generate, "turns": turns,
    }  # fmt: skip
    rates: dict[str, list[float]] = answer_of(engine, python, request, threads)["rates"]
    return rates
