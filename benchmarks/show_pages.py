"""Writes all generated pages and images, from the files under benchmarks/results/.

Run: ``python benchmarks/show_pages.py``. Writes a page beside each result file, the list of them, the tables between
``<!-- … -->`` marks in README and docs/, and docs/images/. Nothing is measured.
"""

import math

import show_blocks
import show_how
import show_idea
import show_press
import show_quality
import show_real
import show_serving
import show_shipped
import show_speed
from show_tables import RESULTS, ROOT, filled, load, prose, row_of, table

from flux_attention.evaluation.figures import STYLE

#: What each result file holds, and what writes it.
FILES = {
    "e2e_prefill": ("prefill of whole models, forced and routed", "flux-attention bench prefill --compile"),
    "e2e_decode": ("decode steps of whole models", "flux-attention bench decode --compile"),
    "ends": ("what deciding by a prompt's ends costs", "flux-attention bench ends --sparsities 0.75 --compile"),
    "vllm_dense": ("the same prompts and steps in vLLM's dense engine", "python benchmarks/vllm_dense.py"),
    "attention_prefill": ("one layer's prefill, by engine", "flux-attention bench attention"),
    "attention_decode": ("one layer's decode step, by engine", "flux-attention bench attention"),
    "serving": ("vLLM with routes beside stock vLLM", "python benchmarks/serving.py"),
    "serving_soak": ("what a server does with 10,000 requests", "python benchmarks/serving_soak.py --serve …"),
    "serving_soak_cpu": ("the same of 1,000, on a CPU", "python benchmarks/serving_soak.py --serve …"),
    "serving_scheduler": ("what vLLM's scheduler takes a step", "python benchmarks/serving_scheduler.py"),
    "e2e_blocks": ("prefill of whole models, block-sparse", "flux-attention bench blocks"),
    "blocks": ("one layer's block-sparse prefill", "flux-attention bench blocks"),
    "block_quality": ("what block-sparse prefill loses on a real model", "python benchmarks/block_quality.py"),
    "press_quality": ("kvpress's presses beside calibrated layers", "python benchmarks/press_quality.py"),
    "profile": ("where the time of a prompt and a step goes", "python benchmarks/profile_speed.py --compile"),
    "memory": ("bytes of KV caches, by arithmetic", "flux-attention bench memory"),
    "training": ("speed and memory of router training", "flux-attention bench training"),
    "packs": ("router training on packs of sequences", "flux-attention bench packs"),
    "cpu_prefill": ("the shipped model's prefill on a CPU", "python benchmarks/cpu_prefill.py"),
    "demo_quality": ("what the shipped model answers", "flux-attention eval shipped"),
    "ends_quality": ("routes by a prompt's ends beside those of the prefill", "python benchmarks/ends_quality.py"),
    "two_prompts": ("routes of two prompts: README's picture", "python benchmarks/two_prompts.py"),
    "quickstart": ("what the quick start's routers answer", "flux-attention eval shipped --routers runs/quickstart"),
    "quality_real": ("what a real model answers, calibrated and trained", "python benchmarks/real_models.py"),
    "quality_real_heads": ("routers by KV head and static heads on a real model", "python benchmarks/real_models.py"),
    "quality_real_small": ("the same of a smaller real model", "python benchmarks/real_models.py"),
    "quality": ("the study: routed, fixed and random layers", "python recipes/study/run.py evaluate"),
}


def index(pages):
    """List the result files."""
    lines = []
    for name, (what, command) in FILES.items():
        meta, rows = load(name)["meta"], load(name)["rows"]
        commits = dict.fromkeys(row.get("commit", meta["commit"])[:7] for row in [meta, *rows])
        shown = f"[{what}]({name}.md)" if name in pages else what
        source = f"{meta['device']}, {' and '.join(commits)}, {meta['date']}"
        lines.append([f"[{name}.json]({name}.json)", shown, f"`{command}`", source])
    about = """
    Numbers in the documentation come from these files; notes of trials say where one does not. A file says on what
    device, with which versions and at which commit it was measured, and each row holds its baseline of the same run.
    This list and the pages are written by `python benchmarks/show_pages.py`; do not edit. What the words mean is in
    the [glossary](../../docs/glossary.md), what the numbers mean in [performance.md](../../docs/performance.md),
    [quality.md](../../docs/quality.md) and [training.md](../../docs/training.md).
    """
    columns = ["file", "what it shows", "written by", "device, commit, date"]
    return f"# Result files\n\n{prose(about)}\n\n{table(columns, lines)}"


