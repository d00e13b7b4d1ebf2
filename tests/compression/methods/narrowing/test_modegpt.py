"""MoDeGPT against brute force, planted structure and counts (its spec's acceptance tests)."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from foldstack.compression.closed_forms.channel_removal import Removals, removals
from foldstack.compression.closed_forms.inner_pairs import (
    kept_coordinates,
    leverage_scores,
    narrower_values,
    output_energy,
    refitted,
    top,
)
from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.candidate_loss import loss_of_cut
from foldstack.compression.methods import METHODS
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.narrowing import modegpt
from foldstack.compression.methods.narrowing.inner_widths import (
    InnerDimension,
    chosen_widths,
    influence_sparsities,
    removed_by,
    uniform_sparsities,
)
from foldstack.compression.methods.narrowing.modegpt import MoDeGpt, Orders
from foldstack.compression.statistics.gathering import KINDS, gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.heads import head_sizes, heads_of
from foldstack.compression.structure.modeling_foldstack import FoldstackForCausalLM
from foldstack.compression.structure.size import count_parameters, size_of
from foldstack.compression.structure.surgery import Cut, build_on_meta, cut, plan_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(97, (8, 40), generator=torch.Generator().manual_seed(0))


def evidence_of(model: Any, windows: Tensor) -> Evidence:
    statistics = gather(model, windows, KINDS)
    return Evidence(windows, statistics, rank_blocks(statistics))


def logits(model: Any, windows: Tensor) -> Tensor:
    with torch.no_grad():
        return model(windows, use_cache=False).logits


def compressed(model: Any, windows: Tensor, **settings: Any) -> Any:
    return cut(model, MoDeGpt(**settings).compress(model, evidence_of(model, windows)))


class TestMlp:
    def activations(self) -> Tensor:
        """400 tokens of 20 channels with energies of their own, some of them near copies."""
        x = normal(400, 12) @ normal(12, 20, seed=1) + 0.1 * normal(400, 20, seed=2)
        return x * torch.linspace(0.1, 3, 20, dtype=torch.float64)

    def test_leverage_is_the_diagonal_of_the_ridge_projection(self) -> None:
        gram = self.activations().T @ self.activations()
        ridge = 0.01 * gram.diagonal().mean()
        expected = (gram @ torch.linalg.inv(gram + ridge * torch.eye(20))).diagonal()
        torch.testing.assert_close(leverage_scores(gram, 0.01), expected)

    def test_a_large_ridge_ranks_by_energy_a_small_one_by_unpredictability(self) -> None:
        gram = self.activations().T @ self.activations()
        assert torch.equal(leverage_scores(gram, 1e6).argsort(), gram.diagonal().argsort())
        unpredictable = torch.linalg.inv(gram).diagonal().reciprocal()
        assert torch.equal(leverage_scores(gram, 1e-9).argsort(), unpredictable.argsort())

    def test_the_refit_is_the_least_squares_solution(self) -> None:
        x, down = self.activations(), normal(7, 20, seed=3)
        kept = torch.tensor([0, 2, 3, 7, 8, 11, 15, 19])
        gram = x.T @ x
        got = refitted(down, gram, kept)
        expected = torch.linalg.lstsq(x[:, kept], x @ down.T).solution.T
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        error = (x @ down.T - x[:, kept] @ got.T).square().sum()
        schur = gram - gram[:, kept] @ torch.linalg.solve(gram[kept][:, kept], gram[kept])
        torch.testing.assert_close(error, (down @ schur @ down.T).trace(), rtol=1e-5, atol=1e-5)
        assert error < 0.9 * (x @ down.T - x[:, kept] @ down[:, kept].T).square().sum()

    def test_keeping_everything_keeps_the_weight_also_without_data(self) -> None:
        down = normal(7, 20)
        assert torch.equal(refitted(down, torch.zeros(20, 20), torch.arange(20)), down)

    def test_dead_channels_score_zero_and_copies_are_made_up_for(self) -> None:
        x, down = self.activations(), normal(7, 20, seed=3)
        x[:, [4, 9]] = 0
        x[:, 6] = x[:, 5]
        gram = x.T @ x
        scores = leverage_scores(gram, 0.01)
        assert scores[[4, 9]].abs().max() < 1e-9
        assert set(range(20)) - set(top(scores, 18).tolist()) == {4, 9}
        kept = torch.tensor([i for i in range(20) if i not in (4, 6, 9)])
        got = x[:, kept] @ refitted(down, gram, kept).T
        torch.testing.assert_close(got, x @ down.T, rtol=0, atol=1e-5)

    def test_a_gram_that_is_not_finite_is_refused(self) -> None:
        with pytest.raises(InputError, match="must be finite"):
            leverage_scores(torch.full((3, 3), torch.nan), 0.01)


class TestQueryKey:
    def test_energies_are_the_diagonals_of_the_grams_of_the_outputs(self) -> None:
        x, weight, bias = normal(50, 6) + 0.5, normal(2, 4, 6, seed=1), normal(2, 4, seed=2)
        outputs = torch.einsum("ti,hdi->thd", x, weight) + bias
        got = output_energy(weight, bias, x.T @ x, x.sum(0), 50)
        torch.testing.assert_close(got, outputs.square().sum(0))

    def test_scores_are_products_of_column_norms_of_matrix_roots(self) -> None:
        """For grouped queries too: the norms of the group's roots add up in squares."""
        queries, key = normal(3, 50, 8), normal(50, 8, seed=1)

        def root(x: Tensor) -> Tensor:
            values, vectors = torch.linalg.eigh(x.T @ x)
            return vectors * values.clamp_min(0).sqrt() @ vectors.T

        norms = torch.stack([root(q).norm(dim=0) for q in queries]).square().sum(0).sqrt()
        expected = top(norms * root(key).norm(dim=0), 5)
        kept, pairs = kept_coordinates(queries.square().sum(1), key.square().sum(0), 0, 0, 5)
        assert torch.equal(kept, expected)
        assert len(pairs) == 0

    def test_the_choice_of_pairs_is_the_same_before_and_after_rotation(self) -> None:
        query, key = normal(2, 50, 8), normal(50, 8, seed=1)
        angles = torch.arange(50.0, dtype=torch.float64)[:, None] * torch.tensor([1, 0.3, 0.1, 0.7])

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            cos, sin = angles.cos(), angles.sin()
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        chosen = [
            kept_coordinates(q.square().sum(1), k.square().sum(0), 8, 2, 0)
            for q, k in ((query, key), (turned(query), turned(key)))
        ]
        assert torch.equal(chosen[0][0], chosen[1][0])
        pairs = chosen[0][1]
        assert torch.equal(chosen[0][0], torch.cat([pairs, pairs + 4]))

    def test_partial_rotary_heads_choose_pairs_and_single_coordinates(self) -> None:
        energy = torch.tensor([1.0, 9, 1, 1, 9, 1, 5, 1, 7]).double()
        kept, pairs = kept_coordinates(energy[None], energy, 6, 1, 2)
        assert kept.tolist() == [1, 4, 6, 8]
        assert pairs.tolist() == [1]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "opt", "gpt2"])
