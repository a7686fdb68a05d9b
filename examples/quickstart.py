"""Attach trained routers, ask two questions of a long text, and see what each needed.

Run: ``python examples/quickstart.py``. Uses the model that comes with the package; with your own, load it with
``AutoModelForCausalLM.from_pretrained`` and call ``attach(model, "path-or-hub-id-of-routers")``.
"""

import inspect
import json

from flux_attention.shipped import load_shipped

model, tokenizer, routing = load_shipped()

source = inspect.getsource(json.decoder) + inspect.getsource(json.encoder)
lines = source.split("\n")
lines.insert(150, "# The secret code of the silver whale is 48213.")
text = "\n".join(lines)[:10000]

prompts = {
    "a fact from the text": text + "\n# Question: What is the secret code of the silver whale?\n# Answer:",
    "more of the same code": text,
}
for name, prompt in prompts.items():
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=7,
        do_sample=False,
    )
    answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
    print(f"{name}: {answer!r}")
    print(routing.routes, routing.report(), sep="\n")
