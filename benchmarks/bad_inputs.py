"""What the command line says to mistakes: each is tried for real, in a process of its own.

That is a fork of this one, which has imported what they need and done nothing else.

A mistake must end with exit code 2 and one sentence, before anything is computed. What is odd and
no mistake (a value head beside the weights, text from Windows) must be planned without a word of
refusal. The models are copies of the reference model that were changed in one way each.

    python benchmarks/bad_inputs.py [--json]
"""

import argparse
import gzip
import http.server
import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import foldstack.flows.planning.forecast
import foldstack.flows.planning.preflight  # noqa: F401 (what most commands import, once for all)
from foldstack.compression.reference import MODEL_FOLDER
from foldstack.flows.cli import app

FORK = multiprocessing.get_context("fork")
SECONDS_AT_MOST = 300.0
NO_SERVER = "http://127.0.0.1:9/api"
MISSING, MISSHAPEN = "a tensor is missing", "a tensor of another shape"
NOT_FINITE = "weights that are not finite"
BASE = """\
methods: [shortgpt]
sparsities: [0.15]
calibration: {num_windows: 4, window_tokens: 32}
evaluation: {perplexity: {protocol: {window_tokens: 64, max_tokens: 512}}}
speed: {enabled: false}
"""


@dataclass(frozen=True)
class Case:
    """One mistake, and the command that makes it."""

    mistake: str
    overrides: tuple[str, ...] = ()
    config: str | None = BASE
    """Content of the config file; None = there is no such file."""
    is_seen_by_a_stage: bool = False
    """Only the first stage that reads the data can know: a Prefect server is started before."""
    is_odd: bool = False
    """No mistake: `plan` is to go through."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What the command finds in its environment; by PREFECT_API_URL it asks a server."""
    encoding: str = "utf-8"
    """Of the terminal."""


@dataclass(frozen=True)
class Outcome:
    """What the command did."""

    mistake: str
    exit_code: int
    said: str
    seconds: float
    models_made: int
    """Model folders in the store afterwards."""
    is_odd: bool = False

    @property
    def is_right(self) -> bool:
        """Exit code 2 and one line that starts with the program's name; 0 for what is only odd."""
        if self.is_odd:
            return self.exit_code == 0 and "Traceback" not in self.said
        lines = self.said.strip().splitlines()
        is_sentence = bool(lines) and lines[-1].startswith("foldstack: ")
        return (
            self.exit_code == 2
            and is_sentence
            and f"{NO_SERVER} (PREFECT_API_URL)" not in self.said
            and not self.models_made
        )


def damaged(folder: Path, name: str, damage: Callable[[Path], Any]) -> str:
    """A copy of the reference model with one thing wrong, as an override."""
    copy = folder / name
    shutil.copytree(MODEL_FOLDER, copy)
    damage(copy)
    return f"model.name={copy}"


def with_config(**changes: Any) -> Callable[[Path], Any]:
    """The damage of other values in config.json."""

    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    """The damage of other tensors in the weights' file."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def truncate(folder: Path) -> None:
    """Half of the weights' file."""
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def pickle_weights(folder: Path) -> None:
    """Weights as a pickle and nothing else."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def gguf_of_nothing(folder: Path) -> None:
    """Weights as a GGUF file that holds nothing."""
    (folder / "model.safetensors").unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")


def remove(*names: str) -> Callable[[Path], Any]:
    """The damage of missing files."""
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name: str, content: bytes | str) -> Callable[[Path], Any]:
    """The damage of a file with this content."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def another_head(folder: Path) -> None:
    """A head that is not the embedding, where the config says that it is."""
    with_config(tie_word_embeddings=True)(folder)
    shape = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape
    with_tensors(lambda tensors: tensors.update({"lm_head.weight": torch.randn(shape)}))(folder)


