"""Which split of a 72B model over eight cards serves most, why others lose, and what more memory would do.

Run it: python examples/plan_a_cluster.py
"""

from dataclasses import replace

from shardwright import plan_layout
from shardwright.plan.hardware import Cluster, parse_cluster

eight = parse_cluster("8x910b2")
found = plan_layout("qwen1.5-72b", eight, serve=(1024, 256), latency_s=0.05)
print(f"{found.candidates} layouts in {found.search_s * 1e3:.1f} ms; the winner is {found.best}")
for lost in found.losers[:4]:
    print(f"  {lost.layout}: {lost.reason}")

roomier = replace(eight.machines[0], memory=eight.machines[0].memory * 2)
twice = plan_layout(
    "qwen1.5-72b", Cluster("8 cards of twice the memory", eight.names, (roomier,) * 8), serve=(1024, 256)
)
assert found.best is not None
assert twice.best is not None
print(f"with twice the memory and no bound: {twice.best}, {twice.best.tokens_per_s:,.0f} tokens/s")
