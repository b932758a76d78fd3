//! One request, from its arrival until its answer is gone: then it is counted, logged, and told to a trace collector.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Instant;

use consort_edge::Busy;
use consort_meter::trace::{Span, Trace};
use hyper::header::HeaderValue;

use super::{Event, Telemetry};
use crate::fleet::{Model, Version};
use crate::keys::Key;

/// What one request comes to, told by whoever learns it.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) answer_tokens: AtomicU64,
    pub(crate) retries: AtomicU32,
    pub(crate) resumes: AtomicU32,
    /// Its stream ended with an error, although its status was 200.
    pub(crate) failed: AtomicBool,
    /// Its answer is complete.
    pub(crate) complete: AtomicBool,
    pub(crate) place: OnceLock<Place>,
    /// Where it went when the version it began with was on trial and failed it.
    pub(crate) diverted: OnceLock<Place>,
}

impl Tally {
    fn place(&self) -> Option<&Place> {
        self.diverted.get().or(self.place.get())
    }
}

/// Where a request went.
pub(crate) struct Place {
    pub(crate) model: Arc<Model>,
    /// The version's index.
    pub(crate) index: usize,
}

impl Place {
    pub(crate) fn version(&self) -> &Version {
        &self.model.versions[self.index]
    }
}

/// One request, from its arrival until its response's body is gone; then it is counted and logged.
pub(crate) struct Record {
    telemetry: Arc<Telemetry>,
    pub(crate) tally: Arc<Tally>,
    pub(crate) key: Option<Arc<Key>>,
    /// Tokens the key's limits were charged with.
    pub(crate) charged: Option<u64>,
    route: &'static str,
    pub(crate) status: u16,
    pub(crate) streams: bool,
    pub(crate) request_id: HeaderValue,
    trace: Trace,
    arrived: Instant,
    counted: bool,
    /// Its connection has a request until its answer is gone.
    pub(crate) busy: Option<Busy>,
}

impl Record {
    pub(crate) fn new(telemetry: &Arc<Telemetry>, request_id: HeaderValue, trace: Trace) -> Record {
        Record {
            telemetry: telemetry.clone(),
            tally: Arc::default(),
            key: None,
            charged: None,
            route: "other",
            status: 0,
            streams: false,
            request_id,
            trace,
            arrived: Instant::now(),
            counted: false,
            busy: None,
        }
    }

    pub(crate) fn route(&mut self, route: &'static str) {
        self.route = route;
    }

    /// It asks for an answer.
    pub(crate) fn count(&mut self) {
        self.counted = true;
        let telemetry = &self.telemetry;
        telemetry.requests.fetch_add(1, Ordering::Relaxed);
        telemetry.active.fetch_add(1, Ordering::Relaxed);
        telemetry.rates.lock().unwrap_or_else(PoisonError::into_inner).0.add(Instant::now(), 1);
    }

    /// It streams.
    pub(crate) fn streaming(&mut self) {
        self.streams = true;
        self.telemetry.streams.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let (now, tally, telemetry) = (Instant::now(), &self.tally, &self.telemetry);
        let took = now - self.arrived;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (prompt, answer) = (load(&tally.prompt_tokens), load(&tally.answer_tokens));
        let failed = tally.failed.load(Ordering::Relaxed);
        // 499, nginx's number for it: the client left before the answer was complete.
        let left = self.streams && !failed && !tally.complete.load(Ordering::Relaxed);
        let status = if self.status == 0 || left { 499 } else { self.status };
        if self.streams {
            telemetry.streams.fetch_sub(1, Ordering::Relaxed);
        }
        let series = &telemetry.series;
        let well = status == 200;
        let labels = || [("route", self.route.to_owned()), ("status", status.to_string())];
        match series.routes.iter().find(|(route, _)| *route == self.route) {
            Some((_, usual)) => usual.count(well, &series.requests, labels),
            None => _ = series.requests.get_or_create(&labels()).inc(),
        }
        series.duration.observe(took.as_secs_f64());
        let key = self.key.as_ref().map_or("-", |key| key.id.as_str());
        if self.counted {
            telemetry.active.fetch_sub(1, Ordering::Relaxed);
            let error = failed || status >= 500;
            telemetry.errors.fetch_add(u64::from(error), Ordering::Relaxed);
            if status == 429 {
                telemetry.count(Event::Refused);
            }
            let usual = self.key.as_ref().map_or(&series.keyless, |key| &key.usual);
            usual.count(well, &series.keys, || [("key", key.to_owned()), ("status", status.to_string())]);
            usual.tokens(prompt + answer, &series.key_tokens, || [("key", key.to_owned())]);
            if let Some(place) = tally.place() {
                let (model, version) = (&place.model, place.version());
                version.stats.requests.fetch_add(1, Ordering::Relaxed);
                version.stats.errors.fetch_add(u64::from(error), Ordering::Relaxed);
                version.stats.tokens.fetch_add(answer, Ordering::Relaxed);
                let outcome = if error {
                    "error"
                } else if status >= 400 {
                    "client"
                } else {
                    "ok"
                };
                let usual = &version.usual;
                let labels = || [("model", model.name.clone()), ("version", version.name.clone())];
                usual.count(outcome == "ok", &series.versions, || {
                    let [model, version] = labels();
                    [model, version, ("outcome", outcome.to_owned())]
                });
                usual.tokens(answer, &series.version_tokens, labels);
            }
        }
        if let (Some(key), Some(charged)) = (&self.key, self.charged) {
            key.settle(now, charged, prompt + answer);
        }
        let (ms, request_id) = (took.as_secs_f64() * 1e3, self.request_id.to_str().unwrap_or_default());
        if !self.counted {
            tracing::debug!(route = self.route, status, ms, request_id, "request");
            return;
        }
        let place = tally.place();
        if self.trace.is_sampled() {
            let name = place.map_or("-", |place| place.model.name.as_str());
            let mut span = Span::ending(self.trace, self.route, took)
                .with("http.route", self.route)
                .with("http.response.status_code", u64::from(status))
                .with("consort.request_id", request_id)
                .with("consort.key", key)
                .with("gen_ai.request.model", name)
                .with("consort.version", place.map_or("-", |place| place.version().name.as_str()))
                .with("gen_ai.usage.input_tokens", prompt)
                .with("gen_ai.usage.output_tokens", answer)
                .with("consort.retries", u64::from(tally.retries.load(Ordering::Relaxed)))
                .with("consort.resumes", u64::from(tally.resumes.load(Ordering::Relaxed)));
            span.failed = failed || status >= 500;
            consort_meter::otlp::export(span);
        }
        tracing::info!(
            route = self.route,
            status,
            ms,
            request_id,
            trace_id = self.trace.id(),
            key,
            model = place.map_or("-", |place| &place.model.name),
            version = place.map_or("-", |place| &place.version().name),
            prompt_tokens = prompt,
            answer_tokens = answer,
            retries = tally.retries.load(Ordering::Relaxed),
            resumes = tally.resumes.load(Ordering::Relaxed),
            failed,
            "request"
        );
    }
}
