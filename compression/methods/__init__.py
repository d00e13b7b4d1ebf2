"""Every method there is. To add one: a file in this folder, and one line in `Registered`."""

from typing import Annotated, get_args

from pydantic import Field

from foldstack.compression.methods.basis_sharing import BasisSharing
from foldstack.compression.methods.block_sharing import BlockSharing
from foldstack.compression.methods.direct_share import DirectShare
from foldstack.compression.methods.flexigpt import FlexiGpt
from foldstack.compression.methods.flexigpt_extend import FlexiGptExtend
from foldstack.compression.methods.foldgpt import FoldGpt
from foldstack.compression.methods.laco import Laco
from foldstack.compression.methods.llm_streamline import LlmStreamline
from foldstack.compression.methods.mka import Mka
from foldstack.compression.methods.modegpt import MoDeGpt
from foldstack.compression.methods.post_share import PostShare
from foldstack.compression.methods.shortgpt import ShortGpt
from foldstack.compression.methods.sleb import Sleb
from foldstack.compression.methods.slicegpt import SliceGpt
from foldstack.compression.methods.stack import Stack
from foldstack.compression.methods.svd_llm import SvdLlm
from foldstack.compression.methods.uidl import Uidl

Registered = (
    ShortGpt
    | SvdLlm
    | LlmStreamline
    | MoDeGpt
    | BlockSharing
    | FoldGpt
    | FlexiGpt
    | FlexiGptExtend
    | Sleb
    | Uidl
    | Laco
    | Mka
    | BasisSharing
    | SliceGpt
    | Stack
    | DirectShare
    | PostShare
)  # fmt: skip

AnyMethod = Annotated[Registered, Field(discriminator="name")]
"""What a config's `method` is read as: the entry `name` chooses the class."""

METHODS: dict[str, type[Registered]] = {
    cls.model_fields["name"].default: cls for cls in get_args(Registered)
}
