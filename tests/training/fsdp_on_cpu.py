"""The command line, thrice, on the same processes: as it was called, then for a run that shares the model by FSDP2.

Accelerate offers that for accelerators only, and else leaves it out silently. The recipe ``SHARED`` is run twice: what
the first run wrote after its last but one checkpoint is moved to ``first`` beside it, so that the second one goes on
from there.
"""

import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import distributed

from flux_attention import cli
from flux_attention.training import Recipe

stock, shared = AcceleratorState.__init__, Path(os.environ["SHARED"])
output = Path(Recipe.from_yaml(shared).output)
first = output.with_name("first")


def sharded(self, *args, fsdp_plugin=None, **kwargs):
    stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


def run():
    try:
        cli.run()
    except SystemExit as end:
        if end.code:
            raise


AcceleratorState.__init__ = sharded
run()
sys.argv[1:] = ["--debug", "train", str(shared)]
run()
distributed.barrier()
if distributed.get_rank() == 0:
    first.mkdir()
    for name in ("checkpoint-6", "routers.safetensors"):
        (output / name).rename(first / name)
distributed.barrier()
run()
