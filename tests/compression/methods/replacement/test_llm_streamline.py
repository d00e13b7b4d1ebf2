"""LLM-Streamline (llm_streamline.md, acceptance tests 2-4, 6-8, 10, 11)."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foldstack.compression.errors import InputError
from foldstack.compression.methods import METHODS
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.replacement.block_start import least_squares_map, refit_outputs
from foldstack.compression.methods.replacement.llm_streamline import LlmStreamline
from foldstack.compression.statistics.gathering import KINDS, gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.statistics.run_states import RunStates
from foldstack.compression.statistics.stream import BlockStream
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.modeling_foldstack import FoldstackForCausalLM
from foldstack.compression.structure.size import count_parameters, size_of_plan
from foldstack.compression.structure.surgery import Cut, build_on_meta, cut, plan_of
from foldstack.compression.training.block_training import (
    Schedule,
    fit,
    split_windows,
    train_only,
)


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(97, (6, 20), generator=torch.Generator().manual_seed(0))


def evidence_of(model: Any, windows: Tensor, work: Path | None = None) -> Evidence:
    statistics = gather(model, windows, {"similarity"})
    return Evidence(windows, statistics, rank_blocks(statistics), work)


def block_share(model: Any) -> float:
    block = architecture_of(model).blocks(model)[0]
    return sum(p.numel() for p in block.parameters()) / count_parameters(model)


def logits(model: Any, windows: Tensor) -> Tensor:
    with torch.no_grad():
        return model(windows, use_cache=False).logits


def test_a_run_that_does_nothing_is_chosen_and_removed_for_free(
    architecture: str, tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model(architecture)
    family = architecture_of(model)
    with torch.no_grad():
        for position in (1, 2):
            for site in family.linears:
                for parameter in (
                    family.blocks(model)[position].get_submodule(site.name).parameters()
                ):
                    parameter.zero_()
    method = LlmStreamline(sparsity=2 * block_share(model), replacement="none")
    change = method.compress(model, evidence_of(model, windows))
    assert change.plan.removed_blocks == (1, 2)
    smaller = cut(model, change)
    assert type(smaller) is type(model)
    torch.testing.assert_close(logits(smaller, windows), logits(model, windows), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_an_untrained_layer_in_place_of_one_block_is_that_block(
    tiny_model: Any, windows: Tensor, family: str
) -> None:
    model = tiny_model(family)
    plan = plan_of(model).replace(1, 2, "layer")
    same = cut(model, Cut(plan, (0, 1, 2, 3)))
    torch.testing.assert_close(logits(same, windows), logits(model, windows), rtol=0, atol=0)
    stream = BlockStream(model, windows)
    stream.advance()
    student = architecture_of(same).blocks(same)[1]
    with torch.no_grad():
        output = stream.call(student, stream.hidden[0])
    stream.advance()
    torch.testing.assert_close(output, stream.hidden[0], rtol=0, atol=0)  # mean squared error 0


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("position", [0, 1])  # of gemma3_text: a sliding and a full attention
def test_the_student_cannot_see_the_future(
    tiny_model: Any, windows: Tensor, family: str, position: int
) -> None:
    model = tiny_model(family)
    stream = BlockStream(model, windows)
    student = architecture_of(model).blocks(model)[position].train()
    hidden = stream.hidden[0]
    perturbed = hidden.clone()
    perturbed[:, 12] += 1
    before = stream.call(student, hidden, position)
    after = stream.call(student, perturbed, position)
    difference = (after - before).detach().abs().amax(dim=(0, 2))
    assert difference[:12].max() == 0
    assert difference[12:].min() > 0


@pytest.mark.parametrize("replacement", ["layer", "ffn", "swiglu"])
@pytest.mark.parametrize("loss", ["mse", "llm"])
def test_training_lowers_the_loss_and_touches_nothing_else(
    tiny_model: Any, windows: Tensor, replacement: str, loss: str
) -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    windows = windows[:1].expand(6, -1)  # what is learned on some windows helps on the others
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {
        "sparsity": block_share(model), "replacement": replacement, "loss": loss, "batch_size": 2,
        "initial": "paper",
    }  # fmt: skip
    evidence = evidence_of(model, windows)
    untrained = LlmStreamline(**settings, epochs=0).compress(model, evidence)
    trained = LlmStreamline(**settings, epochs=6, learning_rate=3e-3).compress(model, evidence)
    assert trained.plan == untrained.plan
    position = next(p for p, b in enumerate(trained.plan.blocks) if b.kind == replacement)
    assert trained.tensors.keys() == untrained.tensors.keys()
    assert all(name.startswith(f"blocks.{position}.") for name in trained.tensors)
    first, last = cut(model, untrained), cut(model, trained)
    assert isinstance(last, FoldstackForCausalLM) == (replacement != "layer")

    def error(smaller: Any) -> float:
        if loss == "llm":
            with torch.no_grad():
                return float(smaller(windows, labels=windows).loss)
        stream = BlockStream(smaller, windows)
        dense = BlockStream(model, windows)
        while stream.position <= position:
            stream.advance()
        while dense.position < trained.plan.blocks[position].stands_for[-1] + 1:
            dense.advance()
        return float((stream.hidden[0] - dense.hidden[0]).square().mean())

    assert error(last) < error(first)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for new, old in enumerate(trained.inherits):
        if new == position:
            continue
        ours = architecture_of(last).blocks(last)[new].state_dict()
        for name, tensor in architecture_of(model).blocks(model)[old].state_dict().items():
            assert torch.equal(ours[name], tensor)


def test_the_last_block_stays_unless_asked(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for linear in (model.model.layers[3].self_attn.o_proj, model.model.layers[3].mlp.down_proj):
            linear.weight.zero_()
    sparsity = block_share(model)
    evidence = evidence_of(model, windows)
    kept = LlmStreamline(sparsity=sparsity, replacement="none").compress(model, evidence)
    assert 3 not in kept.plan.removed_blocks
    method = LlmStreamline(sparsity=sparsity, replacement="none", may_remove_last=True)
    assert method.compress(model, evidence).plan.removed_blocks == (3,)


def test_parameters_of_each_shape_and_the_ratios_of_llama_2_7b() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
    )  # fmt: skip
    model = build_on_meta(config)
    dense = count_parameters(model)
    ratios = {"none": (0.2403, 8), "layer": (0.2403, 9), "ffn": (0.2504, 9), "swiglu": (0.2502, 9)}
    for replacement, (ratio, length) in ratios.items():
        plan = LlmStreamline(sparsity=ratio, replacement=replacement)._plan(model, 20, length)
        removed = 1 - size_of_plan(config, plan).parameters / dense
        assert removed == pytest.approx(ratio, abs=5e-5)
    assert len(LlmStreamline(sparsity=0.2504, replacement="ffn").outline(model).blocks) == 32 - 8


@pytest.mark.parametrize("replacement", ["none", "layer", "ffn", "swiglu"])
def test_the_run_is_as_short_as_the_sparsity_allows(tiny_model: Any, replacement: str) -> None:
    model = tiny_model("llama", num_hidden_layers=8)
    method = LlmStreamline(sparsity=0.3, replacement=replacement)
    plan = method.outline(model)
    removed = 1 - size_of_plan(model.config, plan).parameters / count_parameters(model)
    assert 0.3 - 0.005 <= removed < 0.3 + block_share(model)


def test_out_of_reach_says_what_is_in_reach(tiny_model: Any) -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match=r"3 blocks of 4, replacement layer"):
        LlmStreamline(sparsity=0.7).outline(model)
    shared = cut(model, Cut(plan_of(model).share(0, [3]), (0, 1, 2, 3)))
    with pytest.raises(InputError, match="owns weights that other blocks share"):
        LlmStreamline(sparsity=0.4).outline(shared)


def test_a_run_that_avoids_shared_blocks_is_found(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    plan = plan_of(model).share(2, [4])
    shared = cut(model, Cut(plan, tuple(range(6))))
    method = LlmStreamline(sparsity=0.1, replacement="layer", epochs=1)
    change = method.compress(shared, evidence_of(shared, windows))
    (layer,) = [block for block in change.plan.blocks if block.kind == "layer"]
    assert layer.stands_for[0] not in (2, 4)
    smaller = cut(shared, change)
    assert 1 - count_parameters(smaller) / count_parameters(shared) >= 0.1 - 0.005
    assert logits(smaller, windows).isfinite().all()


def test_a_layer_does_not_start_as_a_factored_block(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    method = METHODS["svd_llm"](sparsity=0.1, update="closed_form")
    statistics = gather(model, windows, KINDS)
    evidence = Evidence(windows, statistics, rank_blocks(statistics))
    factored = cut(model, method.compress(model, evidence))
    with pytest.raises(InputError, match=r"copy of block \d, which is factored; use replacement"):
        LlmStreamline(sparsity=0.2).outline(factored)
    again = LlmStreamline(sparsity=0.2, replacement="ffn", epochs=0)
    assert len(again.outline(factored).blocks) < 6


def test_the_closed_form_map_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 8, generator=generator).double()
    exact = torch.randn(8, 8, generator=generator).double()
    shift = torch.randn(8, generator=generator).double()
    matrix, bias = least_squares_map(zip(x, x @ exact.T + shift, strict=True), ridge=0.0)
    torch.testing.assert_close(matrix, exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(bias, shift, rtol=0, atol=1e-9)
    y = torch.tanh(x @ exact.T)
    matrix, bias = least_squares_map([(x, y)], ridge=0.0)
    residual = (y - x @ matrix.T - bias).flatten(0, 1)
    assert (x.flatten(0, 1).T @ residual).abs().max() < 1e-9  # zero gradient
    assert residual.abs().mean(0).max() > 1e-2
    assert residual.square().sum() <= (y - x).square().sum()


def test_an_ffn_can_start_as_the_closed_form_map(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    method = LlmStreamline(sparsity=block_share(model), replacement="ffn", epochs=0)
    change = method.compress(model, evidence_of(model, windows))
    position = next(p for p, b in enumerate(change.plan.blocks) if b.kind == "ffn")
    stop = change.plan.blocks[position].stands_for[-1] + 1
    stream = BlockStream(model, windows)
    while stream.position < position:
        stream.advance()
    x = torch.cat(stream.hidden)
    while stream.position < stop:
        stream.advance()
    train = split_windows(len(windows), method._schedule(32)).train
    matrix, bias = least_squares_map([(x[train], torch.cat(stream.hidden)[train])])
    smaller = cut(model, change)
    with torch.no_grad():
        got = architecture_of(smaller).blocks(smaller)[position](x)
    torch.testing.assert_close(got, (x.double() @ matrix.T + bias).float(), rtol=1e-4, atol=1e-4)


def test_an_untrained_layer_can_do_the_work_of_a_run_it_can_express(
    tiny_model: Any, windows: Tensor
) -> None:
    """Block 2 does nothing, the student is block 1 with a wrong MLP output: it finds the right."""
    model = tiny_model("llama")
    blocks = model.model.layers
    student = copy.deepcopy(blocks[1])
    with torch.no_grad():
        blocks[2].self_attn.o_proj.weight.zero_()
        blocks[2].mlp.down_proj.weight.zero_()
        student.mlp.down_proj.weight.normal_()
    states = RunStates(model, windows, 1, 3, batch_size=2, memory_gib=8.0)
    everything = torch.arange(len(windows))
    x, y = states.pair(everything)
    through = partial(states.through, student)
    linears = [student.mlp.down_proj]
    refit_outputs(architecture_of(model), linears, through, lambda: [(x, y)], ridge=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(through(x), y, rtol=0, atol=1e-4)


@pytest.mark.parametrize("replacement", ["layer", "ffn", "swiglu"])
def test_the_closed_form_start_is_nearer_than_the_papers(
    architecture: str, tiny_model: Any, replacement: str
) -> None:
    windows = torch.randint(97, (96, 20), generator=torch.Generator().manual_seed(1))
    model = tiny_model(architecture)
    evidence = evidence_of(model, windows)
    errors = {}
    for initial in ("paper", "least_squares"):
        settings = {"replacement": replacement, "initial": initial, "epochs": 0}
        change = LlmStreamline(sparsity=block_share(model), **settings).compress(model, evidence)
        position = next(p for p, b in enumerate(change.plan.blocks) if b.kind == replacement)
        stop = change.plan.blocks[position].stands_for[-1] + 1
        smaller = cut(model, change)
        student = architecture_of(smaller).blocks(smaller)[position]
        states = RunStates(model, windows, position, stop, batch_size=6, memory_gib=8.0)
        x, y = states.pair(torch.arange(len(windows)))
        with torch.no_grad():
            errors[initial] = float((states.through(student, x) - y).square().mean())
    if replacement == "layer" and architecture.startswith(("gemma2", "gemma3")):
        assert errors["least_squares"] == errors["paper"]  # a norm follows its projections
    else:
        assert errors["least_squares"] < errors["paper"]


def test_the_learning_rate_of_the_paper_at_its_width() -> None:
    method = LlmStreamline(sparsity=0.2)
    rates = {width: method._schedule(width).learning_rate for width in (64, 192, 4096, 8192)}
    assert rates == pytest.approx({64: 4e-3, 192: 4e-3, 4096: 2e-4, 8192: 2e-4}, rel=0.05)
    assert LlmStreamline(sparsity=0.2, loss="llm")._schedule(64).learning_rate == 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("settings", [{}, {"loss": "llm"}, {"replacement": "ffn"}], ids=str)
def test_states_computed_again_train_the_same_block_as_recorded_ones(
    settings: dict[str, Any], family: str, tiny_model: Any, windows: Tensor
) -> None:
    model = tiny_model(family)
    recorded, again = (
        LlmStreamline(sparsity=0.2, epochs=2, batch_size=2, memory_gib=gib, **settings)
        for gib in (8, 0)
    )
    expected = recorded.compress(model, evidence_of(model, windows))
    got = again.compress(model, evidence_of(model, windows))
    assert got.plan == expected.plan
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(got.tensors[name], tensor, rtol=1e-4, atol=1e-5)


def test_nothing_is_stored_beyond_the_memory(tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("llama")
    room = 2 * windows.numel() * model.config.hidden_size * 4 / 2**30
    make = partial(RunStates, model, windows, 1, 3, batch_size=2)
    assert make(memory_gib=room).is_recorded
    assert not make(memory_gib=room * 0.99).is_recorded


SETTINGS = {
    "epochs": 4, "batch_size": 2, "learning_rate": 0.1, "min_learning_rate": 0.01,
    "weight_decay": 0.0, "gradient_clip": 1.0, "validation_fraction": 0.3, "seed": 0,
}  # fmt: skip


@pytest.mark.parametrize("num_steps", [1, 2, 17])
def test_the_last_step_has_the_least_learning_rate(num_steps: int) -> None:
    schedule = Schedule(**SETTINGS)
    rates = [schedule.rate(step, num_steps) for step in range(num_steps)]
    assert rates[-1] == pytest.approx(0.01)
    assert rates == sorted(rates, reverse=True)
    assert num_steps == 1 or rates[0] == pytest.approx(0.1)


def test_the_learning_rate_rises_to_its_peak_first() -> None:
    schedule = Schedule(**SETTINGS | {"warmup_fraction": 0.25})
    rates = [schedule.rate(step, 16) for step in range(16)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("replacement", ["layer", "ffn"])
def test_the_better_of_both_starts_stays(tiny_model: Any, replacement: str) -> None:
    """By the loss on the validation windows, after training."""
    windows = torch.randint(97, (24, 20), generator=torch.Generator().manual_seed(1))
    model = tiny_model("llama")
    evidence = evidence_of(model, windows)
    changes, losses = {}, {}
    for initial in ("paper", "least_squares", "better"):
        method = LlmStreamline(
            sparsity=block_share(model), replacement=replacement, initial=initial, epochs=2
        )
        change = changes[initial] = method.compress(model, evidence)
        position = next(p for p, b in enumerate(change.plan.blocks) if b.kind == replacement)
        stop = change.plan.blocks[position].stands_for[-1] + 1
        smaller = cut(model, change)
        student = architecture_of(smaller).blocks(smaller)[position]
        states = RunStates(model, windows, position, stop, batch_size=8, memory_gib=8.0)
        x, y = states.pair(split_windows(len(windows), method._schedule(32)).validation)
        with torch.no_grad():
            losses[initial] = float((states.through(student, x) - y).square().mean())
    best = min(("paper", "least_squares"), key=losses.__getitem__)
    assert losses["paper"] != losses["least_squares"]
    for name, tensor in changes["better"].tensors.items():
        assert torch.equal(tensor, changes[best].tensors[name]), name


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


def scripted(
    losses: list[float], student: Scale, split: Any, seen: list[float] | None = None
) -> Any:
    """A loss whose validation values are these, in order, whatever is learned."""
    calls = iter(losses)

    def loss_of(batch: Tensor) -> Tensor:
        is_validation = bool(torch.isin(batch, split.validation).any())
        if not is_validation:
            return student.scale.sum()
        if seen is not None:
            seen.append(student.scale.item())
        return torch.tensor(float(next(calls)))

    return loss_of


def test_the_best_state_is_kept_even_when_later_ones_are_worse() -> None:
    schedule = Schedule(**SETTINGS | {"batch_size": 3})
    student = Scale()
    seen: list[float] = []
    loss = scripted([5, 4, 1, 3, 2], student, split_windows(6, schedule), seen)
    training = fit(student, loss, 6, schedule)
    assert training.best_epoch == 2
    assert len(set(seen)) == 5  # it kept moving afterwards
    assert student.scale.item() == seen[2]


def test_no_improvement_leaves_the_initial_state() -> None:
    schedule = Schedule(**SETTINGS | {"batch_size": 3})
    student = Scale()
    loss = scripted([1, 2, 3, 4, 5], student, split_windows(6, schedule))
    assert fit(student, loss, 6, schedule).best_epoch == 0
    assert student.scale.item() == 1


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    schedule = Schedule(**SETTINGS)
    student = Scale()
    loss = scripted([float("nan")] * 9, student, split_windows(6, schedule))
    with pytest.raises(InputError, match="finite"):
        fit(student, loss, 6, schedule)
    with pytest.raises(InputError, match="at least 2 windows"):
        fit(student, loss, 1, schedule)


def test_only_the_blocks_themselves_train(tiny_model: Any) -> None:
    """Not those whose name begins alike: block 2 is not block 20."""
    model = tiny_model("llama", num_hidden_layers=21)
    train_only(model, [model.model.layers[2]])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"2"}
    assert len(trained) == len(list(model.model.layers[2].parameters()))


def test_a_killed_training_continues_where_it_was(
    tiny_model: Any, windows: Tensor, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    method = LlmStreamline(sparsity=block_share(model), epochs=3, batch_size=2)
    uninterrupted = method.compress(model, evidence_of(model, windows))

    class Killed(Exception):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if what == "train replacement" and done > total // 2:
            raise Killed

    evidence = evidence_of(model, windows, tmp_path)
    with pytest.raises(Killed):
        method.compress(model, Evidence(**vars(evidence) | {"progress": kill}))
    assert list(tmp_path.glob("replacement/step-*"))
    steps = []
    counting = Evidence(**vars(evidence) | {"progress": lambda _w, done, _t: steps.append(done)})
    resumed = method.compress(model, counting)
    assert min(steps) > 3  # the first epoch was not run again
    for name, tensor in uninterrupted.tensors.items():
        assert torch.equal(resumed.tensors[name], tensor), name
    other = LlmStreamline(sparsity=block_share(model), epochs=3, batch_size=2, seed=1)
    fresh = other.compress(model, evidence_of(model, windows))
    stale = other.compress(model, evidence)  # the checkpoint there is of another run
    for name, tensor in fresh.tensors.items():
        assert torch.equal(stale.tensors[name], tensor), name
