//! GGUF files for tests, as the library writes them, and where every number of a header is, so that tests can lie in
//! each of them.

use consort_model::formats::gguf::write::{Tensor, write};
use consort_tensor::DType;

pub(crate) use consort_model::formats::gguf::write::Value;

/// A number in the header.
#[derive(Clone, Debug)]
pub(crate) struct Field {
    pub(crate) what: String,
    pub(crate) at: usize,
    pub(crate) bytes: usize,
}

/// A file in the making.
#[derive(Default)]
pub(crate) struct GgufWriter {
    pairs: Vec<(String, Value)>,
    tensors: Vec<Tensor>,
    bytes: Vec<Vec<u8>>,
}

const ALIGNMENT: usize = 32;

impl GgufWriter {
    pub(crate) fn pair(&mut self, key: &str, value: Value) -> &mut Self {
        self.pairs.push((key.into(), value));
        self
    }

    /// `shape` outermost first.
    pub(crate) fn tensor(&mut self, name: &str, dtype: DType, shape: &[usize], bytes: Vec<u8>) -> &mut Self {
        self.tensors.push(Tensor { name: name.into(), shape: shape.to_vec(), dtype });
        self.bytes.push(bytes);
        self
    }

    pub(crate) fn f32_tensor(&mut self, name: &str, shape: &[usize], values: &[f32]) -> &mut Self {
        self.tensor(name, DType::F32, shape, values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    pub(crate) fn finish(&self) -> Vec<u8> {
        let mut file = Vec::new();
        write(&mut file, &self.pairs, &self.tensors, |i| self.bytes[i].clone()).unwrap();
        file
    }
}

/// The numbers of a valid file's header, and where the header ends. Reads by itself, so that what is written is read
/// twice.
pub(crate) fn fields(file: &[u8]) -> (Vec<Field>, usize) {
    assert_eq!(&file[..4], b"GGUF");
    let mut walk = Walk { file, at: 4, fields: Vec::new() };
    walk.number("version", 4);
    let tensors = walk.number("tensor count", 8);
    let pairs = walk.number("pair count", 8);
    for _ in 0..pairs {
        let key = walk.text("a key");
        let kind = walk.number(&format!("type of {key}"), 4);
        walk.value(&key, kind);
    }
    for _ in 0..tensors {
        let name = walk.text("a name");
        let dimensions = walk.number(&format!("dimensions of {name}"), 4);
        for _ in 0..dimensions {
            walk.number(&format!("a dimension of {name}"), 8);
        }
        walk.number(&format!("type of {name}"), 4);
        walk.number(&format!("offset of {name}"), 8);
    }
    (walk.fields, walk.at)
}

struct Walk<'a> {
    file: &'a [u8],
    at: usize,
    fields: Vec<Field>,
}

impl Walk<'_> {
    fn number(&mut self, what: &str, bytes: usize) -> u64 {
        let mut number = [0; 8];
        number[..bytes].copy_from_slice(&self.file[self.at..self.at + bytes]);
        self.fields.push(Field { what: what.into(), at: self.at, bytes });
        self.at += bytes;
        u64::from_le_bytes(number)
    }

    fn text(&mut self, what: &str) -> String {
        let length = self.number(&format!("length of {what}"), 8) as usize;
        let text = String::from_utf8(self.file[self.at..self.at + length].to_vec()).unwrap();
        self.at += length;
        text
    }

    fn value(&mut self, key: &str, kind: u64) {
        match kind {
            4 | 6 => drop(self.number(&format!("value of {key}"), 4)),
            7 => drop(self.number(&format!("value of {key}"), 1)),
            8 => drop(self.text(&format!("value of {key}"))),
            9 => {
                let of = self.number(&format!("element type of {key}"), 4);
                let count = self.number(&format!("element count of {key}"), 8);
                for _ in 0..count {
                    match of {
                        8 => drop(self.text(&format!("an element of {key}"))),
                        // Thousands of plain numbers are as good as one.
                        5 => self.at += 4,
                        other => panic!("{key}: no test writes arrays of type {other}"),
                    }
                }
            }
            other => panic!("{key}: no test writes type {other}"),
        }
    }
}

/// Random numbers for weights: SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// −1 to 1.
    pub(crate) fn uniform(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// The sizes of a Llama for tests.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) vocab: usize,
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) ffn: usize,
    pub(crate) layers: usize,
}

/// A Llama's metadata and norms; `matrix` writes each matrix (name, rows, columns).
pub(crate) fn llama(shape: Shape, mut matrix: impl FnMut(&mut GgufWriter, &str, usize, usize)) -> GgufWriter {
    let Shape { vocab, hidden, heads, kv_heads, ffn, layers } = shape;
    let mut w = GgufWriter::default();
    let head_dim = hidden / heads;
    w.pair("general.architecture", Value::Text("llama".into()))
        .pair("general.name", Value::Text("a test".into()))
        .pair("general.alignment", Value::U32(ALIGNMENT as u32))
        .pair("llama.block_count", Value::U32(layers as u32))
        .pair("llama.context_length", Value::U32(128))
        .pair("llama.embedding_length", Value::U32(hidden as u32))
        .pair("llama.feed_forward_length", Value::U32(ffn as u32))
        .pair("llama.attention.head_count", Value::U32(heads as u32))
        .pair("llama.attention.head_count_kv", Value::U32(kv_heads as u32))
        .pair("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5))
        .pair("llama.attention.causal", Value::Bool(true))
        .pair("llama.rope.freq_base", Value::F32(10_000.0))
        .pair("llama.rope.dimension_count", Value::U32(head_dim as u32))
        .pair("tokenizer.ggml.tokens", Value::Texts((0..vocab).map(|i| format!("t{i}")).collect()))
        .pair("tokenizer.ggml.token_type", Value::I32s(vec![1; vocab]));
    matrix(&mut w, "token_embd.weight", vocab, hidden);
    let mut random = Random(7);
    let mut norm = |w: &mut GgufWriter, name: &str| {
        let values: Vec<f32> = (0..hidden).map(|_| 1.0 + 0.2 * random.uniform()).collect();
        w.f32_tensor(name, &[hidden], &values);
    };
    for i in 0..layers {
        norm(&mut w, &format!("blk.{i}.attn_norm.weight"));
        matrix(&mut w, &format!("blk.{i}.attn_q.weight"), hidden, hidden);
        matrix(&mut w, &format!("blk.{i}.attn_k.weight"), kv_heads * head_dim, hidden);
        matrix(&mut w, &format!("blk.{i}.attn_v.weight"), kv_heads * head_dim, hidden);
        matrix(&mut w, &format!("blk.{i}.attn_output.weight"), hidden, hidden);
        norm(&mut w, &format!("blk.{i}.ffn_norm.weight"));
        matrix(&mut w, &format!("blk.{i}.ffn_gate.weight"), ffn, hidden);
        matrix(&mut w, &format!("blk.{i}.ffn_up.weight"), ffn, hidden);
        matrix(&mut w, &format!("blk.{i}.ffn_down.weight"), hidden, ffn);
    }
    norm(&mut w, "output_norm.weight");
    w
}
