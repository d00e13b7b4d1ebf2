"""What decodes from a cache of any kind decodes what the whole text gives, for every structure."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

GROUP, STEPS = 8, 16


class Rounded(QuantizedLayer):
    """A layer that rounds in groups along the width, as those of quanto and hqq do."""

    def __init__(self) -> None:
        super().__init__(nbits=16, q_group_size=GROUP, residual_length=4)

    def _quantize(self, tensor: Any, axis: int) -> Any:
        groups = tensor.reshape(-1, self.q_group_size).double()
        scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-12) / 2 ** (self.nbits - 1)
        return (groups / scale).round(), scale, tensor

    def _dequantize(self, found: Any) -> Any:
        rounded, scale, tensor = found
        return (rounded * scale).to(tensor.dtype).view_as(tensor)


def static(config: Any) -> Cache:
    return StaticCache(config, max_cache_len=STEPS)


def quantised(config: Any) -> Cache:
    return Cache(layers=[Rounded() for _ in range(config.num_hidden_layers)])


@pytest.mark.parametrize("cache_of", [static, quantised])
@torch.no_grad()
def test_decoding_from_it_gives_the_logits_of_the_whole_text(
    cache_of: Callable[[Any], Cache], structure: str, structured: Callable[..., Any]
) -> None:
    """Blocks without attention have no entry in it; narrow heads fit into its widths."""
    model = structured(structure)
    ids = torch.randint(2, 97, (2, STEPS), generator=torch.Generator().manual_seed(3))
    cache = cache_of(model.config.get_text_config())
    steps = [(0, 7), *((n, n + 1) for n in range(7, STEPS))]
    seen = [model(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in steps]
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(seen, 1), expected, rtol=2e-3, atol=2e-3)
