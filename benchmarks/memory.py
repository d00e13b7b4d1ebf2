"""Peak memory of compressing a model block by block, in one go and killed on the way.

A checkpoint of TinyLlama's shape (1.1 billion random parameters in bfloat16) is made on the spot in
a process of its own. Every stage then runs in a fresh process, as a sweep's stages do, whose peak
resident memory the kernel tells when it ends; what the check in yet another process takes, a stock
load of the result, is told apart. Each method compresses the model twice: in one go, and killed
(SIGKILL) three times, a quarter of the blocks apart. Both must write the same bytes.

With --limit every stage, with the processes that it starts, runs in a control group that may have
that many MiB, pages of files included, so that a model with more weights than that goes through
only if it is streamed; it is then compressed once, and not killed. It takes the right to make a
memory group below this process's, which root has in most containers.

    python benchmarks/memory.py [--json] [--blocks 22] [--methods modegpt svd_llm] [--work DIR]
    python benchmarks/memory.py --width 1024 --blocks 48 --windows 2 --methods modegpt --limit 1024

It takes most of an hour on one core. With --work, what was measured is kept in DIR, and the command
that was interrupted goes on with the next process when it is given again.
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
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from foldstack.compression.checkpoints.tokenizer_files import copy_tokenizer
from foldstack.compression.evaluation.memory_probe import peak_resident_bytes
from foldstack.compression.methods import METHODS
from foldstack.compression.reference import MODEL_FOLDER
from foldstack.compression.storage.digest import digest_folder
from foldstack.compression.text.calibration import Windows
from foldstack.tasks.compress_model import CompressModel
from foldstack.tasks.environment import cgroup
from foldstack.tasks.environment.execution import Execution
from foldstack.tasks.gather_statistics import GatherStatistics
from foldstack.tasks.rank_blocks import RankBlocks
from foldstack.tasks.stage import ModelRef, Stage, run_stage
from foldstack.tasks.store.artifacts import Artifact, ArtifactStore

WINDOW_TOKENS = 512
SPARSITY = 0.25
KILLS = 3
SECONDS_BETWEEN_LOOKS = 0.05
MIB = 1024


def make_checkpoint(folder: Path, blocks: int, width: int) -> None:
    """Random weights in the shape of TinyLlama 1.1B, or in its proportions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 512,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")
    copy_tokenizer(MODEL_FOLDER, folder)


def random_windows(store: ArtifactStore, count: int) -> Artifact:
    """Calibration windows of random tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (count, WINDOW_TOKENS)
    tokens = torch.randint(32_000, shape, generator=generator, dtype=torch.int32)
    windows = Windows(tokens, [[] for _ in tokens], count, tokens.numel(), 1)

    def write(folder: Path, _work: Path) -> dict[str, str]:
        windows.save(folder)
        return {}

    return store.publish("collect_calibration", "0" * 16, write)


def stages(work: Path, methods: list[str]) -> dict[str, Stage]:
    """By name, in order; needs the checkpoint, and how many windows were asked for."""
    store, execution = ArtifactStore(work / "store"), Execution(device="cpu")
    model = ModelRef.of(str(work / "model"))
    calibration = random_windows(store, int((work / "windows").read_text()))
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


def group_with(limit: int) -> Path:
    """A new control group below this process's, whose processes may have so many bytes together."""
    files = (
        ("memory.max", "memory.swap.max"),
        ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    )
    for parent in cgroup.groups("memory"):
        group = parent / f"foldstack-{os.getpid()}"
        with suppress(OSError):
            group.mkdir(exist_ok=True)
            for memory, swap in files:
                if (group / memory).exists():
                    (group / memory).write_text(str(limit))
                    with suppress(OSError):  # a system without swap
                        (group / swap).write_text("0" if swap == "memory.swap.max" else str(limit))
                    return group
            group.rmdir()
    raise SystemExit("--limit takes a control group for memory, and none can be made here")


class Fresh:
    """A stage in a process of its own."""

    def __init__(self, work: Path, name: str) -> None:
        self.started = time.monotonic()
        command = [sys.executable, __file__, "--stage", name, "--work", str(work)]
        command += ["--methods", name]
        self.group = None
        if (work / "limit").is_file():
            self.group = group_with(int((work / "limit").read_text()) * MIB**2)
            # Before Python begins: memory belongs to the group in which it was first touched.
            joining = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
            command = ["sh", "-c", joining, str(self.group), *command]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def finish(self) -> dict[str, float]:
        """Seconds, and peak memory in MiB of the process and of those that it started."""
        told, _ = self.process.communicate()
        if self.group is not None:
            self.group.rmdir()
        if self.process.returncode != 0:
            raise SystemExit(f"a stage ended with {self.process.returncode}")
        return {**json.loads(told), "seconds": time.monotonic() - self.started}

    def kill_after(self, left: Path, parts: int) -> None:
        """SIGKILL once so many parts are done and the next one is on its way."""
        while len(list(left.glob("*/spool/*.safetensors"))) < parts:
            if self.process.poll() is not None:
                raise SystemExit("the stage was done before it could be killed")
            time.sleep(SECONDS_BETWEEN_LOOKS)
        time.sleep(1)
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


