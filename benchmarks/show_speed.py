"""Makes pages and plots of the speed and memory results that ``flux-attention bench`` writes to benchmarks/results/.

Run by ``python benchmarks/show_pages.py``. What has not been measured is left out.
"""

from show_tables import LABELS, label, load, page, row_of, save, table

#: Lengths of single layers that the pages show.
SHOWN = tuple(2**10 * thousands for thousands in (4, 32, 128, 256))
#: From the colour of full layers to that of sparse ones; readable on light and dark ground.
COLOURS = {0.0: "#d9561c", 0.25: "#b07d2b", 0.5: "#3d9950", 0.75: "#1f8a8a", 0.9: "#5b93c7"}
CONDITIONS = """
    Random bf16 weights in the sizes of the named model, sink 128 and window 1,024, routes forced unless
    routers are named, layers fused by `attach(..., compile=True)`. "Own dense" is the same code with all
    layers full, in the same run; "vLLM" its dense engine on the same card
    ([vllm_dense.json](vllm_dense.json)). Ω 0.9 is the nearest that whole layers allow. The JSON file has
    least and most of the times.
    """


def of_shape(name, shape):
    """Return a result file's rows of one shape, and their baselines: {facts of a row: {baseline: speed-up}}."""
    results = load(name)
    rows, speedups = {}, {}
    for row in results["rows"]:
        if row["shape"] == shape and "ms" in row:
            key = (row["seq_len"], row["batch"], row["sparsity"], row["method"])
            rows.setdefault(key, row)
            speedups.setdefault(key, {})[row.get("baseline")] = speedup(row)
    return results["meta"], rows, speedups


def speedup(row):
    """Compute a row's speed-up over its baseline; the file's own is rounded."""
    return row["baseline_ms"] / row["ms"] if "baseline_ms" in row else None


def times(value):
    return "" if value is None else f"{value:.2f}"


def both(values, form=".2f"):
    texts = ["–" if value is None else f"{value:{form}}" for value in values]
    return "" if set(texts) == {"–"} else ", ".join(texts)


def sequences(batch):
    return "one prompt" if batch == 1 else f"{batch} prompts at a time"


def prefill_page():
    parts = [
        CONDITIONS,
        """
        The floor is the counted FLOPs at the rate of a large matrix product of the same run; it is a
        yardstick, no bound. "Peak" is the most memory that was allocated. A prompt of 8 K was timed five
        times, of 16 K three times, more often below, and once from 32 K up; of eight prompts once from 8 K
        up.
        """,
    ]
    for shape in LABELS:
        _, rows, speedups = of_shape("e2e_prefill", shape)
        for batch in sorted({key[1] for key in rows}):
            own = {key: row for key, row in rows.items() if key[1] == batch}
            parts.append(f"## {LABELS[shape]}'s sizes, {sequences(batch)}")
            parts += prefill_tables(own, speedups)
    return page("e2e_prefill", "Prefill of whole models", *parts)


