"""The command line: thin, every command calls public functions. Heavy imports happen inside commands."""

from __future__ import annotations

import json
import os
import platform
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Full or sparse attention, decided per input and layer, for frozen Hugging Face language models.",
)
out, err = Console(), Console(stderr=True)
_debug = False

Model = Annotated[
    str, typer.Argument(help="Directory or Hub id of a causal LM; 'shipped' for the one that comes along.")
]
Text = Annotated[Optional[str], typer.Argument(help="File with the prompt, or - for standard input.")]  # noqa: UP045
Routers = Annotated[Optional[str], typer.Option(help="Directory or Hub id of a router adapter.")]  # noqa: UP045
Force = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Ignore the routers: 'full', 'sparse', a ratio with a point (0.75), or the full layers (3,7)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Device = Annotated[Optional[str], typer.Option(help="Device; default: cuda if there is one.")]  # noqa: UP045
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's own.")]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False):
    global _debug
    _debug = debug


class _UserError(Exception):
    """Something that the user can mend."""


def run() -> None:
    """Entry point: errors are one line on standard error; exit codes are 0, 1 (failed), 2 (usage), 130 (Ctrl-C)."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # newer versions of typer catch Ctrl-C themselves
            raise KeyboardInterrupt
        sys.exit(code or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted")
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error of click, or of typer's copy of it
            error.show()
            sys.exit(error.exit_code)
        if _debug:
            traceback.print_exc()
        else:
            text = " ".join(str(error).split()) or type(error).__name__
            kind = "" if isinstance(error, (_UserError, ValueError)) else f"{type(error).__name__}: "
            if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
                kind, text = "", f"not enough memory ({text[:120]}); use a shorter prompt, a smaller dtype, or routers"
            err.print(f"[bold red]error:[/] {escape(kind + text)}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _read(source: str | None) -> str:
    """The prompt, without the newline that editors put at a file's end."""
    if source in (None, "-"):
        if source is None and sys.stdin.isatty():
            raise _UserError("no prompt: name a file, or - to read standard input")
        source, content = "standard input", sys.stdin.buffer.read()
    else:
        path = Path(source)
        if not path.exists() or path.is_dir():
            raise _UserError(f"{source} is not a file; name a text file, or - for standard input")
        content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _UserError(f"{source} is not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise _UserError(f"the prompt in {source} is empty")
    return text.removesuffix("\n")


def _force(spec: str | None) -> Any:
    from flux_attention.routes import read_spec

    return None if spec is None else read_spec(spec)


def _load_model(model: str, device: str | None, dtype: str):
    """Model and tokenizer."""
    with err.status(f"loading {escape(model)}"):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        from flux_attention import named

        logging.disable_progress_bar()
        path = named.model_path(model)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device.split(":")[0] not in ("cpu", "cuda", "mps", "xpu"):
            raise _UserError(f"device is {device!r}, expected cpu, cuda, cuda:N, mps or xpu")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise _UserError(f"device {device} was asked for, but PyTorch sees no CUDA GPU; use --device cpu")
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise _UserError(f"dtype is {dtype!r}, expected float32, bfloat16, float16 or auto")
        try:
            loaded = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
            loaded.config.name_or_path = named.model_name(model)
            return loaded, AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise _UserError(
                f"cannot load {path!r} as a causal LM: {str(error).strip().splitlines()[0][:200]}"
            ) from None


def _load(model: str, routers: str | None, device: str | None, dtype: str):
    """Model, tokenizer and attached routers."""
    loaded, tokenizer = _load_model(model, device, dtype)
    with err.status("attaching routers"):
        from flux_attention import attach, named

        routers = routers or ("shipped" if model == "shipped" else None)
        return loaded, tokenizer, attach(loaded, routers and named.adapter_path(routers))


def _encode(tokenizer, text: str, model, new_tokens: int = 0):
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    from flux_attention.attach import max_positions

    most = max_positions(model)
    if most and ids.shape[1] + new_tokens > most:
        wanted = f" and {new_tokens} are to be generated" if new_tokens else ""
        raise _UserError(f"the prompt has {ids.shape[1]} tokens{wanted}, the model reads at most {most}; shorten it")
    return ids


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


@app.command()
def inspect(
    model: Model,
    text: Text = None,
    routers: Routers = None,
    force: Force = None,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
):
    """Show how a prompt is routed: full and sparse layers, sparsity ratios, bytes of the KV cache."""
    import torch

    from flux_attention.cache import dense_kv_bytes, kv_bytes

    prompt, routes = _read(text), _force(force)
    loaded, tokenizer, routing = _load(model, routers, device, dtype)
    ids = _encode(tokenizer, prompt, loaded)
    with (
        torch.no_grad(),
        err.status(f"prefilling {ids.shape[1]} tokens"),
        routing.force(routes),
    ):
        cache = loaded.get_decoder()(ids, use_cache=True).past_key_values
    held, dense = kv_bytes(cache), dense_kv_bytes(cache)
    if as_json:
        print(json.dumps({"model": model, **routing.routes.to_dict(), "kv_bytes": held, "baseline_kv_bytes": dense}))
        return
    out.print(routing.routes)
    out.print(f"{ids.shape[1]} tokens; KV cache {_mib(held)}, dense {_mib(dense)}", highlight=False)


@app.command()
def generate(
    model: Model,
    text: Text = None,
    routers: Routers = None,
    force: Force = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
):
    """Continue a prompt (greedily), printing text as it comes."""
    import torch
    from transformers import TextStreamer

    from flux_attention import kv_bytes

    prompt, routes = _read(text), _force(force)
    loaded, tokenizer, routing = _load(model, routers, device, dtype)
    ids = _encode(tokenizer, prompt, loaded, max_new_tokens)
    status = err.status(f"prefilling {ids.shape[1]} tokens")

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False):
            status.stop()  # the first text is there
            super().on_finalized_text(text, stream_end)

    streamer = None if as_json else Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with status, torch.no_grad(), routing.force(routes):
        result = loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=streamer,
            return_dict_in_generate=True,
        )
    if as_json:
        new = result.sequences[0, ids.shape[1] :]
        print(
            json.dumps(
                {
                    "model": model,
                    "text": tokenizer.decode(new, skip_special_tokens=True),
                    "tokens": len(new),
                    **routing.routes.to_dict(),
                    "kv_bytes": kv_bytes(result.past_key_values),
                }
            )
        )
    else:
        err.print(routing.routes)


