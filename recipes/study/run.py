"""The study after its backbone: train routers at every sparsity target, then judge all methods with them.

Run: ``python recipes/study/run.py routers``, then ``python recipes/study/run.py evaluate`` (README.md here). Several
runs go at a time, ``--jobs`` of them on each GPU; each writes a log of its own. What is done is left alone,
what was stopped goes on.

A target is that of questions with several steps; look-ups have 0.25 more, at most 0.9, plain text always 0.96.
"""

import argparse
import itertools
import json
import os
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from flux_attention.evaluation.quality import row_key
from flux_attention.evaluation.report import write_report
from flux_attention.results import write_results
from flux_attention.tasks.text import local_texts
from flux_attention.training import Recipe

CLI = [sys.executable, "-m", "flux_attention.cli"]


def run_all(commands: dict[str, list[str]], jobs: int, logs: Path) -> None:
    """Run commands by name, ``jobs`` at a time on each GPU; exits if one fails, after the others."""
    logs.mkdir(parents=True, exist_ok=True)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    slots, failed = queue.SimpleQueue(), []
    for gpu in gpus * jobs:
        slots.put(gpu)

    def run(name):
        gpu = slots.get()
        print(f"{name}: begun, log {logs / name}.log", flush=True)
        try:
            with (logs / f"{name}.log").open("a") as log:
                environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
                subprocess.run(commands[name], stdout=log, stderr=subprocess.STDOUT, env=environment, check=True)
            print(f"{name}: done", flush=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{name}: {error}", flush=True)
            failed.append(name)
        finally:
            slots.put(gpu)

    with ThreadPoolExecutor(len(gpus) * jobs) as pool:
        list(pool.map(run, commands))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; their logs are in {logs}")


def routers(args, names):
    base, commands = Recipe.from_yaml(args.recipe), {}
    for name, (seed, target, granularity) in names.items():
        folder = args.folder / "routers" / name
        recipe = replace(
            base,
            model=str(args.model or args.folder / "backbone"),
            output=str(folder),
            routers={**base.routers, "granularity": granularity},
            targets={**base.targets, "multi-step": target, "look-up": min(0.9, round(target + 0.25, 4))},
            training={**base.training, "seed": seed, **({"max_steps": args.steps} if args.steps else {})},
        )
        if (folder / "README.md").exists():  # the last thing that a run writes
            if Recipe.from_yaml(folder / "recipe.yaml").resolved != recipe.resolved:
                sys.exit(f"{folder} was trained by another recipe: use another --folder")
            print(f"{folder} is there", flush=True)
            continue
        path = args.folder / "recipes" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        recipe.to_yaml(path)
        commands[name] = [*CLI, "train", str(path)]
    run_all(commands, args.jobs, args.folder / "logs")


def held_out_text(folder: Path) -> Path:
    """A file of the text that ``flux-attention eval`` hides questions in, read once for all runs."""
    path = folder / "text.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_text("".join(local_texts(True, site_packages=True, max_chars=5_000_000)), encoding="utf-8")
        partial.replace(path)
    return path


def evaluate(args, names):
    text = held_out_text(args.folder)
    begun = {name for name in names if (args.folder / "recipes" / f"{name}.yaml").exists()}
    names = {name: parts for name, parts in names.items() if (args.folder / "routers" / name / "README.md").exists()}
    if begun - set(names):
        sys.exit(f"{', '.join(sorted(begun - set(names)))}: begun, not finished; run.py routers goes on with them")
    if not names:
        sys.exit(f"no trained routers in {args.folder / 'routers'}: run.py routers trains them")
    print(f"judging {', '.join(names)}", flush=True)
    # Those that routers were trained on: the backbone was, too.
    families = list(itertools.chain.from_iterable(source["tasks"] for source in Recipe.from_yaml(args.recipe).data))
    model, commands = str(args.model or args.folder / "backbone"), {}
    for name, (seed, _, granularity) in names.items():
        # Rivals for every seed: they have as many full layers as its routers use. All sets are tried for one seed only.
        methods = "routed,static,random" if granularity == "layer" else "head,head-static"
        if granularity == "layer" and seed == args.seeds[0]:
            methods += ",best-static,best-static-fewer"
        if name == next(iter(names)):  # what does not depend on routers, once
            methods = f"dense,sparse,{methods}"
        options = {
            "--routers": args.folder / "routers" / name,
            "--output": args.folder / "eval" / name,
            "--methods": methods,
            "--families": ",".join(families),
            "--lengths": args.lengths,
            "--samples": args.samples,
            "--calibration": args.calibration,
            "--text": text,
            "--batch-size": args.batch_size,
        }
        commands[name] = [*CLI, "eval", model, *map(str, itertools.chain.from_iterable(options.items()))]
    run_all(commands, args.jobs, args.folder / "eval" / "logs")
    merge(sorted(args.folder.glob("eval/*/quality.json")), args.folder / "eval" / "quality.json")


def merge(parts: list[Path], path: Path) -> None:
    """One result file of all, and its report."""
    found = [json.loads(part.read_text()) for part in parts]
    meta = found[0]["meta"]
    alike = "device torch transformers model families dtype samples calibration text lengths"
    for fact in alike.split():
        values = {str({**part["meta"]["settings"], **part["meta"]}[fact]) for part in found}
        if len(values) > 1:
            sys.exit(f"measured with {fact} {sorted(values)}: evaluate all with one")
    meta["settings"]["adapters"] = [adapter for part in found for adapter in part["meta"]["settings"]["adapters"]]
    # Parts of another commit say so in their rows; of rows that depend on no routers the first part's are kept.
    rows = {}
    for part in found:
        commit = part["meta"]["commit"]
        mark = {} if commit == meta["commit"] else {"commit": commit}
        for row in part["rows"]:
            rows.setdefault(row_key(row), {**mark, **row})
    write_results(path, list(rows.values()), **meta)
    page, _ = write_report(path, path.parent)
    print(f"{len(rows)} rows in {path}, the report is {page}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["routers", "evaluate"])
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="holds backbone/, gets the rest")
    parser.add_argument("--model", type=Path, help="instead of the folder's backbone")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parent / "routers.yaml")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.35, 0.65, 0.8])
    parser.add_argument("--granularities", nargs="+", choices=["layer", "head"], default=["layer", "head"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on each GPU")
    parser.add_argument("--steps", type=int, help="routers: instead of the recipe's")
    parser.add_argument("--lengths", default="4K,8K", help="evaluate: tokens of a sample")
    parser.add_argument("--samples", type=int, default=100, help="evaluate: of each family and length")
    parser.add_argument("--calibration", type=int, default=8, help="evaluate: samples of each family for static layers")
    parser.add_argument("--batch-size", type=int, default=8, help="evaluate: samples at a time")
    args = parser.parse_args()
    names = {
        f"{granularity}-{target}-{seed}": (seed, target, granularity)
        # So that neighbours, which go to different GPUs, are alike: judging layers takes longer than judging heads.
        for seed, granularity, target in itertools.product(args.seeds, args.granularities, args.targets)
    }
    {"routers": routers, "evaluate": evaluate}[args.what](args, names)


if __name__ == "__main__":
    main()
