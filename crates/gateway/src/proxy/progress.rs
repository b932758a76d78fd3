//! How far the client's answer has come, and what of a replica's stream is news to it.
//!
//! This is what makes one answer of many replicas: the ids of each choice as the client has them, to be sent to the
//! next replica, and the rule by which nothing is told twice. It holds by construction and not by comparing text: a
//! chunk's ids are counted when the chunk is passed on, never before, and a chunk is passed on whole or not at all.
//!
//! The chunk with the reason an answer ended is passed on but not counted. A replica that takes over afterwards
//! repeats it (the contract of `consort.choices`), it is dropped here as known, and what comes after it, the usage, is
//! right. So a death between an answer's last chunk and `[DONE]` needs no case of its own.

use super::chunk::Chunk;

/// One choice, as the client has it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Said {
    ids: Vec<u32>,
    /// Its opening chunk is out.
    opened: bool,
    /// Its last chunk is out.
    finished: bool,
}

/// All choices of an answer.
#[derive(Clone, Debug)]
pub(crate) struct Progress {
    choices: Vec<Said>,
    /// The usage is out.
    pub(crate) usage: bool,
    /// Numerics classes that had a part in it, in order.
    pub(crate) classes: Vec<String>,
    /// Tokens passed on.
    pub(crate) tokens: u64,
}

/// What to do with a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// Pass it on.
    New,
    /// The client has it.
    Known,
    /// It can't belong to this answer.
    Foreign,
}

impl Progress {
    /// An answer of `choices` choices, of which `emitted` was said elsewhere.
    pub(crate) fn new(choices: usize, emitted: Vec<Vec<u32>>) -> Progress {
        let mut said = vec![Said::default(); choices];
        for (choice, ids) in said.iter_mut().zip(emitted) {
            choice.opened = !ids.is_empty();
            choice.ids = ids;
        }
        Progress { choices: said, usage: false, classes: Vec::new(), tokens: 0 }
    }

    /// Judges a chunk that the replica sent next, and counts it where it is new.
    pub(crate) fn judge(&mut self, chunk: &Chunk) -> News {
        let Some(choice) = &chunk.choice else {
            return match chunk.usage() {
                Some(_) if !self.complete() => News::Foreign,
                Some(_) if std::mem::replace(&mut self.usage, true) => News::Known,
                Some(_) => News::New,
                None => News::Foreign,
            };
        };
        let Some(said) = self.choices.get_mut(choice.index) else { return News::Foreign };
        if said.finished {
            return News::Known;
        }
        let Some(ids) = &choice.token_ids else {
            return match (chunk.finish_reason(), std::mem::replace(&mut said.opened, true)) {
                (Some(_), _) => News::Foreign,
                (None, true) => News::Known,
                (None, false) => News::New,
            };
        };
        said.opened = true;
        self.tokens += ids.len() as u64;
        if chunk.finish_reason().is_some() {
            said.finished = true;
        } else {
            said.ids.extend_from_slice(ids);
        }
        News::New
    }

    /// Every choice has had its last chunk.
    pub(crate) fn complete(&self) -> bool {
        self.choices.iter().all(|choice| choice.finished)
    }

    /// Anything is out.
    pub(crate) fn begun(&self) -> bool {
        self.choices.iter().any(|choice| choice.opened)
    }

    /// Whether a replica must be told what was said: the answer goes on and doesn't begin.
    pub(crate) fn resumes(&self) -> bool {
        self.choices.iter().any(|choice| !choice.ids.is_empty())
    }

    /// The ids of each choice.
    pub(crate) fn emitted(&self) -> impl Iterator<Item = &[u32]> {
        self.choices.iter().map(|choice| choice.ids.as_slice())
    }

    /// Bytes of memory it holds.
    pub(crate) fn bytes(&self) -> usize {
        self.choices.iter().map(|choice| size_of::<Said>() + choice.ids.capacity() * 4).sum()
    }

