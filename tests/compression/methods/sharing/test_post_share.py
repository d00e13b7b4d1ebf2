"""PostShare: the penalty, its gradient, and what training on it alone comes to."""

import copy

import pytest
import torch

from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.sharing.direct_share import DirectShare
from foldstack.compression.methods.sharing.head_sharing import head_cuts
from foldstack.compression.methods.sharing.post_share import PostShare, pair_distance
from foldstack.compression.statistics.gathering import gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.structure.surgery import Cut, cut, plan_of

DONORS = {(1, 0): (0, 1), (3, 1): (2, 0)}


@pytest.fixture
def ids():
    return torch.randint(2, 97, (8, 20), generator=torch.Generator().manual_seed(3))


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def evidence(model, ids, work=None):
    statistics = gather(model, ids, {"similarity"})
    return Evidence(ids, statistics, rank_blocks(statistics), work)


def test_the_penalty_is_zero_once_the_pairs_are_equal(architecture, tiny_model):
    model = tiny_model(architecture)
    assert float(pair_distance(model, DONORS, False).detach()) > 1
    shared = cut(model, Cut(plan_of(model).share_slices(head_cuts(model), DONORS), (0, 1, 2, 3)))
    distance = pair_distance(shared, DONORS, True)
    assert float(distance.detach()) == 0
    distance.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in shared.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2"])
def test_the_gradient_of_the_penalty_matches_finite_differences(family, tiny_model):
    model = tiny_model(family).double()
    pair_distance(model, DONORS, True).backward()
    generator = torch.Generator().manual_seed(1)
    slope = difference = 0.0
    steps = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            steps[parameter] = torch.randn(parameter.shape, generator=generator).double()
            slope += float((parameter.grad * steps[parameter]).sum())
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, step in steps.items():
                parameter += sign * 1e-6 * step
            difference += (1 if sign == 1 else -1) * float(pair_distance(model, DONORS, True))
    assert difference / 2e-6 == pytest.approx(slope, rel=1e-5)


def trained(model, ids, pull_output):
    method = PostShare(
        sparsity=0.1,
        pull=1.0,
        pull_output=pull_output,
        epochs=150,
        learning_rate=1e-2,
        weight_decay=0.0,
        batch_size=8,
    )
    change = method.compress(model, evidence(model, ids))
    donors = DirectShare(sparsity=0.1).donors(model)
    return method, change, donors


def test_pulled_together_with_the_output_pairs_share_without_loss(tiny_model, ids):
    """And without it they do not: the columns of the output projection still differ."""
    model = tiny_model("llama")
    jumps = {}
    for pull_output in (True, False):
        method, change, donors = trained(model, ids, pull_output)
        student = method._trained(model, donors, evidence(model, ids))
        assert change.plan == plan_of(model).share_slices(head_cuts(model), donors)
        jump = (logits(cut(model, change), ids) - logits(student, ids)).abs().max()
        jumps[pull_output] = float(jump)
    assert jumps[True] < 0.1 * jumps[False]


def test_without_a_pull_it_is_training_and_without_epochs_direct_share(tiny_model, ids):
    model = tiny_model("llama_tied")
    direct = cut(model, DirectShare(sparsity=0.1).compress(model, evidence(model, ids)))
    untrained = PostShare(sparsity=0.1, epochs=0).compress(model, evidence(model, ids))
    assert torch.equal(logits(cut(model, untrained), ids), logits(direct, ids))
    taught = PostShare(sparsity=0.1, epochs=2, learning_rate=1e-3)
    smaller = cut(model, taught.compress(model, evidence(model, ids)))
    embeddings = (m.get_input_embeddings().weight for m in (model, smaller))
    assert not torch.equal(*embeddings)  # all parameters are trained, not the blocks' alone
    assert smaller.get_output_embeddings().weight is smaller.get_input_embeddings().weight


def test_a_killed_run_goes_on_where_it_was(tiny_model, ids, tmp_path):
    model = tiny_model("llama")
    method = PostShare(sparsity=0.1, epochs=3, learning_rate=1e-3, batch_size=4)
    whole = method.compress(model, evidence(model, ids)).tensors

    class Killed(Exception):
        pass

    def kill(_what, done, total):
        if done == total:
            raise Killed

    started = evidence(model, ids, tmp_path)
    dying = Evidence(ids, started.statistics, started.ranking, tmp_path, kill)
    with pytest.raises(Killed):
        method.compress(copy.deepcopy(model), dying)
    assert list(tmp_path.rglob("*.safetensors"))
    resumed = method.compress(model, started).tensors
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())
