//! Which replica gets the request next, and the wait where none can.
//!
//! Draining, ejected and broken replicas are out, so are those that failed this request and, for an answer that has
//! begun, those of another class. Among the rest, the deployment's way of balancing
//! decides: unless told otherwise a known beginning of the prompt, then the lighter of two.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use consort_api::{Numerics, Protocol};
use hyper::StatusCode;

use super::{Permit, Session};
use crate::error::Refusal;
use crate::fleet::{self, Replica};
use crate::policy::balance::{Balance, Candidate};
use crate::proxy::random;

impl Session {
    /// A replica that may take the request; waits for one where there is none.
    pub(super) async fn choose(&mut self) -> Result<Arc<Replica>, Refusal> {
        let give_up = (Instant::now() + self.settings.retries.wait).min(self.deadline);
        if self.tries > 0 {
            self.pause().await?;
        }
        // Who was let in once doesn't queue again.
        let fresh = self.tries == 0 && !self.progress.begun();
        let mut place = None;
        if fresh && !self.model.pending.is_empty() {
            place = Some(self.enter()?);
        }
        loop {
            let room = self.gateway.registry.room.clone();
            let room = room.notified();
            // Replicas are started anew under new ids: by the time one is lost, the fleet may be another.
            if !fresh {
                self.follow_fleet();
            }
            let turn = place.as_ref().is_none_or(fleet::Place::is_head);
            if turn && let Some(replica) = self.pick() {
                if let Some(place) = place {
                    place.serve();
                    // The next one may fit as well.
                    self.gateway.registry.room.notify_waiters();
                }
                return Ok(replica);
            }
            if self.begin_anew() {
                self.pause().await?;
                continue;
            }
            if turn && !self.failed.is_empty() {
                // None is left that hasn't failed this request: those that have get another turn, after a pause.
                self.failed.clear();
                tokio::time::sleep(self.settings.retries.backoff.delay(self.tries, random())).await;
                continue;
            }
            if fresh && place.is_none() {
                place = Some(self.enter()?);
            }
            if place.as_ref().is_some_and(fleet::Place::evicted) {
                return Err(full(&self.model.name));
            }
            if fresh && self.follow_fleet() {
                continue;
            }
            if !self.version().replicas.iter().any(|replica| replica.is_up(Instant::now()))
                && self.leave_version()
            {
                continue;
            }
            let now = Instant::now();
            if now >= self.deadline {
                return Err(Refusal::deadline());
            }
            // A gateway that ends waits for nobody to come back.
            let ending = self.gateway.draining() && !self.version().replicas.iter().any(|r| r.is_up(now));
            if now >= give_up || ending {
                return Err(self.nobody());
            }
            // Woken where there is room, and now and then: a share grows with time, a breaker closes.
            let pause = Duration::from_millis(if turn { 50 } else { 1000 }).min(give_up - now);
            tokio::select! {
                () = room => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    fn enter(&self) -> Result<fleet::Place, Refusal> {
        let (key, weight) = &self.key;
        let bound = self.settings.replicas.max_pending;
        let place = self.model.pending.enter(key, *weight, self.remaining().tokens(), bound);
        place.ok_or_else(|| full(&self.model.name))
    }

    /// Takes the fleet as it is now; true where that changed something.
    fn follow_fleet(&mut self) -> bool {
        let models = self.gateway.registry.models();
        let Some(model) = models.get(&self.model.name).filter(|model| !Arc::ptr_eq(model, &self.model))
        else {
            return false;
        };
        let name = &self.version().name;
        let same = model.versions.iter().position(|v| v.name == *name);
        // An answer stays with its version: another one is another model. What hasn't begun may go to any.
        let heaviest = || (0..model.versions.len()).max_by_key(|i| model.versions[*i].weight);
        let Some(version) = same.or_else(|| heaviest().filter(|_| !self.progress.begun())) else {
            return false;
        };
        self.version = version;
        self.model = Arc::clone(model);
        true
    }

    /// Before a retry: until the budget has room for it.
    async fn pause(&mut self) -> Result<(), Refusal> {
        let retries = self.settings.retries.clone();
        if self.progress.begun() {
            return Ok(());
        }
        let mut waits = 0;
        while self.permit.is_none() {
            let active = self.gateway.telemetry.active.load(Ordering::Relaxed);
            if self.gateway.budget().take(active, &retries.budget) {
                self.permit = Some(Permit(self.gateway.clone()));
                break;
            }
            if Instant::now() >= self.deadline {
                return Err(Refusal::deadline());
            }
            tokio::time::sleep(retries.backoff.delay(waits, random()).max(Duration::from_millis(1))).await;
            waits += 1;
        }
        Ok(())
    }

    pub(super) fn balance(&self) -> std::sync::MutexGuard<'_, Balance> {
        self.version().balance.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn pick(&self) -> Option<Arc<Replica>> {
        let now = Instant::now();
        let version = self.version();
        let class = self.fingerprint();
        let limit = self.settings.replicas.max_outstanding as u64;
        let mut fit = Vec::with_capacity(version.replicas.len());
        for replica in &version.replicas {
            // An answer that was let in once may go on anywhere: only new ones are held back by a full replica.
            let full = !self.progress.begun() && replica.outstanding_requests() >= limit;
            if full || self.failed.contains(&replica.id) {
                continue;
            }
            if replica.protocol == Protocol::OpenAi && self.progress.begun() {
                continue;
            }
            let fitness = replica.fitness(now);
            if fitness.share <= 0.0 {
                continue;
            }
            let same = class.is_none_or(|class| replica.fingerprint().as_deref() == Some(class));
            if !same && version.numerics == Numerics::SameClass {
                continue;
            }
            let candidate = replica.candidate(fitness.share);
            // Another class, or one that said it is full, only where there is no better.
            let rank = (same, !fitness.degraded);
            fit.push((rank, candidate, replica));
        }
        let best = fit.iter().map(|(rank, ..)| *rank).max()?;
        fit.retain(|(rank, ..)| *rank == best);
        if let [(_, _, only)] = fit.as_slice() {
            return Some(Arc::clone(only));
        }
        let candidates: Vec<Candidate> = fit.iter().map(|(_, candidate, _)| *candidate).collect();
        let (way, cost) = (self.settings.replicas.balancing, self.remaining().tokens());
        let index = self.balance().choose(way, &candidates, &self.beginnings, cost, random())?;
        Some(Arc::clone(fit[index].2))
    }

    fn nobody(&self) -> Refusal {
        let version = self.version();
        let model = &self.model.name;
        if version.replicas.is_empty() {
            return Refusal::unavailable(format!("no replica of {model:?} runs"));
        }
        let other_class = self.fingerprint().is_some_and(|class| {
            version
                .replicas
                .iter()
                .any(|r| r.is_up(Instant::now()) && r.fingerprint().as_deref() != Some(class))
        });
        if other_class {
            return Refusal {
                code: "numerics_class_lost",
                ..Refusal::unavailable(
                    "the replica that gave this answer is lost, and the replicas that are left compute in another \
                     numerics class: they would go on with other tokens, which this deployment doesn't allow",
                )
            };
        }
        Refusal::unavailable(format!("no replica of {model:?} can take the request now; try again"))
    }
}

fn full(model: &str) -> Refusal {
    let message = format!("too many requests wait for {model:?}; try again");
    Refusal::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", message).retry_after(Duration::from_secs(1))
}
