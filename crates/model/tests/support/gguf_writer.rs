//! Writes GGUF files and remembers where every number of the header is, so that tests can lie in each of them.

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
}

pub(crate) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
}

struct Tensor {
    name: String,
    type_id: u32,
    /// Innermost first, as the file has them.
    dims: Vec<u64>,
    bytes: Vec<u8>,
}

const ALIGNMENT: usize = 32;

impl GgufWriter {
    pub(crate) fn pair(&mut self, key: &str, value: Value) -> &mut Self {
        self.pairs.push((key.into(), value));
        self
    }

    /// `dims` outermost first.
    pub(crate) fn tensor(&mut self, name: &str, type_id: u32, dims: &[usize], bytes: Vec<u8>) -> &mut Self {
        let dims = dims.iter().rev().map(|&d| d as u64).collect();
        self.tensors.push(Tensor { name: name.into(), type_id, dims, bytes });
        self
    }

    pub(crate) fn f32_tensor(&mut self, name: &str, dims: &[usize], values: &[f32]) -> &mut Self {
        self.tensor(name, 0, dims, values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    /// The file, the header's numbers, and where the header ends.
    pub(crate) fn finish(&self) -> (Vec<u8>, Vec<Field>, usize) {
        let mut out = Out::default();
        out.bytes.extend_from_slice(b"GGUF");
        out.u32("version", 3);
        out.u64("tensor count", self.tensors.len() as u64);
        out.u64("pair count", self.pairs.len() as u64);
        for (key, value) in &self.pairs {
            out.text(&format!("key {key}"), key);
            out.value(key, value);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            let name = &tensor.name;
            out.text(&format!("name {name}"), name);
            out.u32(&format!("dimensions of {name}"), tensor.dims.len() as u32);
            for &dim in &tensor.dims {
                out.u64(&format!("a dimension of {name}"), dim);
            }
            out.u32(&format!("type of {name}"), tensor.type_id);
            out.u64(&format!("offset of {name}"), offset as u64);
            offset = (offset + tensor.bytes.len()).next_multiple_of(ALIGNMENT);
        }
        let header = out.bytes.len();
        for tensor in &self.tensors {
            out.bytes.resize(out.bytes.len().next_multiple_of(ALIGNMENT), 0);
            out.bytes.extend_from_slice(&tensor.bytes);
        }
        (out.bytes, out.fields, header)
    }
}

#[derive(Default)]
struct Out {
    bytes: Vec<u8>,
    fields: Vec<Field>,
}

impl Out {
    fn field(&mut self, what: &str, bytes: &[u8]) {
        self.fields.push(Field { what: what.into(), at: self.bytes.len(), bytes: bytes.len() });
        self.bytes.extend_from_slice(bytes);
    }

    fn u32(&mut self, what: &str, x: u32) {
        self.field(what, &x.to_le_bytes());
    }

    fn u64(&mut self, what: &str, x: u64) {
        self.field(what, &x.to_le_bytes());
    }

    fn text(&mut self, what: &str, text: &str) {
        self.u64(&format!("length of {what}"), text.len() as u64);
        self.bytes.extend_from_slice(text.as_bytes());
    }

    fn value(&mut self, key: &str, value: &Value) {
        let kind = match value {
            Value::U32(_) => 4,
            Value::F32(_) => 6,
            Value::Bool(_) => 7,
            Value::Text(_) => 8,
            Value::Texts(_) | Value::I32s(_) => 9,
        };
        self.u32(&format!("type of {key}"), kind);
        match value {
            Value::U32(x) => self.u32(&format!("value of {key}"), *x),
            Value::F32(x) => self.field(&format!("value of {key}"), &x.to_le_bytes()),
            Value::Bool(x) => self.field(&format!("value of {key}"), &[u8::from(*x)]),
            Value::Text(x) => self.text(&format!("value of {key}"), x),
            Value::Texts(all) => {
                self.u32(&format!("element type of {key}"), 8);
                self.u64(&format!("element count of {key}"), all.len() as u64);
                all.iter().for_each(|x| self.text(&format!("an element of {key}"), x));
            }
            Value::I32s(all) => {
                self.u32(&format!("element type of {key}"), 5);
                self.u64(&format!("element count of {key}"), all.len() as u64);
                all.iter().for_each(|x| self.bytes.extend_from_slice(&x.to_le_bytes()));
            }
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