def prefill_tables(rows, speedups):
    """Make the tables of one batch size: times, ratios, and what routers cost."""
    forced = {(key[0], key[2]): row for key, row in rows.items() if row["method"] != "routed"}
    faster = {(key[0], key[2]): speedups[key] for key, row in rows.items() if row["method"] != "routed"}
    routed = {(key[0], key[2]): row for key, row in rows.items() if row["method"] == "routed"}
    lengths, ratios = (sorted({key[place] for key in forced}) for place in (0, 1))
    yield table(
        ["tokens", *(f"Ω {ratio}, ms" for ratio in ratios)],
        [[label(n), *(f"{forced[n, r]['ms']:.0f}" if (n, r) in forced else "" for r in ratios)] for n in lengths],
    )
    yield "How many times faster than own dense, than vLLM, the floor, and memory:"
    yield table(
        [
            "tokens",
            *(f"× at Ω {ratio}" for ratio in ratios[1:]),
            "× vLLM at Ω 0, 0.75",
            "floor at Ω 0.75, ms",
            "peak at Ω 0, 0.75, GB",
        ],
        [
            [
                label(n),
                *(times(faster.get((n, r), {}).get("own-dense")) for r in ratios[1:]),
                both(faster.get((n, r), {}).get("vllm-dense") for r in (0.0, 0.75)),
                f"{forced[n, 0.75]['floor_ms']:.0f}" if (n, 0.75) in forced else "",
                both((forced[n, r]["peak_bytes"] / 1e9 if (n, r) in forced else None for r in (0.0, 0.75)), ".1f"),
            ]
            for n in lengths
        ],
    )
    yield "With routers that decide so, timed in turn with forced routes, against own dense:"
    yield table(
        ["tokens", *(f"routers cost at Ω {r}" for r in (0.0, 0.75)), *(f"× at Ω {r}, with routers" for r in ratios)],
        [
            [
                label(n),
                *(f"{100 * (routed[n, r]['ms'] / forced[n, r]['ms'] - 1):.1f} %" for r in (0.0, 0.75)),
                *(times(speedup(routed[n, r])) for r in ratios),
            ]
            for n in sorted({n for n, _ in routed})
            if {(n, 0.0), (n, 0.75)} <= set(routed)
        ],
    )


def decode_page():
    meta = load("e2e_decode")["meta"]
    parts = [
        CONDITIONS,
        f"""
        Milliseconds of a step, a replay of the captured graph, and in brackets how many times its floor:
        the bytes of weights and KV cache at the rate of a large copy, {meta["copy_tbps"]:.2f} TB/s here. A
        copy writes half of its bytes, so the floor is a yardstick and no bound. `generate` is what a token
        takes in `model.generate`, greedy, as the difference of two generations. Eight dense caches of 128 K
        do not fit into the card.
        """,
    ]
    for shape in LABELS:
        _, rows, speedups = of_shape("e2e_decode", shape)
        found = {(key[1], key[0], key[2]): (row, speedups[key]) for key, row in rows.items()}
        for batch in sorted({key[0] for key in found}):
            parts += [f"## {LABELS[shape]}'s sizes, batch {batch}", decode_table(found, batch)]
    return page("e2e_decode", "Decode steps of whole models", *parts)


def decode_table(found, batch):
    lengths, ratios = (sorted({key[place] for key in found}) for place in (1, 2))
    lines = []
    for n in lengths:
        cells = [found.get((batch, n, ratio)) for ratio in ratios]
        if any(cells):
            texts = [f"{c[0]['ms']:.2f} ({c[0]['over_floor']:.2f})" if c else "" for c in cells]
            faster = found.get((batch, n, 0.75), ({}, {}))[1]
            tokens = [found.get((batch, n, ratio), ({}, {}))[0].get("generate_ms") for ratio in (0.0, 0.75)]
            lines.append(
                [label(n), *texts, *(times(faster.get(f"{base}-dense")) for base in ("own", "vllm")), both(tokens)]
            )
    more = ["× dense at Ω 0.75", "× vLLM at Ω 0.75", "`generate` at Ω 0, 0.75, ms"]
    return table(["tokens", *(f"Ω {ratio}" for ratio in ratios), *more], lines)


def training_table():
    return table(
        [
            "tokens",
            "gradients",
            "tokens/s",
            "peak, GB",
            "of a matrix product's rate",
            "the paper's run on 8 such GPUs, hours",
        ],
        [
            [
                label(row["seq_len"]),
                {"flux": "one backward", "plain": "plain formula"}[row["engine"]],
                f"{row['tokens_per_s']:,}",
                f"{row['peak_bytes'] / 1e9:.1f}",
                f"{row['of_matmul']:.3f}",
                f"{row['paper_hours']:.1f}",
            ]
            for row in load("training")["rows"]
            if "ms" in row
        ],
    )


