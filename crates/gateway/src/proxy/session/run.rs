//! The loop: a replica is asked, its events are judged and told, and where it fails the next one is asked.

use std::time::Instant;

use consort_api::Protocol;

use super::failures::{broken, error_code};
use super::{Next, Opening, Session};
use crate::error::Refusal;
use crate::fleet::{Replica, Went};
use crate::proxy::attempt::{Attempt, Failure, Reply};
use crate::proxy::shadow;
use crate::proxy::sse::Event as Sse;

impl Session {
    /// Finds a replica that takes the request.
    ///
    /// # Errors
    /// Where none does.
    pub(crate) async fn open(&mut self) -> Result<Opening, Refusal> {
        loop {
            let replica = self.choose().await?;
            let question = self.question(replica.protocol)?;
            self.tries += 1;
            self.began = Instant::now();
            if self.running.is_none() {
                self.running = Some(self.model.pending.run());
            }
            if !self.beginnings.is_empty() {
                self.balance().note(&self.beginnings, replica.home);
            }
            let settings = &self.settings.replicas;
            self.begin_by = self.time_to_begin(&replica);
            let started = Attempt::start(&replica, question, settings, self.patience()).await;
            let failure = match started {
                Ok(Reply::Stream(attempt)) => {
                    self.confirm_doubt();
                    if self.seed.is_none() {
                        self.seed = attempt.headers.get("x-seed").cloned();
                    }
                    self.attempt = Some(attempt);
                    return Ok(Opening::Stream);
                }
                Ok(Reply::Refused(refused)) if !self.progress.begun() => {
                    replica.went(Instant::now(), Went::Well, true);
                    if self.doubt() {
                        continue;
                    }
                    return Ok(Opening::Refused(refused));
                }
                // It refuses to go on with what another began: this request is nothing for it.
                Ok(Reply::Refused(refused)) => Failure::Error(refused),
                Ok(Reply::Plain(plain)) => match plain.open(self.call.stream, self.patience()).await {
                    Ok(answer) => {
                        self.confirm_doubt();
                        answer.count(&self.tally);
                        return Ok(Opening::Plain(Box::new(answer)));
                    }
                    Err(failure) => failure,
                },
                Err(failure) => failure,
            };
            let failure = self.named(failure);
            if let Some(refused) = self.note(&replica, failure)? {
                return Ok(Opening::Refused(refused));
            }
        }
    }

    /// What there is to tell next.
    pub(crate) async fn next(&mut self) -> Next {
        loop {
            let patience = self.patience();
            let Some(attempt) = &mut self.attempt else {
                match self.open().await {
                    Ok(Opening::Stream) if std::mem::take(&mut self.anew) => return Next::Anew,
                    Ok(Opening::Stream) => continue,
                    Ok(Opening::Refused(refused)) => return Next::Failed(broken(&refused)),
                    Ok(Opening::Plain(_)) => {
                        return Next::Failed(Refusal::unavailable("no replica goes on with it"));
                    }
                    Err(refusal) => return Next::Failed(refusal),
                }
            };
            let hedging = &self.settings.hedging;
            let event = if hedging.enabled && self.news.is_none() && !self.hedged {
                self.first_event().await
            } else {
                attempt.event(patience).await
            };
            let failure = match event {
                Ok(Sse::Data { error: false, data }) => match self.chunk(data) {
                    Ok(Some(chunk)) => return Next::Chunk(chunk),
                    Ok(None) => continue,
                    Err(failure) => failure,
                },
                Ok(Sse::Data { error: true, data }) => match error_code(&data).as_deref() {
                    Some("handed_over") => Failure::HandedOver,
                    Some("deadline_exceeded") => Failure::Deadline,
                    _ => Failure::Broken("it ended the stream with an error".to_owned()),
                },
                Ok(Sse::Done) if self.progress.complete() => {
                    if let Some(mut attempt) = self.attempt.take() {
                        attempt.ticket.replica.went(Instant::now(), Went::Well, true);
                        attempt.ticket.settled = true;
                        let (call, said) = (&self.call, self.progress.emitted().next().unwrap_or_default());
                        let replica = &attempt.ticket.replica;
                        shadow::consider(&self.gateway, &self.model, self.version, call, said, replica);
                        attempt.finish().await;
                    }
                    self.running = None;
                    return Next::Done;
                }
                Ok(Sse::Done | Sse::Comment) => Failure::Garbage,
                Err(failure) => failure,
            };
            let Some(mut attempt) = self.attempt.take() else { continue };
            attempt.ticket.settled = true;
            let replica = attempt.ticket.replica.clone();
            drop(attempt);
            let failure = self.named(failure);
            match self.note(&replica, failure) {
                Ok(Some(refused)) => return Next::Failed(broken(&refused)),
                Ok(None) => {}
                Err(refusal) => return Next::Failed(refusal),
            }
        }
    }

    /// How long the try that is under way may take to say something.
    pub(super) fn patience(&self) -> Instant {
        self.begin_by.map_or(self.deadline, |by| by.min(self.deadline))
    }

    /// Until when a try must bring its first news: there is no use in giving up where nobody else could be asked, and
    /// somebody else's server that answers as a whole says nothing until it has all of it.
    fn time_to_begin(&self, replica: &Replica) -> Option<Instant> {
        let says = replica.protocol == Protocol::Consort || self.call.stream;
        let retries = &self.settings.retries;
        let now = Instant::now();
        let others =
            || self.version().replicas.iter().any(|other| other.id != replica.id && other.is_up(now));
        let elsewhere = || others() || (!self.progress.begun() && self.version().on_trial);
        let more = says && self.tries < retries.attempts && elsewhere();
        more.then(|| now + retries.begin)
    }

    /// A deadline that was the try's and not the request's is the replica's failure.
    fn named(&self, failure: Failure) -> Failure {
        let now = Instant::now();
        let over = self.begin_by.is_some_and(|by| now >= by) && now < self.deadline;
        if failure == Failure::Deadline && over { Failure::Slow } else { failure }
    }
}
