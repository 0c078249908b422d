"""What each of five ranks would hold of Llama 3 8B: from its sizes alone, without torch and without weights.

python examples/who_holds_what.py
"""

from shardwright.layout.spec import stored_bytes
from shardwright.models.config import ModelConfig
from shardwright.models.families import by_name
from shardwright.models.specs import Cuts, model_specs

LLAMA_3_8B = ModelConfig(
    family="llama",
    hidden=4096,
    feed_forward=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_size=128,
    vocabulary=128256,
    context=8192,
    norm_eps=1e-5,
    rope_theta=500_000.0,
    dtype="bfloat16",
)
RANKS = 5

cuts = Cuts.balanced(LLAMA_3_8B, RANKS)
tables = [model_specs(LLAMA_3_8B, cuts, rank, by_name("llama").huggingface) for rank in range(RANKS)]
for rank, table in enumerate(tables):
    heads, kv = cuts.heads.query.range(rank), cuts.heads.kv_range(rank)
    size = sum(spec.nbytes for spec in table.values())
    print(f"rank {rank}: query heads {heads[0]}…{heads[1] - 1}, KV heads {kv[0]}…{kv[1] - 1}, {size / 1e9:.2f} GB")
model, replicas = stored_bytes(tables)
print(f"the model is {model / 1e9:.2f} GB, its replicas {replicas / 1e9:.2f} GB ({replicas / model:.1%})")