def test_empty_coordinates_and_channels_go_first_and_without_loss(
    family: str, tiny_model: Any, windows: Tensor
) -> None:
    """Two of eight coordinates of every head are zero: cutting just them changes no logit, which
    also says that the scale stays that of eight."""
    model = tiny_model(family)
    sizes, architecture = head_sizes(model), architecture_of(model)
    dim, half = sizes.head_dim, sizes.rotary_dim // 2
    with torch.no_grad():
        for block in architecture.blocks(model):
            inputs = [s.name for s in architecture.linears if s.reads == "attention_input"]
            for index, name in enumerate(inputs):
                linear = block.get_submodule(name)
                weight = architecture.weight(linear)
                heads = len(weight) // dim
                count = sizes.heads + sizes.kv_heads if len(inputs) == 1 else heads
                for head in range(count if index < 2 else 0):
                    empty = head % (half or dim)
                    rows = [head * dim + empty, head * dim + (empty + (half or 3)) % dim]
                    weight[rows] = 0
                    if linear.bias is not None:
                        linear.bias[rows] = 0
    # Query heads of one group have other rows empty than their key head: a key's zeros suffice.
    shares = (sizes.heads + sizes.kv_heads) * 2 * 4
    hidden = model.config.hidden_size
    has_bias = family in ("qwen2", "opt", "gpt2")
    sparsity = shares * (hidden + has_bias) / count_parameters(model)
    settings = {"mlp": False, "value_output": False, "allocation": "uniform"}
    smaller = compressed(model, windows, sparsity=sparsity, query_key_weight=1, **settings)
    forms = [block.narrow_heads for block in plan_of(smaller).blocks]
    assert {form.qk_dim for form in forms if form is not None} == {dim - 2}
    torch.testing.assert_close(logits(smaller, windows), logits(model, windows))
    for block in architecture.blocks(smaller):
        attention = block.get_submodule(architecture.linears[0].name.rpartition(".")[0])
        attention.scaling = (dim - 2) ** -0.5
    assert (logits(smaller, windows) - logits(model, windows)).abs().max() > 1e-4


