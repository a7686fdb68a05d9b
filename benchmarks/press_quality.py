"""Lets kvpress's presses answer the questions that ``flux-attention eval`` asks, from KV caches of given sizes.

Run: ``python benchmarks/press_quality.py MODEL --kept 0.64,0.55,0.46``, with kvpress installed or, by ``--kvpress``,
unpacked. A folder on PYTHONPATH instead would change the questions, which are made from what the machine has
installed. Writes benchmarks/results/press_quality.json, a row for each kind, press and share, after each kind; what is
there already is not measured again.

A press reads what the prefill leaves, so the stock model reads each prompt once, and each layer's keys and values go
through every press's own ``compress``. All caches then answer in batches: what a shorter one lacks, and what a press
masks by head, gets no attention. With ``--question-apart`` the prompt is compressed up to where the question begins, as
in kvpress's pipeline; else the presses read the question too, as routers do. With ``--routers`` the layers of a
calibrated adapter answer beside them, at ``--budgets``.

kv_bytes     what the prompts' caches hold, mean over samples; what DuoAttentionPress masks counts as dropped
prefill_ms   of one prompt, the press's own time included, and
decode_ms    of a token at batch 1: medians over a few runs on one prompt, to get an idea
"""

import argparse
import importlib
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from types import ModuleType, SimpleNamespace

import torch
from press_caches import decode, prefill, pressed

from flux_attention import attach
from flux_attention.evaluation.material import CALIBRATION_SEED, Material
from flux_attention.evaluation.measures import answer_measures
from flux_attention.evaluation.savings import mean_kv
from flux_attention.hf.loading import load_model, load_tokenizer
from flux_attention.names import model_name
from flux_attention.results import begun_rows, write_results
from flux_attention.tasks.corpus import local_corpus
from flux_attention.tasks.encoding import encode_prompt
from flux_attention.tasks.generation import room_for, score_answers
from flux_attention.tasks.metrics import score_answer
from flux_attention.tasks.questions import NATURAL, PROSE

#: Presses that take a compression ratio.
BY_RATIO = ("SnapKVPress", "ExpectedAttentionPress", "KeyDiffPress", "StreamingLLMPress")
PRESSES = (*BY_RATIO, "SimLayerKVPress", "DuoAttentionPress")
#: The sizes of what others keep of a layer or head at least.
SIZES = {"SimLayerKVPress": ("n_initial", "n_recent"), "DuoAttentionPress": ("sink_size", "recent_size")}
#: What kvpress imports for functions that are not called here.
UNUSED = ("datasets", "fire", "requests")
#: What tells rows apart.
KEY = "seq_len", "task", "method", "kept", "budget", "question_apart", "n"
#: Tokens of what is timed.
TOKENS = 8


def import_kvpress(folder, count, length):
    """Import kvpress, from ``folder`` if one is given, with local prose in place of the books that it would load."""
    if folder is not None:
        sys.path.insert(0, folder)
    missing = [name for name in UNUSED if find_spec(name) is None]
    for name in missing:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].load_dataset = None
    try:
        kvpress = importlib.import_module("kvpress")
    finally:
        for name in missing:
            del sys.modules[name]
    corpus = local_corpus("calibration")
    texts = ["\n\n".join(corpus.paragraphs(random.Random(seed)))[: 4 * length] for seed in range(count)]
    books = SimpleNamespace(sample=lambda count, random_state: {"chapter": SimpleNamespace(tolist=lambda: texts)})
    duo = importlib.import_module("kvpress.presses.duo_attention_press")
    duo.load_dataset = lambda *args, **kwargs: SimpleNamespace(to_pandas=lambda: books)
    return kvpress


def make_presses(kvpress, model, prompts, names, shares, length):
    """Return {(name, share): press}; ``prompts`` are those that lazy layers are told by."""
    found = {}
    for name in names:
        make = getattr(kvpress, name)
        if name in BY_RATIO:
            presses = [make(compression_ratio=1 - share) for share in shares]
            share_scores(presses)
        else:
            whole = make() if name == "SimLayerKVPress" else make(on_the_fly_scoring=True)
            whole.post_init_from_model(model)  # tells DuoAttentionPress its sizes
            sizes = [getattr(whole, size) for size in SIZES[name]]
            short = [(1 - share) / (1 - sum(sizes) / length) for share in shares]  # of layers or heads
            if sum(sizes) >= length or max(short) > 1:
                print(f"{name} left out: it keeps {' + '.join(map(str, sizes))} tokens of {length} at least")
                continue
            if name == "SimLayerKVPress":
                thresholds = lazy_thresholds(kvpress, model, prompts, short)
                presses = [make(lazy_threshold=threshold) for threshold in thresholds]
            else:
                presses = [make(head_compression_ratio=ratio, on_the_fly_scoring=True) for ratio in short]
        for share, press in zip(shares, presses, strict=True):
            press.post_init_from_model(model)
            found[name, share] = press
    return found


