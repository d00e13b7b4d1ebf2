"""The card's table says who runs a folder, as its structure and its family allow."""

from collections.abc import Callable
from typing import Any

import pytest

from foldstack.compression.export.what_runs import programs_of
from foldstack.compression.structure.surgery import plan_of


@pytest.mark.parametrize(
    ("structure", "family", "said"),
    [
        ("narrow_mlps", "llama", {"llama.cpp": "unchecked; the export compares"}),
        ("factored", "llama", {"llama.cpp": "linears are multiplied out", "vLLM": "unchecked"}),
        ("sliced", "llama", {"llama.cpp": "several layers stand for its narrower residual"}),
        ("sliced", "qwen3", {"llama.cpp": "no: its residual", "mlx-lm": "runs a file of ours"}),
        ("shared_blocks", "opt", {"llama.cpp": "no: GGUF files are written for gemma, "}),
    ],
)
def test_each_program_has_a_command_or_a_reason(
    structure: str, family: str, said: dict[str, str], structured: Callable[..., Any]
) -> None:
    programs = {each.name: each for each in programs_of(plan_of(structured(structure, family)))}
    assert list(programs) == ["transformers", "vLLM", "SGLang", "llama.cpp", "mlx-lm"]
    assert "trust-remote-code" in programs["vLLM"].command
    for name, words in said.items():
        assert words in programs[name].state
        assert ("--trust-remote-code" in programs["mlx-lm"].command) == (structure != "narrow_mlps")
        assert bool(programs[name].command) == (not programs[name].state.startswith("no"))
