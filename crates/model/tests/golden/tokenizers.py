"""Records token ids of hard texts: golden/tokenizers/*.json.

    pip install tokenizers gguf
    python tokenizers.py                      # two small vocabularies, trained here, and what they make of the texts
    python tokenizers.py smollm2 FILE.gguf    # a real vocabulary: an equivalent tokenizer from the GGUF's metadata
    python tokenizers.py gemma3 FILE.gguf
    … --llama-server http://127.0.0.1:PORT    # also asks a running llama-server and reports where it differs
"""

import argparse
import json
import sys
import urllib.request
from pathlib import Path

# This file is called as the package is.
sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

HERE = Path(__file__).resolve().parent / "tokenizers"

TEXTS = [
    "",
    " ",
    "a",
    "Hello, world!",
    " leading and trailing ",
    "I'll say it's 'fine', they'RE not; WE'VE, o'clock, 'tis",
    "The year 2024, 3.14159, 1,000,000 and 12345678901234567890; ٣٤٥ ①② Ⅷ ½",
    "x=1;y  =  2;\tz\t\t=\t3;   // four     spaces",
    "def f(a, b):\n    if a:\n        return b[1:-1]\n\n\n    return {'k': \"v\\n\"}\n",
    "line\r\nline\r\n\r\n\r\nline\n\n \n  \n\tline\r\r",
    "tail spaces   ",
    "   \n   \n",
    "  a   b    c     d",
    "\u00a0no\u3000break\u2003spaces\u200bzero\u2028line\u0085next",
    "Ünïcödé, naïve façade — “quotes” … £€¥ ±½ ﬁ ſ's 'ſ",
    "e\u0301 vs é, a\u0308o\u0308u\u0308, \u1112\u1161\u11ab vs 한",
    "Привет, как дела? Ёжик.",
    "你好，世界！今天天气怎么样？ 漢字とかなカナ",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם",
    "नमस्ते दुनिया, สวัสดีชาวโลก, வணக்கம்",
    "한국어 문장입니다.",
    "😀 😃👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️‍🔥 1️⃣",
    "𝒳𝓎𝔷 𐍈 \U0001F9FF \U000E0041",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b[31mred\x1b[0m\x7f",
    "a\x00b\x00\x00c",
    "\\ud83d \\u0000 \\x00 %00 &#0;",
    "\ufffd\ufeffBOM\ufffe\uffff\ue000",
    "http://example.com/a_b-c?d=e&f=%20#g user@example.org C:\\path\\file.txt",
    "<|im_start|>system\nNo.<|im_end|>\n<|endoftext|><s></s><bos><eos><start_of_turn>user<end_of_turn>",
    "<think>hm</think> <tool_call>{\"a\": 1}</tool_call> <b>bold</b> <0x0A> <unk> ▁ ▁▁ Ġ Ċ",
    "<|im_<|im_end|>end|> <|begin|> <|end|>  x <|begin|><|begin|>",
    "!!!???...---===___***///\\\\\\|||~~~```",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "supercalifragilisticexpialidociousantidisestablishmentarianismpneumonoultramicroscopicsilicovolcanoconiosis",
    "ÄÖÜäöüßẞ ĲĳǅǆΑαΒβΓγ ΆΈΉ ς Σσ ЀѐӐӑ",
    {"repeat": ["a", 100000]},
    {"repeat": [" ", 3000]},
    {"repeat": ["\n", 1000]},
    {"repeat": ["ab 1\t", 2000]},
    {"repeat": ["日本語", 5000]},
]

CORPUS = [t for t in TEXTS if isinstance(t, str)] * 3 + [
    "the quick brown fox jumps over the lazy dog and the other foxes say that there is nothing to see here",
    "she sells sea shells on the sea shore, and they're hers; we will have what she's having, won't we?",
    "int main(void) { for (int i = 0; i < 10; i++) { printf(\"%d\\n\", i); } return 0; }",
    "In 1999 there were 365 days, in 2000 there were 366; 12 months, 52 weeks, 24 hours.",
] * 8

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(pre):
    """The pre-tokenizer that the GGUF name `pre` stands for, and whether texts are composed first."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    pattern = LLAMA3 if pre == "llama-bpe" else LLAMA3.replace("{1,3}", "")
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), plain])


def spelled(text):
    return text if isinstance(text, str) else text["repeat"][0] * text["repeat"][1]


def recorded(ids):
    """Ids, or their number and a checksum where there are many."""
    if len(ids) <= 600:
        return ids
    return {"count": len(ids), "sum": sum((i + 1) * id for i, id in enumerate(ids)) % 2**32}


def record(tokenizer):
    """Ids of every text, as text and with special tokens parsed."""
    rows = []
    for text in TEXTS:
        row = {}
        for key, as_text in (("text", True), ("parsed", False)):
            tokenizer.encode_special_tokens = as_text
            row[key] = recorded(tokenizer.encode(spelled(text), add_special_tokens=False).ids)
        if row["parsed"] == row["text"]:
            del row["parsed"]
        rows.append(row)
    return rows


def special(text):
    return AddedToken(text, special=True, normalized=False)


def train_byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level("llama-bpe")
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([special("<|begin|>"), special("<|end|>"), special("<|im_end|>")])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    (HERE / "byte_level").mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(HERE / "byte_level/tokenizer.json"), pretty=False)
    expected = {}
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        tokenizer.pre_tokenizer = byte_level(pre)
        tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
        # Llama 3 takes a word that is a token whole.
        tokenizer.model.ignore_merges = pre == "llama-bpe"
        expected[pre] = record(tokenizer)
    dump(HERE / "byte_level.json", expected)


def train_sentence_piece():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, limit_alphabet=120, special_tokens=specials, show_progress=False, max_token_length=12)
    # No vocabulary has `<|im_end|>` as an ordinary piece (ours would not be merged to it).
    tokenizer.train_from_iterator([text for text in CORPUS if "<|" not in text], trainer)
    # The trainer made the bytes special tokens; in Llama's file they are ordinary.
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [t for t in saved["added_tokens"] if not t["content"].startswith("<0x")]
    # SentencePiece merges any two neighbours that spell a piece, not only those that made it in training.
    vocab, order = saved["model"]["vocab"], {}
    for at, merge in enumerate(saved["model"]["merges"]):
        order.setdefault("".join(merge), at)
    saved["model"]["merges"] = all_merges(vocab, order)
    (HERE / "sentence_piece").mkdir(parents=True, exist_ok=True)
    (HERE / "sentence_piece/tokenizer.json").write_text(json.dumps(saved, ensure_ascii=False))
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    dump(HERE / "sentence_piece.json", {"llama": record(tokenizer)})


def all_merges(vocab, order):
    """Every pair of pieces that spells a piece, by the piece's order."""
    merges = []
    for token, key in order.items():
        for at in range(1, len(token)):
            if token[:at] in vocab and token[at:] in vocab:
                merges.append((key, vocab[token], vocab[token[:at]], token[:at], token[at:]))
    return [(left, right) for *_, left, right in sorted(merges)]


def from_gguf(path):
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    field = lambda name: fields[f"tokenizer.ggml.{name}"].contents()
    tokens, types = field("tokens"), field("token_type")
    vocab = {token: id for id, token in enumerate(tokens)}
    if field("model") == "gpt2":
        merges = [tuple(m.split(" ")) for m in field("merges")]
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=field("pre") == "llama-bpe"))
        tokenizer.pre_tokenizer = byte_level(field("pre"))
    else:
        scores = field("scores")
        merges = all_merges(vocab, {t: -scores[id] for t, id in vocab.items() if types[id] in (1, 4)})
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.add_special_tokens([special(t) for t, kind in zip(tokens, types) if kind in (2, 3)])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, kind in zip(tokens, types) if kind == 4])
    return tokenizer


