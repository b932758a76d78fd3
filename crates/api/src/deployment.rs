//! What `consort.toml` asks for, as plain values: read and checked by `control`, obeyed by whoever runs the fleet.
//!
//! Every field has a value (the file's or the default), so that nobody downstream decides what an absent key means.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Everything that one `consort up` runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Deployment {
    /// Where the front door listens.
    pub listen: SocketAddr,
    /// Whether the page is served at `/`.
    pub page: bool,
    /// Host names, beside loopback's, under which a front door without keys may be reached.
    pub allowed_hosts: Vec<String>,
    /// Origins whose pages may call the API.
    pub allowed_origins: Vec<String>,
    /// Whether requests need an API key.
    pub keys_required: bool,
    /// How the front door speaks TLS, if it does.
    pub tls: Option<TlsFiles>,
    /// Bounds of the front door.
    pub limits: Limits,
    /// Deadlines.
    pub timeouts: Timeouts,
    /// How much may be tried again.
    pub retries: Retries,
    /// Whether a slow first token is asked for twice.
    pub hedging: Hedging,
    /// What a draining replica may still say.
    pub drain_tokens: u32,
    /// Whether a broken stream may go on in another numerics class.
    pub cross_class: bool,
    /// Which of the replicas that can take a request gets it.
    pub balancing: Balancing,
    /// The models, by the name that requests use; never empty.
    pub models: Vec<ModelDeployment>,
}

/// Which of the replicas that can take a request gets it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Balancing {
    /// The one that has had the prompt's beginning, unless it has too much to do; else as [`Balancing::TwoChoices`].
    #[default]
    Affinity,
    /// Of two drawn at random, the one with fewer tokens to compute.
    TwoChoices,
    /// The one with the fewest requests.
    LeastRequests,
    /// Each in its turn.
    RoundRobin,
}

impl Balancing {
    /// All of them.
    pub const ALL: [Balancing; 4] =
        [Balancing::Affinity, Balancing::TwoChoices, Balancing::LeastRequests, Balancing::RoundRobin];

    /// The word for it in `consort.toml` and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Balancing::Affinity => "affinity",
            Balancing::TwoChoices => "two_choices",
            Balancing::LeastRequests => "least_requests",
            Balancing::RoundRobin => "round_robin",
        }
    }

    /// The one with this name.
    pub fn from_name(name: &str) -> Option<Balancing> {
        Balancing::ALL.into_iter().find(|way| way.name() == name)
    }
}

/// TLS of the front door.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TlsFiles {
    /// A certificate chain and its key, both PEM.
    Files {
        /// The chain.
        certificate: PathBuf,
        /// The private key.
        key: PathBuf,
    },
    /// A certificate made at each start, for trying out.
    SelfSigned,
}

/// Bounds of the front door.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests that may wait for a replica; one more is refused with 429.
    pub pending: u32,
    /// Bytes of a request's body.
    pub body_bytes: u64,
    /// Connections at one time.
    pub connections: u32,
}

/// Deadlines, each within the one that holds it: `connect ≤ try ≤ route ≤ drain`, `token ≤ route`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// To reach a replica.
    pub connect: Duration,
    /// For one replica to begin its answer.
    pub attempt: Duration,
    /// Between two tokens; past it the stream goes on elsewhere.
    pub token: Duration,
    /// A request from its arrival to its last byte.
    pub route: Duration,
    /// A replica from being told to stop to being stopped.
    pub drain: Duration,
    /// A replica from its start to being ready.
    pub start: Duration,
    /// A replica's answer to `/ready`; past it the replica counts as hung.
    pub probe: Duration,
    /// A step of a replica's engine while it has work; past it the replica counts as hung.
    pub step: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            connect: Duration::from_secs(1),
            attempt: Duration::from_secs(60),
            token: Duration::from_secs(20),
            route: Duration::from_secs(600),
            drain: Duration::from_secs(660),
            start: Duration::from_secs(300),
            probe: Duration::from_secs(5),
            step: Duration::from_secs(30),
        }
    }
}