    /// Notes the class of a replica that has a part in the answer.
    pub(crate) fn note_class(&mut self, class: &str) {
        if self.classes.last().is_none_or(|last| last != class) {
            self.classes.push(class.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use consort_base::Philox;

    use super::*;

    /// A replica's stream of `n` choices that goes on from `emitted`, choices in turn.
    fn stream(answers: &[Vec<u32>], emitted: &[Vec<u32>]) -> Vec<String> {
        let mut out = Vec::new();
        let mut at: Vec<usize> = emitted.iter().map(Vec::len).collect();
        for (i, ids) in emitted.iter().enumerate() {
            if ids.is_empty() {
                out.push(format!(r#"{{"choices":[{{"index":{i},"delta":{{"role":"assistant"}}}}]}}"#));
            }
        }
        while at.iter().zip(answers).any(|(at, answer)| *at < answer.len()) {
            for (i, answer) in answers.iter().enumerate() {
                // Two ids a chunk now and then; the last chunk has an id and the reason.
                let end = (at[i] + 1 + answer[at[i].min(answer.len() - 1)] as usize % 2).min(answer.len());
                if at[i] < answer.len() {
                    let ids = &answer[at[i]..end];
                    let reason = if end == answer.len() { "\"stop\"" } else { "null" };
                    out.push(format!(
                        r#"{{"choices":[{{"index":{i},"delta":{{}},"finish_reason":{reason},"token_ids":{ids:?}}}]}}"#
                    ));
                    at[i] = end;
                }
            }
        }
        out.push(r#"{"choices":[],"usage":{"completion_tokens":9}}"#.to_owned());
        out
    }

    /// Cuts the stream at random places again and again; the client has each chunk once, in order.
    #[test]
    fn whatever_breaks_nothing_is_told_twice_or_lost() {
        let mut rng = Philox::new(21, 0);
        for round in 0..300 {
            let n = 1 + rng.next_u64() as usize % 4;
            let answers: Vec<Vec<u32>> = (0..n)
                .map(|_| (0..1 + rng.next_u64() % 20).map(|_| rng.next_u64() as u32 % 100).collect())
                .collect();
            let undisturbed = stream(&answers, &vec![Vec::new(); n]);
            let mut progress = Progress::new(n, Vec::new());
            let mut client = Vec::new();
            while !progress.usage {
                let emitted: Vec<Vec<u32>> = progress.emitted().map(<[u32]>::to_vec).collect();
                let rest = stream(&answers, &emitted);
                let cut = rng.next_u64() as usize % (rest.len() + 1);
                for text in &rest[..cut] {
                    match progress.judge(&Chunk::read(text.clone().into()).unwrap()) {
                        News::New => client.push(text.clone()),
                        News::Known => {}
                        News::Foreign => panic!("round {round}: {text}"),
                    }
                }
            }
            for i in 0..n {
                let own = |all: &[String]| -> Vec<String> {
                    let mark = format!("\"index\":{i},");
                    all.iter().filter(|text| text.contains(&mark)).cloned().collect()
                };
                assert_eq!(own(&client), own(&undisturbed), "round {round}, choice {i}");
            }
            assert_eq!(client.len(), undisturbed.len());
            assert!(progress.complete());
        }
    }

    #[test]
    fn what_cannot_belong_to_the_answer_is_foreign() {
        let mut progress = Progress::new(1, Vec::new());
        let mut judge = |text: &'static str| progress.judge(&Chunk::read(text.into()).unwrap());
        assert_eq!(judge(r#"{"choices":[{"index":1,"token_ids":[1]}]}"#), News::Foreign);
        assert_eq!(judge(r#"{"choices":[],"usage":{}}"#), News::Foreign, "the answer isn't complete");
        assert_eq!(judge(r#"{"choices":[]}"#), News::Foreign);
        assert_eq!(judge(r#"{"choices":[{"index":0,"finish_reason":"stop"}]}"#), News::Foreign);
    }
}
