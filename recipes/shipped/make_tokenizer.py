"""Train the shipped model's tokenizer: byte-level BPE on the standard library of the local Python installation.

Run: ``python recipes/shipped/make_tokenizer.py OUTPUT_DIR``. Seconds on a CPU.

Newlines and digits are tokens of their own, so that text cut into lines and tokenized line by line gives the
tokens of the whole.
"""

import itertools
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from flux_attention.tasks.text import local_texts
from flux_attention.tasks.words import ADJECTIVES, CITIES, NOUNS, PEOPLE

VOCAB_SIZE = 3072
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

output = Path(sys.argv[1])
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\n"), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=VOCAB_SIZE,
    special_tokens=[BOS, EOS, PAD],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    max_token_length=16,
)
names = " ".join(["x", *ADJECTIVES, *NOUNS, *PEOPLE, *CITIES])
# Enough repetitions that every name of the generated tasks becomes one token.
tokenizer.train_from_iterator(itertools.chain(local_texts(held_out=False), [names] * 5000), trainer)
tokenizer.post_processor = processors.Sequence(
    [
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        ),
    ]
)
fast = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=8192, padding_side="left"
)
fast.save_pretrained(output)

split = [word for word in names.split()[1:] if len(tokenizer.encode(f" {word}", add_special_tokens=False)) != 1]
print(f"{tokenizer.get_vocab_size()} tokens; names of more than one token: {split}")
