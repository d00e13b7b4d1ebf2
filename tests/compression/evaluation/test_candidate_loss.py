"""Candidates are measured on a few windows at a time, as many as the vocabulary leaves room for."""

from typing import Any

import pytest
import torch

from foldstack.compression.evaluation import candidate_loss
from foldstack.compression.evaluation.candidate_loss import deletion_losses


def test_a_large_vocabulary_takes_windows_one_by_one_and_changes_no_loss(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    windows = torch.randint(97, (5, 12), generator=torch.Generator().manual_seed(0))
    at_once = []
    model.lm_head.register_forward_hook(lambda _m, _in, logits: at_once.append(len(logits)))
    together = deletion_losses(model, windows, [0, 2])
    assert set(at_once) == {5}
    at_once.clear()
    monkeypatch.setattr(candidate_loss, "LOGIT_BYTES", 4 * 12 * 97 * 2 + 1)
    by_two = deletion_losses(model, windows, [0, 2])
    assert at_once == [2, 2, 1] * 2
    assert by_two == pytest.approx(together, rel=1e-6)
