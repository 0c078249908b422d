"""The work of a step in closed forms: products, attention pairs, bytes that elementwise kernels and collectives move.

Exact in what the decoder does: `tests/plan/test_work.py` holds operations and collectives to the real layers. Decides
no times. All sizes are local ones: what the busiest rank holds.
"""

from dataclasses import dataclass

import numpy as np

from shardwright.plan.blocks import Blocks
from shardwright.plan.quantities import Floats, ceil_div


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank holds of a layer and of the vocabulary: `N_r`, `K_r`, `F_r`, `V_r`, beside H, D and gated."""

    hidden: Floats
    heads: Floats
    kv_heads: Floats
    head_size: Floats
    feed_forward: Floats
    vocabulary: Floats
    gated: Floats


def busiest(blocks: Blocks, tp: Floats) -> Share:
    """The largest share of each dimension when it is dealt out in balance; KV heads follow the query heads."""
    return Share(
        hidden=blocks.hidden,
        heads=ceil_div(blocks.heads, tp),
        kv_heads=_kv_heads(blocks, tp),
        head_size=blocks.head_size,
        feed_forward=ceil_div(blocks.feed_forward, tp),
        vocabulary=ceil_div(blocks.vocabulary, tp),
        gated=blocks.gated,
    )


def _kv_heads(blocks: Blocks, tp: Floats) -> Floats:
    """The most KV heads that some rank's query heads need: one more than they fill where a group straddles ranks."""
    ranks, tp = np.arange(int(np.max(tp))), np.asarray(tp)[..., None]
    heads, group = np.asarray(blocks.heads)[..., None], np.asarray(blocks.heads / blocks.kv_heads)[..., None]
    base, extra = heads // tp, heads % tp
    start = ranks * base + np.minimum(ranks, extra)
    stop = start + base + (ranks < extra)
    widths = np.ceil(stop / group) - np.floor(start / group)
    return np.where((ranks < tp) & (stop > start), widths, 0).max(axis=-1)


def idlest(blocks: Blocks, tp: int) -> Share:
    """The smallest share of each dimension: that of the last rank."""
    heads = blocks.heads // tp
    first = blocks.heads - heads
    group = blocks.heads // blocks.kv_heads
    return Share(
        hidden=blocks.hidden,
        heads=heads,
        kv_heads=blocks.kv_heads - first // group if heads else 0,
        head_size=blocks.head_size,
        feed_forward=blocks.feed_forward // tp,
        vocabulary=blocks.vocabulary // tp,
        gated=blocks.gated,
    )


Product = tuple[Floats, Floats, Floats]
"""m, n, k of `[m, k] @ [k, n]`."""


def products(share: Share, tokens: Floats) -> tuple[Product, ...]:
    """A layer's four products forward: qkv, attention's out, up (with gate), down."""
    inner = share.heads * share.head_size
    return (
        (tokens, inner + 2 * share.kv_heads * share.head_size, share.hidden),
        (tokens, share.hidden, inner),
        (tokens, (1 + share.gated) * share.feed_forward, share.hidden),
        (tokens, share.hidden, share.feed_forward),
    )


def layer_parameters(blocks: Blocks, share: Share) -> Floats:
    """Parameters a rank holds of one layer, norms and biases included."""
    held = blocks.holds
    cut = held.per_head * share.heads + held.per_kv_head * share.kv_heads + held.per_feature * share.feed_forward
    return held.whole + cut


def table_parameters(share: Share) -> Floats:
    """Parameters a rank holds of the embedding, or of a head that is not tied to it."""
    return share.vocabulary * share.hidden


def head_product(share: Share, tokens: Floats) -> Product:
    """The logits."""
    return tokens, share.vocabulary, share.hidden


def backward(product: Product) -> tuple[Product, Product]:
    """Gradients of a product's input and of its weight."""
    m, n, k = product
    return (m, k, n), (n, k, m)


def operations(product: Product) -> Floats:
    """Multiplications and additions of a product."""
    m, n, k = product
    return 2 * m * n * k


def pairs(blocks: Blocks, sequence: Floats) -> Floats:
    """Query-key pairs that a head of one causal sequence sees, in the mean of the layers: half its square, or less
    where a layer has a window.
    """
    seen: Floats = np.where(blocks.window > 0, np.minimum(blocks.window, sequence), sequence)
    windowed, whole = sequence * seen - seen * seen / 2, sequence * sequence / 2
    return blocks.windowed * windowed + (1 - blocks.windowed) * whole


def attention_operations(sequence: Floats, held: Floats, heads: Floats, head_size: Floats) -> Floats:
    """Of scores and values with nothing skipped, as the reference computes them: S queries over L keys."""
    return 4 * sequence * held * heads * head_size


def elementwise(blocks: Blocks, share: Share, tokens: Floats, sharded: Floats, width: Floats) -> tuple[Floats, Floats]:
    """Bytes that the fused elementwise kernels of a layer move forward and backward.

    Forward: norms (read, write), two residual additions (two reads, a write), the activation (its inputs read, its
    output written), norms on heads and the rotation of q and k. Backward: norms read two and write one, the additions
    read and write, the activation reads gradient and inputs and writes the inputs' gradients. sharded: ranks that share
    norms and additions (sequence parallelism) · width: bytes of an element.
    """
    whole, wide = tokens * share.hidden / sharded, tokens * share.feed_forward
    heads = tokens * (share.heads + share.kv_heads) * share.head_size
    forward = (2 * blocks.norms + 6) * whole + (2 + share.gated) * wide
    back = (3 * blocks.norms + 4) * whole + (3 + 2 * share.gated) * wide
    turned = 2 * blocks.turned * heads
    normed = blocks.head_norms * heads
    return width * (forward + turned + 2 * normed), width * (back + turned + 3 * normed)


def activation_bytes(share: Share, tokens: Floats, width: Floats) -> Floats:
    """What each of a layer's sums moves: T x H of `width` bytes."""
    return width * tokens * share.hidden


def norm_bytes(tokens: Floats) -> Floats:
    """What the sum of a norm over all heads moves: a float32 for q and one for k of each token."""
    return 8 * tokens