def packs_table():
    return table(
        ["model's sizes", "tokens", "sequences", "in", "checkpointing", "tokens/s", "least and most ms", "peak, GB"],
        [
            [
                row["shape"],
                label(row["seq_len"]),
                row["batch"],
                {"flux": "one pack", "alone": "a call each"}[row["engine"]],
                "on" if row["checkpointing"] else "off",
                f"{row['tokens_per_s']:,}",
                f"{row['ms_min']:,.0f} to {row['ms_max']:,.0f}",
                f"{row['peak_bytes'] / 1e9:.1f}",
            ]
            for row in load("packs")["rows"]
        ],
    )


def ends_table():
    """Make guide.md's table: what a prompt takes by when its routes are decided."""
    lines = []
    for base in (row for row in load("ends")["rows"] if row["method"] == "static"):
        cells = [label(base["seq_len"]), f"{base['ms']:,.0f} ({base['ms_min']:,.0f} to {base['ms_max']:,.0f})"]
        for method in ("routed", "routed-ends"):
            row = row_of("ends", shape=base["shape"], seq_len=base["seq_len"], method=method)
            more = row["ms"] - base["ms"]
            cells.append(f"{row['ms']:,.0f} ({row['ms_min']:,.0f} to {row['ms_max']:,.0f})")
            cells.append(f"{more:+.1f} ({100 * more / base['ms']:+.1f} %)".replace("-0.0 ", "0.0 "))
        lines.append(cells)
    columns = ["in the prefill, ms", "more, ms", "by the ends, ms", "more, ms"]
    return table(["tokens", "forced, ms", *columns], lines)


def attention_page(name, title, rate, *parts):
    body = table(
        ["tokens", "batch", "engine, method", "ms", rate[1], "baseline", "its ms", "ratio"],
        [
            [
                label(row["seq_len"]),
                row["batch"],
                f"{row['engine']}, {row['method']}" + (f", last {row['queries']}" if "queries" in row else ""),
                f"{row['ms']:.4f}",
                row.get(rate[0], ""),
                row.get("baseline", ""),
                f"{row['baseline_ms']:.4f}" if "baseline" in row else "",
                times(speedup(row)),
            ]
            for row in load(name)["rows"]
            # Some lengths, heads at a share of a half, and cuDNN's of SDPA's backends: the file has all.
            if row["seq_len"] in SHOWN
            and row.get("baseline") != "sdpa-flash"
            and (row["method"] != "head" or row["sparsity"] == 0.5)
        ],
    )
    return page(name, title, *parts, body)


ATTENTION = {
    "attention_prefill": (
        "One layer's prefill",
        ("tflops", "TFLOP/s"),
        """
        Qwen3-8B's and Llama-3.1-8B's attention (32 query heads, 8 KV heads, head dim 128), bf16, in a CUDA
        graph. TFLOP/s count exactly the query-key pairs that the pattern asks for. "flex" is compiled
        FlexAttention with the same pattern, its block mask built beforehand. "head" has half of the KV
        heads of the layer sparse, "routed" half of the layers. "last n" are dense queries of a prompt's
        last n tokens, over all keys, against cuDNN reading the same keys without the causal mask.
        """,
    ),
    "attention_decode": (
        "One layer's decode step",
        ("tbps", "TB/s"),
        """
        Qwen3-8B's and Llama-3.1-8B's attention, bf16, in a CUDA graph; the kernel also stores the new
        token, and reads rows of any lengths wherever they lie, where SDPA has them in one tensor. "routed"
        at batch 8 is a batch whose sequences are full and sparse in turn. "flex" is FlexAttention with its
        block mask rebuilt in every step, both launched one by one. "head" is the same share of work saved
        by making half of the KV heads of every layer sparse, against half of the layers ("routed").
        """,
    ),
}


