//! The fleet behind a gateway: what it should be ([`Fleet`]), what it is ([`FleetSnapshot`]), and what a replica says
//! of itself ([`ReadyReport`]).
//!
//! The page, `consort status` and the autoscaler live from the snapshot alone, so that they show what the gateway acts
//! on and nothing else.

use consort_base::Histogram;
use serde::{Deserialize, Serialize};

/// What a gateway stands before: models, their versions, the replicas of each.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fleet {
    /// One for each name.
    pub models: Vec<FleetModel>,
}

/// A model that clients may name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FleetModel {
    /// The name that requests use, and that answers bear.
    pub name: String,
    /// Other names that requests may use.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// At least one. Several share the requests by their weights.
    pub versions: Vec<FleetVersion>,
    /// Whether one version scores another's answers.
    #[serde(default)]
    pub shadow: Option<Shadow>,
}

/// One version scores a sample of another's answers: a prefill of prompt and answer, after the client has its answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shadow {
    /// The version whose answers are scored; it scores them itself too, for comparison.
    pub incumbent: String,
    /// The version that scores them.
    pub candidate: String,
    /// Of its answers, how many in a hundred; fewer where that would take more than a tenth of the time.
    pub percent: u32,
}

/// One version of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FleetVersion {
    /// Unique within the model (`stable`, `canary`, …).
    pub name: String,
    /// Its share of requests against the model's other versions; 0 gets none.
    pub weight: u32,
    /// Where an answer may go on.
    #[serde(default)]
    pub numerics: Numerics,
    /// On trial: a request that none of its replicas can take, or that one fails before the answer has begun, is given
    /// to another version.
    #[serde(default)]
    pub on_trial: bool,
    /// May be empty: requests then wait for one, as long as the queue's limits allow.
    pub replicas: Vec<FleetReplica>,
}

/// Where an answer may be continued when its replica is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Numerics {
    /// Only on a replica with the same `system_fingerprint`: the answer's bytes are those it would have had.
    #[default]
    SameClass,
    /// On another class too where none of the same is left; the answer then says so in its last event.
    AnyClass,
}

/// One replica.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FleetReplica {
    /// Unique within the fleet. A replica that was started anew should bear a new id: what was known of the old one
    /// (failures, latencies) is forgotten with it.
    pub id: String,
    /// `http://host:port`, without a path.
    pub url: String,
    /// Sent as `Authorization: Bearer …`. Never shown.
    #[serde(default, skip_serializing)]
    pub key: Option<String>,
    /// It takes its full share only this long after it became ready; 0 at once.
    #[serde(default)]
    pub slow_start_ms: u64,
    /// No new requests; what runs there may finish.
    #[serde(default)]
    pub draining: bool,
    /// What it understands.
    #[serde(default)]
    pub protocol: Protocol,
}

/// What a replica understands beside OpenAI's API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// Token ids in streams, and answers that go on behind them: an answer outlives its replica.
    #[default]
    Consort,
    /// Nothing: it gets the request as its client sent it, and what it says is passed on. A request that it fails before
    /// the answer began is sent elsewhere; an answer that had begun can't be continued.
    OpenAi,
}

impl std::fmt::Debug for FleetReplica {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FleetReplica")
            .field("id", &self.id)
            .field("url", &self.url)
            .field("key", &self.key.as_ref().map(|_| "…"))
            .field("slow_start_ms", &self.slow_start_ms)
            .field("draining", &self.draining)
            .field("protocol", &self.protocol)
            .finish()
    }
}

/// The fleet as its gateway sees it now.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FleetSnapshot {
    /// Milliseconds since 1970: when it was taken.
    pub at_ms: u64,
    /// Milliseconds since the gateway started.
    pub uptime_ms: u64,
    /// In the fleet's order.
    pub models: Vec<ModelSnapshot>,
    /// Of the gateway, since it started.
    pub totals: GatewayTotals,
}

/// Counted since the gateway started, except where a rate or a number of now is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GatewayTotals {
    /// Requests for answers.
    pub requests: u64,
    /// Of them, those that ended with a 5xx or a broken stream.
    pub errors: u64,
    /// Refused with 429, by a key's limits or a full queue.
    pub refused: u64,
    /// Requests a second, over the last ten seconds.
    pub requests_per_second: f64,
    /// Tokens sent a second, over the last ten seconds.
    pub tokens_per_second: f64,
    /// Streams open now.
    pub streams: u64,
    /// Requests waiting now.
    pub queued: u64,
    /// Requests sent again, before anything of their answer had been sent to the client.
    pub retries: u64,
    /// Answers continued on another replica.
    pub resumes: u64,
    /// Second attempts for a slow first token.
    pub hedges: u64,
    /// Of them, those that were faster.
    pub hedges_won: u64,
    /// Replicas taken out for failing.
    pub ejections: u64,
}

/// One model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelSnapshot {
    /// Its name.
    pub name: String,
    /// Requests waiting at the gateway.
    pub queued: u64,
    /// Tokens these are estimated to need.
    pub queued_tokens: u64,
    /// How long the first of them has waited.
    pub oldest_wait_ms: u64,
    /// Requests being answered.
    pub running: u64,
    /// Milliseconds since the last request for it arrived, where there was one.
    pub idle_ms: Option<u64>,
    /// In the fleet's order.
    pub versions: Vec<VersionSnapshot>,
}

