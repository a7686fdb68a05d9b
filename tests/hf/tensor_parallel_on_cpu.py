"""A model sharded over two processes (gloo): prints, as JSON, what each decided and generated, and what it would alone.

torchrun --nproc-per-node 2 tensor_parallel_on_cpu.py FOLDER..., with a saved model in each FOLDER.
"""

import json
import os
import sys
from pathlib import Path

import torch
from helpers.models import CONFIG, ids, randomize
from transformers import AutoModelForCausalLM

from flux_attention import UnsupportedModelError, attach
from flux_attention.hf.generation.step import unsupported


@torch.no_grad()
def outcome(model):
    torch.manual_seed(0)
    routing = randomize(attach(model, CONFIG))
    prompt, mask = ids(6, 30), torch.ones(6, 30, dtype=torch.long)
    mask[0, :9] = 0
    logits = model(prompt, attention_mask=mask).logits[:, -1]
    routes = routing.routes
    return dict(
        sample=routing.config.base_model.sample,
        routes=routes.routes_BL.tolist(),
        router_logits=routes.logits_BL2.tolist(),
        logits=logits.tolist(),
        tokens=model.generate(prompt, attention_mask=mask, max_new_tokens=5, do_sample=False).tolist(),
        captured=unsupported(routing) is None,
    )


def main(folder):
    alone = outcome(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    shared = outcome(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto").eval())
    # By a file each: two processes' lines on one output may mix.
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps([alone, shared]))


for folder in sys.argv[1:]:
    try:
        main(folder)
    except UnsupportedModelError as error:
        if "without DTensor" not in str(error):
            raise
        Path(folder, "refused").write_text(str(error))
