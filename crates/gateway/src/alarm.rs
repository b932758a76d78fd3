//! Timers that nearly never ring.
//!
//! Nearly every wait ends with what was waited for, some thousands of times a second, so none of them sets a timer of its
//! own: an [`Alarm`] that is set stays set when its wait is over, and rings for nobody once in a while. The next wait
//! takes it as it is, and sets it again only where it would ring too late, or has rung.

use std::future::{Future as _, poll_fn};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use tokio::time::Sleep;

/// Alarms that are kept for later waits.
const MAX_KEPT: usize = 64;

/// Alarms that nobody waits with.
#[derive(Clone, Default)]
pub(crate) struct Alarms(Arc<Mutex<Vec<Pin<Box<Sleep>>>>>);

/// A timer that is set once and used by many waits.
pub(crate) struct Alarm {
    sleep: Option<Pin<Box<Sleep>>>,
    home: Alarms,
}

impl Alarms {
    /// One of them, or a new one. It comes back when it is dropped.
    pub(crate) fn take(&self) -> Alarm {
        let sleep = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Alarm { sleep, home: self.clone() }
    }
}

impl Alarm {
    /// Waits until `at`.
    pub(crate) async fn until(&mut self, at: Instant) {
        poll_fn(|cx| self.poll_until(cx, at.into())).await;
    }

    /// Whether `at` has come; rings then.
    pub(crate) fn poll_until(&mut self, cx: &mut Context<'_>, at: tokio::time::Instant) -> Poll<()> {
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
    use std::time::Duration;

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
