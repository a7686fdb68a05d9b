"""Answers are generated in batches as they are alone, and padding changes no loss."""

import numpy as np
import pytest
import torch
from helpers.models import CONFIG, randomize, tiny_model

from flux_attention import attach
from flux_attention.shipped import load_shipped
from flux_attention.tasks.generation import generate_answers
from flux_attention.tasks.samples import Sample, make_sample
from flux_attention.tasks.scoring import answer_losses, evaluate


def samples_of(lengths, vocabulary, answer=5):
    generator = np.random.default_rng(0)
    ids = [generator.integers(3, vocabulary, length).astype(np.int32) for length in lengths]
    return [Sample(row, [(len(row) - answer, len(row))], "any") for row in ids]


@pytest.fixture
def model(tokenizer):
    return tiny_model("qwen3", vocab_size=len(tokenizer))


@pytest.mark.parametrize("routed", [False, True])
def test_losses_of_unequal_lengths_are_those_of_each_alone(model, routed):
    routing = randomize(attach(model, CONFIG)) if routed else None
    samples = samples_of([40, 17, 33, 25, 40], 96)
    together = evaluate(model, samples, routing, batch_size=3)
    alone = evaluate(model, samples, routing)
    assert together.nats == pytest.approx(alone.nats, abs=1e-5)
    assert (together.right, together.full) == (alone.right, alone.full)
    assert not routed or len({tuple(row) for row in alone.full}) > 1
    stock = tiny_model("qwen3", vocab_size=model.config.vocab_size)
    if not routed:
        row = torch.from_numpy(samples[1].input_ids.astype(np.int64))[None]
        logits = stock(row).logits[0, 11:16].float()
        expected = torch.nn.functional.cross_entropy(logits, row[0, 12:], reduction="none")
        losses, _ = answer_losses(model, samples[:2])
        assert torch.allclose(losses[1], expected, atol=1e-5)


@pytest.mark.parametrize("routed", [False, True])
def test_answers_in_batches_are_those_of_each_alone(model, tokenizer, routed):
    routing = randomize(attach(model, CONFIG)) if routed else None
    samples = samples_of([40, 17, 33, 25, 40], 96)
    done = []
    together = generate_answers(
        model, tokenizer, samples, batch_size=2, max_new_tokens=8, routing=routing, progress=done.append
    )
    alone = [generate_answers(model, tokenizer, [one], max_new_tokens=8, routing=routing) for one in samples]
    assert together.texts == [one.texts[0] for one in alone]
    assert len(set(together.texts)) > 1 and done == [2, 2, 1]
    assert together.full == ([one.full[0] for one in alone] if routed else [])


def test_each_sample_gets_its_row_of_the_routes(model, tokenizer):
    routing = attach(model, CONFIG)
    samples = samples_of([17, 40, 33], 96)
    routes = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)
    answers = generate_answers(model, tokenizer, samples, 2, max_new_tokens=2, routes=routes, routing=routing)
    assert answers.full == routes.tolist()
    assert evaluate(model, samples, routing, 2, routes).full == routes.tolist()


def test_generation_ends_with_the_turn(model, tokenizer):
    samples = samples_of([20], 96)
    whole = generate_answers(model, tokenizer, samples, max_new_tokens=6)
    ids = torch.from_numpy(samples[0].prompt_ids.astype(np.int64))[None]
    output = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    model.generation_config.eos_token_id = int(output[2])
    ended = generate_answers(model, tokenizer, samples, max_new_tokens=6)
    assert len(ended.texts[0]) < len(whole.texts[0]) and whole.texts[0].startswith(ended.texts[0])


def test_settings_of_the_model_do_not_make_it_sample_or_shun_words(model, tokenizer):
    samples = samples_of([20, 30], 96)
    plain = generate_answers(model, tokenizer, samples, max_new_tokens=12)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=1.5)
    assert generate_answers(model, tokenizer, samples, max_new_tokens=12) == plain


def test_the_shipped_model_says_what_it_was_trained_to(haystack):
    model, tokenizer, routing = load_shipped()
    samples = [make_sample("single_needle", haystack, tokenizer, 400 + 50 * seed, seed) for seed in range(3)]
    answers = generate_answers(model, tokenizer, samples, batch_size=3, routing=routing)
    said = [text.split("\n")[0].strip() for text in answers.texts]
    assert said == [tokenizer.decode(sample.answer_ids).strip() for sample in samples]
