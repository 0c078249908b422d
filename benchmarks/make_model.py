"""Writes a Hugging Face directory for the peers, in their environment: `make_model.py MODEL TARGET GGUF_DIR GGUF_FILE`.

smollm2: the embedded model's weights in float32. qwen3-0.6b: that shape with random weights (speed does not depend on
their values) and the embedded model's tokenizer.
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

model, target, folder, file = sys.argv[1:]
making = Path(f"{target}.part")
shutil.rmtree(making, ignore_errors=True)
making.mkdir(parents=True)
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(making)
if model == "smollm2":
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    made = type(read)(config)  # one that does not remember having been quantised, and so can be saved
    made.load_state_dict(read.state_dict())
else:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        vocab_size=151936,
        tie_word_embeddings=True,
        rope_theta=1_000_000.0,
        max_position_embeddings=40960,
    )
    made = Qwen3ForCausalLM(config)
made.save_pretrained(making)
making.rename(target)