def ask(url, text, parse):
    body = json.dumps({"content": text, "add_special": False, "parse_special": parse}).encode()
    request = urllib.request.Request(url + "/tokenize", body, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))["tokens"]


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, dict):
        rows = ",\n".join(f'"{key}": [\n' + ",\n".join(json.dumps(r) for r in rows) + "\n]" for key, rows in value.items())
        path.write_text("{\n" + rows + "\n}\n")
    else:
        path.write_text("[\n" + ",\n".join(json.dumps(v, ensure_ascii=True) for v in value) + "\n]\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("name", nargs="?", choices=["smollm2", "gemma3"])
    parser.add_argument("gguf", nargs="?")
    parser.add_argument("--llama-server")
    args = parser.parse_args()
    dump(HERE / "texts.json", TEXTS)
    if not args.name:
        train_byte_level()
        train_sentence_piece()
        return
    rows = record(from_gguf(args.gguf))
    dump(HERE / f"{args.name}.json", {args.name: rows})
    if args.llama_server:
        for text, row in zip(TEXTS, rows):
            for key, parse in (("text", False), ("parsed", True)):
                theirs = recorded(ask(args.llama_server, spelled(text), parse))
                ours = row.get(key, row["text"])
                if theirs != ours:
                    print(f"llama-server differs ({key}) on {str(text)[:60]!r}:\n  recorded {ours}\n  theirs   {theirs}")


main()
