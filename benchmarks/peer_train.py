"""A peer's training step: `peer_train.py JSON` on each of its ranks; for every line on stdin, steps and one JSON line.

one_process: transformers' Llama on two threads. dtensor: the same model through `parallelize_module`, two ranks over
gloo, a thread each. ddp: DistributedDataParallel likewise. All with torch's AdamW (fused), float32.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

said = json.loads(sys.argv[1])
shape, batch, length = said["shape"], said["batch"], said["length"]
torch.set_num_threads(2 if said["peer"] == "one_process" else 1)
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=shape["hidden"],
    intermediate_size=shape["feed_forward"],
    num_hidden_layers=shape["layers"],
    num_attention_heads=shape["heads"],
    num_key_value_heads=shape["kv_heads"],
    vocab_size=shape["vocabulary"],
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    attn_implementation="sdpa",
)
model: nn.Module = LlamaForCausalLM(config)


def distributed() -> None:
    """Join the other rank through a file."""
    import torch.distributed as dist

    store = dist.FileStore(said["store"], 2)
    dist.init_process_group("gloo", store=store, rank=said["rank"], world_size=2)


def tensor_parallel() -> None:
    """The plan that torchtitan and the tutorials use, for the model's own names."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, object] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for name in ("q_proj", "k_proj", "v_proj"):
        plan[f"model.layers.*.self_attn.{name}"] = ColwiseParallel()
    plan["model.layers.*.self_attn.o_proj"] = RowwiseParallel()
    for name in ("gate_proj", "up_proj"):
        plan[f"model.layers.*.mlp.{name}"] = ColwiseParallel()
    plan["model.layers.*.mlp.down_proj"] = RowwiseParallel()
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


if said["peer"] == "dtensor":
    distributed()
    tensor_parallel()
elif said["peer"] == "ddp":
    distributed()
    model = nn.parallel.DistributedDataParallel(model)
    batch //= 2
# DTensors and plain tensors may not meet in one fused call
kinds = [[p for p in model.parameters() if (type(p.data) is Tensor) == plain] for plain in (True, False)]
optimizers = [torch.optim.AdamW(kind, lr=1e-4, fused=True) for kind in kinds if kind]
ids: Tensor = torch.randint(shape["vocabulary"], (batch, length), generator=torch.Generator().manual_seed(1))


def step() -> None:
    """Forward, backward, clip (not dtensor: it refuses to mix its norms with plain ones), update."""
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    if said["peer"] != "dtensor":
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


def peak() -> int:
    """Bytes this process held at most."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(int(line)):
        step()
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak()}), flush=True)
