"""Train the reference model: `python -m foldstack.compression.reference.train --out DIR`.

A Llama of about 4 M parameters on the source text of the Python standard library. The time budget
drives the learning rate, so that the run ends when it says, on whatever machine. A run that was
killed goes on where its last checkpoint stands when the same command is given again.

Weight matrices of the blocks are trained with Muon (Jordan et al. 2024, the RMS-matched form of
arXiv:2502.16982), embeddings and norms with AdamW. Needs torch 2.9 or newer.
"""

import argparse
import logging
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from foldstack.compression.reference.stdlib_corpus import stdlib_digest, stdlib_split
from foldstack.compression.reference.tokenizer import train_tokenizer
from foldstack.compression.reference.training_text import CONTEXT, Progress, TrainingText, encode

logger = logging.getLogger(__name__)

VOCAB = 2048
CHECKPOINT = "training.safetensors"


def reference_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Give the reference model's structure: 12 blocks, 6 heads over 2 key-value heads."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=344,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, device: torch.device) -> LlamaForCausalLM:
    """Give an untrained model whose blocks begin as the identity."""
    with device:
        model = LlamaForCausalLM(reference_config(tokenizer)).train()
    for block in model.model.layers:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    if device.type == "cpu":
        AttentionInterface.register("causal_chunks", causal_attention)
        model.set_attn_implementation("causal_chunks")
    return model


def causal_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
) -> tuple[Tensor, None]:
    """Attend causally, 128 queries at a time.

    On the CPU this is twice as fast, forward and backward, as the fused kernel in bfloat16.
    """
    batch, heads, tokens, width = query.shape
    groups = heads // key.shape[1]
    query = query.reshape(batch * heads, tokens, width)
    key = key.repeat_interleave(groups, 1).reshape(batch * heads, tokens, width).transpose(1, 2)
    value = value.repeat_interleave(groups, 1).reshape(batch * heads, tokens, width)
    key, value = key.to(query.dtype), value.to(query.dtype)
    parts = []
    for start in range(0, tokens, 128):
        stop = min(start + 128, tokens)
        mask = torch.full((stop - start, stop), -3e4, dtype=query.dtype).triu(start + 1)
        mask = mask.expand(batch * heads, -1, -1)
        scores = torch.baddbmm(mask, query[:, start:stop], key[:, :, :stop], alpha=width**-0.5)
        parts.append(torch.bmm(torch.softmax(scores, -1, dtype=query.dtype), value[:, :stop]))
    mixed = torch.cat(parts, 1).view(batch, heads, tokens, width)
    return mixed.transpose(1, 2).contiguous(), None


def validation_bits_per_byte(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, max_documents: int
) -> float:
    """Give bits per byte in packed windows of the first validation modules: a quick look."""
    texts = list(stdlib_split("validation").values())[:max_documents]
    stream = torch.cat(encode(tokenizer, texts))
    rows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    nats = 0.0
    model.eval()
    with torch.inference_mode(), autocast(model.device):
        for batch in rows.to(model.device).split(16):
            logits = model(input_ids=batch).logits[:, :-1].float()
            nats += float(
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
                )
            )
    model.train()
    per_token = nats / (len(rows) * (CONTEXT - 1))
    num_bytes = sum(len(text.encode()) for text in texts)
    return per_token * (len(stream) - len(texts)) / num_bytes / math.log(2)


def autocast(device: torch.device) -> torch.autocast:
    """Compute in bfloat16 while weights stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


def step(
    model: LlamaForCausalLM,
    run: Callable[..., Any],
    batch: Tensor,
    optimizers: list[torch.optim.Optimizer],
    workers: int,
) -> float:
    """Take one step on `batch` and give its mean loss; `run` is the model, compiled or not.

    On the CPU every worker takes rows of its own: operators of a model this small are too short
    for several threads to share.
    """

    def part(rows: Tensor) -> float:
        with autocast(rows.device):
            logits = run(input_ids=rows, use_cache=False).logits[:, :-1]
            nats = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), rows[:, 1:].flatten()
            )
        loss = nats * (len(rows) / len(batch))
        loss.backward()
        return loss.item()

    if batch.device.type == "cpu" and workers > 1:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            loss = sum(pool.map(part, batch.chunk(workers)))
    else:
        loss = part(batch)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss


def make_optimizers(
    model: LlamaForCausalLM, matrix_lr: float, other_lr: float
) -> list[torch.optim.Optimizer]:
    """Give Muon for the blocks' matrices and AdamW for embeddings and norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "layers" in name]
    others = [p for name, p in named if not (p.ndim == 2 and "layers" in name)]
    muon = torch.optim.Muon(
        matrices, lr=matrix_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adam]


