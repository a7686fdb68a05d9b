"""Train a backbone from scratch: a small Qwen3 on real source text and generated tasks.

Run: ``python recipes/shipped/train_backbone.py --tokenizer DIR --output DIR`` on one GPU; seven minutes on an H200. On
several: ``torchrun --nproc-per-node N`` instead of ``python``; they share a batch. A run that was stopped goes on from
its last saved state.

The defaults are the shipped run's: there the schedule followed a clock (``minutes`` in its log), and these step
numbers are where that clock changed length and learning rate.
"""

import argparse
import itertools
import json
import math
import os
import random
import time
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from flux_attention.tasks.families import EVERY_FAMILY, FAMILIES
from flux_attention.tasks.samples import Haystack, make_sample, training_sample
from flux_attention.tasks.scoring import evaluate
from flux_attention.tasks.text import local_texts

#: Arguments that a run may go on with changed.
FREE = {"output", "workers", "eval_every", "eval_count", "save_every", "no_compile"}
ANSWER_WEIGHT = 4.0  # answers are a few per cent of the tokens, and all of what is learnt slowly


class Mixture(IterableDataset):
    """Endless (input_ids, weights): a share ``plain`` of the sequences real text, the others generated tasks in it."""

    def __init__(self, haystack, tokenizer, args, first, rank, world):
        self.haystack, self.tokenizer, self.args, self.first = haystack, tokenizer, args, first
        self.rank, self.world = rank, world

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        index, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        args, step = self.args, self.first + index
        while True:
            rng = random.Random(f"{args.seed}-{step}" + (f"-{self.rank}" if self.rank else ""))
            length = next((length for length, until in args.stages if step < until), args.stages[-1][0])
            # Curriculum of the two-hop family: at first most guest lines name the city that they lead to.
            hint = 0.7 * max(0.1, 1 - step / args.hint_steps)
            ids, weights = [], []
            for _ in range(args.batch_tokens // length // self.world):
                weight = np.ones(length, dtype=np.float32)
                if rng.random() < args.plain:
                    text, _ = self.haystack.window(rng, length)
                    text = text.copy()
                    text[0] = self.tokenizer.bos_token_id
                    ids.append(text)
                else:
                    held_out = args.all_names and rng.random() < 0.5
                    sample = training_sample(self.haystack, self.tokenizer, length, rng, hint, args.families, held_out)
                    for start, end in sample.answers:
                        weight[start:end] = ANSWER_WEIGHT
                    ids.append(sample.input_ids)
                weights.append(weight)
            yield torch.from_numpy(np.stack(ids).astype(np.int64)), torch.from_numpy(np.stack(weights))
            step += stride


class Losses(nn.Module):
    """Of a batch: what is minimised, and text's and answers' mean loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, weights):
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden[:, :-1]).float()
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        answers = weights > 1
        return (
            (losses * weights).sum() / weights.sum(),
            (losses * ~answers).sum() / (~answers).sum(),
            (losses * answers).sum() / answers.sum().clamp(min=1),
        )


def report(model, haystack, tokenizer, families, length, count):
    """Accuracy of each family on held-out samples; nats a token for plain text."""
    result = {}
    for family in families:
        samples = [make_sample(family, haystack, tokenizer, length, seed) for seed in range(count)]
        with torch.autocast(model.device.type, torch.bfloat16):
            scores = evaluate(model, samples, batch_size=16)
        result[family] = round(fmean(scores.nats) if family == "plain" else scores.accuracy, 4)
    return result


def stages(text):
    """ "1024:1446,4096:3077" as [(1024, 1446), (4096, 3077)]."""
    pairs = [tuple(map(int, part.split(":"))) for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs) or any(b <= a for (_, a), (_, b) in itertools.pairwise(pairs)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected LENGTH:UNTIL_STEP,… with rising steps")
    return pairs


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a backbone of these sizes to go on from; default: random weights")
    parser.add_argument(
        "--stages", type=stages, default="1024:1446,4096:3077", help="sequence lengths, each up to a step"
    )
    parser.add_argument("--hint-steps", type=int, default=2409, help="steps over which two-hop hints fade")
    parser.add_argument("--batch-tokens", type=int, default=131072)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--plain", type=float, default=0.35)
    parser.add_argument(
        "--max-chars", type=int, default=150_000_000, help="text to read, the library's and the packages'"
    )
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--eval-every", type=int, default=1000)
    parser.add_argument("--eval-count", type=int, default=32)
    parser.add_argument("--save-every", type=int, default=500, help="a multiple of 100")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--families", nargs="+", choices=EVERY_FAMILY, default=list(FAMILIES), help="of questions")
    parser.add_argument("--all-names", action="store_true", help="ask half of the questions about held-out names")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    if args.save_every % 100:
        parser.error("--save-every is not a multiple of 100, the steps between two lines of the log")
    steps, longest = args.stages[-1][1], max(length for length, _ in args.stages)

    began = time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))  # torchrun's
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        distributed.init_process_group()
    if any(args.batch_tokens % (length * world) for length, _ in args.stages):
        parser.error(f"--batch-tokens are not whole sequences of every stage for each of {world} processes")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    haystack = Haystack(local_texts(False, site_packages=True, max_chars=args.max_chars), tokenizer)
    held_out = Haystack(local_texts(True, max_chars=3_000_000), tokenizer)
    print(f"{len(haystack.tokens):,} training tokens, {len(held_out.tokens):,} held-out, {time.time() - began:.0f} s")

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // args.head_dim,
        num_key_value_heads=2,
        head_dim=args.head_dim,
        max_position_embeddings=longest * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    if args.start is None:
        model = Qwen3ForCausalLM(config).to(device)
    else:
        model = Qwen3ForCausalLM.from_pretrained(args.start, config=config, dtype=torch.float32).to(device)
    print(f"{model.num_parameters():,} parameters")

    decay = [p for p in model.parameters() if p.ndim >= 2]
    other = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    args.output.mkdir(parents=True, exist_ok=True)
    state, first = args.output / "state.pt", 0
    # What the weights depend on.
    settings = {name: str(value) for name, value in vars(args).items() if name not in FREE} | {"processes": str(world)}
    if state.exists():
        saved = torch.load(state, map_location=device)
        if changed := sorted(name for name in settings if settings[name] != saved["settings"].get(name)):
            parser.error(f"{args.output} holds a run of another {', '.join(changed)}: use another --output")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
        print(f"going on from step {first} of {steps}")
        if first == steps and (args.output / "backbone").is_dir():
            return

    step_losses = Losses(model)
    if not args.no_compile:
        step_losses = torch.compile(step_losses, dynamic=False)
    if world > 1:
        step_losses = DistributedDataParallel(step_losses)
    loader = DataLoader(
        Mixture(haystack, tokenizer, args, first, rank, world),
        batch_size=None,
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=8 if args.workers else None,
    )
    log = (args.output / "backbone_log.jsonl").open("a" if first else "w") if rank == 0 else None

    def record(**row):
        if log is None:
            return
        log.write(json.dumps(row) + "\n")
        log.flush()
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)

    record(**{key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()})
    tick, tick_step = time.time(), first
    running = torch.zeros(3, device=device)
    for step, (ids, weights) in zip(range(first, steps), loader, strict=False):
        progress = step / steps
        warmup = min(1.0, (step + 1) / 200)
        # Constant for the first half, then a cosine to 2 %.
        cosine = 0.5 + 0.5 * math.cos(math.pi * max(0.0, 2 * progress - 1))
        rate = args.lr * warmup * (0.02 + 0.98 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, weights = ids.to(device, non_blocking=True), weights.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            losses = step_losses(ids, weights)
        losses[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += torch.stack([x.detach() for x in losses])
        if (step + 1) % 100 == 0:
            loss, text, answer = (running / 100).tolist()
            running.zero_()
            speed = (step + 1 - tick_step) * args.batch_tokens / (time.time() - tick)
            record(
                step=step + 1,
                length=ids.shape[1],
                loss=round(loss, 4),
                text=round(text, 4),
                answer=round(answer, 4),
                lr=round(rate, 6),
                tokens_per_s=round(speed),
                elapsed=round(time.time() - began, 1),
            )
            tick, tick_step = time.time(), step + 1
        if rank == 0 and ((step + 1) % args.save_every == 0 or step + 1 == steps):
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**kept, "step": step + 1, "settings": settings}, state.with_suffix(".tmp"))
            state.with_suffix(".tmp").replace(state)  # a kill leaves the old one whole
        if rank == 0 and (step + 1) % args.eval_every == 0:
            record(step=step + 1, **report(model, held_out, tokenizer, args.families, longest, args.eval_count))
            tick, tick_step = time.time(), step + 1
    if world > 1:
        distributed.destroy_process_group()
    if rank:
        return
    record(steps=steps, tokens=steps * args.batch_tokens, elapsed=round(time.time() - began, 1))
    record(final=True, **report(model, held_out, tokenizer, args.families, longest, 2 * args.eval_count))
    model.to(torch.bfloat16).save_pretrained(args.output / "backbone", max_shard_size="8MB")
    tokenizer.save_pretrained(args.output / "backbone")


if __name__ == "__main__":
    main()
