"""Decoder layers fused by ``torch.compile``, with routing and attention left outside of the compiled graphs.

All layers share three graphs: of prompts, of prompts so long that their MLPs take them in chunks, and of decode steps.
A layer's index and a prompt's length are symbols in them, not constants. Routers, KV cache and attention are operators
that the compiler does not look into; they find the forward call that is running in ``context.current``.

Shape suffixes: B batch, S query length, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from flux_attention.errors import UnsupportedModelError
from flux_attention.hf.context import COMPILED, current

#: The first of the products that read an activation, by name.
READERS = ("q_proj", "qkv_proj", "gate_proj", "gate_up_proj", "down_proj")
#: Graphs of one function that a process may compile: for each model, dtype, batch size and grad mode.
MAX_GRAPHS = 64


@torch.library.custom_op("flux_attention::observe", mutates_args=("output",))
def observe(output: torch.Tensor, source: torch.Tensor, layer: int) -> None:
    """Show a query module's output and input to the router. Said to be changed, so that it comes before attention."""
    context = current.get()
    if context.reads_queries:
        context.observe(layer, output, source)


@observe.register_fake
def _(output, source, layer) -> None: ...


@torch.library.custom_op("flux_attention::attend", mutates_args=())
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, layer: int) -> torch.Tensor:
    """Compute attention output (B, S, H, D) of one layer, by route."""
    return current.get().attend(layer, query, key, value, scale)


@attend.register_fake
def _(query, key, value, scale, layer):
    batch, heads, length, dim = query.shape
    return query.new_empty(batch, length, heads, dim)


@torch.library.custom_op("flux_attention::materialize", mutates_args=("states",))
def materialize(states: torch.Tensor) -> None:
    """
    Say that an activation changes, so that it is in memory before products read it.

    In a decode step a product is a reduction for each of its rows. What the activation is made of (a norm, the gating)
    would be fused into all of them, and computed again for each: a step took 5 % longer so.
    """


@materialize.register_fake
def _(states) -> None: ...


def materialize_input(module: nn.Module, args: tuple) -> None:
    """Materialize what the first product that reads an activation takes, in decode steps; a forward pre-hook."""
    if torch.compiler.is_compiling() and args[0].ndim == 3 and args[0].shape[1] == 1:
        torch.ops.flux_attention.materialize(args[0])


def readers(layer: nn.Module) -> list[nn.Module]:
    """List the modules of a decoder layer that ``materialize_input`` is for."""
    return [module for name, module in layer.named_modules() if name.rpartition(".")[2] in READERS]


def compiled_layer(stock):
    """
    Make the forward of a routed decoder layer that is compiled for inference.

    Raises
    ------
    UnsupportedModelError
        When the forward is first called, if the layer cannot be compiled as a whole.
    """
    # In the model's own order: the query comes first, and while the host waits for the router, the device has keys and
    # values to compute. Reordering would compute those first.
    prefill = torch.compile(stock, dynamic=True, fullgraph=True, options={"reorder_for_peak_memory": False})
    # A step is bound by reading the weights, which tuned reductions do faster than cuBLAS's matrix-vector products, for
    # more compilation, and those of query, key and value faster together. Its shapes are fixed for the
    # first batch size, any from the second on.
    step = torch.compile(stock, fullgraph=True, options={"coordinate_descent_tuning": True, "combo_kernels": True})

    @functools.wraps(stock)
    def forward(module, hidden_states, *args, **kwargs):
        context = current.get()
        if context is None or torch.is_grad_enabled():
            return stock(module, hidden_states, *args, **kwargs)
        if hidden_states.shape[1] == 1 and not context.is_step:
            # Would need a graph of its own for what captured steps do better.
            return stock(module, hidden_states, *args, **kwargs)
        kwargs |= {"past_key_values": None, COMPILED: True}  # attention sees to the cache
        try:
            # Layer indices as symbols; and models of all families share the function that is compiled.
            with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=MAX_GRAPHS):
                return (step if context.is_step else prefill)(module, hidden_states, *args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            reason = str(error).strip().split("\n")[0]
            raise UnsupportedModelError(
                f"a layer of this model cannot be compiled ({reason}); attach without compile=True"
            ) from error

    return forward