class TestValueOutput:
    x, value, outputs = normal(300, 12), normal(5, 12, seed=1), normal(3, 12, 5, seed=2)

    def error(self, width: int, by_values_alone: bool = False) -> float:
        """Sum over the group of the squared errors of X W_V W_O."""
        gram = self.x.T @ self.x
        settings = {"by_values_alone": by_values_alone}
        narrow, read = narrower_values(self.value, self.outputs, gram, width, **settings)
        lost = self.x @ self.value.T @ self.outputs.mT - self.x @ narrow.T @ read.mT
        return float(lost.square().sum())

    @pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
    def test_it_reaches_the_optimum(self, width: int) -> None:
        stacked = self.x @ self.value.T @ self.outputs.flatten(0, 1).T
        optimum = torch.linalg.svdvals(stacked)[width:].square().sum().item()
        assert self.error(width) == pytest.approx(optimum, rel=1e-6, abs=1e-8)

    @pytest.mark.parametrize("width", [1, 2, 3, 4])
    def test_the_group_chooses_better_together(self, width: int) -> None:
        assert self.error(width) < self.error(width, by_values_alone=True)

    def test_whole_heads_without_data_keep_the_product(self) -> None:
        nothing = torch.zeros(12, 12, dtype=torch.float64)
        narrow, read = narrower_values(self.value, self.outputs, nothing, 5)
        torch.testing.assert_close(read @ narrow, self.outputs @ self.value)


@pytest.mark.parametrize("family", ["qwen2", "opt", "gpt2"])
def test_a_value_bias_moves_into_the_output_without_loss(
    family: str, tiny_model: Any, windows: Tensor
) -> None:
    """Values of which two coordinates are zero but for their bias lose them exactly."""
    model = tiny_model(family)
    architecture, sizes = architecture_of(model), head_sizes(model)
    dim = sizes.head_dim
    last = [s.name for s in architecture.linears if s.reads == "attention_input"][-1]
    with torch.no_grad():
        for block in architecture.blocks(model):
            weight = architecture.weight(block.get_submodule(last))
            for head in range(sizes.kv_heads):
                start = len(weight) - (head + 1) * dim
                weight[start : start + 2] = 0
    settings = {"mlp": False, "query_key": False, "allocation": "uniform"}
    smaller = compressed(model, windows, sparsity=0.02, **settings)
    forms = [block.narrow_heads for block in plan_of(smaller).blocks]
    assert {form.v_dim for form in forms if form is not None} <= {dim - 1, dim - 2}
    assert all(form.value_bias_in_output for form in forms if form is not None)
    got = logits(smaller, windows)
    torch.testing.assert_close(got, logits(model, windows), rtol=1e-4, atol=1e-5)
    for name, parameter in smaller.named_parameters():
        if name.endswith(("o_proj.bias", "out_proj.bias", "attn.c_proj.bias")):
            parameter.data.zero_()
    assert (logits(smaller, windows) - got).abs().max() > 1e-3


