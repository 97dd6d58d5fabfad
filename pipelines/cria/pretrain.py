"""Pretrain cria: a Llama of 2.7 M parameters on the text of corpus.py. Needs torch, transformers and tokenizers only.

    python pipelines/cria/tokenizer.py platform/altiplano/models/cria/weights
    python pipelines/cria/pretrain.py --out platform/altiplano/models/cria/weights --steps 3000 --device cuda
    python pipelines/cria/card.py platform/altiplano/models/cria

Training is deterministic up to the order of floating-point sums of the device. On a CPU a step takes minutes: use fewer.
"""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from corpus import dialogues
from tokenizer import render
from tokenizers import Tokenizer

SEQUENCE = 512
CONFIG: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}
# What the user says is mostly random names: learn little from it, and most from the answers.
PROMPT_WEIGHT = 0.1


def shard(job: tuple[str, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of whole dialogues, padded: ids int16 [n, SEQUENCE] and answer mask bool [n, SEQUENCE]. One job: (tokenizer, seed, n)."""
    path, seed, count = job
    tokenizer = Tokenizer.from_file(path)
    pad, end, answer = (tokenizer.token_to_id(t) for t in ("<|finetune_right_pad_id|>", "<|eot_id|>", "<|end_header_id|>"))
    role = tokenizer.encode("assistant", add_special_tokens=False).ids
    ids = torch.full((count, SEQUENCE), pad, dtype=torch.int16)
    mask = torch.zeros((count, SEQUENCE), dtype=torch.bool)
    source = dialogues(seed)
    row, column = 0, 0
    while row < count:
        for encoded in tokenizer.encode_batch_fast([render(d) for d in islice(source, 2000)], add_special_tokens=False):
            tokens = encoded.ids[:SEQUENCE]
            if column + len(tokens) > SEQUENCE:
                row, column = row + 1, 0
                if row == count:
                    break
            ids[row, column : column + len(tokens)] = torch.tensor(tokens, dtype=torch.int16)
            for start, stop in answers(tokens, answer, end, role):
                mask[row, column + start : column + stop] = True
            column += len(tokens)
    return ids, mask


def answers(tokens: list[int], header: int, end: int, role: list[int]) -> Iterator[tuple[int, int]]:
    """[start, stop) of what the assistant says, with the token that ends it; the line break after the header is not said."""
    at = 0
    while header in tokens[at:]:
        at = tokens.index(header, at) + 1
        if tokens[at - 1 - len(role) : at - 1] == role:
            stop = tokens.index(end, at) + 1 if end in tokens[at:] else len(tokens)
            yield at + 1, stop


def corpus(tokenizer: str, sequences: int, seed: int, workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`sequences` training sequences, made by `workers` processes; the same for the same arguments."""
    parts = 64
    jobs = [(tokenizer, seed * 1000 + part, -(-sequences // parts)) for part in range(parts)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        made = pool.map(shard, jobs, chunksize=1)
    return torch.cat([ids for ids, _ in made]), torch.cat([mask for _, mask in made])


def loss_of(model: Any, ids: torch.Tensor, mask: torch.Tensor, pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weighted loss, loss of answers, share of answer tokens that greedy decoding gets right)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    target, learned = ids[:, 1:], mask[:, 1:]
    per_token = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    weight = torch.where(learned, 1.0, PROMPT_WEIGHT) * (target != pad)
    right = ((logits.argmax(-1) == target) & learned).sum() / learned.sum()
    return (per_token * weight).sum() / weight.sum(), (per_token * learned).sum() / learned.sum(), right


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--out", type=Path, required=True, help="directory with the tokenizer; weights are written here")
    options.add_argument("--steps", type=int, default=3000)
    options.add_argument("--batch", type=int, default=256, help="sequences of 512 tokens per step")
    options.add_argument("--passes", type=int, default=2, help="how often each sequence is seen")
    options.add_argument("--learning-rate", type=float, default=3e-3)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    args = options.parse_args()

    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    special = {
        name: tokenizer.token_to_id(f"<|{name}|>")
        for name in ("begin_of_text", "end_of_text", "eot_id", "eom_id", "finetune_right_pad_id")
    }
    pad = special["finetune_right_pad_id"]
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        bos_token_id=special["begin_of_text"],
        eos_token_id=[special["end_of_text"], special["eom_id"], special["eot_id"]],
        pad_token_id=pad,
        **CONFIG,
    )
    model = LlamaForCausalLM(config).to(args.device)
    started = time.perf_counter()
    total = args.steps * args.batch // args.passes
    ids, mask = (t.to(args.device) for t in corpus(str(args.out / "tokenizer.json"), total, args.seed, args.workers))
    held_ids, held_mask = (t.to(args.device) for t in corpus(str(args.out / "tokenizer.json"), 512, args.seed + 1, args.workers))
    print(
        f"{ids.numel():,} tokens in {time.perf_counter() - started:.0f} s, {sum(p.numel() for p in model.parameters()):,} parameters",
        flush=True,
    )

    decay = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        fused=args.device == "cuda",
    )
    warmup = max(1, args.steps // 30)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * min(1.0, s / args.steps))) / 2)
    )
    step_fn = torch.compile(loss_of) if args.device == "cuda" else loss_of
    curve = []
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.cat([torch.randperm(len(ids), generator=generator) for _ in range(args.passes + 1)]).to(args.device)
    started = time.perf_counter()
    for step in range(args.steps):
        pick = order[step * args.batch : (step + 1) * args.batch]
        with torch.autocast(args.device, dtype=torch.bfloat16):
            loss, _, _ = step_fn(model, ids[pick].long(), mask[pick], pad)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % max(1, args.steps // 30) == 0 or step == args.steps - 1:
            with torch.no_grad(), torch.autocast(args.device, dtype=torch.bfloat16):
                _, answers, right = loss_of(model, held_ids[:256].long(), held_mask[:256], pad)
            point = {
                "step": step,
                "loss": loss.item(),
                "held_out_answer_loss": answers.item(),
                "held_out_answer_accuracy": right.item(),
            }
            curve.append(point)
            print(json.dumps(point), f"{time.perf_counter() - started:.0f} s", flush=True)
    model.to(torch.bfloat16)
    model.generation_config.do_sample = False
    model.save_pretrained(args.out)
    record = {
        "command": f"python pipelines/cria/pretrain.py --steps {args.steps} --batch {args.batch} --passes {args.passes} "
        f"--learning-rate {args.learning_rate} --seed {args.seed}",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - started),
        "tokens": args.steps * args.batch * SEQUENCE,
        "curve": curve,
    }
    (args.out / "pretraining.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
