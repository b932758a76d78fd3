//! Where each tensor of a model lies in one flat buffer, and the buckets in which its gradients are born.
//!
//! Tensors lie in the order in which backward finishes their gradients: the head and the last norm, the layers from the
//! last to the first, the embedding. A bucket is one of these groups: a trainer can send it away while backward goes
//! on below it. A flat buffer makes the optimizer one loop and a checkpoint one write. Queries, keys and values lie
//! next to each other, and so do gates and ups: each is one product.

use std::ops::Range;

use consort_tensor::Pool;
use consort_tensor::buffer::Buffer;
use consort_tensor::train::clear;

use crate::Error;
use crate::arch::ModelConfig;
use crate::formats::names::{Names, Part};

/// Tensors begin at multiples of this many values, a cache line, unless they continue the one before.
const ALIGN: usize = 16;

/// What a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Embedding,
    Head,
    FinalNorm,
    Weight(usize, Part),
    Bias(usize, Part),
}

/// One tensor of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Its Hugging Face name.
    pub name: String,
    /// Outermost first: a matrix has rows (output features), then columns.
    pub shape: Vec<usize>,
    /// Where it lies in the flat buffer.
    pub range: Range<usize>,
    /// Whether weight decay is meant for it: matrices, but not norms and biases.
    pub decays: bool,
    pub(crate) role: Role,
}

/// Where the tensors of one model lie.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    parameters: Vec<Parameter>,
    buckets: Vec<Range<usize>>,
    pub(super) embedding: Range<usize>,
    pub(super) head: Option<Range<usize>>,
    pub(super) final_norm: Range<usize>,
    pub(super) layers: Vec<LayerLayout>,
}

/// Where one layer's tensors lie. Joined ones cover their parts.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LayerLayout {
    pub(super) bucket: usize,
    pub(super) attention_norm: Range<usize>,
    pub(super) qkv: Range<usize>,
    pub(super) qkv_bias: Option<Range<usize>>,
    pub(super) query_key_norms: Option<(Range<usize>, Range<usize>)>,
    pub(super) output: Range<usize>,
    pub(super) ffn_norm: Range<usize>,
    pub(super) gate_up: Range<usize>,
    pub(super) down: Range<usize>,
}

impl Layout {
    /// The layout of the model that `config` describes.
    ///
    /// # Errors
    /// [`Error::Untrainable`] where the model has something that has no backward here.
    pub fn new(config: &ModelConfig) -> Result<Layout, Error> {
        trainable(config)?;
        let mut writer = Writer {
            names: Names::hugging_face("model.", "lm_head.weight", false),
            parameters: Vec::new(),
            buckets: Vec::new(),
            end: 0,
        };
        let hidden = config.hidden;
        let head = (!config.tied_head).then(|| writer.add(Role::Head, &[config.vocab, hidden]));
        let final_norm = writer.add(Role::FinalNorm, &[hidden]);
        writer.close_bucket();
        let mut layers: Vec<LayerLayout> =
            (0..config.layers).rev().map(|layer| writer.layer(config, layer)).collect();
        layers.reverse();
        let embedding = writer.add(Role::Embedding, &[config.vocab, hidden]);
        writer.close_bucket();
        let Writer { parameters, buckets, .. } = writer;
        Ok(Layout { parameters, buckets, embedding, head, final_norm, layers })
    }

    /// All tensors, in the order in which they lie.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// The tensor of that name.
    pub fn parameter(&self, name: &str) -> Option<&Parameter> {
        self.parameters.iter().find(|p| p.name == name)
    }

    /// Ranges of the flat buffer, in the order in which backward completes them. They cover it.
    pub fn buckets(&self) -> &[Range<usize>] {
        &self.buckets
    }

    /// Values of the flat buffer. Those between tensors are 0 and stay so.
    pub fn len(&self) -> usize {
        self.buckets.last().map_or(0, |bucket| bucket.end)
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Trainable values, without what lies between tensors.
    pub fn parameter_count(&self) -> usize {
        self.parameters.iter().map(|p| p.range.len()).sum()
    }

    /// `bucket` in pieces that decay or don't, in order; ranges are of the flat buffer.
    pub fn decay_pieces(&self, bucket: usize) -> Vec<(Range<usize>, bool)> {
        let bucket = &self.buckets[bucket];
        let mut pieces: Vec<(Range<usize>, bool)> = Vec::new();
        for parameter in self.parameters.iter().filter(|p| bucket.contains(&p.range.start)) {
            match pieces.last_mut() {
                Some((last, decays)) if *decays == parameter.decays => last.end = parameter.range.end,
                _ => pieces.push((parameter.range.clone(), parameter.decays)),
            }
        }
        pieces
    }
}

struct Writer {
    names: Names,
    parameters: Vec<Parameter>,
    buckets: Vec<Range<usize>>,
    end: usize,
}

impl Writer {
    /// A tensor on a line of its own.
    fn add(&mut self, role: Role, shape: &[usize]) -> Range<usize> {
        self.end = self.end.next_multiple_of(ALIGN);
        self.join(role, shape)
    }