class TestAllocation:
    influence = {0: 0.4, 1: 0.1, 3: 0.12, 4: 0.15, 5: 0.11}  # noqa: RUF012

    @pytest.mark.parametrize("average", [0.05, 0.3, 0.5, 0.79])
    @pytest.mark.parametrize("smoothing", [0.02, 0.1, 1.0])
    def test_the_mean_is_kept_and_influence_protects(
        self, average: float, smoothing: float
    ) -> None:
        phi = influence_sparsities(self.influence, smoothing, 0.8)(average)
        assert sum(phi.values()) / 5 == pytest.approx(average)
        assert all(0 <= value <= 0.8 + 1e-12 for value in phi.values())
        by_influence = sorted(self.influence, key=self.influence.__getitem__)
        for low, high in pairwise(by_influence):
            assert phi[low] > phi[high] or phi[low] == pytest.approx(0.8)

    def test_much_smoothing_is_uniform(self) -> None:
        phi = influence_sparsities(self.influence, 1e6, 0.8)(0.3)
        assert list(phi.values()) == pytest.approx([0.3] * 5, abs=1e-6)

    def test_without_a_cap_it_is_the_softmax(self) -> None:
        phi = influence_sparsities(self.influence, 0.1, 0.99)(0.1)
        share = torch.softmax(-torch.tensor(list(self.influence.values())).double() / 0.1, 0)
        assert list(phi.values()) == pytest.approx((0.5 * share).tolist())

    @pytest.mark.parametrize("even", [True, False])
    def test_widths_remove_what_was_asked_within_the_smallest_step(self, even: bool) -> None:
        dimensions = [
            dimension
            for position in range(3)
            for dimension in (
                InnerDimension(position, "mlp", 56, 1, 96),
                InnerDimension(position, "query_key", 8, 2, 192),
                InnerDimension(position, "value_output", 8, 1, 200, freed=-10),
            )
        ]
        for to_remove in (50.0, 1000.0, 3333.0, 12_000.0):
            widths = chosen_widths(
                dimensions, uniform_sparsities(range(3)), to_remove, 0.8, even=even, slack=0.0
            )
            assert 0 <= removed_by(dimensions, widths) - to_remove < 96
            assert all(widths[p, "query_key"] % 2 == 0 for p in range(3))

    def test_influence_shapes_the_blocks(self, tiny_model: Any, windows: Tensor) -> None:
        model = tiny_model("llama")
        evidence = evidence_of(model, windows)
        change = MoDeGpt(sparsity=0.3, smoothing=0.02).compress(model, evidence)
        widths = [block.mlp_width or 56 for block in change.plan.blocks]
        order = evidence.ranking.order()
        assert widths[order[0]] < widths[order[-1]]


