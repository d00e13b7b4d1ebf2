"""The forms that a model may be exported to: what loads each, and what of a structure it keeps."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from foldstack.compression.errors import InputError

if TYPE_CHECKING:
    from foldstack.compression.structure.plan import Plan

Target = Literal["stock", "gguf", "vllm", "deci", "openelm", "mlx"]
ENGINES_OF: dict[Target, tuple[str, ...]] = {
    "stock": (),
    "gguf": ("llama.cpp",),
    "vllm": ("vLLM",),
    "deci": ("vLLM", "mlx-lm"),
    "openelm": ("mlx-lm",),
    "mlx": ("mlx-lm",),
}
"""What loads each form. A stock folder is compared in transformers, which is always here."""
DECI_FAMILIES = ("llama", "mistral", "qwen2")
"""Families whose blocks block_configs describe."""
OPENELM_FAMILIES = ("llama", "mistral", "qwen3")
"""Those that OpenELM's blocks compute: without biases, with norms of queries and keys or none."""
GGUF_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
"""llama.cpp's name for a family."""
MLX_FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
)
"""Those whose own class mlx-lm has."""
MLX_CODE = "foldstack_mlx.py"
"""The file that a folder for mlx-lm brings where no class of mlx-lm's expresses its structure."""
_OWN_WIDTHS: dict[Target, tuple[str, ...]] = {
    "gguf": (*DECI_FAMILIES, "qwen3"),
    "deci": DECI_FAMILIES,
    "openelm": OPENELM_FAMILIES,
}
_MULTIPLES: dict[Target, int] = {"gguf": 32, "vllm": 16, "deci": 256, "openelm": 32, "mlx": 64}
_K_QUANTS = 256
"""Weights in a block of llama.cpp's K schemes; rows of another length stay in 16 bits."""


class NoSuchForm(InputError):
    """The structure, the family or the tokenizer of a model has no form that is asked for."""


@dataclass(frozen=True)
class Form:
    """What a model is to be written as: `gguf-q4_k_m` is a target and a scheme to quantise by."""

    target: Target
    scheme: str | None = None

    @classmethod
    def of(cls, name: str) -> "Form":
        """The form that `name` stands for.

        Raises:
            InputError: there is none.
        """
        target, _, scheme = name.lower().partition("-")
        known: dict[str, Target] = {name: name for name in get_args(Target)}
        if target not in known or (scheme and target != "gguf"):
            raise InputError(
                f"{name} is no form to export to: give one of {', '.join(known)}, or gguf with a "
                "scheme of llama.cpp's, like gguf-q4_k_m"
            )
        return cls(known[target], scheme or None)

    @property
    def name(self) -> str:
        return self.target if self.scheme is None else f"{self.target}-{self.scheme}"

    @property
    def multiple(self) -> int:
        """What widths and ranks are to be multiples of, so that nothing is padded or left out."""
        if self.scheme is not None and "_k" in self.scheme:
            return _K_QUANTS
        return _MULTIPLES.get(self.target, 1)

    def why_not_kept(self, plan: "Plan") -> str | None:
        """What of a structure the form does not keep as small as it is; None where it keeps all.

        What has a stock form can be written all the same, multiplied out and larger.
        """
        if self.target in ("vllm", "mlx") or plan.is_native:
            return None
        is_deci = self.target in ("gguf", "deci") and plan.base_model_type in DECI_FAMILIES
        if (what := why_multiplied_out(plan, takes_no_attention=is_deci)) is not None:
            return what
        is_own = plan.base_model_type in _OWN_WIDTHS.get(self.target, ())
        return None if is_own else "MLPs of several widths"


def why_multiplied_out(plan: "Plan", *, takes_no_attention: bool = False) -> str | None:
    """What of a structure a stock class stores more of, or has no form for; None where only the
    MLPs' widths may differ, or blocks be without attention if that is taken."""
    for block in plan.blocks:
        heads = block.narrow_heads
        reasons = {
            "its light network": not block.has_attention,
            "its narrower residual stream": block.sliced is not None,
            "its shared blocks": block.weights_of is not None,
            "its factored or sliced linears": bool(block.linears),
            "its narrower heads": heads is not None and (heads.attends or not takes_no_attention),
        }
        for what, holds in reasons.items():
            if holds:
                return what
    return None


def why_no_stock(plan: "Plan") -> str | None:
    """What of a structure no stock class can compute, in words; None where there is nothing."""
    reasons = {
        "its residual stream is narrower than the stock one": plan.is_sliced,
        "a light network stands where blocks were": not all(b.has_attention for b in plan.blocks),
        "its virtual blocks norm what attention and the MLP add": any(
            block.outputs == "normed" for block in plan.blocks
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def why_no_gguf(plan: "Plan") -> str | None:
    """What keeps a model from llama.cpp, in words; None where nothing does."""
    family = plan.base_model_type
    if family not in GGUF_ARCHITECTURES:
        known = ", ".join(sorted(GGUF_ARCHITECTURES))
        return f"GGUF files are written for {known}, and not for {family}"
    reason = why_no_stock(plan)
    if reason is None or family in DECI_FAMILIES:
        return None
    return f"{reason}, which GGUF files have of {', '.join(DECI_FAMILIES)}, and not of {family}"
