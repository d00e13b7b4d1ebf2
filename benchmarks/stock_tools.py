"""Do the output directories load, and score the same, where foldstack is not installed?

Makes an environment that has every package of this one except foldstack, and in it runs the stock
`lm_eval` command line on each model directory in the store. `trust_remote_code` is given to
directories of the portable grade alone. Prints the score beside the one that the pipeline recorded;
exit status 1 when one differs.

    python benchmarks/stock_tools.py [--home runs] [--task stdlib_continuation] [--json]
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from foldstack.compression.reference import BENCHMARKS_FOLDER
from foldstack.tasks.environment.home import foldstack_home
from foldstack.tasks.store.manifest import MANIFEST, Manifest, read_manifest

MODEL_STAGES = ("compress_model", "recover_model")
METRIC = "acc"


@dataclass(frozen=True)
class Outcome:
    """One directory under the stock command line."""

    label: str
    grade: str
    recorded: float
    stock: float

    @property
    def agrees(self) -> bool:
        return abs(self.recorded - self.stock) < 1e-9


def environment_without_foldstack(folder: Path) -> Path:
    """The Python of a new environment that sees this one's packages, but not foldstack."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    library = next((folder / "lib").glob("python*")) / "site-packages"
    # A .pth line adds the folder without reading the .pth files in it: no editable installs.
    (library / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    found = subprocess.run(
        [python, "-I", "-c", "import foldstack.compression"], capture_output=True, check=False
    )
    if found.returncode == 0:
        raise SystemExit("foldstack is installed as a wheel here: the test would prove nothing")
    return python


def evaluated_models(
    artifacts: Path, task: str
) -> Iterator[tuple[Path, Manifest, float, int | None]]:
    """Every model directory with a recorded score on `task`, and how many items it is from."""
    models = {}
    for stage in MODEL_STAGES:
        for file in artifacts.glob(f"{stage}/*/{MANIFEST}"):
            models[f"{stage}/{file.parent.name}"] = file.parent
    for file in sorted(artifacts.glob(f"evaluate_model/*/{MANIFEST}")):
        evaluation = read_manifest(file.parent)
        score = evaluation.facts.get(f"{task}/{METRIC}")
        limit = evaluation.ingredients["parameters"]["benchmarks"].get(task)
        for key in evaluation.inputs:
            if key in models and isinstance(score, float):
                yield models[key] / "model", read_manifest(models[key]), score, limit


def stock_score(
    python: Path, model: Path, is_portable: bool, task: str, limit: int | None
) -> float:
    """Accuracy on the first `limit` items of `task` from the stock command line."""
    trust = ",trust_remote_code=True" if is_portable else ""
    with tempfile.TemporaryDirectory() as work:
        command = [
            python, "-m", "lm_eval", "--model", "hf",
            "--model_args", f"pretrained={model.resolve()}{trust}",
            "--include_path", BENCHMARKS_FOLDER, "--tasks", task,
            "--device", "cpu", "--batch_size", "8", "--output_path", work,
            *(["--limit", str(limit)] if limit else []),
        ]  # fmt: skip
        settings = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{work}/modules"}
        finished = subprocess.run(
            command,
            cwd=work,
            env=os.environ | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        reports = list(Path(work).rglob("results_*.json"))
        if finished.returncode or not reports:
            raise SystemExit(f"lm_eval failed on {model}:\n{finished.stderr[-2000:]}")
        results = json.loads(reports[0].read_text())["results"][task]
    return float(results[f"{METRIC},none"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=foldstack_home())
    parser.add_argument("--task", default="stdlib_continuation")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        python = environment_without_foldstack(Path(folder) / "venv")
        artifacts = arguments.home / "store" / "artifacts"
        for model, manifest, recorded, limit in evaluated_models(artifacts, arguments.task):
            grade = str(manifest.facts["grade"])
            score = stock_score(python, model, grade == "portable", arguments.task, limit)
            outcomes.append(Outcome(manifest.label, grade, recorded, score))
            if not arguments.json:
                verdict = "same" if outcomes[-1].agrees else "DIFFERS"
                print(f"{manifest.label:40} {grade:9} {recorded:.4f} {score:.4f} {verdict}")
    if arguments.json:
        agreeing = sum(outcome.agrees for outcome in outcomes)
        figures = {"directories": len(outcomes), "directories_with_equal_score": agreeing}
        print(json.dumps(figures | {"outcomes": [asdict(outcome) for outcome in outcomes]}))
    sys.exit(not outcomes or not all(outcome.agrees for outcome in outcomes))


if __name__ == "__main__":
    main()
