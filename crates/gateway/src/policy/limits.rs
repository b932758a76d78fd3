//! What one key may use: requests and tokens a minute as token buckets, and requests at one time.
//!
//! A bucket holds a minute's worth and fills steadily, so a client may use its minute at once and then goes on at the
//! mean rate. Tokens are taken on an estimate when a request comes (its prompt, and the longest answer it allows) and
//! put right when its usage is known: without the estimate, a key could have any number of long answers under way
//! before the first one counts.

use std::time::{Duration, Instant};

use consort_api::KeyLimits;

/// One limit a minute.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    limit: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    fn new(now: Instant, limit: f64) -> Bucket {
        Bucket { limit, level: limit, at: now }
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.level = (self.level + passed * self.limit / 60.0).min(self.limit);
        self.at = now;
    }

    /// Another limit from now on; what was used stays used.
    fn resize(&mut self, now: Instant, limit: f64) {
        self.fill(now);
        self.level = (self.level + limit - self.limit).min(limit);
        self.limit = limit;
    }

    /// Until `amount` is there.
    fn wait(&self, amount: f64) -> Duration {
        let missing = (amount.min(self.limit) - self.level).max(0.0);
        if self.limit > 0.0 {
            Duration::from_secs_f64((missing * 60.0 / self.limit).min(3600.0))
        } else {
            Duration::MAX
        }
    }
}

/// What is left, for the `x-ratelimit-*` headers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Left {
    pub(crate) limit: u64,
    pub(crate) remaining: u64,
    /// Until all of it is there again.
    pub(crate) reset: Duration,
}

/// Why a request may not go on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Exceeded {
    /// Too many a minute; come back after this long.
    Requests { limit: u64, retry: Duration },
    /// Too many tokens a minute.
    Tokens { limit: u64, wanted: u64, retry: Duration },
    /// Too many at one time.
    Concurrency { limit: u64 },
}

/// The use one key makes of its limits.
#[derive(Clone, Debug)]
pub(crate) struct Use {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    concurrency: Option<u32>,
    running: u32,
}

impl Use {
    pub(crate) fn new(now: Instant, limits: &KeyLimits) -> Use {
        Use {
            requests: limits.requests_per_minute.map(|limit| Bucket::new(now, f64::from(limit))),
            tokens: limits.tokens_per_minute.map(|limit| Bucket::new(now, limit as f64)),
            concurrency: limits.concurrency,
            running: 0,
        }
    }

    /// Other limits from now on.
    pub(crate) fn change(&mut self, now: Instant, limits: &KeyLimits) {
        let change = |bucket: &mut Option<Bucket>, limit: Option<f64>| match (bucket.as_mut(), limit) {
            (Some(bucket), Some(limit)) => bucket.resize(now, limit),
            (_, limit) => *bucket = limit.map(|limit| Bucket::new(now, limit)),
        };
        change(&mut self.requests, limits.requests_per_minute.map(f64::from));
        change(&mut self.tokens, limits.tokens_per_minute.map(|limit| limit as f64));
        self.concurrency = limits.concurrency;
    }

    /// Takes a request of about `tokens`; nothing is taken where it may not go on.
    pub(crate) fn take(&mut self, now: Instant, tokens: u64) -> Result<(), Exceeded> {
        if let Some(limit) = self.concurrency.filter(|limit| self.running >= *limit) {
            return Err(Exceeded::Concurrency { limit: u64::from(limit) });
        }
        for bucket in [&mut self.requests, &mut self.tokens].into_iter().flatten() {
            bucket.fill(now);
        }
        if let Some(bucket) = self.requests.filter(|bucket| bucket.level < 1.0) {
            return Err(Exceeded::Requests { limit: bucket.limit as u64, retry: bucket.wait(1.0) });
        }
        // An estimate above the whole limit needs a full bucket: it may be far too high.
        let wanted = tokens as f64;
        if let Some(bucket) = self.tokens.filter(|bucket| bucket.level < wanted.min(bucket.limit)) {
            let (limit, retry) = (bucket.limit as u64, bucket.wait(wanted));
            return Err(Exceeded::Tokens { limit, wanted: tokens, retry });
        }
        if let Some(bucket) = &mut self.requests {
            bucket.level -= 1.0;
        }
        if let Some(bucket) = &mut self.tokens {
            bucket.level -= wanted.min(bucket.limit);
        }
        self.running += 1;
        Ok(())
    }