def one_token_more(folder: Path) -> None:
    """A special token that the model has no row for, and no text holds."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)


def only_tokenizer(name: str, content: bytes) -> Callable[[Path], Any]:
    """The damage of a tokenizer that is this file and nothing else."""

    def damage(folder: Path) -> None:
        remove("tokenizer.json", "tokenizer_config.json")(folder)
        write(name, content)(folder)

    return damage


def words(folder: Path) -> None:
    """A tokenizer of vocab.txt and no tokenizer.json, as Chinese GPT-2s have it."""
    remove("tokenizer.json", "tokenizer_config.json")(folder)
    letters = [chr(0x61 + i) for i in range(26)]
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    known += [f"[unused{i}]" for i in range(1900)]
    (folder / "vocab.txt").write_text("\n".join(known) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')


def in_utf16(folder: Path) -> None:
    """config.json as PowerShell writes it."""
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_bytes(text.encode("utf-16"))


def odd_models(folder: Path) -> list[Case]:
    """Models that are unlike most, and are to be compressed all the same."""
    one = torch.ones(1)
    oddities: dict[str, Callable[[Path], Any]] = {
        "a head of its own that the config does not know": another_head,
        "a value head beside the weights": with_tensors(
            lambda tensors: tensors.update({"v_head.summary.weight": one})
        ),
        "layers that guess tokens ahead": with_tensors(
            lambda tensors: tensors.update({"mtp.norm.weight": one})
        ),
        "a config that names another precision": with_config(dtype="float16"),
        "a config that asks for flash attention": with_config(
            attn_implementation="flash_attention_2"
        ),
        "a config that asks for attentions": with_config(output_attentions=True),
        "stop strings in generation_config.json": write(
            "generation_config.json", '{"stop_strings": ["."], "num_return_sequences": 2}'
        ),
        "a token more than rows": one_token_more,
        "a tokenizer of vocab.txt": words,
    }
    return [
        Case(what, (damaged(folder, f"odd-{number}", change),), is_odd=True)
        for number, (what, change) in enumerate(oddities.items())
    ]


def odd_texts(folder: Path) -> list[Case]:
    """Text files as people have them, read without a word of refusal."""
    text = "\n\n".join(f"Block {n} reads what block {n - 1} wrote. " * 8 for n in range(80))
    record = json.dumps({"text": text})
    files: dict[str, bytes] = {
        "windows.txt": text.replace("\n", "\r\n").encode(),
        "mark.jsonl": b"\xef\xbb\xbf" + record.encode(),
        "null.jsonl": f'{{"text": null}}\n{record}\n'.encode(),
        "half.jsonl": f'{{"text": "a thumb \\ud83d"}}\n{record}\n'.encode(),
        "packed.jsonl.gz": gzip.compress(record.encode()),
        "table.csv": f'text\n"{text}"\n'.encode(),
        "UPPER.TXT": text.encode(),
        "notes.md": text.encode(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    table = pyarrow.table({"text": [text]})
    pyarrow.parquet.write_table(table, folder / "table.parquet")
    named = {name: folder / name for name in (*files, "table.parquet")}
    named["the home folder"] = Path("~") / "windows.txt"
    return [
        Case(f"a text in {name}", (f"calibration.source.corpus={path}",), is_odd=True)
        for name, path in named.items()
    ]


class OutsideOfApi(http.server.BaseHTTPRequestHandler):
    """Answers as a Prefect server does at the address of its page."""

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def environments(folder: Path) -> list[Case]:
    """What other programs leave in the environment, and what they do not care about."""
    page = http.server.HTTPServer(("127.0.0.1", 0), OutsideOfApi)
    threading.Thread(target=page.serve_forever, daemon=True).start()
    profiles = {
        "a profile of Prefect with a dead address": (
            f'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "{NO_SERVER}"\n'
        ),
        "a damaged profile of Prefect": "[profiles",
    }
    for number, text in enumerate(profiles.values()):
        (folder / f"prefect-{number}").mkdir()
        (folder / f"prefect-{number}" / "profiles.toml").write_text(text)
    job = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777"}
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    return [
        Case(
            "an address without /api",
            environment={"PREFECT_API_URL": f"http://127.0.0.1:{page.server_port}"},
        ),
        *(
            Case(
                what,
                environment={
                    "PREFECT_API_URL": "",
                    "PREFECT_HOME": str(folder / f"prefect-{number}"),
                },
            )
            for number, what in enumerate(profiles)
        ),
        Case("a process of another job", is_odd=True, environment=job),
        Case("a proxy", is_odd=True, environment=proxies),
        Case("a terminal that shows ASCII", is_odd=True, encoding="ascii"),
    ]


def damaged_models(folder: Path) -> list[Case]:
    """Models that cannot be compressed."""
    one = torch.ones(1)
    first = "model.layers.0.mlp.up_proj.weight"
    damages: dict[str, Callable[[Path], Any]] = {
        "a mixture of experts": with_config(model_type="mixtral"),
        "an encoder-decoder": with_config(model_type="t5"),
        "an encoder": with_config(model_type="bert"),
        "an unheard-of architecture": with_config(model_type="nonesuch"),
        "no weights": remove("model.safetensors"),
        "half of the weights' file": truncate,
        MISSING: with_tensors(lambda tensors: tensors.pop(first)),
        MISSHAPEN: with_tensors(
            lambda tensors: tensors.update({first: tensors[first][:-1].clone()})
        ),
        "weights that are not finite": with_tensors(
            lambda tensors: tensors[first].fill_(torch.nan)
        ),
        "weights as a pickle": pickle_weights,
        "config.json is no JSON": lambda copy: (copy / "config.json").write_text("{"),
        "no config.json": remove("config.json"),
        "weights that cannot be dequantised": with_config(
            quantization_config={"quant_method": "gptq", "bits": 4}
        ),
        "a GGUF file that is none": gguf_of_nothing,
        "no tokenizer": remove("tokenizer.json", "tokenizer_config.json"),
        "a tokenizer with more tokens than the model": with_config(vocab_size=100),
        "a tokenizer without a vocabulary": write(
            "tokenizer.json",
            '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
        ),
        "a damaged tokenizer": write("tokenizer.json", "{"),
        "a tokenizer that needs mistral_common": only_tokenizer("tekken.json", b"{}"),
        "a tokenizer that needs sentencepiece": only_tokenizer("tokenizer.model", b"\n\x0e"),
        "layer types of another depth": with_config(layer_types=["full_attention"]),
        "a whole number for a float": with_config(initializer_range=1),
        "null for a boolean": with_config(tie_word_embeddings=None),
        "a padding id behind the vocabulary": with_config(pad_token_id=1 << 20),
        "a rope type that nobody knows": with_config(rope_parameters={"rope_type": "newer"}),
        "text for a size": with_config(hidden_size="wide"),
        "config.json is a list": write("config.json", "[1]"),
        "config.json with a byte order mark": write("config.json", b"\xef\xbb\xbf{}"),
        "config.json in UTF-16": in_utf16,
        "config.json of 17 MB": write("config.json", b" " * (17 << 20)),
        "a damaged generation_config.json": write("generation_config.json", "{"),
        "an adapter beside the weights": write("adapter_config.json", '{"peft_type": "LORA"}'),
        "a block too many": with_tensors(
            lambda tensors: tensors.update({"model.layers.99.mlp.up_proj.weight": one})
        ),
        "a bias that the config does not know": with_tensors(
            lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": one})
        ),
        "weights twice": write(
            "model.safetensors.index.json", '{"weight_map": {"x": "model-1.safetensors"}}'
        ),
    }
    return [
        Case(
            mistake,
            (damaged(folder, f"model-{number}", damage),),
            is_seen_by_a_stage=mistake == NOT_FINITE,
        )
        for number, (mistake, damage) in enumerate(damages.items())
    ]


def cases(folder: Path) -> list[Case]:
    """Every mistake."""
    empty, short = folder / "empty.txt", folder / "short.txt"
    empty.write_text("\n")
    short.write_text("Once upon a time.")
    file = folder / "a-file"
    file.write_text("")
    pdf, table, record = folder / "a.pdf", folder / "a.parquet", folder / "a.jsonl"
    pdf.write_bytes(b"%PDF-1.7")
    table.write_bytes(b"PAR1")
    record.write_text("[1]\n")
    return [
        Case("no such config", config=None),
        Case("broken YAML", config="methods: [shortgpt\n"),
        Case("a key twice", config=BASE + "sparsities: [0.3]\n"),
        Case("an unknown key", ("calibraton.num_windows=4",)),
        Case("an unknown key further down", ("evaluation.perplexity.protocl={}",)),
        Case("an override without a value", ("sparsities",)),
        Case("an unknown method", ("methods=[shortgtp]",)),
        Case("an unknown setting of a method", ("methods=[{name: svd_llm, updat: none}]",)),
        Case("an unknown benchmark", ("evaluation.benchmarks=[stdlib_continuatoin]",)),
        Case("a sparsity of 0", ("sparsities=[0]",)),
        Case("a sparsity above 1", ("sparsities=[30]",)),
        Case("a sparsity out of the method's reach", ("sparsities=[0.97]",)),
        Case("no method", ("methods=[]",)),
        Case("windows longer than the context", ("calibration.window_tokens=100000",)),
        Case("a device that is not there", ("model.device=cuda:9",)),
        Case("no such model folder", ("model.name=./no-such-folder",)),
        Case("a hub that is not reached", ("model.name=nobody/no-such-model",)),
        Case("no such text", (f"calibration.source.corpus={folder / 'none.txt'}",)),
        Case("an empty text", (f"calibration.source.corpus={empty}",)),
        Case(
            "a text too short for a window",
            (f"calibration.source.corpus={short}",),
            is_seen_by_a_stage=True,
        ),
        Case("results cannot be written", (f"output.home={file / 'home'}",)),
        Case("a text that is no text", (f"calibration.source.corpus={pdf}",)),
        Case("a damaged table", (f"calibration.source.corpus={table}",)),
        Case("a record that is no object", (f"calibration.source.corpus={record}",)),
        *damaged_models(folder),
        *environments(folder),
        *odd_models(folder),
        *odd_texts(folder),
    ]


def attempt(case: Case, folder: Path) -> Outcome:
    """Run the command of a case; most never get so far as to ask a server, and have none."""
    config, home = folder / "config.yaml", folder / "home"
    config.unlink(missing_ok=True)
    if case.config is not None:
        config.write_text(case.config)
    shutil.rmtree(home, ignore_errors=True)
    server = {} if case.is_seen_by_a_stage else {"PREFECT_API_URL": NO_SERVER}
    environment = server | {"FOLDSTACK_HOME": str(home), "HOME": str(folder)} | case.environment
    command = ["plan" if case.is_odd else "run", str(config), *case.overrides]
    said = folder / "said.txt"
    started = time.perf_counter()
    process = FORK.Process(target=run_here, args=(command, environment, said, case.encoding))
    process.start()
    process.join(SECONDS_AT_MOST)
    if process.is_alive():
        process.kill()
        process.join()
    return Outcome(
        mistake=case.mistake,
        exit_code=-1 if process.exitcode is None else process.exitcode,
        said=said.read_text(errors="replace").strip(),
        seconds=round(time.perf_counter() - started, 1),
        models_made=len(list((home / "store" / "artifacts" / "compress_model").glob("*"))),
        is_odd=case.is_odd,
    )


def run_here(command: list[str], environment: dict[str, str], said: Path, encoding: str) -> None:
    """The command in this process; what it tells the person goes to a file."""
    with said.open("w") as told, open(os.devnull, "w") as nowhere:
        os.dup2(told.fileno(), 2)
        os.dup2(nowhere.fileno(), 1)
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding=encoding)
    os.environ.update({name: value for name, value in environment.items() if value})
    for name in (name for name, value in environment.items() if not value):
        os.environ.pop(name, None)
    sys.argv = ["foldstack", *command]
    app.main()


def main() -> None:
    """Print what was said to every mistake; exit status 1 when one was not refused so."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--skip", type=int, default=0, help="so many cases, tried before")
    arguments = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for case in cases(folder)[arguments.skip :]:
            outcome = attempt(case, folder)
            outcomes.append(outcome)
            if not arguments.json:
                wrong = "REFUSED" if outcome.is_odd else "NOT REFUSED IN A SENTENCE"
                mark = "" if outcome.is_right else f"  <-- {wrong}"
                said = outcome.said.replace(str(folder), "...")
                print(
                    f"{outcome.mistake}: exit code {outcome.exit_code}{mark}\n    {said}",
                    flush=True,
                )
    mistakes = [outcome for outcome in outcomes if not outcome.is_odd]
    odd = [outcome for outcome in outcomes if outcome.is_odd]
    refused, planned = (sum(each.is_right for each in some) for some in (mistakes, odd))
    if arguments.json:
        figures = {
            "bad_inputs_tried": len(mistakes), "bad_inputs_refused_in_a_sentence": refused,
            "odd_inputs_tried": len(odd), "odd_inputs_planned": planned,
        }  # fmt: skip
        print(json.dumps({**figures, "cases": [asdict(outcome) for outcome in outcomes]}, indent=1))
    else:
        print(f"{refused} of {len(mistakes)} refused in a sentence")
        print(f"{planned} of {len(odd)} that are only odd planned")
    sys.exit(refused + planned != len(outcomes))


if __name__ == "__main__":
    main()
