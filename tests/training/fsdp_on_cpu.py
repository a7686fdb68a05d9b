"""The command line with FSDP2 on CPUs, which accelerate offers for accelerators only and else leaves out silently.

Run twice: what the first run wrote after its last but one checkpoint is moved to ``first`` beside it, so that the
second one goes on from there, on the same processes.
"""

import os
from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import distributed

from flux_attention import cli

stock, first = AcceleratorState.__init__, Path(os.environ["FIRST"])


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
distributed.barrier()
if distributed.get_rank() == 0:
    first.mkdir()
    for name in ("checkpoint-6", "routers.safetensors"):
        (first.parent / "run" / name).rename(first / name)
distributed.barrier()
run()
