//! hyper's timer, over alarms.
//!
//! hyper sets a timer for each request's head and drops it when the head is there. Here it is the connection's one
//! [`Alarm`], which stays set.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper::rt::{Sleep, Timer};

use crate::alarm::{Alarm, Alarms};

/// One connection's.
#[derive(Clone, Default)]
pub(super) struct AlarmTimer(Alarms);

struct Until {
    alarm: Alarm,
    at: Instant,
}

impl Timer for AlarmTimer {
    fn now(&self) -> Instant {
        tokio::time::Instant::now().into()
    }

    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until(self.now() + duration)
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn Sleep>> {
        Box::pin(Until { alarm: self.0.take(), at: deadline })
    }
}

impl Future for Until {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let at = self.at.into();
        self.alarm.poll_until(cx, at)
    }
}

impl Sleep for Until {}
