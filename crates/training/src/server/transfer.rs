//! A shard as messages, for a backup that begins: everything that it holds, with a hash over all of it.

use std::sync::Arc;

use consort_collectives::link::{self, Message};
use consort_tensor::Pool;
use serde::{Deserialize, Serialize};

use super::seen::Seen;
use super::shard::{Bucket, Counts, Shard};
use super::spec::Spec;
use crate::Error;

/// The first message: what is not a bucket's.
#[derive(Debug, Serialize, Deserialize)]
struct First {
    log: u64,
    fenced: Vec<u64>,
    counts: Counts,
}

/// One bucket; its numbers are weights, state, sums, and the groups' gradients in order.
#[derive(Debug, Serialize, Deserialize)]
struct Part {
    bucket: usize,
    loaded: bool,
    step: u64,
    updates: u64,
    seen: Seen,
    attempt: u32,
    exponent: i32,
    largest: u32,
    held: Vec<u64>,
}

/// The hash of a shard's messages.
pub(super) fn hash(messages: &[Message]) -> String {
    let mut hasher = blake3::Hasher::new();
    for message in messages {
        // Lengths first, so that nothing runs together.
        hasher.update(&(message.head.len() as u64).to_le_bytes()).update(&message.head);
        hasher.update(&(message.body.len() as u64).to_le_bytes()).update(&message.body);
    }
    hasher.finalize().to_hex().to_string()
}

impl Shard {
    /// Everything it holds.
    pub fn export(&self) -> Vec<Message> {
        let head = |value: serde_json::Result<Vec<u8>>| value.unwrap_or_default();
        let first =
            First { log: self.log, fenced: self.fenced.iter().copied().collect(), counts: self.counts };
        let mut messages = vec![Message { head: head(serde_json::to_vec(&first)), body: Vec::new() }];
        for (&index, bucket) in &self.buckets {
            let part = Part {
                bucket: index,
                loaded: bucket.loaded,
                step: bucket.step,
                updates: bucket.updates,
                seen: bucket.seen.clone(),
                attempt: bucket.attempt,
                exponent: bucket.exponent,
                largest: bucket.largest,
                held: bucket.held.keys().copied().collect(),
            };
            let mut body = link::bytes(&bucket.weights[..]).to_vec();
            bucket.state.iter().for_each(|state| body.extend_from_slice(link::bytes(&state[..])));
            body.extend_from_slice(link::bytes(&bucket.sums[..]));
            bucket.held.values().for_each(|held| body.extend_from_slice(link::bytes(held)));
            messages.push(Message { head: head(serde_json::to_vec(&part)), body });
        }
        messages
    }

    /// The shard that [`Shard::export`] was called on.
    ///
    /// # Errors
    /// [`Error::Server`] where the messages are not such a shard's.
    pub fn import(spec: Arc<Spec>, index: usize, pool: &Pool, messages: &[Message]) -> Result<Shard, Error> {
        let mut shard = Shard::new(Arc::clone(&spec), index)?;
        let wrong = |what: &str| Error::Server(format!("the copy of shard {index} {what}"));
        let [first, parts @ ..] = messages else { return Err(wrong("is empty")) };
        let first: First = serde_json::from_slice(&first.head).map_err(|e| wrong(&e.to_string()))?;
        if parts.len() != shard.buckets.len() {
            return Err(wrong("has another number of buckets"));
        }
        for message in parts {
            let part: Part = serde_json::from_slice(&message.head).map_err(|e| wrong(&e.to_string()))?;
            let bucket = shard.buckets.get_mut(&part.bucket).ok_or_else(|| wrong("has a foreign bucket"))?;
            bucket.fill(part, &message.body).ok_or_else(|| wrong("has another length"))?;
        }
        for (&index, bucket) in &mut shard.buckets {
            if spec.mode == super::Mode::Synchronous {
                bucket.complete(pool, &spec, index);
            }
        }
        (shard.log, shard.counts) = (first.log, first.counts);
        shard.fenced = first.fenced.into_iter().collect();
        Ok(shard)
    }
}

impl Bucket {
    fn fill(&mut self, part: Part, body: &[u8]) -> Option<()> {
        let mut body = body;
        let mut take = |len: usize| {
            let (front, rest) = body.split_at_checked(len)?;
            body = rest;
            Some(front)
        };
        let len = self.weights.len();
        self.weights.copy_from_slice(&link::numbers::<f32>(take(4 * len)?)?);
        for state in &mut self.state {
            state.copy_from_slice(&link::numbers::<f32>(take(4 * len)?)?);
        }
        let sums = self.sums.len();
        self.sums.copy_from_slice(&link::numbers::<i64>(take(8 * sums)?)?);
        for group in part.held {
            self.held.insert(group, link::numbers::<f32>(take(4 * len)?)?);
        }
        (self.loaded, self.step, self.updates, self.seen) = (part.loaded, part.step, part.updates, part.seen);
        (self.attempt, self.exponent, self.largest) = (part.attempt, part.exponent, part.largest);
        body.is_empty().then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::op::Op;
    use super::super::shard::tests::{loaded, push};
    use super::super::spec::Aggregate;
    use super::super::spec::tests::spec;
    use super::*;

    #[test]
    fn a_copy_goes_on_as_the_original() {
        let (mut shard, pool) = loaded(spec(&[4, 6], 1));
        let body = |len| link::bytes(&vec![1i64 << 39; len]).to_vec();
        for group in 0..3 {
            shard.apply(&pool, &push(group, 0, 40), &body(4));
        }
        shard.apply(&pool, &Op::Fence { worker: 3 }, &[]);
        let parts = shard.export();
        let mut copy = Shard::import(Arc::clone(&shard.spec), 0, &pool, &parts).unwrap();
        assert_eq!(copy.export(), parts);
        for shard in [&mut shard, &mut copy] {
            shard.apply(&pool, &push(3, 0, 40), &body(4));
        }
        assert_eq!(shard.ready().cloned().collect::<Vec<_>>(), copy.ready().cloned().collect::<Vec<_>>());
        assert_eq!((copy.log(), copy.ready().count(), copy.fences(3)), (shard.log(), 1, true));
        assert_eq!(shard.export(), copy.export());
    }

    #[test]
    fn a_copy_that_is_another_thing_is_refused() {
        let (shard, pool) = loaded(spec(&[4, 6], 1));
        let import = |parts: &[Message]| Shard::import(Arc::clone(&shard.spec), 0, &pool, parts).err();
        let parts = shard.export();
        assert!(import(&parts).is_none());
        assert!(import(&[]).is_some() && import(&parts[..2]).is_some());
        let mut short = parts.clone();
        short[1].body.pop();
        assert!(import(&short).is_some());
        let mut foreign = parts.clone();
        foreign[1].head = foreign[2].head.clone();
        assert!(import(&foreign).is_some());
        let mut flipped = parts.clone();
        flipped[2].body[5] ^= 1;
        assert_ne!(hash(&flipped), hash(&parts));
        assert!(
            Shard::new(Arc::new(super::super::Spec { aggregate: Aggregate::Median, ..spec(&[4], 1) }), 0)
                .is_ok()
        );
    }
}
