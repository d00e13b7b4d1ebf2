"""Where BOS tokens may stand in a text."""

from typing import Literal

Bos = Literal["none", "stream", "document", "window"]
