"""One process that trains a Llama in PyTorch on the CPU, a step for each line it is sent; `cargo xtask peers train` runs it.

    python train.py SHAPE PRECISION MODE THREADS      # small|smollm2  f32|bf16  eager|compiled

The model is transformers' LlamaForCausalLM with scaled_dot_product_attention; bf16 is torch.autocast; the optimizer is
AdamW(fused=True) with gradients clipped to a norm of 1. Prints "ready" after two steps that warm up (and compile), then
the seconds of a step for each line on its standard input.
"""

import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {
    "small": (dict(vocab_size=4096, num_hidden_layers=6, hidden_size=384, num_attention_heads=6,
                   num_key_value_heads=6, intermediate_size=1024, rope_theta=1e4), 8),
    "smollm2": (dict(vocab_size=49152, num_hidden_layers=30, hidden_size=576, num_attention_heads=9,
                     num_key_value_heads=3, intermediate_size=1536, rope_theta=1e5), 4),
}


def main():
    shape, precision, mode, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(1)
    numbers, sequences = SHAPES[shape]
    config = LlamaConfig(**numbers, max_position_embeddings=2048, tie_word_embeddings=True, use_cache=False,
                         attn_implementation="sdpa")
    model = LlamaForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    vocab = numbers["vocab_size"]

    def loss_of(ids):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = model(ids[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.reshape(-1, vocab).float(), ids[:, 1:].reshape(-1))

    forward = torch.compile(loss_of) if mode == "compiled" else loss_of

    def step():
        ids = torch.randint(vocab, (sequences, 257))
        begun = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        forward(ids).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return time.perf_counter() - begun

    step(), step()
    print("ready", torch.__version__, flush=True)
    for _ in sys.stdin:
        print(step(), flush=True)


main()
