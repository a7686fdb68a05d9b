"""Merges evaluations of one pretrained model, run in parts, into one result file.

Run: ``python benchmarks/real_models.py FOLDER... --weights TEXT``. Folders are what ``flux-attention eval`` wrote, and
the adapters that it judged: rows then say what an adapter is, not where it lay; ``NAME=FOLDER`` says it in words of
one's own. Writes benchmarks/results/quality_real.json, with what the runs say about device, versions and commit; rows
of other commits than the file's name theirs. A method that has not answered all samples of all families of a length is
left out there. Nothing is measured.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from statistics import fmean

from flux_attention.adapters import CONFIG_FILE, load_config
from flux_attention.evaluation.base import adapter_hash
from flux_attention.evaluation.compare import ROUTED, by_method, label
from flux_attention.evaluation.methods import METHODS
from flux_attention.evaluation.quality import row_key
from flux_attention.results import write_results

#: Settings in which parts may differ; samples have to agree at each length, all else everywhere.
OWN = ("adapters", "lengths", "samples", "calibration")
#: Methods whose layers were chosen on samples, as many of each kind as their rows say.
CHOSEN = ("static", "head-static")


def describe(folder, given=None):
    """Return an adapter's hash, its name, and what it is."""
    _, config = load_config(folder)
    if config.ranking is not None:
        name, facts = "calibrated", {"ranking": list(config.ranking), "budget": config.budget}
    else:
        name, facts = {"prefill": "trained", "ends": "trained for ends"}[config.decide], {"decide": config.decide}
        name += " by head" if config.granularity == "head" else ""
    return adapter_hash(folder), given or name, {**facts, "sparse": config.sparse, "full": config.full}


def read_adapters(folders):
    """Return {hash: name} and {name: what it is} of adapters, {folder: name or None}, each name once."""
    digests, about = {}, {}
    for digest, name, facts in (describe(folder, given) for folder, given in folders.items()):
        if digests.setdefault(name, digest) != digest:
            raise ValueError(f"two adapters are {name}: merge evaluations of one, or name them, as NAME=FOLDER")
        about[name] = facts
    return {digest: name for name, digest in digests.items()}, about


def read(folder, names, about):
    """Return an evaluation's rows, with adapters by name, and what has to agree: of all parts, and of each length."""
    data = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    settings = data["meta"]["settings"]
    known = {path: names.get(digest) for path, digest in settings["adapters"]}
    if None in known.values():
        raise ValueError(
            f"{folder} judged an adapter of no folder that was named: name that of {', '.join(known)}, too"
        )
    apart = ("settings", "date", "command", *OWN)
    facts = {fact: value for fact, value in {**data["meta"], **settings}.items() if fact not in apart}
    for name in known.values():  # the pattern is the adapter's, where there is one
        facts |= {fact: about[name][fact] for fact in ("sparse", "full")}
    commit = facts.pop("commit")
    rows = [{"commit": commit, **row, "routers": row["routers"] and known[row["routers"]]} for row in data["rows"]]
    for row in rows:
        if row["method"] in CHOSEN:
            row["calibration"] = settings["calibration"]
    return rows, facts, dict.fromkeys(settings["lengths"], settings["samples"]), (data["meta"]["date"], commit)


def check_same(folder, facts, first, others):
    """Refuse an evaluation of other samples or conditions than the first one's."""
    if changed := sorted(fact for fact in {*facts, *others} if facts.get(fact) != others.get(fact)):
        raise ValueError(f"{folder} and {first} differ in {', '.join(changed)}: merge parts that saw the same samples")


def complete(rows, families, samples):
    """Split rows: those of methods that answered all samples of all families of a length, and names of the others."""
    kept, unfinished = [], []
    for (length, *_), some in by_method(rows).items():
        done = [row["task"] for row in some if row["n"] == len(row["scores"]) == samples[length]]
        if sorted(done) == sorted(families):
            kept.append(sorted(some, key=lambda row: families.index(row["task"])))
        else:
            names = {name: name for name in (row["routers"] for row in some)}
            unfinished.append(f"{label(some[0], names)}, {length:,} tokens: {len(done)} of {len(families)} families")
    kept.sort(
        key=lambda some: (
            some[0]["seq_len"],
            fmean(row["sparsity"] for row in some),
            some[0]["method"] in ROUTED,
            METHODS.index(some[0]["method"]),
            some[0]["routers"] or "",
        )
    )
    return [slim(row) for some in kept for row in some], unfinished


def slim(row):
    """Leave out how often each layer ran full, where other facts say so."""
    if row["method"] in (*ROUTED, "head-static"):
        return row
    return {fact: value for fact, value in row.items() if fact != "fa_rate"}


def without(row, commit):
    """Leave out the commit, if it is the file's."""
    return {fact: value for fact, value in row.items() if fact != "commit" or value != commit}


def merge(folders):
    """
    Merge evaluations.

    Returns
    -------
    rows : list of dict
    meta : dict
    unfinished : list of str
        What was left out.

    Raises
    ------
    ValueError
        Where samples or conditions differ, an adapter is not there, or two folders have a row each.
    """
    folders = dict(named(folder) for folder in folders)
    adapters = {folder: name for folder, name in folders.items() if (folder / CONFIG_FILE).exists()}
    names, about = read_adapters(adapters)
    parts = {folder: read(folder, names, about) for folder in folders if folder not in adapters}
    if not parts:
        raise ValueError("no folder was named that flux-attention eval wrote")
    (first, (_, facts, *_)), rows, samples = next(iter(parts.items())), {}, {}
    for folder, (some, own, counts, _) in parts.items():
        check_same(folder, own, first, facts)
        for length, count in counts.items():
            if samples.setdefault(length, count) != count:
                raise ValueError(
                    f"{folder} has {count} samples of {length:,} tokens, but {samples[length]} are expected, as in "
                    "folders before it"
                )
        for row in some:
            if rows.setdefault(row_key(row), row) is not row:
                raise ValueError(f"{folder} has {row['task']} by {row['method']} a second time")
    kept, unfinished = complete(list(rows.values()), facts["families"], samples)
    used = {row["routers"] for row in kept}
    machine = ("device", "torch", "triton", "transformers")
    commits = Counter(row["commit"] for row in kept)
    commit = max(commits, key=commits.get) if kept else next(iter(parts.values()))[-1][1]
    kept = [without(row, commit) for row in kept]
    meta = {fact: facts[fact] for fact in machine} | {
        "commit": commit,
        "date": max(part[-1][0] for part in parts.values()),
    }
    settings = {fact: value for fact, value in facts.items() if fact not in machine}
    return (
        kept,
        {
            **meta,
            "settings": {**settings, "samples": {str(length): samples[length] for length in sorted(samples)}},
            "adapters": {name: facts for name, facts in about.items() if name in used},
        },
        unfinished,
    )


def named(text):
    """Read ``NAME=FOLDER``, or a folder alone."""
    name, _, folder = str(text).rpartition("=")
    return Path(folder), name or None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--weights", required=True, help="what weights the model had, in words")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/quality_real.json")
    args = parser.parse_args()
    try:
        rows, meta, unfinished = merge(args.folders)
    except ValueError as error:
        parser.error(str(error))
    write_results(args.output, rows, weights=args.weights, **meta)
    print(f"wrote {len(rows)} rows", *(f"left out, as it is unfinished: {what}" for what in unfinished), sep="\n")


if __name__ == "__main__":
    main()