class TestCounts:
    def test_every_linear_narrows_and_the_cache_with_it(
        self, tiny_model: Any, windows: Tensor
    ) -> None:
        model = tiny_model("llama")
        dense = size_of(model)
        share = 0.5 * dense.block_linear_parameters / dense.parameters
        smaller = compressed(
            model, windows, sparsity=share, allocation="uniform", query_key_weight=1
        )
        size = size_of(smaller)
        assert size.block_linear_parameters * 2 == dense.block_linear_parameters
        assert size.kv_bytes_per_token * 2 == dense.kv_bytes_per_token
        block = architecture_of(smaller).blocks(smaller)[2]
        shapes = {n.rpartition(".")[2]: tuple(p.shape) for n, p in block.named_parameters()
                  for n in [n.removesuffix(".weight")] if p.ndim == 2}  # fmt: skip
        assert shapes == {
            "q_proj": (16, 32), "k_proj": (8, 32), "v_proj": (8, 32), "o_proj": (32, 16),
            "gate_proj": (28, 32), "up_proj": (28, 32), "down_proj": (32, 28),
        }  # fmt: skip

    def test_only_the_mlp_uniformly_is_a_stock_model(
        self, architecture: str, tiny_model: Any, windows: Tensor
    ) -> None:
        # A vocabulary so large that one channel in each block is less than the tolerance.
        model = tiny_model(architecture, vocab_size=2910)
        settings = {"query_key": False, "value_output": False, "allocation": "uniform"}
        smaller = compressed(model, windows, sparsity=0.05, **settings)
        assert type(smaller) is type(model)
        assert 0.05 <= 1 - count_parameters(smaller) / count_parameters(model) < 0.055
        assert torch.isfinite(logits(smaller, windows)).all()

    def test_widths_are_multiples_for_speed(self, tiny_model: Any, windows: Tensor) -> None:
        model = tiny_model("mistral")
        settings = {"mlp_multiple": 8, "head_multiple": 4, "query_key_weight": 1}
        smaller = compressed(model, windows, sparsity=0.4, **settings)
        for block in plan_of(smaller).blocks:
            assert (block.mlp_width or 56) % 8 == 0
            heads = block.narrow_heads
            assert heads is None or (heads.qk_dim % 4, heads.v_dim % 4) == (0, 0)

    def test_the_selection_changes_which_channels_stay_and_not_how_many(
        self, architecture: str, tiny_model: Any, windows: Tensor
    ) -> None:
        model = tiny_model(architecture)
        evidence = evidence_of(model, windows)
        settings = {"sparsity": 0.3, "mlp_multiple": 4, "allocation": "uniform",
                    "query_key_weight": 0.5}  # fmt: skip
        by_leverage, greedy = (
            MoDeGpt(mlp_selection=selection, **settings).compress(model, evidence)
            for selection in ("leverage", "greedy")
        )
        assert by_leverage.plan == greedy.plan
        down = next(s.name for s in architecture_of(model).linears if s.reads == "mlp_output")
        name = f"blocks.1.{down}.weight"
        assert by_leverage.tensors[name].shape == greedy.tensors[name].shape
        assert not torch.equal(by_leverage.tensors[name], greedy.tensors[name])

    @pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3"])
    def test_greedily_narrowed_mlps_are_the_best_on_their_channels(
        self, family: str, tiny_model: Any, windows: Tensor
    ) -> None:
        """Down projection and bias, by least squares over the tokens: biases, transposed weights
        and fused halves stand where they belong."""
        model = tiny_model(family).double()
        architecture = architecture_of(model)
        (down,) = (s.name for s in architecture.linears if s.reads == "mlp_output")
        settings = {"query_key": False, "value_output": False, "allocation": "uniform"}
        smaller = compressed(model, windows, sparsity=0.2, mlp_selection="greedy", **settings)
        dense, narrow = (
            architecture_of(m).blocks(m)[0].get_submodule(down) for m in (model, smaller)
        )
        (seen, target), (kept, output) = (
            _read_and_written(m, linear, windows)
            for m, linear in ((model, dense), (smaller, narrow))
        )
        assert kept.shape[1] < seen.shape[1]
        assert all(((seen - channel[:, None]).abs().amax(0) < 1e-9).any() for channel in kept.T)
        if dense.bias is not None:
            kept = torch.cat([kept, torch.ones(len(kept), 1, dtype=kept.dtype)], dim=1)
        solution = torch.linalg.lstsq(kept, target).solution
        torch.testing.assert_close(output, kept @ solution, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
    def test_normed_queries_and_keys_stay_whole(
        self, family: str, tiny_model: Any, windows: Tensor
    ) -> None:
        model = tiny_model(family)
        smaller = compressed(model, windows, sparsity=0.3)
        assert isinstance(smaller, FoldstackForCausalLM)
        forms = [block.narrow_heads for block in plan_of(smaller).blocks]
        assert all(form.qk_dim == 12 for form in forms if form is not None)
        assert any(form is not None and form.v_dim < 12 for form in forms)
        alone = MoDeGpt(sparsity=0.1, mlp=False, value_output=False)
        with pytest.raises(InputError, match="cannot make this model smaller"):
            alone.outline(build_on_meta(model.config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_a_cut_is_that_of_its_model(
    architecture: str, tiny_model: Any, windows: Tensor, dtype: torch.dtype
) -> None:
    """It decides between cuts that are never made; one block at a time is in memory."""
    model = tiny_model(architecture).to(dtype)
    change = MoDeGpt(sparsity=0.2, allocation="uniform").compress(
        model, evidence_of(model, windows)
    )
    smaller = cut(model, change).float()
    with torch.no_grad():
        expected = float(smaller(windows, labels=windows).loss)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert loss_of_cut(model, change, windows) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("refit", ["none", "residual"])
@pytest.mark.parametrize("weight", [0.5, 0.25])
@pytest.mark.parametrize("allocation", ["influence", "uniform"])
def test_what_has_the_lower_loss_is_chosen(
    tiny_model: Any,
    windows: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    allocation: str,
    weight: float,
    refit: str,
) -> None:
    """A default that suits one model is worse than its own other forms on another."""
    model = tiny_model("llama")
    evidence = evidence_of(model, windows)
    settings: dict[str, Any] = {"sparsity": 0.3, "smoothing": 0.02, "refit": refit}
    cuts = {
        (a, w): MoDeGpt(**settings, allocation=a, query_key_weight=w).compress(model, evidence)
        for a in ("influence", "uniform")
        for w in (0.5, 0.25)
    }
    assert len({c.plan.model_dump_json() for c in cuts.values()}) == 4
    wanted = cuts[allocation, weight]

    def loss(_model: Any, change: Cut, _windows: Tensor) -> float:
        is_there = change.plan in (wanted.plan, cuts[allocation, 0.5].plan)
        return 0.0 if change.plan == wanted.plan else 1.0 if is_there else 2.0

    monkeypatch.setattr(modegpt, "loss_of_cut", loss)
    found = MoDeGpt(**settings).compress(model, evidence)
    assert found.plan == wanted.plan
    assert found.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(found.tensors[name], t) for name, t in wanted.tensors.items())


def _read_and_written(model: Any, linear: Any, windows: Tensor) -> tuple[Tensor, Tensor]:
    """What enters and leaves a linear, a row a token."""
    rows: list[tuple[Tensor, Tensor]] = []
    handle = linear.register_forward_hook(
        lambda _m, args, out: rows.append(
            (args[0].reshape(-1, args[0].shape[-1]), out.reshape(-1, out.shape[-1]))
        )
    )
    logits(model, windows)
    handle.remove()
    return rows[0]


def test_biases_of_queries_keys_and_values_count(tiny_model: Any, windows: Tensor) -> None:
    """A run that drops Qwen2's biases, as the published re-implementation does, is another one."""
    model = tiny_model("qwen2")
    smaller = compressed(model, windows, sparsity=0.2)
    got = logits(smaller, windows)
    for name, parameter in smaller.named_parameters():
        if "self_attn" in name and name.endswith("bias"):
            parameter.data.zero_()
    assert (logits(smaller, windows) - got).abs().max() > 1e-2


def test_one_token_changes_the_statistics_that_heads_are_chosen_by(
    tiny_model: Any, windows: Tensor
) -> None:
    model, other = tiny_model("qwen2"), windows.clone()
    other[3, 5] = (other[3, 5] + 1) % 97
    sizes = head_sizes(model)
    energies = []
    for tokens in (windows, other):
        statistics = gather(model, tokens, {"gram"})
        heads = heads_of(model, 2, sizes)
        key = (2, "attention_input")
        inputs = statistics.gram(*key), statistics.input_sum(*key), statistics.num_tokens
        energies.append(output_energy(heads.key, heads.key_bias, *inputs))
    assert not torch.equal(*energies)


@pytest.mark.parametrize("after", ["shortgpt", "svd_llm", "llm_streamline", "modegpt"])
def test_what_can_follow_it(after: str, tiny_model: Any, windows: Tensor) -> None:
    model = tiny_model("qwen2")
    smaller = compressed(model, windows, sparsity=0.1)
    settings = {"epochs": 0} if after == "llm_streamline" else {}
    method = METHODS[after](sparsity=0.2, **settings)
    evidence = evidence_of(smaller, windows)
    if after == "modegpt":
        with pytest.raises(InputError, match="narrowed already; use modegpt before that"):
            method.compress(smaller, evidence)
        return
    again = cut(smaller, method.compress(smaller, evidence))
    assert torch.isfinite(logits(again, windows)).all()
    assert count_parameters(again) < 0.83 * count_parameters(smaller)


def test_an_order_of_channels_serves_every_width(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Any, windows: Tensor
) -> None:
    """Found once for the first width, and to its end when a second one asks for more; what is made
    is the same as alone."""
    model = tiny_model("llama")
    evidence = evidence_of(model, windows)
    sought = []

    def counted(down: Tensor, gram: Tensor, count: int) -> Removals:
        sought.append(count)
        return removals(down, gram, count)

    monkeypatch.setattr(modegpt, "removals", counted)
    method = MoDeGpt(sparsity=0.2, mlp_selection="greedy")
    together: Orders = {}
    size = model.config.intermediate_size
    for width in (size - 4, size - 12, size - 8, 3):
        plan = method.narrow_plan(model, {(1, "mlp"): width})
        alone, given = (
            method.narrow_block(model, 1, plan.blocks[1], evidence, orders, mlp=True)
            for orders in ({}, together)
        )
        assert alone.keys() == given.keys()
        for name, tensor in alone.items():
            assert torch.equal(tensor, given[name]), name
    assert sought.count(size - 1) == 1
    assert len(sought) == 4 + 2
