"""Measures what block-sparse prefill loses: recall of attention, error of outputs, loss, and generated answers.

Run: ``python benchmarks/block_quality.py MODEL --select mass=0.95 --select maximum=0.01,0.025``. Layers that are full
attend block-sparse in the prefill: all of them, or with ``--routers`` those that an adapter's ranking leaves full at
``--budget``; ``--select own`` is the adapter's own rule and thresholds. Writes to ``--output`` a row for each rule,
threshold and family beside the exact one; what is there already is not measured again, so that several calls add to one
file. What is published lies in benchmarks/results/block_quality.json. ``text`` in a row is the digest of the texts that
its samples are hidden in, which come from the packages that are installed: rows are set beside exact ones of the same.

density        of the causal blocks, what share was selected: mean over layers and samples
recall         of the exact attention, what share lies in selected blocks: mean over layers, heads and some blocks' rows
output_error   of a layer's output: norm of the difference to exact attention on the same states, over the norm

All three are of the first ``--watched`` samples of a family. Later layers see what earlier ones lost.
"""

import argparse
import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from flux_attention import FluxConfig, attach, kernels
from flux_attention.adapters import load_config
from flux_attention.evaluation.base import adapter_hash
from flux_attention.evaluation.material import Material
from flux_attention.evaluation.measures import answer_measures, token_measures
from flux_attention.hf.loading import load_model, load_tokenizer
from flux_attention.kernels.block_sparse import BLOCK, FIRST, LAST
from flux_attention.names import adapter_path, model_name
from flux_attention.patterns import BlockSparse, Full, full_pattern
from flux_attention.results import begun_rows, write_results
from flux_attention.tasks.generation import score_answers
from flux_attention.tasks.questions import NATURAL
from flux_attention.tasks.scoring import evaluate

#: Rows of blocks whose recall is measured, of a layer.
ROWS = 8


