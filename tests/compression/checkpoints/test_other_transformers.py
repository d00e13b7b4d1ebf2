"""Folders of every structure under other versions of transformers (make test-engines)."""

import json
import os
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from foldstack.compression.checkpoints import reload_check
from foldstack.compression.checkpoints.checkpoint import _probe, save_model
from foldstack.compression.structure.modeling_foldstack import (
    NEWEST_TRANSFORMERS,
    OLDEST_TRANSFORMERS,
)

ROOT = Path(__file__).parents[3]
PYTHONS = os.environ.get("FOLDSTACK_PYTHONS", "").split()
FAMILIES = ["llama", "gpt2", "opt", "qwen3"]


def test_the_pins_end_at_what_was_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = [d for d in project["dependencies"] if d.startswith("transformers")]
    major, minor = NEWEST_TRANSFORMERS
    assert pin.endswith(f",<{major}.{minor + 1}")
    lowest = re.search(r">=(\d+)\.(\d+)", pin)
    assert lowest is not None
    assert OLDEST_TRANSFORMERS <= tuple(map(int, lowest.groups())) <= NEWEST_TRANSFORMERS


@pytest.mark.engines
@pytest.mark.parametrize("python", PYTHONS)
def test_each_structure_computes_and_decodes_the_same_under_another_version(
    python: str, structured: Callable[..., Any], structures: tuple[str, ...], tmp_path: Path
) -> None:
    """Logits bit by bit, and decoding from the cache, in one process of that version."""
    requests = []
    for family in FAMILIES:
        for structure in structures:
            folder = tmp_path / f"{family}-{structure}"
            model = structured(structure, family)
            save_model(model, folder, tokenizer_from=folder)
            save_file(_probe(model), folder.with_suffix(".probe"))
            request = {"folder": str(folder), "probe": str(folder.with_suffix(".probe"))}
            requests.append(request | {"trust_remote_code": True, "texts": []})
    finished = subprocess.run(
        [python, "-I", reload_check.__file__],
        input="".join(json.dumps(request) + "\n" for request in requests),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "was tested under transformers" not in finished.stderr
    seen = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    for request, report in zip(requests, seen, strict=True):
        assert "error" not in report, (request["folder"], report)
        assert report["logits_difference"] <= 1e-6 * report["logits_scale"], request["folder"]
        assert report["cached_difference"] <= 1e-5 * report["logits_scale"], request["folder"]