def left_behind(store: ArtifactStore, stage: Stage) -> Path:
    """Where killed runs of a stage leave what the next one goes on from."""
    return store.root / "work" / stage.stage / stage.fingerprint


def compress_in_one_go(work: Path, name: str) -> dict[str, float]:
    """One method; its result is kept as a digest only."""
    stage, store = stages(work, [name])[name], ArtifactStore(work / "store")
    shutil.rmtree(left_behind(store, stage), ignore_errors=True)
    figures = Fresh(work, name).finish()
    folder = stage.artifact(store).folder
    (work / f"{name}.digest").write_text(digest_folder(folder / "model", ("*",)))
    shutil.rmtree(folder)
    return {f"{name}_{what}": value for what, value in figures.items()}


def compress_killed(work: Path, name: str, blocks: int) -> dict[str, float]:
    """The same, killed on the way; needs the digest of the first result."""
    stage, store = stages(work, [name])[name], ArtifactStore(work / "store")
    left = left_behind(store, stage)
    shutil.rmtree(left, ignore_errors=True)
    for number in range(1, KILLS + 1):
        Fresh(work, name).kill_after(left, number * blocks // (KILLS + 1))
    last = Fresh(work, name).finish()
    out = stage.artifact(store).folder
    is_same = digest_folder(out / "model", ("*",)) == (work / f"{name}.digest").read_text()
    shutil.rmtree(out)
    return {
        f"{name}_seconds_after_last_kill": last["seconds"],
        f"{name}_kills": KILLS,
        f"{name}_same_bytes_after_kills": float(is_same),
    }


def run_here(work: Path, name: str) -> None:
    """The stage in this process; prints its peak memory."""
    run_stage(stages(work, [name] if name in METHODS else [])[name], ArtifactStore(work / "store"))
    # Of children Linux tells what they began with, a copy of this process, or more.
    others = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / MIB
    print(json.dumps({"peak_mib": peak_resident_bytes() / MIB**2, "reload_peak_mib": others}))


def make_here(work: Path, blocks: int, width: int) -> dict[str, float]:
    """The checkpoint, in a process of its own."""
    making = [sys.executable, __file__, "--make", "--work", work]
    making += ["--blocks", str(blocks), "--width", str(width)]
    subprocess.run(making, check=True)
    weights = sum(file.stat().st_size for file in (work / "model").glob("*.safetensors"))
    return {"blocks": float(blocks), "weights_mib": weights / MIB**2}


def run_fresh(work: Path, name: str) -> dict[str, float]:
    """A stage that every method needs."""
    found = Fresh(work, name).finish()
    return {f"{name}_{what}": found[what] for what in ("peak_mib", "seconds")}


def measure(work: Path, blocks: int, width: int, methods: list[str]) -> dict[str, float]:
    """All figures, memory in MiB; those that are in `work` already are not measured again."""
    pieces: dict[str, Callable[[], dict[str, float]]] = {
        "make": lambda: make_here(work, blocks, width),
        "gather": lambda: run_fresh(work, "gather"),
        "rank": lambda: run_fresh(work, "rank"),
    }
    for name in methods:
        pieces[name] = partial(compress_in_one_go, work, name)
        if not (work / "limit").is_file():
            pieces[f"{name}-killed"] = partial(compress_killed, work, name, blocks)
    for piece, take in pieces.items():
        file = work / f"{piece}.figures.json"
        if not file.is_file():
            file.write_text(json.dumps(take()))
    return {
        what: value
        for piece in pieces
        for what, value in json.loads((work / f"{piece}.figures.json").read_text()).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--limit", type=int, help="MiB that a stage may have")
    parser.add_argument("--methods", nargs="+", default=["modegpt", "svd_llm"])
    parser.add_argument("--work", type=Path, help="kept; on a disk with 20 GB; default: temporary")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_checkpoint(arguments.work / "model", arguments.blocks, arguments.width)
    elif arguments.stage:
        run_here(arguments.work, arguments.stage)
    else:
        with ExitStack() as stack:
            if arguments.work is None:
                temporary = tempfile.TemporaryDirectory(prefix="foldstack-memory-")
                arguments.work = Path(stack.enter_context(temporary))
            arguments.work.mkdir(parents=True, exist_ok=True)
            (arguments.work / "windows").write_text(str(arguments.windows))
            if arguments.limit:
                (arguments.work / "limit").write_text(str(arguments.limit))
            figures = measure(arguments.work, arguments.blocks, arguments.width, arguments.methods)
        if arguments.json:
            print(json.dumps(figures, indent=1))
        else:
            for name, value in figures.items():
                print(f"{name:<36} {value:14.1f}")


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