/// The retry budget.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Retries {
    /// Retries under way, as a share of requests under way.
    pub budget: f64,
    /// Retries that are allowed however few requests there are.
    pub floor: u32,
    /// Tries of one request, the first included.
    pub attempts: u32,
}

/// Hedging of the first token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hedging {
    /// Whether it is on.
    pub enabled: bool,
    /// How long the first replica has before a second is asked.
    pub after: Duration,
    /// Hedges under way, as a share of requests under way.
    pub budget: f64,
}

/// One model behind one name.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelDeployment {
    /// The name that requests use.
    pub name: String,
    /// What is run under it.
    pub stable: Version,
    /// A second version that gets a share of the requests.
    pub canary: Option<Canary>,
}

/// One version of a model and how its replicas run.
#[derive(Clone, Debug, PartialEq)]
pub struct Version {
    /// Its name within the model, like `stable`.
    pub name: String,
    /// A catalog name, `hf:org/repo[/file]`, a file or a folder.
    pub source: String,
    /// The fewest replicas.
    pub min: u32,
    /// The most replicas.
    pub max: u32,
    /// Compute threads of a replica; `None` divides the machine's cores among the replicas.
    pub threads: Option<u16>,
    /// Longest sequence in tokens; `None` is the model's.
    pub context: Option<u32>,
    /// Memory for keys and values of a replica; `None` fits the machine.
    pub kv_bytes: Option<u64>,
    /// Requests that a replica runs at once.
    pub max_running: u32,
    /// Requests that may wait at a replica.
    pub max_queued: u32,
    /// Whether prompts reuse what earlier ones had in common.
    pub prefix_cache: bool,
    /// How the number of replicas follows the load, where `min < max`.
    pub autoscale: Autoscale,
}

/// A second version and its share.
#[derive(Clone, Debug, PartialEq)]
pub struct Canary {
    /// What is run.
    pub version: Version,
    /// Its share of the requests, in percent, 0 to 100.
    pub weight: u32,
}

/// How the number of replicas follows the load.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Autoscale {
    /// Queued and running tokens that a replica should have.
    pub target_tokens: u32,
    /// Relative distance from the target within which nothing changes.
    pub tolerance: f64,
    /// A higher number must have been wanted for this long.
    pub up_window: Duration,
    /// A lower number must have been wanted for this long.
    pub down_window: Duration,
    /// Where `min` is 0: how long a model must have had nothing to do before its last replica ends.
    pub idle: Duration,
}

impl Default for Autoscale {
    fn default() -> Autoscale {
        Autoscale {
            target_tokens: 2048,
            tolerance: 0.1,
            up_window: Duration::ZERO,
            down_window: Duration::from_secs(300),
            idle: Duration::from_secs(600),
        }
    }
}

impl Version {
    /// A version with this source and number of replicas, everything else by default.
    pub fn new(name: &str, source: &str, replicas: u32) -> Version {
        Version {
            name: name.to_owned(),
            source: source.to_owned(),
            min: replicas,
            max: replicas,
            threads: None,
            context: None,
            kv_bytes: None,
            max_running: 32,
            max_queued: 256,
            prefix_cache: true,
            autoscale: Autoscale::default(),
        }
    }
}

impl Deployment {
    /// One model with this many replicas on this machine's own address, everything else by default.
    pub fn of(name: &str, source: &str, replicas: u32) -> Deployment {
        let stable = Version::new("stable", source, replicas);
        Deployment {
            models: vec![ModelDeployment { name: name.to_owned(), stable, canary: None }],
            ..Deployment::default()
        }
    }
}

impl Default for Deployment {
    /// Everything but the models.
    fn default() -> Deployment {
        Deployment {
            listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080),
            page: true,
            allowed_hosts: Vec::new(),
            allowed_origins: Vec::new(),
            keys_required: false,
            tls: None,
            limits: Limits { pending: 1024, body_bytes: 4 << 20, connections: 4096 },
            timeouts: Timeouts::default(),
            retries: Retries { budget: 0.2, floor: 3, attempts: 3 },
            hedging: Hedging { enabled: false, after: Duration::from_millis(500), budget: 0.05 },
            drain_tokens: 256,
            cross_class: false,
            balancing: Balancing::default(),
            models: Vec::new(),
        }
    }
}
