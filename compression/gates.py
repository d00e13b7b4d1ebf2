"""Block gates: one number per block, trained to close where the model can do without the block.

With x^(i) the input of block i and f_i the block, its residual adds included,

    x^(i+1) = x^(i) + g_i (f_i(x^(i)) - x^(i)),     g_i = t_i^2 / (t_i^2 + eps)

so g = 1 is the model and g_i = 0 the model without block i. All t are trained together on

    next-token loss + price * e + penalty / 2 * e^2,     e = sum of g - (blocks to keep)

and nothing else is: what a gate costs is seen with the others partly closed, which scores of single
blocks cannot see. The price rises by dual_rate * e a step. eps stays until the budget is met, then
falls geometrically, which drives the gates to 0 and 1.

Block gates, joint training and the budget: FoldGPT (Liu et al. 2024, arXiv 2407.00928), whose
formulas are not public; the polarised form is that of GDP (Guo et al. 2021, arXiv 2109.02220).
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.architectures import architecture_of
from foldstack.compression.distillation import Blend, head_of
from foldstack.compression.objective import Objective

logger = logging.getLogger(__name__)


class GateTraining(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: int = 100
    batch_tokens: int = 1024
    learning_rate: float = 0.05
    eps_start: float = 0.1
    eps_end: float = 1e-4
    hold: float = 0.5
    dual_rate: float = 0.05
    penalty: float = 0.1
    polarisation: Literal["anneal", "prox"] = "anneal"
    betas: tuple[float, float] = (0.9, 0.99)
    seed: int = 0


@contextmanager
def gated(model: nn.Module, gates: Callable[[], Float[Tensor, " blocks"]]) -> Iterator[None]:
    """Inside, block i puts out x + g_i (f_i(x) - x); exactly f_i(x) at 1 and exactly x at 0."""

    def hook_of(position: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            mixed = torch.lerp(before, after, gates()[position].to(after.dtype))
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        return hook

    blocks = architecture_of(model).blocks(model)
    handles = [
        block.register_forward_hook(hook_of(position), with_kwargs=True)
        for position, block in enumerate(blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def train_gates(model, windows, num_removed, s: GateTraining, log=None):
    L = len(architecture_of(model).blocks(model))
    keep = L - num_removed
    flags = {p: p.requires_grad for p in model.parameters()}
    for p in flags:
        p.requires_grad_(False)
    t = torch.ones(L, requires_grad=True)
    opt = torch.optim.Adam([t], lr=s.learning_rate, betas=s.betas)
    obj = Objective(model, head_of(model), Blend(0.0))
    price = 0.0
    eps = s.eps_start
    hist = []
    gen = torch.Generator().manual_seed(s.seed)
    per = max(1, s.batch_tokens // windows.shape[1])
    order = torch.randperm(len(windows), generator=gen).tolist()
    met_at = None
    for step in range(s.steps):
        if met_at is None and step >= s.hold * s.steps:
            met_at = step
        if met_at is not None:
            frac = (step - met_at) / max(1, s.steps * 0.9 - 1 - met_at)
            eps = s.eps_start * (s.eps_end / s.eps_start) ** min(1, frac)
        if len(order) < per:
            order = order + torch.randperm(len(windows), generator=gen).tolist()
        idx, order = order[:per], order[per:]
        g = t**2 / (t**2 + eps)
        with gated(model, lambda: g):
            ce, _ = obj(windows[idx])
        e = g.sum() - keep
        loss = ce + price * e + s.penalty / 2 * e**2
        opt.zero_grad()
        loss.backward()
        cost = None
        for gr in opt.param_groups:
            gr["lr"] = s.learning_rate * (math.sqrt(eps / s.eps_start)) ** 0.5
        opt.step()
        with torch.no_grad():
            t.clamp_(0.1 * math.sqrt(eps), 1.0)
        price = max(0.0, price + s.dual_rate * float(e.detach()))
        if met_at is None and float(e.detach()) <= 0.1:
            met_at = step
        hist.append(g.detach().clone())
        if log and (step % log == 0 or step == s.steps - 1):
            print(
                step,
                f"ce {float(ce):.3f} e {float(e):.2f} price {price:.2f} eps {eps:.1e}",
                " ".join(f"{v:.2f}" for v in g.tolist()),
                flush=True,
            )
    for p, f in flags.items():
        p.requires_grad_(f)
    return torch.stack(hist)
