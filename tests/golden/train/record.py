#!/usr/bin/env python3
"""Records what PyTorch computes for tiny models, for crates/training/tests/golden.rs to hold Consort to.

    tests/golden/train/record.py            # writes a folder a family beside this file

Each folder is a model as `transformers` saves it (weights in bf16, computed in f32), and `expected.safetensors`:

- `logits.N`: of sequence N, for its rows but the last;
- `gradient.NAME`: of the sum of weighted cross-entropies over both sequences;
- `losses`: the mean loss before each of ten AdamW steps on the same two sequences, with the constants of
  `expected.json`, decay on matrices alone, gradients clipped to a norm;
- `norms`: the gradient's norm before clipping in each of them.

`expected.json` holds the sequences, weights and constants. Needs torch, transformers and safetensors.
"""

import copy
import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HERE = pathlib.Path(__file__).resolve().parent
SHAPE = dict(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, dict(SHAPE, head_dim=6, tie_word_embeddings=True)),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, dict(SHAPE, tie_word_embeddings=True)),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, dict(SHAPE, tie_word_embeddings=False)),
}
ADAMW = dict(learning_rate=0.01, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0)
SEQUENCES = [[(i * i + 3 * i) % 48 for i in range(31)], [(7 * i + 5) % 48 for i in range(14)]]
WEIGHTS = [[1.0] * 30, [0.0] * 5 + [0.5] * 8]
STEPS = 10


def model_of(config_class, model_class, shape):
    torch.manual_seed(1)
    model = model_class(config_class(**shape, attn_implementation="eager")).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
            parameter.copy_(parameter.bfloat16().float())
    return model


def losses(model):
    """The weighted sum of both sequences' losses, and each one's logits."""
    total, logits = 0.0, []
    for tokens, weights in zip(SEQUENCES, WEIGHTS):
        ids = torch.tensor(tokens)
        out = model(ids[None, :-1]).logits[0]
        each = torch.nn.functional.cross_entropy(out, ids[1:], reduction="none")
        total = total + (each * torch.tensor(weights)).sum()
        logits.append(out.detach().clone().contiguous())
    return total, logits


def record(family):
    model = model_of(*FAMILIES[family])
    folder = HERE / family
    folder.mkdir(exist_ok=True)
    # A copy: rounding the model itself would round its rotary frequencies with it.
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    for name in ["generation_config.json"]:
        (folder / name).unlink(missing_ok=True)

    total, logits = losses(model)
    total.backward()
    expected = {f"logits.{i}": x for i, x in enumerate(logits)}
    for name, parameter in model.named_parameters():
        expected[f"gradient.{name}"] = parameter.grad.clone().contiguous()

    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": ADAMW["weight_decay"]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (ADAMW["beta1"], ADAMW["beta2"])
    optimizer = torch.optim.AdamW(groups, lr=ADAMW["learning_rate"], betas=betas, eps=ADAMW["epsilon"])
    weight = sum(map(sum, WEIGHTS))
    means, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        mean = losses(model)[0] / weight
        mean.backward()
        means.append(mean.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW["clip_norm"]).item())
        optimizer.step()
    expected["losses"] = torch.tensor(means)
    expected["norms"] = torch.tensor(norms)
    save_file(expected, folder / "expected.safetensors")
    plan = {"torch": torch.__version__, "sequences": SEQUENCES, "weights": WEIGHTS, **ADAMW}
    (folder / "expected.json").write_text(json.dumps(plan) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for family in FAMILIES:
        record(family)
