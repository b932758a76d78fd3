#!/usr/bin/env python3
"""Records what llama.cpp answers, for tests/golden.rs to hold Consort to.

    tests/golden/record.py --llama BUILD/bin --model FILE.gguf --context 512 --out tests/golden/NAME.json

For each prompt of prompts.json: its token ids, then up to 32 greedy tokens, each with the ten likeliest tokens and
their log-probabilities (`steps`). llama.cpp rounds activations to 8 bits in every product with quantized weights, and
so does Consort, each in its own way; that alone moves log-probabilities by a tenth. So the same weights are also run
unrounded: the file is widened to F32 and asked about the same tokens (`exact`: its ten likeliest, and those of the
step). The test can then ask who is nearer to the truth instead of allowing any difference of that size.

Then the perplexity of text.txt over chunks of --context tokens, as llama-perplexity defines it.

The key and value cache is f32, flash attention and weight repacking are off: as near as llama.cpp comes to exact
arithmetic. Gemma 3 270M is a base model without a chat template in its file: add --template gemma for that one.

Needs Python 3.9 and a llama.cpp build with llama-server, llama-perplexity and llama-quantize; nothing else. Takes a
few minutes and four bytes of temporary disk a weight.
"""

import argparse
import hashlib
import json
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
TOKENS = 32
TOP = 10
# Asked of the unrounded weights, so that a step's ten are found among them.
WIDE = 100
EXACT = ["--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32", "--no-repack"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    def __init__(self, binary, model, threads, template):
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        port = self.url.rsplit(":", 1)[1]
        self.process = subprocess.Popen(
            [binary, "-m", model, "-t", str(threads), "-c", "2048", "--parallel", "1", "--host", "127.0.0.1",
             "--port", port, "--no-webui", *EXACT, *(["--no-jinja", "--chat-template", template] if template else [])],
            stdout=self.log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(self.url + "/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"llama-server did not start; see {self.log.name}")
                time.sleep(0.1)
        self.plain = self.ids(" the")[-1]
        with urllib.request.urlopen(self.url + "/props", timeout=30) as answer:
            self.end = self.ids(json.load(answer)["eos_token"], special=True)[-1]

    def ids(self, text, special=False):
        return self.post("/tokenize", {"content": text, "add_special": False, "parse_special": special})["tokens"]

    def post(self, path, body):
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def likeliest(self, ids, count):
        """The likeliest tokens after `ids` with their log-probabilities.

        The token that this request itself samples is forced: llama-server gives no probabilities for one that ends
        inside a character, and those it gives are taken before any bias.
        """
        answer = self.post("/completion", {
            "prompt": ids, "n_predict": 1, "n_probs": count, "cache_prompt": True, "ignore_eos": True,
            "logit_bias": [[self.plain, 1000.0]]})
        top = answer["completion_probabilities"][0]["top_logprobs"]
        if len(top) != count:
            sys.exit(f"llama-server gave {len(top)} likeliest tokens of {count} asked for")
        return [[t["id"], round(t["logprob"], 5)] for t in top]

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


def prompt_ids(server, prompt):
    """Ids of a raw text (special tokens in it are text, as Consort reads it) or of a templated conversation."""
    if "messages" in prompt:
        text = server.post("/apply-template", {"messages": prompt["messages"]})["prompt"]
        ids = server.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
    else:
        ids = server.post("/tokenize", {"content": prompt["text"], "add_special": True, "parse_special": False})["tokens"]
    if len(ids) < 6 or ids[0] == ids[1]:
        sys.exit(f"{prompt['name']}: not what was asked, or it starts with the same token twice: {ids}")
    return ids


def record_prompt(server, prompt):
    prompt = dict(prompt)
    if "text_from" in prompt:
        prompt["text"] = (HERE / prompt["text_from"]).read_text(encoding="utf-8")[: prompt["characters"]]
    ids = prompt_ids(server, prompt)
    tokens, steps = [], []
    while len(tokens) < TOKENS and (not tokens or tokens[-1] != server.end):
        steps.append(server.likeliest(ids + tokens, TOP))
        tokens.append(steps[-1][0][0])
    text = server.post("/detokenize", {"tokens": tokens})["content"]
    return {"name": prompt["name"], "ids": ids, "text": text, "steps": steps}


def record_exact(server, recorded):
    """What the unrounded weights say at each step of a recorded answer."""
    ids, exact = list(recorded["ids"]), []
    for step in recorded["steps"]:
        top = server.likeliest(ids, WIDE)
        asked = {token for token, _ in step}
        exact.append(top[:TOP] + [pair for pair in top[TOP:] if pair[0] in asked])
        ids.append(step[0][0])
    return exact


def noise(recorded):
    """How far llama.cpp's own rounding moves the log-probabilities it gives, on average."""
    differences = []
    for prompt in recorded:
        for step, exact in zip(prompt["steps"], prompt["exact"]):
            exact = dict(exact)
            differences += [abs(logprob - exact[token]) for token, logprob in step if token in exact]
    return sum(differences) / len(differences)


def perplexity(binary, model, context, threads):
    out = subprocess.run(
        [binary, "-m", model, "-f", HERE / "text.txt", "-c", str(context), "-b", str(context), "-t", str(threads), *EXACT],
        capture_output=True, text=True, check=True)
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", out.stdout + out.stderr)
    chunks = re.search(r"over (\d+) chunks", out.stdout + out.stderr)
    if not found or not chunks:
        sys.exit(f"llama-perplexity printed no estimate:\n{out.stdout}\n{out.stderr}")
    return {"context": context, "chunks": int(chunks[1]), "value": float(found[1])}


def main():
    arguments = argparse.ArgumentParser(description="Records llama.cpp's answers for tests/golden.rs.")
    arguments.add_argument("--llama", required=True, type=pathlib.Path, help="folder with llama-server and llama-perplexity")
    arguments.add_argument("--model", required=True, type=pathlib.Path, help="the .gguf file")
    arguments.add_argument("--context", required=True, type=int, help="tokens a chunk for the perplexity")
    arguments.add_argument("--template", help="llama.cpp's name of a chat template, where the file has none (gemma)")
    arguments.add_argument("--threads", type=int, default=2, help="threads for llama.cpp (its answers don't depend on it)")
    arguments.add_argument("--out", required=True, type=pathlib.Path, help="the file to write")
    a = arguments.parse_args()

    version = subprocess.run([a.llama / "llama-server", "--version"], capture_output=True, text=True, check=True)
    version = next(line for line in (version.stdout + version.stderr).splitlines() if line.startswith("version:"))
    prompts = json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))
    server = Server(a.llama / "llama-server", a.model, a.threads, a.template)
    try:
        recorded = [record_prompt(server, prompt) for prompt in prompts]
    finally:
        server.stop()
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        wide = pathlib.Path(folder) / "f32.gguf"
        subprocess.run([a.llama / "llama-quantize", "--allow-requantize", a.model, wide, "F32"],
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        server = Server(a.llama / "llama-server", wide, a.threads, a.template)
        try:
            for prompt in recorded:
                prompt["exact"] = record_exact(server, prompt)
        finally:
            server.stop()
    record = {
        "llama_cpp": version.removeprefix("version: "),
        "options": " ".join(EXACT),
        "template": a.template,
        "model": {"file": a.model.name, "bytes": a.model.stat().st_size,
                  "sha256": hashlib.sha256(a.model.read_bytes()).hexdigest()},
        "text_sha256": hashlib.sha256((HERE / "text.txt").read_bytes()).hexdigest(),
        "perplexity": perplexity(a.llama / "llama-perplexity", a.model, a.context, a.threads),
    }
    # One prompt a line: a re-recording shows in a diff which answers changed.
    head = json.dumps(record, indent=1)[:-2]
    lines = ",\n  ".join(json.dumps(p, ensure_ascii=False, separators=(",", ":")) for p in recorded)
    a.out.write_text(f'{head},\n "prompts": [\n  {lines}\n ]\n}}\n', encoding="utf-8")

    print(f"llama.cpp {record['llama_cpp']}, {record['model']['file']}")
    for p in recorded:
        print(f"  {p['name']:10} {len(p['ids']):4} tokens in, {len(p['steps']):2} out: {p['text']!r:.90}")
    print(f"  perplexity {record['perplexity']}; llama.cpp's own rounding moves log-probabilities by {noise(recorded):.4f}")


if __name__ == "__main__":
    main()
