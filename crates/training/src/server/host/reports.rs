//! The thread that tells the coordinator what it waits for.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Host, Hosted, lock, wait};
use crate::server::client::Office;
use crate::server::cluster::ServerId;
use crate::server::wire::{Ask, Report, Told};

impl Host {
    /// Tells the coordinator what it waits for.
    pub(super) fn report(&self, office: &Office, server: ServerId) {
        // What was told already, of which epoch.
        let mut told: BTreeSet<(usize, u64, String)> = BTreeSet::new();
        let mut largest_lag = 0;
        let mut seen = 0;
        while !self.over.load(Ordering::SeqCst) {
            {
                let mut news = lock(&self.news.0);
                if *news == seen {
                    news = wait(&self.news.1, news, self.spec.lease() / 5);
                }
                seen = *news;
            }
            for report in std::mem::take(&mut *lock(&self.refusals)) {
                // Of no shard in particular. What isn't heard of was logged.
                let _ = office.ask(&Ask::Report { server, shard: 0, epoch: 0, report });
            }
            let shards: Vec<(usize, Arc<Hosted>)> =
                lock(&self.shards).iter().map(|(shard, hosted)| (*shard, Arc::clone(hosted))).collect();
            for (shard, hosted) in shards {
                let (epoch, reports) = hosted.reports();
                told.retain(|(of, in_epoch, _)| *of != shard || *in_epoch == epoch);
                for report in reports {
                    if let Report::Lag(lag) = report {
                        // With every push it changes; the largest is what counts.
                        if lag <= largest_lag {
                            continue;
                        }
                        largest_lag = lag;
                    }
                    let key = (shard, epoch, key(&report));
                    if told.contains(&key) {
                        continue;
                    }
                    let promoted = matches!(report, Report::Promoted(_));
                    match office.ask(&Ask::Report { server, shard, epoch, report }) {
                        Ok(Told::Fine) => {
                            if promoted {
                                lock(&hosted.state).replica.told(epoch);
                            }
                            told.insert(key);
                        }
                        // The duty thread hears the same, and ends this life.
                        Ok(_) | Err(_) => {
                            std::thread::sleep(Duration::from_millis(5));
                            break;
                        }
                    }
                }
            }
            // Complete buckets of steps long over.
            if told.len() > 1 << 16 {
                told.clear();
            }
        }
    }
}

/// What makes one report another than the last.
fn key(report: &Report) -> String {
    match report {
        Report::Ready(ready) => {
            ready.iter().map(|r| format!("ready {} {} {};", r.bucket, r.step, r.attempt)).collect()
        }
        Report::Fenced(workers) => format!("fenced {workers:?}"),
        Report::Promoted(_) => "promoted".into(),
        Report::InSync => "in sync".into(),
        Report::Suspect => "suspect".into(),
        Report::Lag(lag) => format!("lag {lag}"),
        Report::Refused { .. } => "refused".into(),
    }
}

impl Hosted {
    /// What the coordinator should know, and in which epoch that is so.
    fn reports(&self) -> (u64, Vec<Report>) {
        let state = lock(&self.state);
        let replica = &state.replica;
        let epoch = replica.epoch();
        let mut reports = Vec::new();
        if !replica.is_primary() {
            return (epoch, reports);
        }
        if let Some(seen) = replica.untold() {
            reports.push(Report::Promoted(seen));
        }
        if replica.in_sync() {
            reports.push(Report::InSync);
        }
        if state.suspect == epoch {
            reports.push(Report::Suspect);
        }
        let fenced: Vec<u64> = state.fencing.iter().copied().filter(|w| replica.shard().fences(*w)).collect();
        if !fenced.is_empty() && replica.safe(replica.shard().log(), true) == Some(true) {
            reports.push(Report::Fenced(fenced));
        }
        reports.extend(replica.ready().into_iter().map(|ready| Report::Ready(vec![ready])));
        reports.push(Report::Lag(replica.lag()));
        (epoch, reports)
    }
}
