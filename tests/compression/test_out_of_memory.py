"""Memory that runs out makes batches smaller, and changes no number."""

import logging

import pytest
import torch

from foldstack.compression.errors import InputError
from foldstack.compression.out_of_memory import with_smaller_batches
from foldstack.compression.statistics.gathering import gather
from foldstack.compression.training.objective import Objective
from foldstack.compression.training.recovery import Recovery, RecoveryResult, recover


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: no")]
)
def test_statistics_are_gathered_in_smaller_batches(
    tiny_model, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    model = tiny_model("llama")
    windows = torch.randint(0, 90, (8, 12), generator=torch.Generator().manual_seed(0))
    plenty = gather(model, windows, {"gram"}, batch_size=8)
    # The second block has room for two windows: what the first attempts summed must not count.
    second = model.model.layers[1]
    forward, sizes = second.forward, []

    def room_for_two(hidden: torch.Tensor, **kwargs) -> torch.Tensor:
        sizes.append(len(hidden))
        output = forward(hidden, **kwargs)
        if len(hidden) > 2:
            raise error
        return output

    second.forward = room_for_two
    with caplog.at_level(logging.WARNING):
        short = with_smaller_batches(
            lambda batch_size: gather(model, windows, {"gram"}, batch_size=batch_size), 8, 12
        )
    assert "8 windows at once do not fit in memory, going on with 4" in caplog.text
    assert sizes[-4:] == [2, 2, 2, 2]
    for key in plenty.grams:
        torch.testing.assert_close(short.gram(*key), plenty.gram(*key), rtol=1e-5, atol=1e-5)


def test_other_errors_and_too_long_windows_are_told() -> None:
    def broken(_batch_size: int) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        with_smaller_batches(broken, 8, 12)

    def full(_batch_size: int) -> None:
        raise MemoryError

    with pytest.raises(InputError, match="one window of 12 tokens does not fit"):
        with_smaller_batches(full, 8, 12)


def test_recovery_goes_on_in_parts_of_a_micro_batch(
    tiny_model, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = torch.randint(0, 90, (12, 10), generator=torch.Generator().manual_seed(0))
    settings = Recovery(
        steps=3, batch_size=4, gradient_accumulation=2, lora_rank=4, precision="float32",
        distillation=0.5,
    )  # fmt: skip

    def recovered() -> RecoveryResult:
        return recover(
            tiny_model("llama"), windows, settings, teacher=tiny_model("llama", seed=1),
            validation=windows[:4],
        )  # fmt: skip

    plenty = recovered()
    forward, sizes = Objective.forward, []

    def room_for_three(self: Objective, tokens: torch.Tensor, use_teacher: bool = True):
        sizes.append(len(tokens))
        # The first micro-batch of a step fits: its gradients must not count twice.
        if len(tokens) > 3 and len(sizes) != 4:
            raise MemoryError
        return forward(self, tokens, use_teacher)

    monkeypatch.setattr(Objective, "forward", room_for_three)
    with caplog.at_level(logging.WARNING):
        short = recovered()
    validation = [4, 2, 2]
    assert sizes == validation[:1] + [2, 2] + [4, 4] + 3 * [2, 2, 2, 2] + validation
    assert "4 windows at once do not fit in memory, going on with 2" in caplog.text
    for row, expected in zip(short.history, plenty.history, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    for name, weight in plenty.model.state_dict().items():
        torch.testing.assert_close(short.model.state_dict()[name], weight, rtol=1e-4, atol=1e-5)
