"""The command line with FSDP2 on CPUs, which accelerate offers for accelerators only and else leaves out silently."""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from flux_attention import cli

stock = AcceleratorState.__init__


def sharded(self, *args, fsdp_plugin=None, **kwargs):
    stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


AcceleratorState.__init__ = sharded
cli.run()
