"""Output projections fitted in order, against least squares over the tokens, in every family."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from foldstack.compression.errors import InputError
from foldstack.compression.methods import METHODS
from foldstack.compression.methods.in_order import refitted
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.refit import RIDGE
from foldstack.compression.statistics.gathering import KINDS, gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.surgery import BlockByBlock, Cut, cut, plan_of

SETTINGS: dict[str, dict[str, Any]] = {
    "modegpt": {"sparsity": 0.3, "allocation": "uniform"},
    "svd_llm": {"sparsity": 0.4},
}


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(97, (8, 40), generator=torch.Generator().manual_seed(0))


def evidence_of(model: Any, windows: Tensor) -> Evidence:
    statistics = gather(model, windows, KINDS)
    return Evidence(windows, statistics, rank_blocks(statistics))


def streams(model: Any, windows: Tensor) -> list[Tensor]:
    """The residual stream behind every block, a row a token."""
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(
            lambda _m, _args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in architecture_of(model).blocks(model)
    ]
    with torch.no_grad():
        model(windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return [rows.flatten(0, 1) for rows in seen]


def relative_error(model: Any, dense: Any, windows: Tensor, position: int = -1) -> float:
    """Mean over tokens of the squared error of the stream behind a block over its size."""
    got, wanted = streams(model, windows)[position], streams(dense, windows)[position]
    return float(((got - wanted).square().sum(1) / wanted.square().sum(1)).mean())


@pytest.mark.parametrize("refit", ["mlp_output", "residual"])
def test_what_was_not_compressed_stays(
    architecture: str, refit: Any, tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model(architecture)
    whole = Cut(plan_of(model), tuple(range(4)))
    same = cut(model, refitted(model, whole, evidence_of(model, windows), refit))
    torch.testing.assert_close(
        same(windows).logits, model(windows).logits, rtol=1e-4, atol=1e-4
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_the_stream_behind_a_block_comes_nearer_to_the_dense_one(
    architecture: str, name: str, tiny_model: Any, windows: Tensor
) -> None:
    """Behind the first block with certainty: both fits read the same there."""
    model = tiny_model(architecture)
    evidence = evidence_of(model, windows)
    plain, moved = (
        cut(model, METHODS[name](refit=refit, **SETTINGS[name]).compress(model, evidence))
        for refit in ("none", "residual")
    )
    assert plan_of(plain) == plan_of(moved)
    before, after = (relative_error(m, model, windows, 0) for m in (plain, moved))
    assert after < 0.98 * before
    assert relative_error(moved, model, windows) < relative_error(plain, model, windows)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3"])
@pytest.mark.parametrize("reads", ["attention_output", "mlp_output"])
def test_it_is_ridge_regression_around_the_closed_form(
    family: str, reads: str, tiny_model: Any, windows: Tensor
) -> None:
    """Errors count over the size of the token's stream; the bias is free."""
    model = tiny_model(family).double()
    evidence, position = evidence_of(model, windows), 2
    method = METHODS["modegpt"](refit="residual", **SETTINGS["modegpt"])
    moved = method.compress(model, evidence)
    plain = method.model_copy(update={"refit": "none"}).compress(model, evidence)
    architecture = architecture_of(model)
    name = next(s.name for s in architecture.linears if s.reads == reads)
    dense, small = (_seen(m, windows, position, name) for m in (model, cut(model, moved)))

    key = f"blocks.{position}.{name}"
    module = architecture.blocks(model)[position].get_submodule(name)
    is_conv = type(module).__name__ == "Conv1D"
    start, got = (
        t[f"{key}.weight"].T if is_conv else t[f"{key}.weight"]
        for t in (plain.tensors, moved.tensors)
    )
    has_bias = module.bias is not None
    read = torch.nn.functional.pad(small["read"], (0, int(has_bias)), value=1.0)
    if has_bias:
        bias = plain.tensors.get(f"{key}.bias", module.bias.detach())
        start = torch.cat([start, bias[:, None]], dim=1)
        got = torch.cat([got, moved.tensors[f"{key}.bias"][:, None]], dim=1)
    if reads == "mlp_output":
        target, rest = dense["leaving"], small["leaving"] - small["written"]
    else:
        target, rest = dense["entering"] + dense["written"], small["entering"]
    size = target.square().mean(1, keepdim=True).sqrt()
    rows, error = read / size, (target - rest - read @ start.T) / size
    width = rows.shape[1] - has_bias
    shift = RIDGE * rows[:, :width].square().sum(0).mean()
    ridge = shift.sqrt() * torch.eye(rows.shape[1], dtype=rows.dtype)[:width]
    none = torch.zeros(width, error.shape[1], dtype=rows.dtype)
    solution = torch.linalg.lstsq(torch.cat([rows, ridge]), torch.cat([error, none])).solution
    torch.testing.assert_close(got, start + solution.T, rtol=1e-4, atol=1e-6)


