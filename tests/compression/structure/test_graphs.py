"""Portable models as graphs of other programs, torch.export and ONNX, at a length of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

LENGTH = {1: torch.export.Dim("length", min=2, max=100)}


class Logits(torch.nn.Module):
    """A model as a function of tokens alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(tokens, use_cache=False).logits
        return logits


@pytest.fixture
def logits(structure: str, structured: Callable[..., Any]) -> Logits:
    return Logits(structured(structure)).eval()


@pytest.mark.engines
@torch.no_grad()
def test_torch_export_takes_any_length(logits: Logits) -> None:
    program = torch.export.export(
        logits, (torch.arange(2, 20)[None],), dynamic_shapes=(LENGTH,), strict=False
    )
    longer = torch.arange(2, 33)[None]
    torch.testing.assert_close(program.module()(longer), logits(longer), rtol=1e-5, atol=1e-5)


@pytest.mark.engines
@pytest.mark.foreign_warnings
@torch.no_grad()
def test_onnxruntime_computes_the_same(logits: Logits, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="pip install 'foldstack[onnx]'")
    pytest.importorskip("onnxscript", reason="pip install 'foldstack[onnx]'")
    program = torch.onnx.export(
        logits, (torch.arange(2, 20)[None],), dynamo=True, dynamic_shapes=(LENGTH,), verbose=False
    )
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    longer = torch.arange(2, 33)[None]
    (found,) = session.run(None, {session.get_inputs()[0].name: longer.numpy()})
    torch.testing.assert_close(torch.tensor(found), logits(longer), rtol=1e-4, atol=1e-4)