def profile_page():
    parts = [
        "Qwen3-8B's sizes, batch 1, under the profiler, whose own time is in it: GPU milliseconds by kind of kernel."
    ]
    for row in load("profile")["rows"]:
        alone = f", {row['unprofiled_ms']:.2f} without the profiler" if "unprofiled_ms" in row else ""
        phase = {"prefill": "Prefill", "decode": "A decode step"}[row["phase"]]
        parts.append(f"## {phase} at {label(row['seq_len'])}, Ω {row['sparsity']}: {row['ms']:.2f} ms{alone}")
        kinds = {**row["kinds"], "idle": row["idle_ms"]}
        lines = [[kind, f"{ms:.2f}", f"{100 * ms / row['ms']:.1f} %"] for kind, ms in kinds.items()]
        parts.append(table(["kind", "ms", "share"], lines))
    return page("profile", "Where the time goes", *parts)


def memory_page():
    rows = load("memory")["rows"]
    parts = [
        f"""
        By arithmetic: weights and KV cache of one sequence, sink 128 and window 1,024, bf16, without the
        activations of prefill. "Longest" is the longest context beside the weights in {
            rows[0]["gpu_bytes"] / 1e9:.0f} GB.
        """
    ]
    for shape in LABELS:
        found = {(row["seq_len"], row["sparsity"]): row for row in rows if row["shape"] == shape}
        lengths, ratios = (sorted({key[place] for key in found}) for place in (0, 1))
        lines = [
            [label(n), *(f"{found[n, r]['kv_bytes'] / 1e9:.2f}" if (n, r) in found else "" for r in ratios)]
            for n in lengths
        ]
        longest = ["longest", *(f"{found[lengths[0], r]['longest_context'] / 1e6:.2f} M" for r in ratios)]
        parts += [f"## {LABELS[shape]}'s sizes", table(["tokens", *(f"Ω {r}, GB" for r in ratios)], [*lines, longest])]
    return page("memory", "Memory of the KV cache", *parts)


def cpu_page():
    rows = load("cpu_prefill")["rows"]
    spread = "{:.1f} ({:.1f} to {:.1f})".format
    lines = [
        [
            f"{row['seq_len']:,}",
            row["sparsity"],
            spread(*(row[name] / 1e3 for name in ("ms", "ms_min", "ms_max"))),
            spread(*(row[name] / 1e3 for name in ("baseline_ms", "baseline_ms_min", "baseline_ms_max"))),
            times(speedup(row)),
            f"{row['kv_bytes'] / 2**20:.0f}",
            f"{row['baseline_kv_bytes'] / 2**20:.0f}",
        ]
        for row in rows
    ]
    columns = ["tokens", "Ω_MSR", "s", "own dense, s", "×", "KV cache, MiB", "own dense, MiB"]
    about = f"""
        The shipped model in float32 on {load("cpu_prefill")["meta"]["threads"]} CPU threads, random tokens,
        forced routes, plain PyTorch: by `python benchmarks/cpu_prefill.py`. Seconds are medians, with least
        and most.
        """
    return page("cpu_prefill", "Prefill on a CPU", about, table(columns, lines))


def pages():
    """Return {name of the result file: text} of all pages."""
    about = """
        One sequence forward and backward through the sizes of Qwen3-8B with random bf16 weights, every
        other layer full, the loss on its last 512 tokens, gradient checkpointing on, layers not compiled:
        by `flux-attention bench training`. [training.md](../../docs/training.md#speed-and-memory) says what
        the columns mean.
        """
    return {
        "e2e_prefill": prefill_page(),
        "e2e_decode": decode_page(),
        **{name: attention_page(name, *facts) for name, facts in ATTENTION.items()},
        "profile": profile_page(),
        "memory": memory_page(),
        "training": page("training", "Training of routers", about, training_table()),
        "cpu_prefill": cpu_page(),
    }


