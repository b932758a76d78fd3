//! What of a replica's stream is news to the client, counted on its way.

use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use consort_api::{Numerics, Usage};

use super::Session;
use crate::fleet::Ticket;
use crate::proxy::attempt::Failure;
use crate::proxy::chunk::{Chunk, Head};
use crate::proxy::progress::News;

impl Session {
    /// Judges a chunk; returns it where it is news.
    pub(super) fn chunk(&mut self, data: Bytes) -> Result<Option<Chunk>, Failure> {
        let chunk = match &mut self.attempt {
            Some(attempt) => Chunk::read_after(&mut attempt.head, data),
            None => Chunk::read_after(&mut Head::default(), data),
        };
        let chunk = chunk.map_err(|_| Failure::Garbage)?;
        if let Some(class) = chunk.fingerprint() {
            let known = self.progress.classes.last();
            if known.is_some_and(|known| known != class) && self.version().numerics == Numerics::SameClass {
                return Err(Failure::OtherClass);
            }
            if known.is_none_or(|known| known != class) {
                self.progress.note_class(class);
            }
        }
        let before = self.progress.tokens;
        let news = self.progress.judge(&chunk);
        if let Some(usage) = chunk.usage()
            && let Ok(usage) = serde_json::from_str::<Usage>(usage)
        {
            self.tally.prompt_tokens.store(usage.prompt_tokens as u64, Ordering::Relaxed);
            self.tally.answer_tokens.store(usage.completion_tokens as u64, Ordering::Relaxed);
        }
        match news {
            News::New => {
                let count = self.progress.tokens - before;
                if count > 0 {
                    self.note_news(count);
                }
                Ok(Some(chunk))
            }
            News::Known => Ok(None),
            News::Foreign => Err(Failure::Garbage),
        }
    }

    /// Tokens came that the client doesn't have.
    fn note_news(&mut self, count: u64) {
        let mut attempt = self.attempt.take();
        // Tokens that came in one read came at one time.
        let at = attempt.as_ref().map_or_else(Instant::now, |attempt| attempt.read);
        self.passed(at, count, attempt.as_mut().map(|attempt| &mut attempt.ticket));
        self.attempt = attempt;
        self.tries = 0;
        self.begin_by = None;
        self.failed.clear();
        self.permit = None;
    }

    /// Takes note of tokens on their way to the client, from the replica with this ticket.
    pub(crate) fn passed(&mut self, now: Instant, count: u64, ticket: Option<&mut Ticket>) {
        let telemetry = &self.gateway.telemetry;
        let stats = &self.model.versions[self.version].stats;
        telemetry.tokens(now, count);
        self.tally.answer_tokens.fetch_add(count, Ordering::Relaxed);
        let latency = match self.news {
            Some(last) => {
                telemetry.inter_token(now, stats, now.saturating_duration_since(last));
                if std::mem::take(&mut self.moved) {
                    telemetry.gap(now.saturating_duration_since(last));
                }
                now.saturating_duration_since(last)
            }
            None => {
                telemetry.first_token(now, stats, now.saturating_duration_since(self.arrived));
                now.saturating_duration_since(self.began)
            }
        };
        if let Some(ticket) = ticket {
            ticket.replica.gave(now, count, self.news.is_none(), latency);
            ticket.done(count);
        }
        self.news = Some(now);
    }
}
