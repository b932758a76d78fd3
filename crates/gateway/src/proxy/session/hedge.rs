//! A slow first token, asked for on a second replica too.
//!
//! The one that is slower is dropped, which closes its connection, which is how its replica learns that nobody waits.

use std::time::Instant;

use consort_api::Protocol;

use super::Session;
use crate::proxy::attempt::{Attempt, Failure, Reply};
use crate::proxy::sse::Event as Sse;
use crate::telemetry::Event;

impl Session {
    /// The first event: from a second replica too, where the first one is slow.
    pub(super) async fn first_event(&mut self) -> Result<Sse, Failure> {
        let due = self.began + self.settings.hedging.after;
        let Some(mut first) = self.attempt.take() else { return Err(Failure::Garbage) };
        let outcome = self.race(&mut first, due).await;
        if self.attempt.is_none() {
            self.attempt = Some(first);
        }
        outcome
    }

    /// Puts the second attempt in place where that one was faster; the first is then dropped, which cancels it.
    async fn race(&mut self, first: &mut Attempt, due: Instant) -> Result<Sse, Failure> {
        tokio::select! {
            biased;
            event = first.event(self.patience()) => return event,
            () = tokio::time::sleep_until(due.into()) => self.hedged = true,
        }
        self.failed.push(first.ticket.replica.id.clone());
        let other = self.pick();
        self.failed.pop();
        let settings = &self.settings;
        let Some(replica) = other
            .filter(|other| other.protocol == Protocol::Consort)
            .filter(|_| self.gateway.purse().take(&settings.hedging))
        else {
            return first.event(self.patience()).await;
        };
        self.gateway.telemetry.count(Event::Hedge);
        let question = self.question(replica.protocol).map_err(|_| Failure::Deadline)?;
        let deadline = self.patience();
        let second = async {
            let Ok(Reply::Stream(mut second)) =
                Attempt::start(&replica, question, &settings.replicas, deadline).await
            else {
                return None;
            };
            second.event(deadline).await.ok().map(|event| (second, event))
        };
        let won = {
            let mut second = std::pin::pin!(second);
            tokio::select! {
                biased;
                event = first.event(deadline) => return event,
                won = &mut second => won,
            }
        };
        match won {
            Some((second, event)) => {
                self.gateway.telemetry.count(Event::HedgeWon);
                first.ticket.settled = false;
                self.attempt = Some(second);
                Ok(event)
            }
            // It failed: nothing is lost but the try.
            None => first.event(deadline).await,
        }
    }
}