def speed_figures():
    """Return README's speed and memory in a cell each: headline and explanation. Ratios are rounded down."""
    facts = dict(shape="qwen3-8b", batch=1, baseline="own-dense", seq_len=2**18, sparsity=0.75)
    exact, blocks = (
        row_of("e2e_blocks", **facts, engine="flux-compile", full=name) for name in ("full", "block_sparse")
    )
    decode, memory = row_of("e2e_decode", **facts, method="static"), row_of("memory", **facts)
    smaller = memory["baseline_kv_bytes"] / memory["kv_bytes"]
    lost = show_blocks.beside_routing()
    folder = "benchmarks/results"
    return (
        (
            f"{rounded_down(exact['speedup'])} to {rounded_down(blocks['speedup'])} × faster prefill",
            f"256 K tokens in {exact['ms'] / 1e3:.1f} s instead of {exact['baseline_ms'] / 1e3:.1f}, and in"
            f" {blocks['ms'] / 1e3:.1f} where full layers read {100 * blocks['density']:.0f} % of their blocks"
            f" ([file]({folder}/e2e_blocks.json)), [at a price](docs/block-sparse.md#what-it-loses): {lost}; a decode"
            f" step in {decode['ms']:.1f} ms instead of {decode['baseline_ms']:.1f} ([file]({folder}/e2e_decode.md))",
        ),
        (
            f"{rounded_down(smaller)} × smaller KV cache",
            f"256 K tokens in {memory['kv_bytes'] / 1e9:.1f} GB instead of {memory['baseline_kv_bytes'] / 1e9:.1f}"
            f" ([file]({folder}/memory.md))",
        ),
    )


def rounded_down(ratio):
    """Return a ratio to a tenth that is not more than it, by its two digits."""
    return math.floor(10 * round(ratio, 2)) / 10


def key_figures():
    """Return README's three numbers."""
    cells = [*speed_figures(), show_shipped.key_figure()]
    return table([f"**{headline}**" for headline, _ in cells], [[explanation for _, explanation in cells]])


def pages():
    """Return {path in the repository: text} of all that is generated, but for the images."""
    own = {**show_speed.pages(), **show_quality.pages(), **show_real.pages(), **show_shipped.pages()}
    found = {f"benchmarks/results/{name}.md": text for name, text in {**own, "README": index(own)}.items()}
    marked = {
        "README.md": {"key figures": key_figures()},
        "docs/comparison.md": {"heads": show_quality.heads(), "presses": show_press.press_tables()},
        "docs/guide.md": {"ends": show_speed.ends_table()},
        "docs/performance.md": {"at a glance": show_speed.at_a_glance()},
        "docs/block-sparse.md": {
            "blocks, whole models": show_blocks.whole_table(),
            "blocks, one layer": show_blocks.layer_table(),
            "blocks, quality": show_blocks.quality_table(),
        },
        "docs/quality.md": {"in short": show_quality.brief()},
        "docs/real-models.md": {
            "aims": show_real.aims(),
            "layers": show_real.route_table(),
            "lengths": show_real.length_tables(),
            "aims of the small one": show_real.aims(show_real.SMALLER),
            "layers of the small one": show_real.route_table(show_real.SMALLER),
            "lengths of the small one": show_real.length_tables(show_real.SMALLER),
        },
        "docs/serving.md": {
            "speed": show_serving.speed_table(),
            "many": show_serving.many_table(),
            "load": show_serving.load_table(),
        },
        "docs/training.md": {
            "quick start": show_shipped.quickstart_table(),
            "speed": show_speed.training_table(),
            "packs": show_speed.packs_table(),
        },
    }
    for name, parts in marked.items():
        found[name] = filled((ROOT / name).read_text(encoding="utf-8"), parts)
    return found


def main():
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(STYLE)
    for show in (show_how, show_idea, show_quality, show_real, show_shipped, show_speed):
        show.images()
    for name, text in pages().items():
        (ROOT / name).write_text(text, encoding="utf-8")
    print(f"wrote the pages of {RESULTS.relative_to(ROOT)}, the tables of README and docs, and docs/images")


if __name__ == "__main__":
    main()
