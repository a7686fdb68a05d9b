"""Block-sparse attention by loops over tiles, blocks and tokens, in float64, written from the method's text."""

import math

import torch

BLOCK = 128


def naive_scores(query_SD, key_TD, stride, scale):
    """Scores of one head: {query block: [score of each key block]}, by loops."""
    length, keys = len(query_SD), len(key_TD)
    offset, tiles = keys - length, -(-keys // stride)
    query_TD = torch.zeros(tiles * stride, query_SD.shape[1], dtype=torch.float64)
    key_PD = torch.zeros_like(query_TD)
    query_TD[offset:keys], key_PD[:keys] = query_SD.double(), key_TD.double()
    found = {}
    for i in range(tiles):
        if (i + 1) * stride <= offset:
            continue
        row = []
        for j in range(i + 1):
            product = 0.0
            for s in range(stride):
                product += float(query_TD[i * stride + stride - 1 - s] @ key_PD[j * stride + s])
            row.append(product * scale / stride)
        shares = torch.tensor(row, dtype=torch.float64).softmax(0)
        block = found.setdefault(i * stride // BLOCK, [0.0] * -(-keys // BLOCK))
        for j, share in enumerate(shares.tolist()):
            block[j * stride // BLOCK] += share
    return found


def naive_mass(row, place, share):
    if share >= 1:  # all, however small the last ones are
        return set(range(place + 1))
    chosen = {0, place}
    mass, total = sum(row[n] for n in chosen), sum(row)
    for n in sorted(set(range(place + 1)) - chosen, key=lambda n: -row[n]):
        if mass >= share * total:
            break
        chosen.add(n)
        mass += row[n]
    return chosen


def naive_maximum(row, place, share, last):
    if place == last:
        return set(range(place + 1))
    always = {0, place - 1, place}
    return {n for n in range(place + 1) if n in always or row[n] >= share * max(row)}


def expected_output(query, key, value, scale, blocks, correct):
    """Attention of one sequence inside the selected blocks, by token, in float64."""
    heads, length, keys = query.shape[0], query.shape[1], key.shape[1]
    output = torch.zeros_like(query, dtype=torch.float64)
    first = (keys - length) // BLOCK
    for head in range(heads):
        k, v = (part[head // (heads // len(key))].double() for part in (key, value))
        for row in range(length):
            i = keys - length + row
            chosen = blocks[head, i // BLOCK - first]
            seen = [j for j in range(i + 1) if chosen[j // BLOCK]]
            scores, values = (k[seen] @ query[head, row].double()) * scale, v[seen]
            if correct:
                for n in range(i // BLOCK):
                    if not chosen[n]:
                        mean = k[n * BLOCK : (n + 1) * BLOCK].mean(0) @ query[head, row].double() * scale
                        scores = torch.cat([scores, mean[None] + math.log(BLOCK)])
                        values = torch.cat([values, v[n * BLOCK : (n + 1) * BLOCK].mean(0)[None]])
            output[head, row] = scores.softmax(0) @ values
    return output


def structured(length, keys, heads=4, kv_heads=2, dim=16, seed=0, batch=1):
    """Queries and keys with structure, so that few blocks hold most of the attention."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(6, dim, generator=generator)
    what = torch.randint(6, (-(-keys // 64),), generator=generator).repeat_interleave(64)[:keys]
    query = torch.randn(batch, heads, length, dim, generator=generator) + 2 * topics[what[keys - length :]]
    key = torch.randn(batch, kv_heads, keys, dim, generator=generator) + 2 * topics[what]
    return query, key, torch.randn(batch, kv_heads, keys, dim, generator=generator)
