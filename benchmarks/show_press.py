"""Makes the tables of docs/comparison.md that set kvpress's presses beside dense and calibrated layers.

Run by ``python benchmarks/show_pages.py``.
"""

from show_real import LOOK_UPS, kept, losing, of, points, questions, result, shown, sparsity
from show_tables import load, prose, table

from flux_attention.evaluation import compare

MISSING = "**Not measured here:** none of its methods was run beside ours.\n"
#: What the presses read, by whether the question was apart.
READ = {False: "the presses read the question too", True: "compressed before the question is read"}


def press_tables():
    """Return a table for each length and way to read the question; a sentence where nothing was measured."""
    data = load("press_quality")
    if not data["rows"]:
        return MISSING
    by_length, meta = result()
    if data["meta"]["settings"]["text"] != meta["settings"]["text"]:
        raise ValueError("press_quality.json and quality_real.json hold answers to other questions: measure one again")
    groups = {}
    for row in data["rows"]:
        groups.setdefault((row["seq_len"], row["question_apart"]), []).append(row)
    parts = []
    for (length, apart), rows in groups.items():
        kinds = len({row["task"] for row in rows})
        title = f"**{length:,} tokens, {rows[0]['n']} samples of each of {kinds} kinds; {READ[apart]}:**"
        parts += [title, length_table(rows, by_length[length], length, meta["settings"]["sparse"])]
    return "\n" + "\n\n".join(part.strip("\n") for part in [*parts, prose(about(data["meta"]))]) + "\n\n"


def length_table(rows, ours, length, pattern):
    """Make a line for each method and share, the largest shares first."""
    groups = {}
    for row in rows:
        groups.setdefault((row["method"], row["kept"]), []).append(row)
    dense, tasks = groups.pop(("dense", 1.0)), {row["task"] for row in rows}
    ours = of(ours, tasks)
    sets = [some for key, some in compare.by_method(ours).items() if key[1] == "static-nll"]
    own = next(some for key, some in compare.by_method(ours).items() if key[1] == "dense")
    kinds = [questions(ours), [task for task in LOOK_UPS if task in tasks], losing(ours)]
    shares = [(kept(sparsity(some), length, pattern), some) for some in sets]
    lines = [
        (share, compare.label(some[0], {some[0]["routers"]: "calibrated"}), some, own, None) for share, some in shares
    ]
    for (method, _), some in groups.items():
        share = sum(row["kv_bytes"] for row in some) / sum(row["baseline_kv_bytes"] for row in some)
        nearest = min(shares, key=lambda pair: abs(pair[0] - share))[1]
        lines.append((share, f"`{method}`", some, dense, nearest))
    lines.sort(key=lambda line: -round(line[0], 2))
    cells = [
        [name, f"{share:.2f}", *(cell(some, base, each) for each in kinds), cell(some, nearest, kinds[0])]
        for share, name, some, base, nearest in lines
    ]
    columns = ["all kinds", "look-ups", "kinds that need full layers", "all kinds, beside calibrated layers"]
    return table(["points beside dense", "KV cache ÷ dense's", *columns], cells)


def cell(rows, others, families):
    """Show the difference over families, where there are any and something to differ from."""
    found = points(rows, others, families) if families and others is not None else None
    return "" if found is None else shown(found)


def about(meta):
    return f"""
    kvpress {meta["settings"]["kvpress"]} on {meta["device"]}, transformers {meta["transformers"]}, by
    `benchmarks/press_quality.py`. Each method's dense is of its own run; the last column is beside the set of
    calibrated layers with the nearest share.
    """