    /// A tensor that continues the one before.
    fn join(&mut self, role: Role, shape: &[usize]) -> Range<usize> {
        let name = match role {
            Role::Embedding => self.names.embedding(),
            Role::Head => self.names.head(),
            Role::FinalNorm => self.names.final_norm(),
            Role::Weight(layer, part) => self.names.part(layer, part),
            Role::Bias(layer, part) => self.names.bias(layer, part),
        };
        let range = self.end..self.end + shape.iter().product::<usize>();
        self.end = range.end;
        let decays = shape.len() > 1;
        self.parameters.push(Parameter { name, shape: shape.to_vec(), range: range.clone(), decays, role });
        range
    }

    fn close_bucket(&mut self) {
        self.end = self.end.next_multiple_of(ALIGN);
        let start = self.buckets.last().map_or(0, |bucket| bucket.end);
        self.buckets.push(start..self.end);
    }

    fn layer(&mut self, config: &ModelConfig, layer: usize) -> LayerLayout {
        let (hidden, ffn, dim) = (config.hidden, config.ffn, config.head_dim);
        let (q, kv) = (config.heads * dim, config.kv_heads * dim);
        let weight = |part| Role::Weight(layer, part);
        let bias = |part| Role::Bias(layer, part);
        let down = self.add(weight(Part::Down), &[hidden, ffn]);
        let gate = self.add(weight(Part::Gate), &[ffn, hidden]);
        let up = self.join(weight(Part::Up), &[ffn, hidden]);
        let ffn_norm = self.add(weight(Part::FfnNorm), &[hidden]);
        let output = self.add(weight(Part::Output), &[hidden, q]);
        let query_key_norms = config
            .query_key_norm
            .then(|| (self.add(weight(Part::QueryNorm), &[dim]), self.add(weight(Part::KeyNorm), &[dim])));
        let qkv_bias = (config.family == "qwen2").then(|| {
            let query = self.add(bias(Part::Query), &[q]);
            self.join(bias(Part::Key), &[kv]);
            query.start..self.join(bias(Part::Value), &[kv]).end
        });
        let query = self.add(weight(Part::Query), &[q, hidden]);
        self.join(weight(Part::Key), &[kv, hidden]);
        let value = self.join(weight(Part::Value), &[kv, hidden]);
        let attention_norm = self.add(weight(Part::AttentionNorm), &[hidden]);
        self.close_bucket();
        LayerLayout {
            bucket: self.buckets.len() - 1,
            attention_norm,
            qkv: query.start..value.end,
            qkv_bias,
            query_key_norms,
            output,
            ffn_norm,
            gate_up: gate.start..up.end,
            down,
        }
    }
}

/// Refuses what has no backward.
fn trainable(config: &ModelConfig) -> Result<(), Error> {
    let no = |what: &str| {
        Err(Error::Untrainable {
            what: format!("{what} ({} model)", config.family),
            supported: "Llama (SmolLM2), Mistral without a sliding window, Qwen 2, Qwen 3".into(),
        })
    };
    if let Some(reason) = config.contradiction() {
        return no(&format!("a configuration where {reason}"));
    }
    if config.activation != consort_tensor::activation::Activation::Silu {
        return no("a gate other than SiLU");
    }
    if config.post_norms || config.embedding_scale.is_some() {
        return no("norms after a block or a scaled embedding");
    }
    if config.attention_softcap.is_some() || config.logit_softcap.is_some() {
        return no("a cap on scores or logits");
    }
    if config.sliding.is_some() {
        return no("a sliding window");
    }
    if config.head_dim > 256 {
        return no("heads of more than 256 values");
    }
    if values(config).is_none_or(|values| values > MOST_VALUES) {
        return no("more parameters than this machine can count");
    }
    Ok(())
}

/// More than any machine holds, and few enough to count the bytes of what is kept beside each of them.
const MOST_VALUES: usize = 1 << 50;

/// At least as many values as such a model has; `None` where they can't be counted.
fn values(config: &ModelConfig) -> Option<usize> {
    let rows = |count: usize| count.checked_mul(config.head_dim);
    // Of queries and of what is made of their answers; of keys and values; biases and norms are few beside them.
    let attention = rows(config.heads)?.checked_add(rows(config.kv_heads)?)?.checked_mul(2)?;
    let block = attention.checked_add(config.ffn.checked_mul(3)?)?.checked_add(16)?;
    let all = block.checked_mul(config.layers)?.checked_add(config.vocab.checked_mul(2)?)?.checked_add(1)?;
    all.checked_mul(config.hidden)
}

/// Gradients, one buffer a bucket: sums over rows and micro-batches.
///
/// A buffer of its own, so that a finished bucket can be moved to another thread while backward fills the next.
#[derive(Debug)]
pub struct Gradients {
    /// In the order of [`Layout::buckets`], each as long as its range.
    pub buckets: Vec<Buffer<f32>>,
    /// Whether what the buckets hold counts as 0.
    pub(super) forgotten: bool,
}

impl Gradients {
    /// Zeros.
    ///
    /// # Errors
    /// [`Error::Tensor`] where memory is refused.
    pub fn zeroed(layout: &Layout) -> Result<Gradients, Error> {
        let buckets = layout.buckets().iter().map(|range| Buffer::zeroed(range.len()));
        Ok(Gradients { buckets: buckets.collect::<Result<_, _>>()?, forgotten: false })
    }

