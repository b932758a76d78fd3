//! How long something from a replica is waited for.
//!
//! Nearly every wait ends with what was waited for, some thousands of times a second, so none of them sets a timer of its
//! own: an [`Alarm`] that is set stays set when its wait is over, and rings for nobody once in a while. The next wait
//! takes it as it is, and sets it again only where it would ring too late, or has rung.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use consort_api::Protocol;
use tokio::sync::watch;
use tokio::time::Sleep;

use super::attempt::Failure;
use crate::fleet::Replica;
use crate::settings::ReplicaSettings;

/// Alarms that are kept for later waits.
const MAX_KEPT: usize = 64;

/// How long something is waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// A connection.
    pub(super) connect: Duration,
    /// Without a byte, before the replica is asked whether it lives.
    suspect: Duration,
    /// Without a byte at all.
    silence: Duration,
}

/// One try's waits, each no longer than makes sense.
pub(super) struct Vigil {
    pub(super) patience: Patience,
    lost: watch::Receiver<u64>,
    alarm: Alarm,
}

/// Alarms that nobody waits with.
#[derive(Clone, Default)]
pub(crate) struct Alarms(Arc<Mutex<Vec<Pin<Box<Sleep>>>>>);

/// A timer that is set once and used by many waits.
struct Alarm {
    sleep: Option<Pin<Box<Sleep>>>,
    home: Alarms,
}

impl Patience {
    fn with(replica: &Replica, settings: &ReplicaSettings) -> Patience {
        Patience {
            connect: settings.connect_timeout,
            suspect: settings.suspect_after,
            silence: match replica.protocol {
                Protocol::Consort => settings.silence_timeout,
                // It says nothing while it thinks; the request's own deadline holds.
                Protocol::OpenAi => Duration::from_secs(86_400),
            },
        }
    }
}

impl Vigil {
    pub(super) fn new(replica: &Replica, settings: &ReplicaSettings) -> Vigil {
        let mut lost = replica.lost();
        lost.mark_unchanged();
        Vigil { patience: Patience::with(replica, settings), lost, alarm: replica.upstream.alarms.take() }
    }

    /// Waits for something from the replica.
    ///
    /// # Errors
    /// Where the deadline passes, the replica is found dead, or nothing comes for too long.
    pub(super) async fn wait<F: Future + Unpin>(
        &mut self,
        future: &mut F,
        replica: &Replica,
        deadline: Instant,
    ) -> Result<F::Output, Failure> {
        let Vigil { patience, lost, alarm } = self;
        let begun = Instant::now();
        let silence = begun + patience.silence;
        let mut check = patience.suspect;
        loop {
            let wake = (begun + check).min(silence).min(deadline);
            tokio::select! {
                biased;
                output = &mut *future => return Ok(output),
                _ = lost.changed() => return Err(Failure::Lost),
                () = alarm.until(wake) => {}
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(Failure::Deadline);
            }
            if now >= silence {
                return Err(Failure::Silent);
            }
            if replica.silent_for() >= patience.suspect {
                replica.suspected.notify_one();
            }
            check += patience.suspect;
        }
    }
}

impl Alarms {
    fn take(&self) -> Alarm {
        let sleep = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Alarm { sleep, home: self.clone() }
    }
}

impl Alarm {
    async fn until(&mut self, at: Instant) {
        poll_fn(|cx| self.poll_until(cx, at.into())).await;
    }

    fn poll_until(&mut self, cx: &mut Context<'_>, at: tokio::time::Instant) -> Poll<()> {
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
        if sleep.deadline() > at || sleep.is_elapsed() {
            sleep.as_mut().reset(at);
        }
        loop {
            ready!(sleep.as_mut().poll(cx));
            if sleep.deadline() >= at {
                return Poll::Ready(());
            }
            // It was set for an earlier wait.
            sleep.as_mut().reset(at);
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        let mut kept = self.home.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < MAX_KEPT {
            kept.extend(self.sleep.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn waited(alarm: &mut Alarm, milliseconds: u64) -> Duration {
        let begun = tokio::time::Instant::now();
        let at = begun + Duration::from_millis(milliseconds);
        poll_fn(|cx| alarm.poll_until(cx, at)).await;
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn an_alarm_rings_when_it_should_whatever_it_was_set_to_before() {
        let alarms = Alarms::default();
        let mut alarm = alarms.take();
        for (given_up, wanted) in [(50, 300), (300, 20), (20, 20), (0, 100), (100, 0)] {
            // A wait that ends with what was waited for leaves it set.
            let early = Duration::from_millis(given_up / 2);
            let _ = tokio::time::timeout(early, waited(&mut alarm, given_up)).await;
            assert_eq!(waited(&mut alarm, wanted).await, Duration::from_millis(wanted));
            drop(alarm);
            assert_eq!(alarms.0.lock().unwrap().len(), 1);
            alarm = alarms.take();
            assert!(alarm.sleep.is_some());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn alarms_that_are_kept_are_few() {
        let alarms = Alarms::default();
        let mut many: Vec<Alarm> = (0..2 * MAX_KEPT).map(|_| alarms.take()).collect();
        for alarm in &mut many {
            waited(alarm, 1).await;
        }
        drop(many);
        assert_eq!(alarms.0.lock().unwrap().len(), MAX_KEPT);
    }
}
