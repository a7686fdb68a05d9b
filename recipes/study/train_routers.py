"""Train the study's routers: every seed, sparsity target and granularity, one after the other.

Run: ``python recipes/study/train_routers.py`` after the backbone (README.md here). A run that is done is left alone,
one that was stopped goes on. A target is that of questions with several steps; look-ups have 0.25 more, plain text
always 0.96.
"""

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

from flux_attention.training import Recipe, train


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parent / "routers.yaml")
    parser.add_argument("--model", default="runs/study/backbone")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.35, 0.65, 0.2])
    parser.add_argument("--granularities", nargs="+", choices=["layer", "head"], default=["layer", "head"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()

    base = Recipe.from_yaml(args.recipe)
    for seed, target, granularity in itertools.product(args.seeds, args.targets, args.granularities):
        folder = Path(base.output) / f"{granularity}-{target}-{seed}"
        if (folder / "README.md").exists():  # the last thing that a run writes
            print(f"{folder} is there", flush=True)
            continue
        recipe = replace(
            base,
            model=args.model,
            output=str(folder),
            routers={**base.routers, "granularity": granularity},
            targets={**base.targets, "multi-step": target, "look-up": round(target + 0.25, 4)},
            training={**base.training, "seed": seed},
        )
        print(folder, flush=True)
        train(recipe)


if __name__ == "__main__":
    main()