def test_mlp_output_makes_a_sublayer_add_what_the_dense_one_adds(
    tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model("qwen2").double()
    evidence = evidence_of(model, windows)
    errors = []
    for refit in ("none", "mlp_output"):
        method = METHODS["modegpt"](refit=refit, **SETTINGS["modegpt"])
        smaller = cut(model, method.compress(model, evidence))
        seen = [_seen(m, windows, 0, "mlp.down_proj")["written"] for m in (model, smaller)]
        errors.append(float((seen[0] - seen[1]).square().sum()))
    assert errors[1] < 0.98 * errors[0]


def test_blocks_that_are_gone_are_made_up_for(tiny_model: Any, windows: Tensor) -> None:
    """The last block before them aims at the stream behind them, also where the first ones go."""
    model = tiny_model("llama", num_hidden_layers=6)
    evidence = evidence_of(model, windows)
    kept = (1, 2, 5)
    change = Cut(plan_of(model).keep(kept), kept)
    moved = refitted(model, change, evidence, "residual")
    assert set(moved.tensors) == {
        f"blocks.{p}.{name}.weight"
        for p in range(3)
        for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    wanted = streams(model, windows)[4]
    errors = [
        float((streams(cut(model, c), windows)[1] - wanted).square().sum()) for c in (change, moved)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_shared_linears_and_norms_behind_the_links_stay(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    shared = Cut(plan_of(model).share(1, [2]), tuple(range(4)))
    moved = refitted(model, shared, evidence_of(model, windows), "residual")
    assert not any(name.startswith(("blocks.1.", "blocks.2.")) for name in moved.tensors)
    assert any(name.startswith("blocks.3.") for name in moved.tensors)
    other = tiny_model("opt", do_layer_norm_before=False)
    whole = Cut(plan_of(other), tuple(range(4)))
    assert refitted(other, whole, evidence_of(other, windows), "residual").tensors == {}


def test_new_blocks_are_refused(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    plan = plan_of(model).replace(1, 3, "ffn", 8)
    with pytest.raises(InputError, match="some are new"):
        refitted(model, Cut(plan, (0, None, 3)), evidence_of(model, windows), "residual")


@pytest.mark.parametrize(
    ("name", "settings"), [("svd_llm", {"update": "none"}), ("basis_sharing", {"update": "global"})]
)
def test_a_refit_out_of_order_is_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="goes through the blocks in order"):
        METHODS[name](sparsity=0.3, refit="residual", **settings)


@pytest.mark.parametrize(
    "name", ["modegpt", "svd_llm", "basis_sharing", "direct_share", "flexigpt"]
)
def test_block_by_block_is_the_model_that_a_cut_makes(
    name: str, tiny_model: Any, windows: Tensor
) -> None:
    """Whatever a block borrows of others: a basis, heads, all of its linears."""
    model = tiny_model("llama_tied")
    sparsity = 0.1 if name == "direct_share" else 0.25
    change = METHODS[name](sparsity=sparsity).compress(model, evidence_of(model, windows))
    whole = architecture_of(model).blocks(cut(model, change))
    blocks = BlockByBlock(model, change.plan, change.inherits)
    order = sorted(range(len(whole)), key=lambda p: change.plan.owner(p) != p)  # owners first
    for position in order:
        state = blocks.fill(position, change.tensors).state_dict()
        wanted = whole[position].state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    blocks.empty(0)
    assert all(parameter.is_meta for parameter in blocks.blocks[0].parameters())


def _seen(model: Any, windows: Tensor, position: int, name: str) -> dict[str, Tensor]:
    """What enters and leaves a block, and what one of its linears reads and writes."""
    block = architecture_of(model).blocks(model)[position]
    rows: dict[str, Tensor] = {}

    def flat(value: Any) -> Tensor:
        tensor = value[0] if isinstance(value, tuple) else value
        return tensor.detach().reshape(-1, tensor.shape[-1])

    def of_linear(_module: Any, args: Any, output: Any) -> None:
        rows.update(read=flat(args), written=flat(output))

    def of_block(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
        rows.update(entering=flat(args or kwargs["hidden_states"]), leaving=flat(output))

    handles = [
        block.get_submodule(name).register_forward_hook(of_linear),
        block.register_forward_hook(of_block, with_kwargs=True),
    ]
    with torch.no_grad():
        model(windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return rows
