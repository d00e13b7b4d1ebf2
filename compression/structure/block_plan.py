"""One executed block as data: whose weights it runs on, in which form, of which widths."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from foldstack.compression.structure.head_slices import HeadSlices


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class LowRank(Record):
    """A linear y = W x + b kept as two factors: y = second(first(x)) + b."""

    kind: Literal["low_rank"] = "low_rank"
    rank: int = Field(ge=1)
    """Inner width: first is (rank, in), second is (out, rank)."""
    basis_of: int | None = None
    """Position whose first factor is used instead of an own one (a basis shared across blocks)."""


class NarrowHeads(Record):
    """Attention whose heads have fewer coordinates than the base model's, one width for all heads
    of a block, or of which there are fewer for keys and values; its scale stays that of the base
    model's heads. Without any coordinates it adds its output bias alone, and has no KV cache."""

    qk_dim: int = Field(ge=0)
    """Coordinates of a query and of a key head."""
    v_dim: int = Field(ge=0)
    """Coordinates of a value head, and of what the output projection reads of it."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads where they are fewer than the base model's; each serves equally many of
    the base model's, neighbours."""
    rotary_dim: int = Field(default=0, ge=0)
    """How many of the first query-key coordinates rotate, i with i + rotary_dim / 2; 0 without
    rotary positions. Which of the base model's frequencies they are is stored with the weights."""
    value_bias_in_output: bool = False
    """The value bias was added to the output projection's, where it has the same effect."""

    @model_validator(mode="after")
    def _rotates_pairs_it_has(self) -> "NarrowHeads":
        if self.rotary_dim % 2 or self.rotary_dim > self.qk_dim:
            raise ValueError(
                f"rotary_dim must be even and at most qk_dim {self.qk_dim}, got {self.rotary_dim}"
            )
        if (self.qk_dim == 0) != (self.v_dim == 0):
            raise ValueError(
                f"queries, keys and values are absent together, got qk_dim {self.qk_dim} and v_dim "
                f"{self.v_dim}"
            )
        return self

    @property
    def attends(self) -> bool:
        """Whether anything is computed between tokens."""
        return self.v_dim > 0


class Sliced(Record):
    """A block of a narrower residual stream: how wide it is before, inside and after the block.

    The basis differs from link to link, so each of the two residual links has a matrix of its own;
    the norms have no parameters and divide by the base model's width (SliceGPT, 2401.15024).
    """

    entering: int = Field(ge=1)
    """Coordinates that attention reads."""
    middle: int = Field(ge=1)
    """Coordinates that attention's output is added to, and that the MLP reads."""
    leaving: int = Field(ge=1)
    """Coordinates that the MLP's output is added to."""


BlockKind = Literal["original", "layer", "ffn", "swiglu"]
Outputs = Literal["plain", "normed", "scaled"]
Rank = Annotated[int, Field(ge=1)]
"""A first factor, told from others by where it was stored before a change or who brings it."""
Form = LowRank | HeadSlices


# What describes a block's linears, as it is where they are the base model's or another block's.
NO_FORMS: dict[str, Any] = {"linears": {}, "mlp_width": None, "narrow_heads": None}


