"""Train the shipped model's routers on its frozen backbone, with the method's objective.

Run: ``python recipes/shipped/train_routers.py --backbone DIR --output DIR`` on one GPU. Kept: ``routers/`` and
``routers_log.jsonl``.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from flux_attention import FluxConfig, attach
from flux_attention.evaluation.harness import answer_losses
from flux_attention.evaluation.tasks import FAMILIES, Haystack, make_sample
from flux_attention.evaluation.text import local_texts
from flux_attention.training import SparsityObjective

#: Task class of each family: one look-up, a long copy, several look-ups or an aggregate, and plain text.
CLASSES = {
    "single_needle": "look-up",
    "multi_key": "look-up",
    "copy": "copy",
    "multi_value": "multi-step",
    "two_hop": "multi-step",
    "count": "multi-step",
    "plain": "holistic",
}
#: Target Ω_MSR of each class.
TARGETS = {"look-up": 0.8, "copy": 0.65, "multi-step": 0.45, "holistic": 0.96}
#: Samples of each family in a round.
SHARES = {"look-up": 1, "copy": 1, "multi-step": 1, "holistic": 2}
LENGTHS = (4096, 4096, 2048, 2048, 1024)


class Batches(IterableDataset):
    """Endless lists of samples of one length, families as often as ``SHARES`` says."""

    def __init__(self, haystack, tokenizer, batch_tokens, seed):
        self.haystack, self.tokenizer, self.batch_tokens, self.seed = haystack, tokenizer, batch_tokens, seed

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        index, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        families = [family for family in FAMILIES for _ in range(SHARES[CLASSES[family]])]
        while True:
            rng = random.Random(f"routers-{self.seed}-{index}")
            length = rng.choice(LENGTHS)
            count = self.batch_tokens // length
            seeds = [rng.randrange(2**40) for _ in range(count)]
            yield [
                make_sample(
                    families[(index * count + i) % len(families)],
                    self.haystack,
                    self.tokenizer,
                    length,
                    seed,
                    held_out=False,
                )
                for i, seed in enumerate(seeds)
            ]
            index += stride


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--multiplier-lr", type=float, default=5e-4)
    # At the paper's temperature (1.5 to 1) gates saturate within a few hundred steps, the useless ones among them
    # whenever Ω overshoots its target; a saturated gate has no gradient, and stays for all inputs as it is.
    parser.add_argument("--temperature", type=float, default=8.0, help="of the Gumbel-Softmax, all the time")
    parser.add_argument("--targets", type=json.loads, default=TARGETS, help="Ω_MSR of each task class, as JSON")
    parser.add_argument("--sink", type=int, default=64)
    parser.add_argument("--window", type=int, default=704)
    # The questions have about twenty tokens. Over 64 tokens the text around them drowns what tells the classes apart:
    # a linear probe of the pooled states finds the class in 66 to 84 % of the samples, over 16 tokens in 95 to 100 %.
    parser.add_argument("--pool-size", type=int, default=16)
    parser.add_argument("--max-chars", type=int, default=60_000_000)
    parser.add_argument("--max-minutes", type=float, default=60.0, help="stop early, at the end of a step")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    began = time.time()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.backbone)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.backbone, dtype=dtype).to(device).eval()
    model.requires_grad_(False)
    model.config.name_or_path = "flux-attention/shipped"  # the name that the adapter gives its base model
    routing = attach(model, FluxConfig(sink=args.sink, window=args.window, pool_size=args.pool_size))
    objective = SparsityObjective(args.targets).to(device)
    optimizer = torch.optim.AdamW(routing.routers.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    ascent = torch.optim.Adam(objective.parameters(), lr=args.multiplier_lr, maximize=True)
    warmup = 0.2 * args.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warmup)
            * (0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, step - warmup) / (args.steps - warmup))))
        ),
    )
    haystack = Haystack(local_texts(False, site_packages=True, max_chars=args.max_chars), tokenizer)
    loader = DataLoader(
        Batches(haystack, tokenizer, args.batch_tokens, args.seed),
        batch_size=None,
        num_workers=args.workers,
        prefetch_factor=4 if args.workers else None,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    log = (args.output / "routers_log.jsonl").open("w")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    log.write(json.dumps(settings) + "\n")
    sums: dict[str, list] = {}
    for step, samples in enumerate(loader):
        if step == args.steps or time.time() - began > args.max_minutes * 60:
            break
        classes = [CLASSES[sample.family] for sample in samples]
        with routing.soft(args.temperature):
            losses, _ = answer_losses(model, samples, prompt_lengths=[len(sample.prompt_ids) for sample in samples])
        lm_loss = torch.stack([loss.mean() for loss in losses])
        loss = objective(lm_loss, routing.gates, classes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(routing.routers.parameters(), 5.0)
        optimizer.step()
        ascent.step()
        objective.clamp()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        ascent.zero_grad(set_to_none=True)
        for sample, nats, gates in zip(samples, lm_loss.tolist(), routing.gates.detach().tolist(), strict=True):
            sums.setdefault(sample.family, []).append((nats, gates))
        if (step + 1) % 50 == 0:
            row = {
                "step": step + 1,
                "elapsed": round(time.time() - began, 1),
                "multipliers": {
                    name: [round(value, 3) for value in objective.multipliers_C2[index].tolist()]
                    for name, index in objective.classes.items()
                },
            }
            for family in FAMILIES:
                seen = sums.get(family, [])
                if seen:
                    rates = torch.tensor([gates for _, gates in seen]).mean(0)
                    row[family] = {
                        "loss": round(sum(nats for nats, _ in seen) / len(seen), 4),
                        "msr": round(1 - rates.mean().item(), 3),
                        "fa_rate": [round(rate, 2) for rate in rates.tolist()],
                    }
            sums.clear()
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row["step"], row["elapsed"], row["multipliers"], flush=True)
            for family in FAMILIES:
                if family in row:
                    print(f"   {family:14s}", row[family], flush=True)
    routing.save_pretrained(args.output / "routers", dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
