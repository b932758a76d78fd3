//! How long something from a replica is waited for.

use std::future::Future;
use std::time::{Duration, Instant};

use consort_api::Protocol;
use tokio::sync::watch;

use super::attempt::Failure;
use crate::alarm::Alarm;
use crate::fleet::Replica;
use crate::settings::ReplicaSettings;

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