    /// The request is over: it was taken for `estimate` tokens and used `actual`.
    pub(crate) fn settle(&mut self, now: Instant, estimate: u64, actual: u64) {
        self.running = self.running.saturating_sub(1);
        if let Some(bucket) = &mut self.tokens {
            bucket.fill(now);
            let taken = (estimate as f64).min(bucket.limit);
            bucket.level = (bucket.level + taken - actual as f64).min(bucket.limit);
        }
    }

    fn left(bucket: Option<Bucket>, now: Instant) -> Option<Left> {
        let mut bucket = bucket?;
        bucket.fill(now);
        let remaining = bucket.level.max(0.0) as u64;
        Some(Left { limit: bucket.limit as u64, remaining, reset: bucket.wait(bucket.limit) })
    }

    /// Requests left, tokens left.
    pub(crate) fn remaining(&self, now: Instant) -> (Option<Left>, Option<Left>) {
        (Use::left(self.requests, now), Use::left(self.tokens, now))
    }
}

/// A duration as OpenAI's headers write it: `6ms`, `1.5s`, `1m30s`.
pub(crate) fn written(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 1.0 {
        format!("{}ms", (seconds * 1e3).ceil())
    } else if seconds <= 59.9 {
        format!("{}s", (seconds * 10.0).ceil() / 10.0)
    } else {
        let whole = seconds.ceil() as u64;
        format!("{}m{}s", whole / 60, whole % 60)
    }
}

#[cfg(test)]
mod tests {
    use consort_base::Philox;

    use super::*;

    fn limits(requests: Option<u32>, tokens: Option<u64>, concurrency: Option<u32>) -> KeyLimits {
        KeyLimits {
            requests_per_minute: requests,
            tokens_per_minute: tokens,
            concurrency,
            ..KeyLimits::default()
        }
    }

    #[test]
    fn a_minute_holds_what_was_promised_and_no_more() {
        let (start, mut rng) = (Instant::now(), Philox::new(6, 0));
        let mut used = Use::new(start, &limits(Some(30), None, None));
        let mut taken = 0;
        let mut ms = 0;
        while ms < 600_000 {
            ms += rng.next_u64() % 500;
            taken += u32::from(used.take(start + Duration::from_millis(ms), 0).is_ok());
        }
        // The bucket's first fill, and ten minutes at the rate.
        assert!((325..=330).contains(&taken), "{taken}");
    }

    #[test]
    fn tokens_are_estimated_then_put_right() {
        let now = Instant::now();
        let mut used = Use::new(now, &limits(None, Some(1000), None));
        used.take(now, 600).unwrap();
        let Err(Exceeded::Tokens { limit, wanted, retry }) = used.take(now, 600) else { panic!() };
        assert_eq!((limit, wanted, retry), (1000, 600, Duration::from_secs(12)));
        used.settle(now, 600, 100);
        assert_eq!(used.remaining(now).1.unwrap().remaining, 900);
        used.settle(now, 0, 5000);
        assert!(
            used.take(now + Duration::from_secs(60), 1).is_err(),
            "used more than estimated: the debt is paid off"
        );
        let mut used = Use::new(now, &limits(None, Some(1000), None));
        used.take(now, 50_000).unwrap();
        assert!(used.take(now, 1).is_err());
    }

    #[test]
    fn only_so_many_at_one_time() {
        let now = Instant::now();
        let mut used = Use::new(now, &limits(None, None, Some(1)));
        used.take(now, 0).unwrap();
        assert_eq!(used.take(now, 0), Err(Exceeded::Concurrency { limit: 1 }));
        used.settle(now, 0, 0);
        used.take(now, 0).unwrap();
    }

    #[test]
    fn durations_read_as_openais_do() {
        let ms = Duration::from_millis;
        assert_eq!([ms(6), ms(1500), ms(90_000)].map(written), ["6ms", "1.5s", "1m30s"]);
    }
}