def learning_rate_factor(done: float) -> float:
    """Warm up over 2 % of the budget, hold, and fall in a line to zero over the last 65 %."""
    return min(done / 0.02, 1.0, max(0.0, (1.0 - done) / 0.65))


def save_checkpoint(
    out: Path,
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    progress: Progress,
) -> None:
    """Write model and training state; a reader never meets half a file."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{number}.{index}.{key}"] = torch.as_tensor(value)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, out / f"{CHECKPOINT}.new", metadata={"progress": progress.to_json()})
    os.replace(out / f"{CHECKPOINT}.new", out / CHECKPOINT)
    model.save_pretrained(out / "new")
    for file in (out / "new").iterdir():
        os.replace(file, out / file.name)


def load_checkpoint(
    out: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]
) -> Progress:
    """Bring back what `save_checkpoint` wrote; a fresh start where there is nothing."""
    if not (out / CHECKPOINT).exists():
        return Progress()
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    with safe_open(out / CHECKPOINT, framework="pt") as file:
        named = dict(model.named_parameters())
        for name in file.keys():  # noqa: SIM118 - not a mapping
            kind, rest = name.split(".", 1)
            if kind == "model":
                named[rest].data.copy_(file.get_tensor(name))
            else:
                number, index, key = rest.split(".", 2)
                states[int(number)].setdefault(int(index), {})[key] = file.get_tensor(name)
        metadata = file.metadata()
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return Progress.from_json(metadata["progress"])


def train(arguments: argparse.Namespace) -> None:
    """Train until the time budget is spent; `arguments.out` always holds the latest model."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    else:
        texts = stdlib_split("train").values()
        tokenizer = train_tokenizer(texts, vocab_size=VOCAB, max_length=CONTEXT)
        tokenizer.save_pretrained(out)
    model = new_model(tokenizer, device)
    optimizers = make_optimizers(model, arguments.matrix_lr, arguments.other_lr)
    progress = load_checkpoint(out, model, optimizers)
    text = TrainingText(tokenizer, arguments.batch_size, arguments.seed)
    logger.info(
        "%d parameters, %d documents, %d tokens in a pass, split %s, at step %d",
        model.num_parameters(),
        len(text.modules),
        text.one_pass(0).numel(),
        stdlib_digest("train")[:12],
        progress.step,
    )
    run = torch.compile(model) if device.type == "cuda" else model
    clock, looked, saved = Clock(progress), progress.seconds, progress.seconds
    losses: list[float] = []
    for batch in text.batches(progress):
        done = progress.seconds / (arguments.minutes * 60)
        if done >= 1:
            break
        factor = learning_rate_factor(done)
        for optimizer, peak in zip(
            optimizers, (arguments.matrix_lr, arguments.other_lr), strict=True
        ):
            optimizer.param_groups[0]["lr"] = peak * factor
        losses.append(step(model, run, batch.to(device), optimizers, arguments.workers))
        progress.step, progress.tokens = progress.step + 1, progress.tokens + batch.numel()
        clock.tick()
        if progress.seconds - looked > arguments.look_seconds:
            looked = progress.seconds
            report(progress, losses, validation_bits_per_byte(model, tokenizer, 5))
            losses.clear()
        if progress.seconds - saved > arguments.save_seconds:
            saved = progress.seconds
            save_checkpoint(out, model, optimizers, progress)
    save_checkpoint(out, model, optimizers, progress)
    report(progress, losses, validation_bits_per_byte(model, tokenizer, 1000))


class Clock:
    """Counts the seconds of training, those of earlier runs and of saving and looking included."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.before, self.start = progress, progress.seconds, time.monotonic()

    def tick(self) -> None:
        """Bring the progress up to date."""
        self.progress.seconds = self.before + time.monotonic() - self.start


def report(progress: Progress, losses: list[float], bits_per_byte: float) -> None:
    """Log where the run stands."""
    logger.info(
        "step %d  %.1f min  %.2f M tokens  %.0f tokens/s  loss %.4f  validation %.4f bits per byte",
        progress.step,
        progress.seconds / 60,
        progress.tokens / 1e6,
        progress.tokens / max(progress.seconds, 1e-9),
        sum(losses) / max(len(losses), 1),
        bits_per_byte,
    )


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--minutes", type=float, default=60.0, help="time budget of all runs")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step")
    parser.add_argument("--workers", type=int, default=2, help="threads with rows of their own")
    parser.add_argument("--matrix-lr", type=float, default=8e-3, help="peak learning rate of Muon")
    parser.add_argument("--other-lr", type=float, default=4e-3, help="peak learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--look-seconds", type=float, default=180.0)
    parser.add_argument("--save-seconds", type=float, default=200.0)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
