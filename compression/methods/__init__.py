"""How a model is made smaller: every method there is, a folder per family. To add one: a file in
the folder of its family, and one line in `Registered`.

- `arithmetic`: What a method computes, counted beforehand: what the time and memory it takes are
  told from.
- `in_order`: Blocks compressed in order, each with a look at what the compressed ones before it
  produce.
- `method`: What every method is: settings, an outline before any data is seen, and a cut after.
- `refit`: Linears that write into the residual stream, fitted again on what the compressed model
  computes.
- `stack`: Several methods one after the other, budgeted to one sparsity.
- `support`: Which method takes which family of models, and why not: asked of the methods
  themselves.
- `factoring/`: Linears become two thin ones.
- `narrowing/`: Widths shrink.
- `removal/`: Blocks go, or are merged into a neighbour.
- `replacement/`: Something small stands in for a run of blocks.
- `search/`: Which change where, chosen by what each costs in loss.
- `sharing/`: Weights serve several blocks or heads.
"""

from typing import Annotated, get_args

from pydantic import Field

from foldstack.compression.methods.factoring.basis_sharing import BasisSharing
from foldstack.compression.methods.factoring.svd_llm import SvdLlm
from foldstack.compression.methods.narrowing.modegpt import MoDeGpt
from foldstack.compression.methods.narrowing.slicegpt import SliceGpt
from foldstack.compression.methods.removal.laco import Laco
from foldstack.compression.methods.removal.mka import Mka
from foldstack.compression.methods.removal.shortgpt import ShortGpt
from foldstack.compression.methods.removal.sleb import Sleb
from foldstack.compression.methods.removal.uidl import Uidl
from foldstack.compression.methods.replacement.llm_streamline import LlmStreamline
from foldstack.compression.methods.replacement.replaceme import ReplaceMe
from foldstack.compression.methods.search.search import Search
from foldstack.compression.methods.sharing.block_sharing import BlockSharing
from foldstack.compression.methods.sharing.direct_share import DirectShare
from foldstack.compression.methods.sharing.flexigpt import FlexiGpt
from foldstack.compression.methods.sharing.flexigpt_extend import FlexiGptExtend
from foldstack.compression.methods.sharing.foldgpt import FoldGpt
from foldstack.compression.methods.sharing.post_share import PostShare
from foldstack.compression.methods.stack import Stack

Registered = (
    ShortGpt
    | SvdLlm
    | LlmStreamline
    | ReplaceMe
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
    | Search
    | Stack
    | DirectShare
    | PostShare
)  # fmt: skip

AnyMethod = Annotated[Registered, Field(discriminator="name")]
"""What a config's `method` is read as: the entry `name` chooses the class."""

METHODS: dict[str, type[Registered]] = {
    cls.model_fields["name"].default: cls for cls in get_args(Registered)
}
