"""Peak memory of compressing a model block by block, in one go and killed on the way.

A checkpoint of TinyLlama's shape (1.1 billion random parameters in bfloat16) is made on the spot in
a process of its own. Every stage then runs in a fresh process, as a sweep's stages do, whose peak
resident memory the kernel tells when it ends; what the check in yet another process takes, a stock
load of the result, is told apart. Each method compresses the model twice: in one go, and killed
(SIGKILL) three times, a quarter of the blocks apart. Both must write the same bytes.

    python benchmarks/memory.py [--json] [--blocks 22] [--methods modegpt svd_llm]
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from foldstack.compression.calibration import Windows
from foldstack.compression.digest import digest_folder
from foldstack.compression.methods import METHODS
from foldstack.tasks.artifacts import Artifact, ArtifactStore
from foldstack.tasks.compress_model import CompressModel
from foldstack.tasks.execution import Execution
from foldstack.tasks.gather_statistics import GatherStatistics
from foldstack.tasks.rank_blocks import RankBlocks
from foldstack.tasks.stage import ModelRef, Stage, run_stage

NUM_WINDOWS, WINDOW_TOKENS = 16, 512
SPARSITY = 0.25
KILLS = 3
SECONDS_BETWEEN_LOOKS = 0.05
MIB = 1024


def make_checkpoint(folder: Path, blocks: int) -> None:
    """Random weights in the shape of TinyLlama 1.1B."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")


def random_windows(store: ArtifactStore) -> Artifact:
    """Calibration windows of random tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (NUM_WINDOWS, WINDOW_TOKENS)
    tokens = torch.randint(32_000, shape, generator=generator, dtype=torch.int32)
    windows = Windows(tokens, [[] for _ in tokens], NUM_WINDOWS, tokens.numel(), 1)

    def write(folder: Path) -> dict[str, str]:
        windows.save(folder)
        return {}

    return store.publish("collect_calibration", "0" * 16, write)


def stages(work: Path, methods: list[str]) -> dict[str, Stage]:
    """By name, in order; needs the checkpoint and the windows."""
    store, execution = ArtifactStore(work / "store"), Execution(device="cpu")
    model = ModelRef.of(str(work / "model"))
    calibration = random_windows(store)
    gathering = GatherStatistics(
        model=model,
        calibration=calibration,
        kinds=("gram", "similarity"),
        execution=execution,
    )
    ranking = RankBlocks(statistics=gathering.artifact(store))
    compressing = {
        name: CompressModel(
            model=model,
            calibration=calibration,
            statistics=gathering.artifact(store),
            ranking=ranking.artifact(store),
            method=METHODS[name](sparsity=SPARSITY),
            execution=execution,
        )
        for name in methods
    }
    return {"gather": gathering, "rank": ranking, **compressing}


class Fresh:
    """A stage in a process of its own."""

    def __init__(self, work: Path, name: str) -> None:
        self.started = time.monotonic()
        command = [sys.executable, __file__, "--stage", name, "--work", work, "--methods", name]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def finish(self) -> dict[str, float]:
        """Seconds, and peak memory in MiB of the process and of those that it started."""
        told, _ = self.process.communicate()
        if self.process.returncode != 0:
            raise SystemExit(f"a stage ended with {self.process.returncode}")
        return {**json.loads(told), "seconds": time.monotonic() - self.started}

    def kill_after(self, spool: Path, parts: int) -> None:
        """SIGKILL once so many parts are done and the next one is on its way."""
        while len(list(spool.glob("*.safetensors"))) < parts:
            if self.process.poll() is not None:
                raise SystemExit("the stage was done before it could be killed")
            time.sleep(SECONDS_BETWEEN_LOOKS)
        time.sleep(1)
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


def compress_twice(work: Path, name: str, blocks: int) -> dict[str, float]:
    """In one go and killed on the way."""
    stage, store = stages(work, [name])[name], ArtifactStore(work / "store")
    artifact = stage.artifact(store)
    figures = Fresh(work, name).finish()
    digest = digest_folder(artifact.folder / "model", ("*",))
    shutil.rmtree(artifact.folder)
    spool = store.work_folder(stage.stage, stage.fingerprint) / "spool"
    for number in range(1, KILLS + 1):
        Fresh(work, name).kill_after(spool, number * blocks // (KILLS + 1))
    last = Fresh(work, name).finish()
    is_same = digest_folder(artifact.folder / "model", ("*",)) == digest
    return {
        **{f"{name}_{what}": value for what, value in figures.items()},
        f"{name}_seconds_after_last_kill": last["seconds"],
        f"{name}_kills": KILLS,
        f"{name}_same_bytes_after_kills": float(is_same),
    }


def run_here(work: Path, name: str) -> None:
    """The stage in this process; prints its peak memory."""
    run_stage(stages(work, [name] if name in METHODS else [])[name], ArtifactStore(work / "store"))
    own, others = (
        resource.getrusage(who).ru_maxrss / MIB
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(json.dumps({"peak_mib": own, "reload_peak_mib": others}))


def measure(work: Path, blocks: int, methods: list[str]) -> dict[str, float]:
    """All figures; memory in MiB."""
    making = [sys.executable, __file__, "--make", "--work", work, "--blocks", str(blocks)]
    subprocess.run(making, check=True)
    weights = sum(file.stat().st_size for file in (work / "model").glob("*.safetensors"))
    figures = {"blocks": float(blocks), "weights_mib": weights / MIB**2}
    for name in ("gather", "rank"):
        found = Fresh(work, name).finish()
        figures |= {f"{name}_{what}": found[what] for what in ("peak_mib", "seconds")}
    for name in methods:
        figures |= compress_twice(work, name, blocks)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--methods", nargs="+", default=["modegpt", "svd_llm"])
    parser.add_argument("--work", type=Path, help="folder on a disk with 20 GB; default: temporary")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_checkpoint(arguments.work / "model", arguments.blocks)
    elif arguments.stage:
        run_here(arguments.work, arguments.stage)
    else:
        with tempfile.TemporaryDirectory(dir=arguments.work, prefix="foldstack-memory-") as work:
            figures = measure(Path(work), arguments.blocks, arguments.methods)
        if arguments.json:
            print(json.dumps(figures, indent=1))
        else:
            for name, value in figures.items():
                print(f"{name:<36} {value:14.1f}")


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