def share_scores(presses):
    """Let presses that differ in the ratio alone score each layer once."""
    score, last = presses[0].score, {}

    def once(module, hidden, keys, *args):
        if last.get("keys") is not keys:
            last.update(keys=keys, scores=score(module, hidden, keys, *args))
        return last["scores"]

    for press in presses:
        press.score = once


def lazy_thresholds(kvpress, model, prompts, short):
    """Return the thresholds over which such shares of layers are lazy, over all prompts."""
    press, scores = kvpress.SimLayerKVPress(), []

    def note(module, hidden, keys, values, kwargs):
        window = kvpress.SnapKVPress.compute_window_attention
        weights = window(module, hidden, keys, press.n_last, kwargs["position_embeddings"]).mean((0, 1, 2))
        scores.append((weights[: press.n_initial].sum() + weights[-press.n_recent :].sum()).item())

    for prompt in prompts:
        prefill(model, prompt, note)
    return [min(1.0, torch.tensor(scores).double().quantile(1 - share).item()) for share in short]


def question_start(sample, tokenizer, chat):
    """Return how many tokens of the prompt the context alone begins with, too; all but one where the rest is none."""
    prompt = sample.prompt_ids.tolist()
    alone = encode_prompt(sample.question.context, tokenizer, chat)
    same = next(
        (place for place, pair in enumerate(zip(prompt, alone, strict=False)) if pair[0] != pair[1]), len(alone)
    )
    return min(same, len(prompt) - 1)


def end_tokens(model, tokenizer):
    """Return the tokens that end an answer, as in ``tasks.generation``."""
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


@dataclass
class Asking:
    """Holds what all kinds share, and answers one kind after the other."""

    model: object
    tokenizer: object
    chat: bool
    apart: bool
    batch_size: int
    group: int
    routers: str | None = None

    def routed(self, samples, budget):
        """Return the scores of a calibrated adapter's layers, and mean bytes kept."""
        routing = attach(self.model, self.routers, budget=budget)
        try:
            scores, full = score_answers(self.model, self.tokenizer, samples, self.batch_size, routing=routing)
        finally:
            routing.detach()
        return scores, mean_kv(routing, full, [len(sample.prompt_ids) for sample in samples])["kv_bytes"]

    def answer(self, samples, presses):
        """Yield (key, scores, mean bytes kept) of each press."""
        ends, scores, kept = end_tokens(self.model, self.tokenizer), {}, {}
        order = sorted(range(len(samples)), key=lambda index: -room_for([samples[index]]))
        for start in range(0, len(order), self.group):
            some = order[start : start + self.group]
            rows = [((key, index), row) for index in some for key, row in self.read(samples[index], presses).items()]
            rows.sort(key=lambda pair: pair[1].longest)
            for place in range(0, len(rows), self.batch_size):
                names, batch = zip(*rows[place : place + self.batch_size], strict=True)
                texts = self.tokenizer.batch_decode(decode(self.model, batch, ends), skip_special_tokens=True)
                for (key, index), row, text in zip(names, batch, texts, strict=True):
                    scores[key, index] = score_answer(samples[index].question, text)
                    kept[key, index] = row.kv_bytes
        indices = range(len(samples))
        return {
            key: ([scores[key, index] for index in indices], fmean(kept[key, index] for index in indices))
            for key in presses
        }

    def read(self, sample, presses):
        prompt = sample.prompt_ids.tolist()
        cut = question_start(sample, self.tokenizer, self.chat) if self.apart else len(prompt)
        return pressed(self.model, prompt, cut, presses, room_for([sample]))

    def times(self, sample, presses, runs):
        """Return {key: what one prompt and one token take}."""
        prompt, found = sample.prompt_ids.tolist(), {}
        for key, press in presses.items():
            row = pressed(self.model, prompt, len(prompt), {key: press}, TOKENS + 1)[key]
            read = [
                timed(lambda one={key: press}: pressed(self.model, prompt, len(prompt), one, 1)) for _ in range(runs)
            ]
            step = [timed(lambda row=row: decode(self.model, [row], set())) / TOKENS for _ in range(runs)]
            found[key] = {"prefill_ms": round(median(read), 2), "decode_ms": round(median(step), 2)}
        return found


