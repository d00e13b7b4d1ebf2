"""Peak memory of a model: load it and run it once in a process of its own.

Run as `python -m foldstack.compression.evaluation.memory_probe` it imports everything once and then
reads one request as JSON from each line of standard input. It forks for each model, so that each
starts from the same memory. Whoever asks keeps it for the next time: its imports take longer than
the answers.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foldstack.compression.standby import Standby

STATUS = Path("/proc/self/status")
PROBE = Standby(("-W", "ignore", "-m", "foldstack.compression.evaluation.memory_probe"))


def peak_memory(
    folders: Sequence[Path],
    spec: Mapping[str, Any],
    vocabulary: int,
    device: str,
    dtype: Any = None,
) -> dict[Path, int]:
    """Bytes that loading each model and running its largest batch adds, at the worst moment.

    On the CPU that is resident memory of the process (of weights that are mapped from a file, the
    pages that were read), on an accelerator what torch takes of it.

    Raises:
        RuntimeError: a model could not be loaded and run in a process of its own.
    """
    import torch

    request = {
        "folders": [str(folder.resolve()) for folder in folders],
        "prompt_tokens": spec["prompt_tokens"],
        "new_tokens": spec["new_tokens"],
        "batch_size": max(spec["batch_sizes"]),
        "seed": spec["seed"],
        "vocabulary": vocabulary,
        "device": device,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "temporary": tempfile.gettempdir(),  # the one that it was started with may be gone
    }
    try:
        peaks = PROBE.ask(request)
    except RuntimeError as error:
        raise RuntimeError(f"memory cannot be measured: {error}") from error
    return dict(zip(folders, peaks, strict=True))


def answer(request: Mapping[str, Any]) -> list[int]:
    """The peak of each model of a request, each measured in a fork of this process."""
    from foldstack.compression.checkpoints.checkpoint import load_config
    from foldstack.compression.structure.surgery import build_on_meta

    peaks = []
    for folder in map(Path, request["folders"]):
        build_on_meta(load_config(folder))  # imports the model's code: not its memory
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, str(_peak_of(folder, request)).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as result:
            peak = result.read()
        _, status = os.waitpid(child, 0)
        if status != 0:
            sys.exit(f"{folder} could not be run, exit status {os.waitstatus_to_exitcode(status)}")
        peaks.append(int(peak))
    return peaks


def _peak_of(folder: Path, request: Mapping[str, Any]) -> int:
    import torch

    torch.set_num_threads(request["threads"])
    device, dtype = request["device"], request["dtype"] and getattr(torch, request["dtype"])
    tempfile.tempdir = request["temporary"]
    with tempfile.TemporaryDirectory() as toy:
        _save_toy(Path(toy))
        # Code of libraries is paged in when it first runs: that is not the model's memory.
        _load_and_run(Path(toy), {**request, "vocabulary": 2}, device, dtype)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _load_and_run(folder, request, device, dtype)
        return int(torch.cuda.max_memory_allocated(device) - before)
    before = resident_bytes()
    _load_and_run(folder, request, device, dtype)
    return peak_resident_bytes() - before


def _load_and_run(folder: Path, request: Mapping[str, Any], device: str, dtype: Any) -> None:
    from foldstack.compression.checkpoints.checkpoint import load_model
    from foldstack.compression.evaluation.generation import generate_greedily, make_prompt

    model = load_model(folder, dtype=dtype, device=device)
    prompt = make_prompt(
        request["prompt_tokens"], request["batch_size"], request["vocabulary"], request["seed"]
    )
    generate_greedily(model, prompt.to(device), request["new_tokens"])


def _save_toy(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    toy = LlamaConfig(
        vocab_size=2,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(toy).save_pretrained(folder)


def resident_bytes() -> int:
    """Memory that this process has now."""
    return _status("VmRSS") if STATUS.exists() else peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Most memory that this process ever had."""
    if STATUS.exists():
        # Not ru_maxrss: Linux carries that over from the process that started this one.
        return _status("VmHWM")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}")


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()