    /// The gradient of `parameter`.
    ///
    /// # Panics
    /// If the parameter is not one of the layout these were made for.
    pub fn of(&self, layout: &Layout, parameter: &Parameter) -> &[f32] {
        let bucket = layout.buckets().partition_point(|range| range.end <= parameter.range.start);
        let start = layout.buckets()[bucket].start;
        &self.buckets[bucket][parameter.range.start - start..parameter.range.end - start]
    }

    /// From here on all of them count as 0. Nothing is written: the next backward puts its own in their place, which
    /// takes less time than clearing them and adding. Who wants to read them before calls [`Gradients::settle`].
    pub fn forget(&mut self) {
        self.forgotten = true;
    }

    /// Makes them 0 if they count as 0.
    pub fn settle(&mut self, pool: &Pool) {
        if std::mem::take(&mut self.forgotten) {
            self.buckets.iter_mut().for_each(|bucket| clear(pool, bucket));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::decoder::tests::tiny;
    use super::*;

    #[test]
    fn tensors_cover_their_buckets_and_joined_ones_touch() {
        for family in ["llama", "qwen2", "qwen3"] {
            let config = tiny(family);
            let layout = Layout::new(&config).unwrap();
            assert_eq!(layout.buckets().len(), config.layers + 2);
            let mut end = 0;
            for parameter in layout.parameters() {
                assert!(parameter.range.start >= end && parameter.range.start < end + ALIGN);
                assert_eq!(parameter.range.len(), parameter.shape.iter().product::<usize>());
                assert_eq!(layout.parameter(&parameter.name), Some(parameter));
                end = parameter.range.end;
            }
            assert!(
                layout.len() >= end && layout.buckets().windows(2).all(|pair| pair[0].end == pair[1].start)
            );
            let layer = &layout.layers[0];
            let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
            assert_eq!(layer.qkv.len(), (q + 2 * kv) * config.hidden);
            assert_eq!(layer.gate_up.len(), 2 * config.ffn * config.hidden);
            assert_eq!(layer.qkv_bias.is_some(), family == "qwen2");
            assert_eq!(layer.query_key_norms.is_some(), family == "qwen3");
            // Backward comes to the last layer first.
            assert!(layout.layers[0].bucket > layout.layers[1].bucket);
            assert_eq!(layout.head.is_none(), config.tied_head);
        }
    }

    #[test]
    fn what_has_no_backward_is_refused() {
        for change in [
            (|c| c.post_norms = true) as fn(&mut ModelConfig),
            |c| c.logit_softcap = Some(30.0),
            |c| c.activation = consort_tensor::activation::Activation::GeluTanh,
            |c| (c.head_dim, c.heads, c.kv_heads) = (512, 1, 1),
            |c| c.kv_heads = 3,
        ] {
            let mut config = tiny("llama");
            change(&mut config);
            assert!(matches!(Layout::new(&config), Err(Error::Untrainable { .. })), "{config:?}");
        }
    }
}