def recall(query, key, scale, blocks):
    """Return the mean share of the exact attention that lies in the selected blocks, of some rows of blocks."""
    first, found = (key.shape[2] - query.shape[2]) // BLOCK, []
    groups = query.shape[1] // key.shape[1]
    for row in torch.linspace(0, blocks.shape[2] - 1, ROWS).round().int().unique().tolist():
        start, stop = max((first + row) * BLOCK, key.shape[2] - query.shape[2]), (first + row + 1) * BLOCK
        some = query[:, :, start - key.shape[2] + query.shape[2] :][:, :, : stop - start].float()
        keys = key[:, :, :stop].float().repeat_interleave(groups, 1)
        i = torch.arange(start, start + some.shape[2], device=key.device)
        hidden = torch.arange(keys.shape[2], device=key.device) > i[:, None]
        shares = (some @ keys.transpose(-1, -2) * scale).masked_fill(hidden, -math.inf).softmax(-1)
        shares = torch.nn.functional.pad(shares, (0, -shares.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).sum(-1)
        mine = blocks[:, :, row, None, : shares.shape[-1]]
        found.append(shares.where(mine, 0).sum(-1).mean())
    return torch.stack(found).mean().item()


@contextmanager
def watching():
    """Note density, recall and the output's error of each block-sparse call."""
    found, block_sparse = {"density": [], "recall": [], "output_error": []}, kernels.block_sparse

    def watched(query, key, value, scale, select, share, stride=16, correct=False):
        output = block_sparse(query, key, value, scale, select, share, stride, correct)
        blocks = kernels.selected_blocks(query, key, scale, select, share, stride)
        found["density"].append(kernels.density(blocks).item())
        found["recall"].append(recall(query, key, scale, blocks))
        exact = kernels.full(query, key, value, scale).float()
        found["output_error"].append(((output.float() - exact).norm() / exact.norm()).item())
        return output

    kernels.block_sparse = watched
    try:
        yield found
    finally:
        kernels.block_sparse = block_sparse


def patterns_of(args, base):
    """Yield the patterns that are judged; they select at any length, also a short one."""
    for text in args.select:
        if text == "own":
            yield replace(full_pattern(base), from_tokens=0)
            continue
        rule, _, values = text.partition("=")
        for value in values.split(","):
            yield BlockSparse(float(value), rule, args.stride, args.correct, from_tokens=0)


def rows_of(model, tokenizer, material, base, patterns, args, done):
    """Yield rows: of each family the exact one, then one for each pattern, a rule and its threshold."""
    routers = args.routers and adapter_hash(adapter_path(args.routers))[:12]
    base = base if args.budget is None else replace(base, budget=args.budget)
    text = material.settings["text"][:12]
    have = {identity(row): row for row in done}
    for length in args.lengths:
        for pattern in [None, *patterns]:
            full = (pattern or Full()).to_dict()
            routing = attach(model, replace(base, full=full))
            for family in material.families:
                samples = material.make(family, length, args.samples)
                facts = dict(model=model_name(args.model), seq_len=length, task=family, full=full["pattern"])
                facts |= {"n": len(samples), "routers": routers, "text": text}
                facts["sparsity"] = (
                    round(1 - len(routing.config.full_layers) / len(routing.layers), 4) if base.ranking else 0.0
                )
                if pattern is not None:
                    facts |= {name: getattr(pattern, name) for name in ("select", "threshold", "stride", "correct")}
                    if not isinstance(pattern.threshold, float):
                        facts["threshold"] = "own"
                    if pattern.select == "maximum":
                        facts["always"] = ALWAYS
                if (row := have.get(identity(facts))) is None:
                    row = facts | measured(model, tokenizer, routing, samples, args, pattern is not None)
                yield row
            routing.detach()


def identity(row):
    """Return what tells rows apart, of what is known before they are measured."""
    named = "model", "seq_len", "task", "full", "n", "routers", "text", "sparsity"
    return *(row.get(key) for key in named), *(str(row.get(key)) for key in RULE)


#: How many first and last blocks the rule by the maximum takes whatever their scores.
ALWAYS = [FIRST, LAST]
#: How blocks are selected, by the names in rows.
RULE = "select", "threshold", "stride", "correct", "always"
#: Samples of which the loss is taken; answers are generated of all.
LOSS = 48


def measured(model, tokenizer, routing, samples, args, watch):
    """Return what the samples scored, and what was lost on the way."""
    found = {}
    if watch:
        with watching() as seen:
            evaluate(model, samples[: args.watched], routing, 1)
        found = {"watched": args.watched} | {name: round(fmean(values), 4) for name, values in seen.items()}
    question = samples[0].question
    scores = evaluate(model, samples if question.is_prose else samples[:LOSS], routing, args.batch_size)
    found["nats"] = round(fmean(scores.nats), 5)
    if question.is_prose:
        return found | token_measures(scores, True)
    answers, _ = score_answers(model, tokenizer, samples, args.batch_size, None, routing)
    return found | answer_measures(answers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--select", action="append", required=True, help="mass=… or maximum=…, with thresholds; or own")
    parser.add_argument("--routers", help="a calibrated adapter")
    parser.add_argument("--budget", type=float)
    parser.add_argument("--families", nargs="+", default=list(NATURAL))
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--watched", type=int, default=2)
    parser.add_argument("--stride", type=int, default=16)
    parser.add_argument("--correct", action="store_true")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/block_quality.json"))
    args = parser.parse_args()
    base = FluxConfig() if args.routers is None else load_config(adapter_path(args.routers))[1]
    if "own" in args.select and base.full["pattern"] != BlockSparse.name:
        parser.error("--select own is for --routers whose full layers are block-sparse")
    try:
        patterns = list(patterns_of(args, base))
    except ValueError as error:
        parser.error(f"--select is {' '.join(args.select)}, expected as mass=0.95 or maximum=0.01,0.025: {error}")
    model = load_model(args.model, args.dtype, args.device).to(args.device).eval()
    tokenizer = load_tokenizer(args.model)
    material = Material(tokenizer, args.families)
    settings = {"dtype": str(model.dtype), "chat": material.settings["chat"]}
    rows = []
    remedy = "name another file by --output"
    try:
        done = begun_rows(args.output, settings, remedy=remedy)
    except ValueError as error:
        parser.error(str(error))
    if any("text" not in row for row in done):
        parser.error(f"{args.output} is of an earlier version, whose rows do not say of which texts they are: {remedy}")
    for row in rows_of(model, tokenizer, material, base, patterns, args, done):
        rows.append(row)
        print({key: value for key, value in row.items() if key != "scores"}, flush=True)
        again = {identity(new) for new in rows}
        write_results(args.output, [*(old for old in done if identity(old) not in again), *rows], settings=settings)


if __name__ == "__main__":
    main()