def timed(call: Callable[[], object]) -> float:
    """Return the milliseconds of a call."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    return 1000 * (time.perf_counter() - began)


def rows_of(asking, material, kvpress, args, done, until):
    """Yield lists of rows, kind by kind, as long as there is time; dense is the first."""
    have = {tuple(row.get(key) for key in KEY): row for row in done}
    for length in args.lengths:
        prompts = [material.make(family, length, 1, CALIBRATION_SEED)[0].prompt_ids for family in material.families]
        made = make_presses(kvpress, asking.model, prompts, args.presses, args.kept, length)
        presses, times = {("dense", 1.0, None): None, **{(*key, None): press for key, press in made.items()}}, None
        ours = [("static-nll", None, budget) for budget in args.budgets]
        for family in material.families:
            samples = material.make(family, length, args.samples)
            keys = {key: (length, family, *key, args.question_apart, len(samples)) for key in [*presses, *ours]}
            missing = {key: press for key, press in presses.items() if keys[key] not in have}
            wanted = [key for key in ours if keys[key] not in have]
            if not missing and not wanted:
                yield [have[key] for key in keys.values()]
                continue
            if time.monotonic() > until:
                return
            times = times or (asking.times(samples[0], presses, args.runs) if args.runs else {})
            question, answers = samples[0].question, asking.answer(samples, missing) if missing else {}
            answers |= {key: asking.routed(samples, key[-1]) for key in wanted}
            dense = fmean(len(sample.prompt_ids) for sample in samples) * token_bytes(asking.model)
            yield [
                have.get(names)
                or {
                    **dict(zip(KEY, names, strict=True)),
                    **dict(
                        model=Path(model_name(args.model)).name.lower(),
                        task_class=question.task_class,
                        metric=question.metric,
                    ),
                    **dict(kv_bytes=round(answers[key][1]), baseline_kv_bytes=round(dense)),
                    **times.get(key, {}),
                    "press": settings_of(presses.get(key)),
                    **answer_measures(answers[key][0]),
                }
                for key, names in keys.items()
            ]


def token_bytes(model):
    """Return the bytes of one token in the KV cache."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * size * model.dtype.itemsize


def settings_of(press):
    """Return a press's own settings."""
    if press is None:
        return None
    return {key: value for key, value in asdict(press).items() if isinstance(value, int | float) and key[-1] != "_"}


def numbers(text):
    return [float(part) for part in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kvpress", help="folder of an unpacked wheel, and of what it needs")
    parser.add_argument("--presses", nargs="+", choices=PRESSES, default=list(PRESSES), metavar="PRESS")
    parser.add_argument("--kept", type=numbers, default=[0.64, 0.55, 0.46], help="shares of the KV cache")
    parser.add_argument("--routers", help="a calibrated adapter, to answer beside the presses")
    parser.add_argument("--budgets", type=numbers, default=[], help="its shares of sparse layers")
    parser.add_argument("--question-apart", action="store_true", help="compress before the question is read")
    parser.add_argument("--families", nargs="+", default=[family for family in NATURAL if family != PROSE])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--texts", type=int, default=50, help="by which DuoAttentionPress scores heads")
    parser.add_argument("--batch-size", type=int, default=192, help="answers generated at once")
    parser.add_argument("--group", type=int, default=25, help="prompts whose caches are held at once")
    parser.add_argument("--runs", type=int, default=3, help="of what is timed; 0: no times")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no kind is begun")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/press_quality.json")
    args = parser.parse_args()
    if PROSE in args.families:
        parser.error("prose is scored in the prefill, which presses leave as it is: leave it out")
    if bool(args.budgets) != (args.routers is not None):
        parser.error("budgets are of an adapter: give both --routers and --budgets, or neither")
    until = time.monotonic() + args.limit
    tokenizer = load_tokenizer(args.model)
    material = Material(tokenizer, args.families)
    for length in args.lengths:  # before kvpress is on the path, see above
        for count, seed in ((args.samples, 0), (1, CALIBRATION_SEED)):
            material.make(args.families[0], length, count, seed)
    kvpress = import_kvpress(args.kvpress, args.texts, min(args.lengths))
    model = load_model(args.model, args.dtype, args.device).to(args.device).eval()
    facts = {key: material.settings[key] for key in ("chat", "text")}
    settings = {"dtype": str(model.dtype).removeprefix("torch."), "kvpress": version("kvpress"), **facts}
    asking = Asking(model, tokenizer, facts["chat"], args.question_apart, args.batch_size, args.group, args.routers)
    done, rows = begun_rows(args.output, settings, remedy="name another file by --output"), []
    for some in rows_of(asking, material, kvpress, args, done, until):
        rows += some
        for row in some:
            print({key: value for key, value in row.items() if key != "scores"}, flush=True)
        written = {tuple(row[key] for key in KEY) for row in rows}
        kept = [old for old in done if tuple(old.get(key) for key in KEY) not in written]
        write_results(args.output, [*kept, *rows], settings=settings)


if __name__ == "__main__":
    main()