@app.command()
def info(as_json: Json = False):
    """Versions, device and kernels."""
    import torch

    import flux_attention
    from flux_attention.evaluation.results import environment
    from flux_attention.kernels import has_triton

    env = environment()
    facts = {
        "flux_attention": flux_attention.__version__,
        "python": platform.python_version(),
        **{name: env[name] for name in ("torch", "transformers", "triton", "device")},
        "cuda": torch.version.cuda,
        "kernels": ["reference (PyTorch, any device)"] + ["triton"] * has_triton(torch.device("cuda")),
    }
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    out.print(table)


def _numbers(text: str, kind: type, least: float, most: float) -> list:
    """Numbers separated by commas; lengths may end in K."""
    try:
        numbers = [kind(float(part[:-1]) * 1024) if part[-1] in "kK" else kind(part) for part in text.split(",")]
    except (ValueError, IndexError):
        raise _UserError(f"{text!r} is not a list of numbers such as 1K,32K or 0.5,0.75") from None
    if not all(least <= number <= most for number in numbers):
        raise _UserError(f"{text!r} has a number that is not between {least} and {most}")
    return numbers


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="attention, prefill, decode, training or memory.", show_default=False)],
    shapes: Annotated[str, typer.Option(help="Sizes of the model: qwen3-8b, llama-3.1-8b.")] = "qwen3-8b",
    lengths: Annotated[str, typer.Option(help="Tokens.")] = "1K,2K,4K,8K,16K,32K,64K,128K,256K",
    sparsities: Annotated[str, typer.Option(help="Forced Ω_MSR.")] = "0,0.25,0.5,0.75,0.9",
    batches: Annotated[str, typer.Option(help="attention, prefill, decode: sequences together.")] = "1,8",
    compile: Annotated[bool, typer.Option(help="prefill, decode: layers fused by torch.compile.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="prefill, training: times at least.")] = 3,
    gpu_gb: Annotated[float, typer.Option(help="memory: 10⁹ bytes to fit into.")] = 141.0,
    output: Annotated[Optional[Path], typer.Option(help="Folder for JSON, written after every row.")] = None,  # noqa: UP045
):
    """Measure speed and memory on this GPU, with random weights, against dense attention in the same run."""
    import flux_attention

    folder = Path(flux_attention.__path__[0]).parents[1] / "benchmarks"
    if not (folder / "speed").is_dir():
        raise _UserError(
            "bench runs from a checkout only, as benchmarks/ is not in the installed package: clone the repository, "
            "and in it run pip install -e ."
        )
    sys.path.insert(0, str(folder))
    from speed.bench import bench as measure

    numbers = _numbers(lengths, int, 1, 2**24), _numbers(sparsities, float, 0, 1), _numbers(batches, int, 1, 1024)

    def tell(row: dict[str, Any]) -> None:
        out.print("  ".join(f"{key} {value}" for key, value in row.items()), highlight=False, soft_wrap=True)

    measure(what, shapes.split(","), *numbers, compile, repeats, int(gpu_gb * 1e9), output, tell)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file; see docs/training.md.", show_default=False)],
    output: Annotated[Optional[str], typer.Option(help="Folder of the run, instead of the recipe's.")] = None,  # noqa: UP045
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew; else go on from the last checkpoint.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count parameters, memory and steps only.")] = False,
    as_json: Json = False,
):
    """Train routers for a frozen model; `torchrun --nproc-per-node N -m flux_attention.cli train …` for N GPUs."""
    from dataclasses import replace

    from flux_attention.training.recipe import Recipe

    if not Path(recipe).is_file():
        raise _UserError(f"{recipe} is not a file; name a recipe, such as recipes/quickstart.yaml")
    loaded = Recipe.from_yaml(recipe)
    if output is not None:
        loaded = replace(loaded, output=output)
    try:
        from flux_attention.training import run
    except ImportError as error:
        raise _UserError(f"training needs more packages ({error}): pip install 'flux-attention[train]'") from None
    if not dry_run:
        run.train(loaded, restart, lambda text: out.print(escape(text), highlight=False, soft_wrap=True))
        return
    counted = run.dry_run(loaded)
    if as_json:
        print(json.dumps(counted))
        return
    table = Table("", "", show_header=False)
    for name, value in counted.items():
        if name in ("weights", "optimizer", "activations", "total"):
            table.add_row(f"memory of each GPU, {name}", f"{value / 1e9:.2f} GB")
        else:
            table.add_row(name.replace("_", " "), f"{value:,}")
    out.print(table)


