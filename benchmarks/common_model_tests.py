"""transformers' own common model tests over every structure: how many run, pass, skip, and why.

python benchmarks/common_model_tests.py tests-of-transformers/ [--structure NAME] [-k EXPRESSION]

The folder is the `tests` of a source distribution (`pip download --no-deps --no-binary :all:
transformers==5.23.0`), which no wheel holds; it needs the package `parameterized`. What the source
distribution itself lacks (the mixins about exporters and generation) is left out.
"""

import argparse
import importlib.util
import re
import sys
import tempfile
import types
import unittest
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from foldstack.compression.structure.modeling_foldstack import (
    FoldstackConfig,
    FoldstackForCausalLM,
    FoldstackModel,
)
from foldstack.compression.structure.surgery import config_for, plan_of

ROOT = Path(__file__).parents[1]
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    # With the usual 0.02 two blocks that attend change too little for the tests of rotary scaling.
    "initializer_range": 0.1,
}
NOT_FOR_US = {
    "test_num_layers_is_small": "asks the tests' own models to have few layers, and ours show four",
    "test_generation_tester_mixin_inheritance": "asks for a mixin that no distribution holds",
}
SLICED_ALONE = {
    "test_hidden_states_output": "asks for states of one width, and here each block has its own",
}
LACKING = {
    "tests.exporters.test_export": "ExportTesterMixin",
    "tests.generation.test_utils": "GenerationTesterMixin",
}


def structures() -> dict[str, Any]:
    """Plans by name, as the tests of the modelling file have them."""
    spec = importlib.util.spec_from_file_location("plans", ROOT / "tests/compression/conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Any] = module.STRUCTURES
    return found


class Tester:
    """What the common tests ask of a family's own tester."""

    batch_size, seq_length, is_training = 4, 7, True
    hidden_size, num_attention_heads, num_hidden_layers = 32, 4, 4

    def __init__(self, structure: str) -> None:
        self.parent: Any = None
        stock = AutoConfig.for_model("llama", **SIZES)
        dense = AutoModelForCausalLM.from_config(stock)
        plan = structures()[structure](dense, plan_of(dense))
        self._config = config_for(dense.config, plan).to_dict()
        self.num_hidden_layers = len(plan.blocks)

    def get_config(self) -> Any:
        return FoldstackConfig(**self._config)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = torch.randint(1, SIZES["vocab_size"], (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def lay_out(tests: Path, work: Path) -> None:
    """The tests as a package, with empty mixins for what the source distribution lacks."""
    (work / "tests").symlink_to(tests.resolve())
    sys.path.insert(0, str(work))
    package = types.ModuleType("tests")
    package.__path__ = [str(work / "tests")]
    sys.modules["tests"] = package
    for name, mixin in LACKING.items():
        parent = types.ModuleType(name.rpartition(".")[0])
        module = types.ModuleType(name)
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules[parent.__name__], sys.modules[name] = parent, module


def know_the_classes() -> None:
    """The tests look up by name which classes have a loss."""
    modeling_auto.MODEL_MAPPING_NAMES["foldstack"] = FoldstackModel.__name__
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["foldstack"] = FoldstackForCausalLM.__name__


def case_of(mixin: Any, structure: str) -> type[unittest.TestCase]:
    """The common tests for one structure."""

    def set_up(self: Any) -> None:
        self.model_tester = Tester(structure)
        self.model_tester.parent = self

    names = {
        "setUp": set_up,
        "all_model_classes": (FoldstackModel, FoldstackForCausalLM),
        "all_generative_model_classes": (FoldstackForCausalLM,),
        "has_attentions": structure not in ("light_block", "light_first"),
        "test_resize_embeddings": True,
        "is_encoder_decoder": False,
    }
    of_this = SLICED_ALONE if structure == "sliced" else {}
    for name, why in (NOT_FOR_US | of_this).items():
        names[name] = unittest.skip(why)(lambda self: None)
    return type(f"Test_{structure}", (mixin, unittest.TestCase), names)


class Tally:
    """pytest's outcomes, by structure and reason."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.reasons: Counter[str] = Counter()
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and not (report.when == "setup" and not report.passed):
            return
        found = re.search(r"Test_(\w+?)::", report.nodeid)
        self.outcomes[found[1] if found else "?", report.outcome] += 1
        if report.skipped:
            text = (
                report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            )
            self.reasons[text.removeprefix("Skipped: ")[:100]] += 1
        if report.failed:
            last = str(report.longrepr).strip().splitlines()[-1]
            self.failed.append(
                f"{report.nodeid.rpartition('::')[2]} [{found[1] if found else ''}] {last[:140]}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", type=Path)
    parser.add_argument("--structure", action="append", choices=sorted(structures()))
    parser.add_argument("-k", default="")
    arguments = parser.parse_args()
    names = arguments.structure or sorted(structures())
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        lay_out(arguments.tests, work)
        know_the_classes()
        from tests.test_modeling_common import ModelTesterMixin

        collected = types.ModuleType("common_cases")
        for name in names:
            setattr(collected, f"Test_{name}", case_of(ModelTesterMixin, name))
        sys.modules["common_cases"] = collected
        file = work / "test_common.py"
        file.write_text("from common_cases import *\n")
        options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(work), "-W", "ignore", "-k"]
        pytest.main(
            [str(file), *options, arguments.k, "--tb=line", "-o", "addopts="], plugins=[tally]
        )
    runs = Counter[str]()
    for (_, outcome), count in tally.outcomes.items():
        runs[outcome] += count
    for name in names:
        counts = {o: tally.outcomes[name, o] for o in ("passed", "failed", "skipped")}
        print(f"{name:<16}", *(f"{counts[o]:4d} {o}" for o in counts))
    print(f"{'all':<16}", *(f"{runs[o]:4d} {o}" for o in ("passed", "failed", "skipped")))
    for reason, count in tally.reasons.most_common():
        print(f"skipped {count:4d} times: {reason}")
    for line in sorted(tally.failed):
        print("failed:", line)


if __name__ == "__main__":
    main()
