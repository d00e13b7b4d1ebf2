"""The model card (README.md) that travels with every compressed folder."""

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from foldstack.compression.checkpoints.model_folder import is_hub_id
from foldstack.compression.structure.modeling_foldstack import (
    NEWEST_TRANSFORMERS,
    OLDEST_TRANSFORMERS,
)
from foldstack.compression.structure.size import Size

_HOW_TO_LOAD = {
    "native": """The folder is a stock {model_type} checkpoint: it needs no code of ours.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```""",
    "portable": """Stock classes do not know this structure, so its modelling file lies beside the
weights. Read `modeling_foldstack.py`, then allow it; where `foldstack` is imported no flag is
needed. It was tested under transformers {oldest} to {newest}, and says so under another version.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
```

Adapters (peft) go on `target_modules="all-linear"` or, by names, on
`model.stored_linears("q_proj", "v_proj")`: a name alone is refused where it stands for factors or
for another block's weights.""",
}


@dataclass(frozen=True)
class Program:
    """A program that runs a folder, or does not."""

    name: str
    command: str
    """In Markdown; {name} stands for the folder."""
    state: str
    """Checked or unchecked, and what follows from the structure."""


@dataclass(frozen=True)
class CardFacts:
    """What a card tells of a compressed model."""

    base_model: str
    model_type: str
    grade: str
    steps: tuple[str, ...]
    """What was done to the base model, one sentence each, in order."""
    dense: Size
    compressed: Size
    fingerprints: dict[str, str]
    programs: tuple[Program, ...] = ()
    """Who runs the folder."""

    def then(self, step: str, **fingerprints: str) -> "CardFacts":
        """The facts after one more step that keeps the structure."""
        merged = self.fingerprints | fingerprints
        return replace(self, steps=(*self.steps, step), fingerprints=merged)


_FACTS = TypeAdapter(CardFacts)


def save_facts(file: Path, facts: CardFacts) -> None:
    """Write the facts, for a later step to add to."""
    file.write_bytes(_FACTS.dump_json(facts, indent=1))


def load_facts(file: Path) -> CardFacts:
    """What `save_facts` wrote."""
    return _FACTS.validate_json(file.read_bytes())


def write_model_card(folder: Path, facts: CardFacts) -> None:
    """Write `README.md`: Hub metadata, what was done, sizes before and after, how to load."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=facts.base_model if is_hub_id(facts.base_model) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["foldstack", "structured-compression", facts.grade],
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(folder.name, facts)}"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _body(name: str, facts: CardFacts) -> str:
    done = "\n".join(f"{number}. {step}" for number, step in enumerate(facts.steps, start=1))
    origin = "\n".join(f"- {what}: `{digest}`" for what, digest in facts.fingerprints.items())
    # A path tells of this machine and of its user, and the hub takes none.
    base = facts.base_model if is_hub_id(facts.base_model) else Path(facts.base_model).name
    return f"""# {base}, compressed by foldstack

{done}

{_sizes(facts.dense, facts.compressed)}

## Loading

{_HOW_TO_LOAD[facts.grade].format(name=name, model_type=facts.model_type, **_tested())}

{programs_table(facts.programs, name)}
The structure is described in `plan.json`. The licence is that of the base model.

## Origin

{origin}
"""


def programs_table(programs: tuple[Program, ...], name: str) -> str:
    """A table of who runs the folder `name`; empty where nothing is known."""
    if not programs:
        return ""
    rows = [
        f"| {each.name} | {each.command} | {each.state} |".replace("{name}", name)
        for each in programs
    ]
    return "\n".join(["| program | command | state |", "|---|---|---|", *rows, ""])


def _tested() -> dict[str, str]:
    """The versions of transformers between which a portable folder was tested."""
    versions = {"oldest": OLDEST_TRANSFORMERS, "newest": NEWEST_TRANSFORMERS}
    return {name: ".".join(map(str, version)) for name, version in versions.items()}


def _sizes(dense: Size, compressed: Size) -> str:
    rows = (
        ("stored parameters", dense.parameters, compressed.parameters),
        ("bytes", dense.bytes, compressed.bytes),
        ("FLOPs per token (linears)", dense.flops_per_token, compressed.flops_per_token),
        ("KV-cache bytes per token", dense.kv_bytes_per_token, compressed.kv_bytes_per_token),
        ("executed blocks", dense.num_blocks, compressed.num_blocks),
    )
    lines = [f"| {what} | {a:,} | {b:,} | {1 - b / a:.1%} |" for what, a, b in rows]
    return "\n".join(["| | dense | compressed | removed |", "|---|---|---|---|", *lines])
