"""What do the parallel layers cost at one rank, against the same decoder written by hand in plain torch?

python benchmarks/overhead.py [--case SUBSTRING] [--peer plain] [--repeat N] [--json]

Both take the same weights of the embedded model, run in one process on one thread in turn, and must agree.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.nn.functional as F
from harness import Case, Options, main
from torch import Tensor

from shardwright.comm.single import SingleGroup
from shardwright.layers.batch import Batch
from shardwright.models.decoder import Decoder
from shardwright.models.embedded import embedded_model
from shardwright.models.load import load


class Plain:
    """A Llama without a library around it: `ids [T]` → logits `[T, V]`. Holds the decoder's own tensors."""

    def __init__(self, model: Decoder) -> None:
        self.config, self.weights = model.config, dict(model.named_parameters())
        self.frequencies = torch.tensor(model.config.rope_frequencies())

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMSNorm."""
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.norm_eps)
        return x * scale * self.weights[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        """A product without a bias."""
        return F.linear(x, self.weights[f"{name}.weight"])

    def __call__(self, ids: Tensor) -> Tensor:
        """One sequence."""
        n, k, d = self.config.heads, self.config.kv_heads, self.config.head_size
        x = F.embedding(ids, self.weights["embedding.weight"])
        angles = torch.arange(len(ids))[:, None] * self.frequencies
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]

        def turned(heads: Tensor) -> Tensor:
            first, second = heads.chunk(2, -1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

        for layer in range(self.config.layers):
            name = f"layers.{layer}"
            qkv = self.linear(self.norm(x, f"{name}.attention_norm"), f"{name}.attention.qkv")
            q, key, value = qkv.view(len(ids), n + 2 * k, d).split([n, k, k], 1)
            heads = (turned(q), turned(key).repeat_interleave(n // k, 1), value.repeat_interleave(n // k, 1))
            y = F.scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in heads), is_causal=True)
            x = x + self.linear(y[0].transpose(0, 1).reshape(len(ids), n * d), f"{name}.attention.out")
            gate, up = self.linear(self.norm(x, f"{name}.mlp_norm"), f"{name}.mlp.gate_up").chunk(2, -1)
            x = x + self.linear(F.silu(gate) * up, f"{name}.mlp.down")
        return self.linear(self.norm(x, "norm"), "embedding")


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cases(options: Options) -> Iterator[Case]:
    """Forward without a graph, and forward with backward, at two lengths."""
    torch.set_num_threads(1)
    model = load(embedded_model(), SingleGroup()).model
    plain = Plain(model)
    for tokens in (128, 512):
        ids = torch.arange(1000, 1000 + tokens)
        batch = Batch.whole([ids.tolist()])
        with torch.inference_mode():
            torch.testing.assert_close(model(batch), plain(ids), rtol=1e-4, atol=1e-3)
        for what, context in (("forward", torch.inference_mode), ("forward and backward", torch.enable_grad)):
            if not options.wants(name := f"{tokens} tokens {what}"):
                continue
            sides = {"ours": lambda: model(batch), "plain": lambda: plain(ids)}  # noqa: B023  called at once
            runs: dict[str, list[float]] = {side: [] for side in sides}
            with context():
                for _ in range(3 * options.repeat + 1):
                    for side, forward in sides.items():
                        run = (lambda f=forward: f().logsumexp(-1).mean().backward()) if "back" in what else forward
                        runs[side].append(seconds(run))
                        model.zero_grad()
            values = {side: 1e3 * statistics.median(times[1:]) for side, times in runs.items()}
            yield Case(name, "ms", values).compare(smaller_is_better=True)


if __name__ == "__main__":
    main("overhead", __doc__.splitlines()[0], cases)
