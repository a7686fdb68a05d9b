"""Makes the tables of docs/comparison.md that set kvpress's presses beside dense and calibrated layers.

Run by ``python benchmarks/show_pages.py``.
"""

from statistics import fmean

from show_real import points, questions, shown
from show_tables import load, prose, table

MISSING = "**Not measured here:** none of its methods was run beside ours.\n"
#: What the presses read, by whether the question was apart.
READ = {False: "the presses read the question too", True: "compressed before the question is read"}


def press_tables():
    """Return a table for each length and way to read the question; a sentence where nothing was measured."""
    data = load("press_quality")
    if not data["rows"]:
        return MISSING
    groups = {}
    for row in data["rows"]:
        groups.setdefault((row["seq_len"], row["question_apart"]), []).append(row)
    parts = []
    for (length, apart), rows in groups.items():
        kinds = ", ".join(dict.fromkeys(row["task"].replace("_", " ") for row in rows))
        what = f"{rows[0]['model']}, {length:,} tokens, {rows[0]['n']} samples each of {kinds}"
        parts += [prose(f"**{what}; {READ[apart]}:**"), length_table(rows)]
    return "\n" + "\n\n".join(part.strip("\n") for part in [*parts, prose(about(data["meta"]))]) + "\n\n"


def length_table(rows):
    """Make a line for each method and share, the largest shares first."""
    groups = {}
    for row in rows:
        groups.setdefault((row["method"], row["kept"], row["budget"]), []).append(row)
    dense = next(some for (method, *_), some in groups.items() if method == "dense")
    lines = [(share(some), name(some[0]), some) for some in groups.values()]
    ours = [(size, some) for size, _, some in lines if some[0]["method"] == "static-nll"]
    cells = []
    for size, title, some in sorted(lines, key=lambda line: -round(line[0], 2)):
        cells.append([title, f"{size:.2f}", f"{fmean(row['accuracy'] for row in some):.3f}"])
        cells[-1].append(cell(some, None if some is dense else dense))
        nearest = min(ours, key=lambda pair: abs(pair[0] - size), default=(0, None))[1]
        cells[-1].append(cell(some, None if some is dense or some is nearest else nearest))
    columns = [
        "KV cache ÷ dense's",
        "questions answered",
        "points beside dense",
        "beside the nearest calibrated layers",
    ]
    return table(["method", *columns], cells)


def share(rows):
    """Return the share of dense's KV cache that was kept."""
    return sum(row["kv_bytes"] for row in rows) / sum(row["baseline_kv_bytes"] for row in rows)


def name(row):
    """Name a row's method as the page does."""
    ours = {"dense": "dense", "static-nll": f"calibrated layers, budget {row['budget']}"}
    return ours.get(row["method"], f"`{row['method']}`")


def cell(rows, others):
    """Show the difference, where there is something to differ from."""
    return "" if others is None else shown(points(rows, others, questions(rows)))


def about(meta):
    device = "a CPU" if meta["device"] == "cpu" else meta["device"]
    return f"""
    kvpress {meta["settings"]["kvpress"]} on {device}, transformers {meta["transformers"]}, by
    `benchmarks/press_quality.py`, all in one run; intervals of 95 %.
    """
