"""The card beside a compressed model says what was done, how big it is and how it loads."""

import pytest
from huggingface_hub import ModelCard

from foldstack.compression.checkpoints.model_card import (
    CardFacts,
    Program,
    load_facts,
    save_facts,
    write_model_card,
)
from foldstack.compression.structure.size import size_of_plan
from foldstack.compression.structure.surgery import plan_of


@pytest.mark.parametrize("grade", ["native", "portable"])
def test_card_has_valid_metadata_and_the_sizes(tiny_model, tmp_path, grade):
    model = tiny_model("llama")
    plan = plan_of(model)
    facts = CardFacts(
        base_model="some-org/some-model",
        model_type="llama",
        grade=grade,
        steps=("ShortGPT removed blocks 1 and 2.",),
        dense=size_of_plan(model.config, plan),
        compressed=size_of_plan(model.config, plan.keep([0, 3])),
        fingerprints={"compress": "ab12"},
        programs=(Program("vLLM", "`vllm serve {name}`", "unchecked"),),
    )
    save_facts(tmp_path / "card.json", facts)
    facts = load_facts(tmp_path / "card.json").then("Trained back.", recover="cd34")
    write_model_card(tmp_path, facts)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "some-org/some-model"
    assert grade in card.data.tags
    assert "| executed blocks | 4 | 2 | 50.0% |" in card.content
    assert ("trust_remote_code=True" in card.content) == (grade == "portable")
    assert "1. ShortGPT removed blocks 1 and 2.\n2. Trained back." in card.content
    assert f"| vLLM | `vllm serve {tmp_path.name}` | unchecked |" in card.content
    assert "- compress: `ab12`\n- recover: `cd34`" in card.content


def test_a_card_names_no_path_of_this_machine(tiny_model, tmp_path):
    model = tiny_model("llama")
    size = size_of_plan(model.config, plan_of(model))
    folder = tmp_path / "secret-project" / "our-model"
    write_model_card(tmp_path, CardFacts(str(folder), "llama", "native", (), size, size, {}))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None
    assert "secret-project" not in card.content
    assert "# our-model, compressed by foldstack" in card.content