@app.command(name="eval")
def evaluate(
    model: Model,
    routers: Annotated[Optional[list[str]], typer.Option(help="Adapter; may be given several times.")] = None,  # noqa: UP045
    families: Annotated[Optional[str], typer.Option(help="Default: all; for 'shipped' those it has learnt.")] = None,  # noqa: UP045
    tasks: Annotated[Optional[str], typer.Option(help="lm-eval's tasks, instead of generated questions.")] = None,  # noqa: UP045
    include_path: Annotated[Optional[Path], typer.Option(help="Folder with more of lm-eval's task files.")] = None,  # noqa: UP045
    lengths: Annotated[str, typer.Option(help="Tokens of a sample.")] = "4K",
    methods: Annotated[Optional[str], typer.Option(help="Of full layers; default: all but best-static*.")] = None,  # noqa: UP045
    samples: Annotated[int, typer.Option(min=2, help="Samples of each family and length, or task.")] = 100,
    calibration: Annotated[int, typer.Option(min=1, help="Samples of each family to choose static layers on.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 1,
    text: Annotated[Optional[Path], typer.Option(help="File to hide questions in; default: local source text.")] = None,  # noqa: UP045
    output: Annotated[Path, typer.Option(help="Folder for quality.json and the report.")] = Path("runs/eval"),
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew; else go on where a run stopped.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
):
    """Score a model on generated questions or lm-eval's tasks by every way of choosing full layers; write a report."""
    from flux_attention import named
    from flux_attention.evaluation import quality
    from flux_attention.evaluation.report import label, short_names, summary, tokens, write_report
    from flux_attention.tasks.families import EVERY_FAMILY, FAMILIES
    from flux_attention.tasks.samples import Haystack
    from flux_attention.tasks.text import local_texts

    if tasks and families:
        raise _UserError(
            "--tasks and --families are both there: lm-eval's tasks and generated questions take a run each"
        )
    if tasks and find_spec("lm_eval") is None:
        raise _UserError("lm-eval is missing, which has the tasks: pip install 'flux-attention[eval]'")
    sizes = _numbers(lengths, int, 256, 2**24)
    if find_spec("matplotlib") is None:  # known now, not at the end
        raise _UserError("matplotlib is missing, which draws the report: pip install 'flux-attention[eval]'")
    adapters = [named.adapter_path(name) for name in routers or (["shipped"] if model == "shipped" else [])]
    loaded, tokenizer = _load_model(model, device, dtype)
    with err.status("reading text") as status:
        asked = methods.split(",") if methods else None

        def generated() -> quality.Evaluation:
            texts = [_read(str(text))] if text else local_texts(True, site_packages=True, max_chars=5_000_000)
            named = families.split(",") if families else list(FAMILIES if model == "shipped" else EVERY_FAMILY)
            found = Haystack(texts, tokenizer)
            chosen = asked or quality.DEFAULT_METHODS
            return quality.Evaluation(
                loaded, tokenizer, adapters, found, named, sizes, chosen, samples, calibration, batch_size
            )

        if tasks:
            from flux_attention.evaluation.lm_harness import TaskEvaluation

            def static(routing, count, tell):
                found = generated()
                choose = found.static_heads if routing.config.granularity == "head" else found.static_layers
                return choose(routing, sizes[0], count, tell)

            evaluation = TaskEvaluation(
                loaded,
                tokenizer,
                adapters,
                tasks.split(","),
                asked or quality.DEFAULT_METHODS,
                samples,
                batch_size,
                static,
                include_path,
            )
        else:
            evaluation = generated()
        rows = quality.run(evaluation, output, restart, lambda text: status.update(escape(text)))
        page, _ = write_report(output / "quality.json", output)
    table = Table("method", "tokens", "mean accuracy", "perplexity", "mean Ω_MSR")
    for each in summary(rows):
        numbers = [each["accuracy"], each["perplexity"], each["sparsity"]]
        cells = ["" if number is None else f"{number:.3f}" for number in numbers]
        table.add_row(label(each, short_names(rows)), tokens(each["seq_len"]), *cells)
    out.print(table)
    out.print(f"the report is {page}", highlight=False, soft_wrap=True)


@app.command()
def demo(
    samples: Annotated[int, typer.Option(min=1, help="Samples of each kind of input.")] = 2,
    length: Annotated[int, typer.Option(min=1024, max=8192, help="Tokens of each sample.")] = 3072,
    seed: Annotated[Optional[int], typer.Option(help="Default: a fresh sample each time.")] = None,  # noqa: UP045
    as_json: Json = False,
):
    """Run the shipped model on real text, dense, routed and all-sparse, and show what each input needed."""
    from flux_attention.shipped.demo import run_demo

    rows = run_demo(samples, length, seed, Console(quiet=True) if as_json else out)
    if as_json:
        print(json.dumps(rows))


if __name__ == "__main__":
    run()
