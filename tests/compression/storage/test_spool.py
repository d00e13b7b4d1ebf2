"""Methods that go block by block, killed and run again: they do the rest, and give the same."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foldstack.compression.methods import METHODS
from foldstack.compression.methods.method import Evidence
from foldstack.compression.statistics import kept_pass
from foldstack.compression.statistics.gathering import KINDS, gather
from foldstack.compression.statistics.ranking import rank_blocks
from foldstack.compression.statistics.stream import BlockStream
from foldstack.compression.storage.spool import Spool
from foldstack.compression.structure.surgery import cut

SPARSITY = 0.3
SETTINGS: dict[str, dict[str, Any]] = {
    "svd_llm": {"name": "svd_llm"},
    "svd_llm in order": {"name": "svd_llm", "update": "closed_form"},
    "basis_sharing": {"name": "basis_sharing"},
    "basis_sharing at once": {"name": "basis_sharing", "update": "global"},
    "basis_sharing in order": {"name": "basis_sharing", "update": "layerwise"},
    "modegpt": {"name": "modegpt"},
    "modegpt refitted": {
        "name": "modegpt",
        "refit": "residual",
        # By rule: what is chosen by measuring runs every block for it.
        "allocation": "influence",
        "query_key_weight": 0.5,
    },
    "svd_llm refitted": {"name": "svd_llm", "refit": "residual"},
    "slicegpt": {"name": "slicegpt", "round_interval": 1},
}


STREAMED = (
    "svd_llm in order",
    "basis_sharing in order",
    "slicegpt",
    "modegpt refitted",
    "svd_llm refitted",
)
"""Those whose hidden states go along and are kept."""


class Killed(BaseException):
    """Ends a run anywhere."""


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*.safetensors"))
    }


@pytest.fixture
def evidence(tiny_model: Any) -> Callable[[Any, Path], Evidence]:
    windows = torch.randint(97, (4, 20), generator=torch.Generator().manual_seed(0))

    def of(model: Any, work: Path) -> Evidence:
        statistics = gather(model, windows, KINDS)
        return Evidence(windows, statistics, rank_blocks(statistics), work)

    return of


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
@pytest.mark.parametrize(
    ("name", "seconds_between"),
    [*((name, kept_pass.SECONDS_BETWEEN) for name in SETTINGS), *((name, 0) for name in STREAMED)],
)
def test_a_killed_run_goes_on_behind_the_last_block_it_finished(
    name: str,
    family: str,
    seconds_between: float,
    tiny_model: Any,
    evidence: Callable[[Any, Path], Evidence],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept_pass, "SECONDS_BETWEEN", seconds_between)
    model = tiny_model(family)
    settings = {"sparsity": SPARSITY, **SETTINGS[name]}
    method = METHODS[settings["name"]](**settings)
    whole = method.compress(model, evidence(model, tmp_path / "whole"))
    in_memory = method.compress(model, replace(evidence(model, tmp_path), work=None))

    made: list[str] = []
    part = Spool.part

    def counted(self: Spool, name: str, make: Callable[[], Any]) -> dict[str, Tensor]:
        def noted() -> Any:
            if len(made) in (1, 4):  # twice, in the middle of a block
                made.append("killed")
                raise Killed
            made.append(name)
            return make()

        return part(self, name, noted)

    monkeypatch.setattr(Spool, "part", counted)
    broken = evidence(model, tmp_path / "broken")
    for _ in range(2):
        with pytest.raises(Killed):
            method.compress(model, broken)
    resumed = method.compress(model, broken)

    finished = [name for name in made if name != "killed"]
    assert len(finished) == len(set(finished))  # nothing was made twice
    assert files_in(tmp_path / "broken") == files_in(tmp_path / "whole")
    assert whole.plan == resumed.plan == in_memory.plan
    assert whole.tensors.keys() == resumed.tensors.keys() == in_memory.tensors.keys()
    for key, tensor in whole.tensors.items():
        assert torch.equal(tensor, resumed.tensors[key]), key
        torch.testing.assert_close(tensor, in_memory.tensors[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STREAMED)
def test_no_window_passes_a_block_again_that_a_killed_run_has_passed(
    name: str,
    tiny_model: Any,
    evidence: Callable[[Any, Path], Evidence],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept_pass, "SECONDS_BETWEEN", 0)
    model = tiny_model("llama")
    settings = {"sparsity": SPARSITY, **SETTINGS[name]}
    method = METHODS[settings["name"]](**settings)
    whole = method.compress(model, evidence(model, tmp_path / "whole"))

    passed: list[int] = []
    call = BlockStream.call

    def noted(self: BlockStream, block: Any, hidden: Tensor, position: int | None = None) -> Any:
        passed.append(self.position if position is None else position)
        return call(self, block, hidden, position)

    def kill(_what: str, done: int, _total: int) -> None:
        if done == 2:
            raise Killed

    broken = evidence(model, tmp_path / "broken")
    with pytest.raises(Killed):
        method.compress(model, replace(broken, progress=kill))
    monkeypatch.setattr(BlockStream, "call", noted)
    resumed = method.compress(model, broken)
    assert set(passed) == set(range(2, len(model.model.layers)))
    for key, tensor in whole.tensors.items():
        assert torch.equal(tensor, resumed.tensors[key]), key


def test_a_part_that_was_not_finished_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "block-0.unfinished").write_bytes(b"half a file")
    both = torch.arange(4.0)
    spool = Spool(tmp_path)
    part = spool.part("block-0", lambda: {"a": both[:2], "b": both[:2], "c": both.view(2, 2).T})
    assert torch.equal(part["c"], torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
    again = Spool(tmp_path).part("block-0", lambda: pytest.fail("it is there"))
    assert all(torch.equal(part[name], again[name]) for name in "abc")


@pytest.mark.parametrize("share", [0.0, 0.05, 0.9])
def test_a_part_that_was_cut_short_is_named_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, share: float
) -> None:
    tensors = {"a": torch.arange(200.0)}
    Spool(tmp_path).part("block-0", lambda: tensors)
    file = tmp_path / "block-0.safetensors"
    whole = file.read_bytes()
    os.truncate(file, int(share * len(whole)))
    part = Spool(tmp_path).part("block-0", lambda: tensors)
    assert torch.equal(part["a"], tensors["a"])
    assert file.read_bytes() == whole
    assert f"{file} was left by an earlier run and cannot be read" in caplog.text


@pytest.mark.parametrize("seconds_between", [0, kept_pass.SECONDS_BETWEEN])
@pytest.mark.parametrize("name", ["slicegpt", "svd_llm in order"])
def test_a_method_makes_the_part_again_that_was_cut_short(
    name: str,
    seconds_between: float,
    tiny_model: Any,
    evidence: Callable[[Any, Path], Evidence],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept_pass, "SECONDS_BETWEEN", seconds_between)
    model = tiny_model("llama")
    settings = {"sparsity": SPARSITY, **SETTINGS[name]}
    method = METHODS[settings["name"]](**settings)
    method.compress(model, evidence(model, tmp_path))
    whole = files_in(tmp_path)
    cut_short = sorted(tmp_path.rglob("*-*.safetensors"))[1]
    os.truncate(cut_short, cut_short.stat().st_size // 2)
    method.compress(model, evidence(model, tmp_path))
    assert files_in(tmp_path) == whole


def test_a_model_that_shares_memory_is_the_same(
    architecture: str, tiny_model: Any, evidence: Callable[[Any, Path], Evidence], tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    change = METHODS["svd_llm"](sparsity=SPARSITY).compress(model, evidence(model, tmp_path))
    own, sharing = cut(model, change), cut(model, change, share_memory=True)
    assert own.state_dict().keys() == sharing.state_dict().keys()
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, sharing.state_dict()[name])
    places = [p.data_ptr() for p in sharing.parameters()]
    assert len(places) == len(set(places))  # safetensors would take two at one place for one
