"""Makes the golden models: tiny random decoders of every family and what `transformers` computes with them.

    python3 -m venv venv && venv/bin/pip install torch==2.15.0 transformers==5.23.0 safetensors==0.8.0
    venv/bin/python make.py [NAME…]

Each folder gets config.json, the weights, and
  golden.json          the prompt, the greedy continuation, the rows whose logits are recorded, and `bf16_error`
  golden.safetensors   logits of those rows, F32: `logits` as transformers computes them, and `half_cache` with keys
                       and values rounded to half precision on their way into attention, as Consort's cache has them

The reference is computed in F32 on F32 weights, and in F32 on the weights rounded to BF16. `bf16_error` says how far
transformers' own BF16 pass is from that second reference (largest difference over largest logit): what anyone who
multiplies in BF16 has to expect.

Weights are drawn so that logits have a spread of several units, and a seed is only taken if every greedy step wins
by a clear margin: the continuation is then a fair test of equality.
"""

import contextlib
import json
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

HERE = pathlib.Path(__file__).parent
PROMPT_TOKENS = 40
NEW_TOKENS = 24
RECORDED_ROWS = [0, 1, 15, 16, 17, 31, 32, 39]
# The smallest lead of a greedy token over the next one, in logits.
MARGIN = 0.05

COMMON = dict(
    vocab_size=200,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)


def configs():
    yield "llama", LlamaConfig(**COMMON, tie_word_embeddings=True, rope_parameters=LLAMA3)
    yield "llama-untied", LlamaConfig(**COMMON, tie_word_embeddings=False, attention_bias=True)
    yield "mistral", MistralConfig(**COMMON, tie_word_embeddings=False, sliding_window=12, head_dim=32)
    yield "qwen2", Qwen2Config(**COMMON, tie_word_embeddings=True)
    yield "qwen3", Qwen3Config(**COMMON, tie_word_embeddings=True, head_dim=32, rope_parameters=YARN)
    yield "gemma3", Gemma3TextConfig(
        **COMMON | dict(num_hidden_layers=3, intermediate_size=64),
        head_dim=32,
        query_pre_attn_scalar=24,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": dict(rope_type="linear", rope_theta=1000000.0, factor=8.0),
            "sliding_attention": dict(rope_type="default", rope_theta=10000.0),
        },
    )


def draw(model, seed):
    """Random weights that make decided logits."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda shape, std: torch.randn(shape, generator=generator) * std
    gemma = model.config.model_type.startswith("gemma")
    for name, weight in model.named_parameters():
        if gemma and name == "model.norm.weight":
            weight.data = 19.0 + normal(weight.shape, 2.0)
        elif "norm" in name:
            weight.data = (0.0 if gemma else 1.0) + normal(weight.shape, 0.2)
        elif name.endswith("bias"):
            weight.data = normal(weight.shape, 0.5)
        elif "embed_tokens" in name:
            # Gemma multiplies embeddings by eight here and normalizes what layers add: larger embeddings would
            # drown it, and a tied head would only ever repeat its input. The last norm makes up for it.
            weight.data = normal(weight.shape, 0.02 if gemma else 0.5)
        else:
            weight.data = normal(weight.shape, 1.5 * weight.shape[1] ** -0.5)
    model.tie_weights()


@torch.no_grad()
def greedy(model, prompt):
    """Logits of the prompt, the continuation, and its smallest margin."""
    ids, margin = prompt, float("inf")
    prompt_logits = model(torch.tensor([prompt])).logits[0].float()
    for _ in range(NEW_TOKENS):
        logits = model(torch.tensor([ids])).logits[0, -1].float()
        best = torch.topk(logits, 2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        ids = ids + [best.indices[0].item()]
    return prompt_logits, ids[len(prompt) :], margin


@contextlib.contextmanager
def half_cache(model):
    """Rounds keys and values to half precision, after rotation, as a cache in half precision does."""
    modeling = sys.modules[type(model).__module__]
    exact = modeling.eager_attention_forward

    def rounded(module, query, key, value, *args, **kwargs):
        return exact(module, query, key.half().float(), value.half().float(), *args, **kwargs)

    modeling.eager_attention_forward = rounded
    try:
        yield
    finally:
        modeling.eager_attention_forward = exact


def save(name, model, dtype, prompt, logits, continuation, extra):
    with half_cache(model.float()), torch.no_grad():
        cached = model(torch.tensor([prompt])).logits[0].float()
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB" if name == "qwen3-bf16" else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    golden = dict(prompt=prompt, continuation=continuation, rows=RECORDED_ROWS) | extra
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")
    recorded = {"logits": logits, "half_cache": cached}
    save_file({key: rows[RECORDED_ROWS].contiguous() for key, rows in recorded.items()}, folder / "golden.safetensors")


def make(name, config):
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval().float()
    for seed in range(1000):
        draw(model, seed)
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(config.vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
        logits, continuation, margin = greedy(model, prompt)
        # A continuation that repeats itself would test little.
        if margin > MARGIN and len(set(continuation)) > NEW_TOKENS // 2:
            break
    else:
        raise SystemExit(f"{name}: no seed has the margin")
    print(f"{name}: seed {seed}, margin {margin:.3f}, largest logit {logits.abs().max():.1f}")
    save(name, model, torch.float32, prompt, logits, continuation, {})

    if name not in ("llama", "qwen3", "gemma3"):
        return  # The rest differ in nothing that meets the type; the files are committed, so fewer is better.
    rounded = model.to(torch.bfloat16).float()
    logits, continuation, margin = greedy(rounded, prompt)
    own = rounded.to(torch.bfloat16)(torch.tensor([prompt])).logits[0].float()
    error = ((own - logits).abs().max() / logits.abs().max()).item()
    print(f"{name}-bf16: error of a BF16 pass {error:.4f}, margin {margin:.3f}")
    save(f"{name}-bf16", rounded, torch.bfloat16, prompt, logits, continuation, dict(bf16_error=error))


if __name__ == "__main__":
    wanted = sys.argv[1:]
    for name, config in configs():
        if not wanted or name in wanted:
            make(name, config)
