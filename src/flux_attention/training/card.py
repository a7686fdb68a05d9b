"""Shows people what training reached: a section of the adapter's model card, and a plot."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from huggingface_hub import ModelCard
from jinja2 import Template

from flux_attention import adapters
from flux_attention.training.data import PackedExamples
from flux_attention.training.recipe import Recipe
from flux_attention.training.trainer import RouterTrainer

TEMPLATE = Path(__file__).with_name("card.md.jinja")


def _last(rows: list[dict[str, float]], name: str) -> list[dict[str, float]]:
    """Return the rows of a task class that stand for what training reached: as many as a tenth of all."""
    return [row for row in rows if f"{name}/msr" in row][-max(1, len(rows) // 10) :]


def plot(rows: list[dict[str, float]], recipe: Recipe, units: list[str], path: Path) -> None:
    """Plot each class's Ω_MSR, loss, multipliers over the steps; how often each layer or head ran full in the end."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    names = [name for name in recipe.targets if any(f"{name}/msr" in row for row in rows)]
    if not names:  # nothing was logged
        return
    with plt.rc_context({"svg.fonttype": "none", "font.size": 9}):
        figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
        for key, axis, title in (
            ("msr", axes[0, 0], "Ω_MSR" if recipe.budget else "Ω_MSR (dotted: target)"),
            ("lm_loss", axes[0, 1], "language-modelling loss, nats"),
            ("lambda1", axes[1, 0], "λ1 (dotted: λ2)"),
        ):
            for place, name in enumerate(names):
                points = [(row["step"], row[f"{name}/{key}"]) for row in rows if f"{name}/{key}" in row]
                axis.plot(*zip(*points, strict=True), color=f"C{place}", label=name, linewidth=1)
                if key == "msr" and not recipe.budget:
                    axis.axhline(recipe.targets[name], color=f"C{place}", linestyle=":", linewidth=1)
                elif key == "lambda1":
                    axis.plot([r["step"] for r in rows], [r[f"{name}/lambda2"] for r in rows], ":", color=f"C{place}")
            axis.set_title(title, size=9)
            axis.set_xlabel("step")
            axis.grid(alpha=0.25)
        axes[0, 0].legend(fontsize=8)
        rates = []
        for name in names:
            last = _last(rows, name)
            rates.append([sum(row[f"{name}/fa_rate_{unit}"] for row in last) / len(last) for unit in units])
        image = axes[1, 1].imshow(rates, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axes[1, 1].set_yticks(range(len(names)), names)
        axes[1, 1].set_xticks(range(len(units)), units, fontsize=7 if len(units) < 40 else 3, rotation=90)
        axes[1, 1].set_title("share of full attention at the end, by layer or head", size=9)
        figure.colorbar(image, ax=axes[1, 1])
        figure.savefig(path, facecolor="white", metadata={"Date": None})
        plt.close(figure)


def card(trainer: RouterTrainer, rows: list[dict[str, float]], data: PackedExamples) -> ModelCard:
    """Make the adapter's model card with what training reached, and how."""
    recipe, routing = trainer.recipe, trainer.routing
    classes = []
    for name, target in recipe.targets.items():
        if last := _last(rows, name):
            means = {key: fmean(row[f"{name}/{key}"] for row in last) for key in ("msr", "lm_loss")}
            ends = {key: rows[-1][f"{name}/{key}"] for key in ("lambda1", "lambda2")}
            classes.append({"name": name, "target": "drawn" if recipe.budget else target, **means, **ends})
    card = adapters.card(routing.config, recipe.config)  # the model as the routers were trained with it
    card.text += Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True).render(
        classes=classes,
        steps=trainer.state.global_step,
        batch_size=recipe.batch_size,
        trained=sum(parameter.numel() for parameter in routing.routers.parameters()),
        tokens=data.tokens,
        packs=len(data),
    )
    return card