class BlockPlan(Record):
    """One executed block."""

    kind: BlockKind = "original"
    """original: a block of the base model; layer: a trained block of the same shape standing for a
    run; ffn, swiglu: an attention-free network standing for a run (LLM-Streamline, 2403.19135)."""
    source: int = Field(ge=0)
    """Base block it comes from; for a replacement, the first of its run."""
    stands_for: tuple[int, ...]
    """Base blocks that this one does the work of: (source,) unless it replaces a run."""
    weights_of: int | None = None
    """Position, before or after it, whose linears this block uses instead of its own; its norms
    stay its own."""
    linears: dict[str, Form] = {}
    """Linears that are not dense, by their name inside the block."""
    adapters: dict[str, Rank] = {}
    """Rank of what this block alone adds to a linear that it borrows, by the linear's name:
    y = borrowed(x) + second(first(x)) + b, with b where the borrowed one has a bias (FlexiGPT,
    2501.14713, section 3.4)."""
    outputs: Outputs = "plain"
    """What becomes of attention's and the MLP's output before they are added to the residual.
    normed: LayerNorm with a gain and no bias (FlexiGPT, equation 6); scaled: times a vector
    (FoldGPT, 2407.00928)."""
    intermediate_size: int | None = None
    """Inner width of an ffn or swiglu replacement."""
    mlp_width: int | None = Field(default=None, ge=0)
    """Inner width of the block's own MLP where it is not the base model's; 0: it adds its bias
    alone."""
    narrow_heads: NarrowHeads | None = None
    """Widths of the attention heads where they are not the base model's."""
    sliced: Sliced | None = None
    """Widths of the residual stream where they are not the base model's."""

    @model_validator(mode="after")
    def _is_consistent(self) -> "BlockPlan":
        attention_free = self.kind in ("ffn", "swiglu")
        if attention_free != (self.intermediate_size is not None):
            raise ValueError(
                f"intermediate_size belongs to ffn and swiglu blocks, got {self.kind} with "
                f"intermediate_size {self.intermediate_size}"
            )
        if attention_free and (self.weights_of is not None or any(self.forms.values())):
            raise ValueError(f"an {self.kind} block has no shared, factored or narrow linears")
        if attention_free and self.outputs != "plain":
            raise ValueError(f"an {self.kind} block has plain outputs, got {self.outputs}")
        if self.sliced and (attention_free or self.weights_of is not None):
            raise ValueError("a sliced block has attention and linears of its own")
        if self.sliced and self.outputs != "plain":
            raise ValueError(f"a sliced block has plain outputs, got {self.outputs}")
        if self.adapters and self.weights_of is None:
            raise ValueError("a block has adapters on linears that it borrows, not on its own")
        if self.weights_of is not None and any(self.forms.values()):
            raise ValueError("a block that uses another's linears has no forms of its own for them")
        if not self.stands_for or self.stands_for[0] != self.source:
            raise ValueError(
                f"stands_for must begin with source {self.source}, got {self.stands_for}"
            )
        return self

    @property
    def has_attention(self) -> bool:
        return self.kind in ("original", "layer")

    @property
    def forms(self) -> dict[str, Any]:
        """All that describes the linears that this block stores: it goes where they go."""
        return {name: getattr(self, name) for name in NO_FORMS}

    def borrowing(self, base: int, ranks: Mapping[str, int], outputs: Outputs) -> "BlockPlan":
        """This block on the linears of position `base` with adapters of these ranks."""
        return BlockPlan(
            kind=self.kind,
            source=self.source,
            stands_for=self.stands_for,
            weights_of=base,
            adapters=dict(ranks),
            outputs=outputs,
        )

    def after(self, earlier: Sequence["BlockPlan"]) -> "BlockPlan":
        """This block with `earlier`, blocks as a stock class has them, as what it is made from."""
        made_from = [earlier[source] for source in self.stands_for]
        has_base_width = self.has_attention and self.weights_of is None and self.mlp_width is None
        return BlockPlan.model_validate(
            dict(self)
            | {
                "kind": made_from[0].kind if self.kind == "original" else self.kind,
                "source": made_from[0].source,
                "stands_for": tuple(base for block in made_from for base in block.stands_for),
                "mlp_width": made_from[0].mlp_width if has_base_width else self.mlp_width,
            }
        )

    @property
    def is_virtual(self) -> bool:
        """True for a block that stands on borrowed linears by what it adds to them (FlexiGPT)."""
        return bool(self.adapters) or (self.weights_of is not None and self.outputs == "normed")


def original_block(source: int) -> BlockPlan:
    """Block `source` of the base model, untouched."""
    return BlockPlan(source=source, stands_for=(source,))
