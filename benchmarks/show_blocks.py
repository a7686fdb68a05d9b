"""Makes the tables of block-sparse prefill in docs/block-sparse.md: its speed, and what it loses.

Run by ``python benchmarks/show_pages.py``.
"""

from statistics import fmean

from block_quality import ALWAYS, RULE
from show_real import points, shown
from show_tables import load, table

from flux_attention.evaluation import compare

#: What the columns of whole models are: the full layers' pattern, and whether three of four layers are sparse.
KINDS = {
    ("full", False): "all layers exact",
    ("full", True): "three of four sparse, others exact",
    ("block_sparse", True): "three of four sparse, others block-sparse",
    ("block_sparse", False): "all block-sparse",
}


#: What one layer's selection is beside: the call of cuDNN, or what full layers run.
EXACT = {"sdpa-cudnn": "cuDNN, causal", "own-dense": "exact"}


#: Share of blocks at which the rule for short prompts expects selection to win: thresholds that select a fifth of
#: look-ups' blocks at 16,384 tokens select up to 36 % of prose's, and of shorter prompts more.
RULE_DENSITY = 0.4


def whole_table():
    """Return prompts of whole models, by what full layers do."""
    rows = load("e2e_blocks")["rows"]
    lines = []
    for engine, length in sorted({(row["engine"], row["seq_len"]) for row in rows}):
        mine = [row for row in rows if (row["engine"], row["seq_len"]) == (engine, length)]
        found = {(row["full"], row["sparsity"] > 0): row for row in mine}
        density = found["block_sparse", True]["density"]
        cells = [f"{found[kind]['ms'] / 1000:.3g} (× {found[kind]['speedup']:.2f})" for kind in KINDS]
        name = f"{length // 1024} K" + (", compiled" if engine == "flux-compile" else "")
        lines.append([name, f"{density:.0%}", *cells])
    return table(["tokens", "blocks selected", *(f"{name}, s" for name in KINDS.values())], lines)


def layer_table():
    """Return one layer's search and attention."""
    rows = load("blocks")["rows"]
    lines = [
        [
            f"{row['seq_len'] // 1024} K", f"{row['select']}, {row['threshold']:.4g}", f"{row['density']:.1%}",
            EXACT[row["baseline"]], digits(row["baseline_ms"]),
            digits(row["search_ms"]), f"{row['search_share']:.1%}", digits(row["attend_ms"]), f"{row['tflops']:.0f}",
            f"× {row['speedup']:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    columns = [
        "tokens", "rule", "blocks selected", "beside", "ms", "search, ms", "of that", "attention, ms", "TFLOP/s",
        "faster",
    ]  # fmt: skip
    return table(columns, lines)


def digits(ms):
    """Write milliseconds with three digits, or as many as whole ones need."""
    return f"{ms:.{0 if ms >= 100 else 1 if ms >= 10 else 2}f}"


def faster_from(rows):
    """
    Return the shortest length from which on one layer's selection is faster than its exact attention; else None.

    By its search, and its attention at ``RULE_DENSITY``, which takes as long as it has blocks.
    """
    wins = {}
    for row in rows:
        if row["baseline"] == "own-dense":
            wins[row["seq_len"]] = wins.get(row["seq_len"], True) and beats(row)
    found = None
    for length in sorted(wins, reverse=True):
        if not wins[length]:
            break
        found = length
    return found


def beats(row):
    """Whether a selection of ``RULE_DENSITY`` would take less time than any exact one did."""
    return row["search_ms"] + row["attend_ms"] * RULE_DENSITY / row["density"] < row["baseline_ms_min"]


def quality_table():
    """Return what selections lose on real models, beside exact attention of the same layers."""
    groups = {}
    for row in load("block_quality")["rows"]:
        if row.get("always", ALWAYS) != ALWAYS:  # by a former rule
            continue
        kind = row["model"].split("/")[-1], row["seq_len"], row["sparsity"], row["n"], row["text"], row.get("routers")
        groups.setdefault((kind, tuple(str(row.get(key)) for key in RULE)), []).append(row)
    lines = []
    exact_rule = ("None",) * len(RULE)
    chosen = {(kind, rule): rows for (kind, rule), rows in groups.items() if rule != exact_rule}
    for (kind, rule), rows in sorted(chosen.items(), key=lambda item: (*item[0][0][:4], mean(item[1], "density"))):
        (model, length, sparsity, samples, *_), exact = kind, groups[kind, exact_rule]
        of = dict(zip(RULE, rule, strict=True))
        name = f"{of['select']}, {of['threshold']}" + (f", stride {of['stride']}" if of["stride"] != "16" else "")
        name += ", corrected" if of["correct"] == "True" else ""
        asked = [row["task"] for row in rows if "accuracy" in row]
        answers = ["–"] * 4
        if asked:
            family, lost = worst(rows, exact, asked)
            some = "" if len(asked) == 5 else f" ({len(asked)} kinds)" if len(asked) > 1 else " (1 kind)"
            answers = [
                f"{mean(rows, 'density'):.1%}", f"{mean(rows, 'recall'):.3f}, {mean(rows, 'output_error'):.3f}",
                f"{shown(points(rows, exact, asked))}{some}", f"{shown(lost)} ({family})",
            ]  # fmt: skip
        lines.append([
            f"{model.split('-')[0]}, {length // 1024} K", f"{sparsity:.0%}", name, samples,
            *answers, *_prose(rows, exact),
        ])  # fmt: skip
    columns = [
        "model, tokens", "layers sparse", "rule, threshold", "samples", "blocks selected", "recall, error",
        "look-ups, points beside exact", "the worst kind", "of prose: blocks", "perplexity, ratio",
    ]  # fmt: skip
    return table(columns, lines)


#: What is said of block-sparse layers beside sparse ones: of which rows, and of which rule.
BESIDE = dict(model="Qwen/Qwen2.5-Coder-0.5B-Instruct", seq_len=16384, sparsity=0.5, n=100, text="77644e3a2705")
BESIDE_RULE = dict(select="maximum", threshold=0.025, always=ALWAYS)


def beside_routing():
    """Say what look-ups lose where half of the layers are sparse and the others select, by default."""
    rows = [row for row in load("block_quality")["rows"] if BESIDE.items() <= row.items() and "accuracy" in row]
    exact = [row for row in rows if row["full"] == "full"]
    ours = [row for row in rows if BESIDE_RULE.items() <= row.items()]
    asked = [row["task"] for row in ours]
    family, lost = worst(ours, exact, asked)
    blocks = f"{100 * mean(ours, 'density'):.0f} %"
    return (
        f"at 16 K, half of the layers sparse and {blocks} of the others' blocks read, look-ups of a 0.5 B model"
        f" change by {shown(points(ours, exact, asked))} points beside exact full layers, the worst kind by"
        f" {shown(lost)} (at 256 K none were asked)"
    )


def _prose(rows, exact):
    """Return the share of blocks and the perplexity beside exact attention's."""
    found = [row for row in rows if row["task"] == "prose"]
    if not found:
        return "–", "–"
    ratio, width = compare.difference(found, [row for row in exact if row["task"] == "prose"])[1]
    return f"{found[0]['density']:.1%}", f"{ratio:.4f} ± {width:.4f}"


def mean(rows, name):
    """Return the mean of what rows hold under a name, over the look-ups, or of prose where there are none."""
    return fmean([row[name] for row in rows if "accuracy" in row] or [row[name] for row in rows])


def worst(rows, exact, families):
    """Return the family that loses most, and its difference."""
    found = {family: points(rows, exact, [family]) for family in families}
    return min(found.items(), key=lambda item: item[1][0])