/// One version.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VersionSnapshot {
    /// Its name.
    pub name: String,
    /// Its weight.
    pub weight: u32,
    /// Requests it got.
    pub requests: u64,
    /// Of them, those that failed for a reason that wasn't the client's.
    pub errors: u64,
    /// Of these, those that another version answered instead.
    #[serde(default)]
    pub diverted: u64,
    /// Tokens of its answers.
    #[serde(default)]
    pub tokens: u64,
    /// To the first token.
    pub first_token: Latency,
    /// Between tokens.
    pub inter_token: Latency,
    /// What came of scoring another version's answers.
    #[serde(default)]
    pub shadow: ShadowSnapshot,
    /// To the first token, since the version was made; for whoever compares versions within the process.
    #[serde(skip)]
    pub first_token_ever: Histogram,
    /// Between tokens, likewise.
    #[serde(skip)]
    pub inter_token_ever: Histogram,
    /// In the fleet's order.
    pub replicas: Vec<ReplicaSnapshot>,
}

/// What came of scoring another version's answers, since the version was made.
///
/// An answer's disagreement is how much less likely, per token and in nats, this version finds it than the version that
/// gave it: 0 for the same weights, bit for bit; an estimate of the Kullback-Leibler divergence for answers that were
/// sampled at temperature 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ShadowSnapshot {
    /// Answers scored.
    pub scored: u64,
    /// Answers that it refused although the other version had given them (a shorter context, other token ids).
    pub refused: u64,
    /// Tries that came to nothing for another reason; they say nothing of the version.
    pub failed: u64,
    /// The disagreements of all scored answers added up, in nats a token.
    pub disagreement_sum: f64,
    /// Their squares added up.
    pub disagreement_squares: f64,
}

/// A latency's distribution over the last minute or so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Measured so often.
    pub count: u64,
    /// Half are below, in milliseconds; 0 where none was measured.
    pub p50_ms: f64,
    /// 99 of 100 are below.
    pub p99_ms: f64,
}

/// One replica, as the gateway sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ReplicaSnapshot {
    /// Its id.
    pub id: String,
    /// Its base URL.
    pub url: String,
    /// What the gateway makes of it.
    pub state: ReplicaState,
    /// Why it isn't ready, where it isn't.
    pub reason: Option<String>,
    /// The breaker's.
    pub breaker: BreakerState,
    /// Its numerics class, once it has said so.
    pub fingerprint: Option<String>,
    /// Requests sent there and not yet complete.
    pub outstanding_requests: u64,
    /// Tokens these are estimated to need yet.
    pub outstanding_tokens: u64,
    /// Tokens it sent a second, over the last ten seconds.
    pub tokens_per_second: f64,
    /// To the first token.
    pub first_token: Latency,
    /// Between tokens.
    pub inter_token: Latency,
    /// Requests sent there.
    pub requests: u64,
    /// Of them, those that it failed.
    pub errors: u64,
    /// Answers that were continued elsewhere because of it.
    pub lost: u64,
    /// Times it was taken out for failing.
    pub ejections: u64,
    /// Milliseconds until it is tried again, while it is out.
    pub ejected_for_ms: Option<u64>,
    /// Its share of requests while it starts slowly, 0 to 1; 1 afterwards.
    pub share: f64,
    /// What it last said of itself.
    pub report: Option<ReadyReport>,
    /// Milliseconds since it said so.
    pub report_age_ms: Option<u64>,
}

/// What the gateway makes of a replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaState {
    /// It has not yet been ready.
    #[default]
    Starting,
    /// It gets requests.
    Ready,
    /// It gets requests where no other can take them: it said 429 a moment ago.
    Degraded,
    /// It gets none for a while: it failed too often.
    Ejected,
    /// It gets no new ones: it is shutting down, or is to be taken out.
    Draining,
    /// It doesn't answer.
    Down,
}

/// A circuit breaker's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BreakerState {
    /// Passing.
    #[default]
    Closed,
    /// Rejecting.
    Open,
    /// One probe is under way.
    HalfOpen,
}

/// The body of a replica's `/ready`: who it is and how loaded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReadyReport {
    /// `ready`, `loading` or `draining`.
    pub status: String,
    /// The model's name; empty while it loads.
    pub model: String,
    /// The numerics class; empty while it loads.
    pub system_fingerprint: String,
    /// Requests waiting for their first step.
    pub queued: u64,
    /// Sequences running.
    pub running: u64,
    /// Tokens yet to compute for all of them.
    pub outstanding_tokens: u64,
    /// Tokens generated since it started.
    pub generated_tokens: u64,
    /// Engine steps since it started: a replica with work whose steps stand still hangs.
    pub steps: u64,
    /// Milliseconds since the last step, while there is work; 0 otherwise.
    pub stalled_ms: u64,
    /// Share of the key-value cache in use, 0 to 1.
    pub kv_use: f64,
}
