"""Print, as a line of JSON each, the shared memory that kernels take on GPUs; needs none.

shared_memory.py CAPABILITY LIMIT ..., with the compute capability and the limit in bytes of each GPU.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flux_attention.kernels import (
    triton_attention,
    triton_block_scores,
    triton_block_sparse,
    triton_decode,
    triton_paged,
    triton_prefill,
)

TYPES = {
    "lse_ptr": "*fp32", "delta_ptr": "*fp32", "table_ptr": "*i64", "lengths_ptr": "*i32", "state_ptr": "*fp32",
    "top_ptr": "*fp32", "total_ptr": "*fp32", "count_ptr": "*i32",
    "tiles_ptr": "*i32", "blocks_ptr": "*i32", "spans_ptr": "*i32", "sizes_ptr": "*i32", "starts_ptr": "*i32",
    "routes_ptr": "*u8", "list_ptr": "*i32",
    "share_ptr": "*fp32", "score_ptr": "*fp32",
    "scale": "fp32", "scale_log2": "fp32",
}  # fmt: skip
#: Strides of pages: of a page, a token and a head.
PAGED = "kn", "kp", "kk", "vn", "vp", "vk"


def shared(kernel, capability, constants, types=TYPES, loop=True, **options):
    names = kernel.arg_names  # addresses and strides are multiples of 16
    signature, attributes = {}, {}
    for place, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if constants.get("TMA") and name in ("key_ptr", "value_ptr"):
            signature[name] = f"tensordesc<bf16[1, 1, {constants['N']}, {constants['D']}]>"
            continue
        signature[name] = types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        if name.endswith("_ptr") or name.rsplit("_", 1)[-1] in (
            "b",
            "h",
            "s",
            "t",
            "n",
            *PAGED,
        ):
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert not loop or "cp.async" in compiled.asm["ptx"], f"{kernel} waits for what it loads"
    return compiled.metadata.shared


def main(capability, limit):
    used = {}
    tables = dict.fromkeys(("tiles_ptr", "blocks_ptr", "spans_ptr", "sizes_ptr"))
    for dim in (64, 128, 256):
        for kind, missing in (("batch", tables), ("pack", {})):
            used |= prefill(kind, missing, dim, capability, limit)
        tile = triton_decode.decode_tile(dim, limit)
        constants = dict(G=4, D=dim, GROUP=16, SPLITS=64, N=tile.pop("N"))
        used[f"decode {dim}"] = shared(triton_decode._decode, capability, constants, **tile)
        used |= paged(dim, capability) | blocks(dim, capability, limit)
    print(json.dumps(used))


def blocks(dim, capability, limit):
    """What the kernels of block-sparse prefill take."""
    used, types = {}, TYPES | {"count_ptr": "*i32", "chosen_ptr": "*u8", "table_ptr": "*i32"}
    tables = dict.fromkeys(("starts_ptr", "lengths_ptr", "routes_ptr", "table_ptr", "P"))
    means = dict.fromkeys(("chosen_ptr", "mean_key_ptr", "mean_value_ptr"))
    kinds = {"": tables | means, ", corrected": tables, ", pages": {"P": 64} | means}
    for kind, missing in kinds.items():
        if kind and dim != 128:  # they take no more than the first kind, and minutes to compile
            continue

        def of(name, kernel, constants, options, kind=kind, missing=missing, loop=True):
            constants |= {name: value for name, value in missing.items() if name in kernel.arg_names}
            used[f"{name} {dim}{kind}"] = shared(kernel, capability, constants, types, loop, **options)

        sizes, options = triton_block_scores.score_tile(dim)
        of("block scores", triton_block_scores._tile_scores, dict(H=8, G=4, D=dim, STRIDE=16, PER=8, **sizes), options)
        shape = dict(H=8, STRIDE=16, PER=8, MASS=True, NP=2048, score_ptr=None)
        of("selection", triton_block_scores._select, shape, {}, loop=False)
        tile = triton_block_sparse.attend_tile(dim, divmod(capability, 10), limit)
        shape = dict(G=4, D=dim, M=128, N=tile.pop("N"), TMA=tile.pop("TMA"))
        of("selected blocks", triton_block_sparse._attend, shape, tile)
    return used


def paged(dim, capability):
    """What the kernels over pages take."""
    types = TYPES | {"table_ptr": "*i32"}
    shape = dict(G=4, D=dim, P=16, stride_kd=1, stride_vd=1)
    sizes, options = triton_paged.prefill_tile(dim)
    used = {f"paged prefill {dim}": shared(triton_paged._sparse_prefill, capability, shape | sizes, types, **options)}
    sizes, options = triton_paged.decode_tile(dim)
    constants = dict(shape, GROUP=16, SPLITS=64, AHEAD=8, **sizes)
    return used | {f"paged decode {dim}": shared(triton_paged._decode, capability, constants, types, **options)}


def prefill(kind, missing, dim, capability, limit):
    """What the prefill kernels take, with the tables of a pack or without."""
    used, shape = {}, dict(G=4, D=dim)

    def of(kernel, constants, options):
        constants |= {name: None for name in missing if name in kernel.arg_names}
        return shared(kernel, capability, constants, **options)

    for queries in (1, 2**20):
        tile = triton_prefill.forward_tile(dim, queries, limit, divmod(capability, 10))
        pack = tile.pop("max_pack")
        sizes, options = {name: tile.pop(name) for name in ("M", "N", "TMA")}, tile
        constants = dict(shape, PACK=pack, lse_ptr=None, **sizes)
        used[f"forward {kind} {dim}, {queries}"] = of(triton_attention._forward, constants, options)
    tile = triton_prefill.backward_tile(dim)
    sizes, options = {name: tile.pop(name) for name in "MN"}, tile
    constants = dict(shape, PACK=4, **sizes)
    used[f"query gradient {kind} {dim}"] = of(triton_attention._query_gradient, constants, options)
    constants = dict(shape, FAR=False, **sizes)
    used[f"key gradient {kind} {dim}"] = of(triton_attention._key_gradient, constants, options)
    return used


numbers = list(map(int, sys.argv[1:]))
for gpu in zip(numbers[::2], numbers[1::2], strict=True):
    main(*gpu)