def at_a_glance():
    """Make performance.md's table: prefill, decode and KV cache at Ω 0.75 over length."""
    (_, prefills, faster), (_, steps, quicker) = (of_shape(name, "qwen3-8b") for name in ("e2e_prefill", "e2e_decode"))
    lines = []
    for n in (2**10 * thousands for thousands in (4, 8, 32, 128, 256)):
        dense, some = (n, 1, 0.0, "dense"), (n, 1, 0.75, "static")
        memory = row_of("memory", shape="qwen3-8b", seq_len=n, sparsity=0.75)
        lines.append(
            [
                label(n),
                f"{prefills[dense]['ms'] / 1e3:.2f}, {prefills[some]['ms'] / 1e3:.2f}",
                both(faster[some].get(base) for base in ("own-dense", "vllm-dense")),
                f"{steps[dense]['ms']:.1f}, {steps[some]['ms']:.1f}",
                both(quicker[some].get(base) for base in ("own-dense", "vllm-dense")),
                f"{memory['baseline_kv_bytes'] / 1e9:.2f}, {memory['kv_bytes'] / 1e9:.2f}",
            ]
        )
    columns = ["prefill, s", "× dense, vLLM", "decode step, ms", "× dense, vLLM", "KV cache, GB"]
    return table(["tokens", *columns], lines)


def plot(name, title, y_label, series, log_y=False, reference=None):
    """Plot lines over length: {legend: (colour, style, {tokens: value})}."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for legend, (colour, style, points) in series.items():
        axes.plot(list(points), list(points.values()), style, color=colour, label=legend, marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    lengths = sorted({tokens for _, _, points in series.values() for tokens in points})
    axes.set_xticks(lengths, map(label, lengths))
    axes.minorticks_off()
    if log_y:
        axes.set_yscale("log")
    if reference is not None:
        axes.axhline(reference, color="#bbbbbb", linewidth=1)
    axes.set(xlabel="tokens", ylabel=y_label)
    axes.set_title(title, size=11)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9 if len(series) < 8 else 7)
    save(figure, name)


def plot_prefill():
    meta, rows, speedups = of_shape("e2e_prefill", "qwen3-8b")
    series = {}
    for ratio in (0.25, 0.5, 0.75, 0.9):
        for base, name, style in (("own-dense", "own dense", "-"), ("vllm-dense", "vLLM dense", ":")):
            forced = {key[0]: speedups[key].get(base) for key in rows if key[1:] == (1, ratio, "static")}
            points = {n: value for n, value in sorted(forced.items()) if value}
            series[f"Ω {ratio} against {name}"] = (COLOURS[ratio], style, points)
    plot("prefill_speedup", f"Prefill, Qwen3-8B's shape, {meta['device']}", "speed-up", series, reference=1.0)


def plot_decode():
    meta, rows, _ = of_shape("e2e_decode", "qwen3-8b")
    series = {}
    for ratio in (0.0, 0.5, 0.75):  # more would be hard to read
        own = {key[0]: row for key, row in sorted(rows.items()) if key[1:3] == (1, ratio)}
        series[f"Ω {ratio}"] = (COLOURS[ratio], "-", {n: row["ms"] for n, row in own.items()})
        series[f"Ω {ratio}, floor"] = (COLOURS[ratio], ":", {n: row["floor_ms"] for n, row in own.items()})
    wanted = {"phase": "decode", "shape": "qwen3-8b", "batch": 1}
    vllm = {row["seq_len"]: row["ms"] for row in load("vllm_dense")["rows"] if wanted.items() <= row.items()}
    series["vLLM, dense"] = ("#8a8a8a", "--", vllm)
    plot("decode_floor", f"One decode step, batch 1, Qwen3-8B's shape, {meta['device']}", "ms", series)


def plot_memory():
    series = {}
    for row in load("memory")["rows"]:
        if row["shape"] == "qwen3-8b":
            colour = COLOURS[row["sparsity"]]
            series.setdefault(f"Ω {row['sparsity']}", (colour, "-", {}))[2][row["seq_len"]] = row["kv_bytes"] / 1e9
    plot("kv_bytes", "KV cache of one sequence, Qwen3-8B's shape, bf16", "GB", series, log_y=True)


def images():
    """Draw the plots of performance.md."""
    plot_prefill()
    plot_decode()
    plot_memory()
