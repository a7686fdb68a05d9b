"""Decoder layers fused by ``torch.compile``, with routing and attention left outside of the compiled graphs.

All layers share three graphs: of prompts, of prompts so long that their MLPs take them in pieces, and of decode steps.
A layer's index and a prompt's length are symbols in them, not constants. Routers, KV cache and attention are operators
that the compiler does not look into; they find the forward call that is running in ``call.current``.

Shape suffixes: B batch, S query length, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import functools

import torch

from flux_attention.call import UnsupportedModelError, current

#: The keyword by which attention is told that it is traced into a compiled layer.
COMPILED = "flux_compiled"
#: The first of the products that read an activation, by name.
READERS = ("q_proj", "qkv_proj", "gate_proj", "gate_up_proj", "down_proj")
#: Graphs of one function that a process may compile: for each model, dtype, batch size and grad mode.
MOST_GRAPHS = 64


@torch.library.custom_op("flux_attention::decide", mutates_args=("output",))
def decide(output: torch.Tensor, source: torch.Tensor, layer: int) -> None:
    """Show a query module's output and input to the router. Said to be changed, so that it comes before attention."""
    call = current.get()
    if call.decides:
        call.routing.observe(call, layer, output, source)


@torch.library.custom_op("flux_attention::attend", mutates_args=())
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, layer: int) -> torch.Tensor:
    """Attention output (B, S, H, D) of one layer, by route."""
    return current.get().attend(layer, query, key, value, scale)


@decide.register_fake
def _(output, source, layer) -> None: ...


@torch.library.custom_op("flux_attention::settle", mutates_args=("states",))
def settle(states: torch.Tensor) -> None:
    """
    Said to change an activation, so that it is in memory before products read it.

    In a decode step a product is a reduction for each of its rows. What the activation is made of (a norm, the gating)
    would be fused into all of them, and computed again for each: a step took 5 % longer so.
    """


@settle.register_fake
def _(states) -> None: ...


def settle_input(module, args) -> None:
    """A hook before the first product that reads an activation; for decode steps."""
    if torch.compiler.is_compiling() and args[0].ndim == 3 and args[0].shape[1] == 1:
        torch.ops.flux_attention.settle(args[0])


@attend.register_fake
def _(query, key, value, scale, layer):
    batch, heads, length, dim = query.shape
    return query.new_empty(batch, length, heads, dim)


def compiled_layer(stock):
    """
    The forward of a routed decoder layer, compiled for inference.

    Raises
    ------
    UnsupportedModelError
        When first called, if the layer cannot be compiled as a whole.
    """
    # In the model's own order: the query comes first, and while the host waits for the router, the device has keys and
    # values to compute. Reordering would compute those first.
    prefill = torch.compile(stock, dynamic=True, fullgraph=True, options={"reorder_for_peak_memory": False})
    # A step is bound by reading the weights, which tuned reductions do faster than cuBLAS's matrix-vector products, for
    # more compilation, and those of query, key and value faster together. Its shapes are fixed for the
    # first batch size, any from the second on.
    step = torch.compile(stock, fullgraph=True, options={"coordinate_descent_tuning": True, "combo_kernels": True})

    @functools.wraps(stock)
    def forward(hidden_states, *args, **kwargs):
        call = current.get()
        if call is None or torch.is_grad_enabled():
            return stock(hidden_states, *args, **kwargs)
        if hidden_states.shape[1] == 1 and not call.is_step:  # would need a graph of its own for what steps do better
            return stock(hidden_states, *args, **kwargs)
        kwargs |= {"past_key_values": None, COMPILED: True}  # attention sees to the cache
        try:
            # Layer indices as symbols; and models of all families share the function that is compiled.
            with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=MOST_GRAPHS):
                return (step if call.is_step else prefill)(hidden_states, *args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            reason = str(error).strip().split("\n")[0]
            raise UnsupportedModelError(
                f"a layer of this model cannot be compiled ({reason}); attach without compile=True"
            ) from error

    return forward
