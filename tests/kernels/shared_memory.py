"""Print, as a line of JSON each, the shared memory that kernels take on GPUs; needs none.

shared_memory.py CAPABILITY LIMIT ..., with the compute capability and the limit in bytes of each GPU.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flux_attention.kernels import triton_decode, triton_prefill

TYPES = {
    "lse_ptr": "*fp32", "delta_ptr": "*fp32", "table_ptr": "*i64", "lengths_ptr": "*i32", "state_ptr": "*fp32",
    "top_ptr": "*fp32", "total_ptr": "*fp32", "count_ptr": "*i32", "scale": "fp32", "scale_log2": "fp32",
}  # fmt: skip


def shared(kernel, capability, constants, **options):
    names = kernel.arg_names  # addresses and strides are multiples of 16
    signature, attributes = {}, {}
    for place, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if constants.get("TMA") and name in ("key_ptr", "value_ptr"):
            signature[name] = f"tensordesc<bf16[1, 1, {constants['N']}, {constants['D']}]>"
            continue
        signature[name] = TYPES.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        if name.endswith("_ptr") or name.rsplit("_", 1)[-1] in (
            "b",
            "h",
            "s",
            "t",
        ):
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert "cp.async" in compiled.asm["ptx"], f"{kernel} waits for what it loads"
    return compiled.metadata.shared


def main(capability, limit):
    used = {}
    for dim in (64, 128, 256):
        shape = dict(G=4, D=dim)
        for queries in (1, 2**20):
            tile = triton_prefill.forward_tile(dim, queries, limit, divmod(capability, 10))
            pack = tile.pop("max_pack")
            sizes, options = {name: tile.pop(name) for name in ("M", "N", "TMA")}, tile
            used[f"forward {dim}, {queries}"] = shared(
                triton_prefill._forward, capability, dict(shape, PACK=pack, lse_ptr=None, **sizes), **options
            )
        tile = triton_prefill.backward_tile(dim)
        sizes, options = {name: tile.pop(name) for name in "MN"}, tile
        used[f"query gradient {dim}"] = shared(
            triton_prefill._query_gradient, capability, dict(shape, PACK=4, **sizes), **options
        )
        used[f"key gradient {dim}"] = shared(
            triton_prefill._key_gradient, capability, dict(shape, FAR=False, **sizes), **options
        )
        tile = triton_decode.decode_tile(dim, limit)
        constants = dict(shape, GROUP=16, SPLITS=64, N=tile.pop("N"))
        used[f"decode {dim}"] = shared(triton_decode._decode, capability, constants, **tile)
    print(json.dumps(used))


numbers = list(map(int, sys.argv[1:]))
for gpu in zip(numbers[::2], numbers[1::2], strict=True):
    main(*gpu)
