"""The config of a folder with block_configs, as vLLM and SGLang read it: by attribute.

This file is copied beside the weights, so it needs nothing but transformers.
"""

from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedConfig


class _Part(SimpleNamespace):
    """Entries by attribute, which JSON can be made of again."""

    def to_dict(self) -> dict[str, Any]:
        return {k: v.to_dict() if isinstance(v, _Part) else v for k, v in vars(self).items()}


class NemotronNasConfig(PreTrainedConfig):
    """Llama's entries, and what each block is like."""

    model_type = "nemotron-nas"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(self, block_configs: Any = (), **entries: Any) -> None:
        self.block_configs = [
            _Part(**{name: _Part(**part) for name, part in block.items()})
            for block in block_configs
        ]
        super().__init__(**entries)

    def to_dict(self) -> dict[str, Any]:
        entries = super().to_dict()
        entries["block_configs"] = [block.to_dict() for block in self.block_configs]
        return entries
