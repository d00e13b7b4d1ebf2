"""A compressed model writes ahead of its dense one, which keeps what it would have written."""

from collections.abc import Callable
from pathlib import Path

from foldstack.tasks.benchmark_speed import BenchmarkAssistant
from foldstack.tasks.environment.execution import Execution
from foldstack.tasks.stage import ModelRef, run_stage
from foldstack.tasks.store.artifacts import ArtifactStore


def test_an_assistant_that_is_the_model_is_always_right(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Each pass then keeps all that was written ahead, and the text is what it was alone."""
    model = ModelRef.of(str(model_folder("llama")))
    stage = BenchmarkAssistant(
        dense=model, model=model, prompt_tokens=8, new_tokens=12, turns=2, machine="this",
        execution=Execution(device="cpu", threads=1),
    )  # fmt: skip
    facts = run_stage(stage, ArtifactStore(tmp_path / "store")).manifest().facts
    assert facts["assistant_same_text"]
    assert float(facts["assistant_accepted_per_pass"] or 0) > 0.5
    assert float(facts["assistant_speedup"] or 0) > 0
