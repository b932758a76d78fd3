//! `consort up` at work: the front door on the main thread, the fleet's supervisor, its director and the
//! administration on another. A busy front door must not keep health checks waiting, or its replicas would count as
//! hung.

mod admin;
mod director;
mod fleet_page;
mod guard;
mod locate;
mod rollouts;
mod shared;
mod source;
mod start;
mod summary;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use consort_api::deployment::{Deployment, TlsFiles};
use consort_control::keeper::Keeper;
use consort_control::store::Store;
use consort_gateway::{Gateway, Settings, Tls};

use crate::listen::Bound;
use crate::terminal::note;
use crate::{environment, signals};
use admin::Admin;
pub(crate) use admin::{Door, FILE as ADMIN_FILE, NewKey};
pub(crate) use rollouts::{Numbers, RolloutView, abort_at_rest, records};
pub(crate) use shared::FleetStatus;
use shared::Shared;
pub(crate) use shared::cores;
pub(crate) use source::{Source, read};

/// What `consort up` was asked for.
pub(crate) struct Plan {
    pub(crate) source: Source,
    pub(crate) deployment: Deployment,
    pub(crate) bound: Bound,
    pub(crate) json: bool,
    pub(crate) started: Instant,
}

/// Runs a deployment until told to stop.
pub(crate) fn run(plan: Plan) -> Result<()> {
    let tls = plan.deployment.tls.as_ref().map(|files| tls(files, &plan.deployment)).transpose()?;
    let folder = environment::state_folder()?;
    let store = Arc::new(Store::open(&folder)?);
    let ended = consort_control::process::end_leftovers(&store)?;
    if ended > 0 {
        note(&format!("ended {ended} replica{} of an earlier run", if ended == 1 { "" } else { "s" }));
    }
    let hub = environment::hub()?;
    // Progress is shown for what must be fetched before anything can run; later fetches happen behind the scenes.
    let rollouts = rollouts::Rollouts::load(store.clone())?;
    let located = locate::first(&hub, &rollouts.promoted(&plan.deployment), plan.json)?;

    let door = Gateway::new(settings(&plan.deployment));
    if let Some(tls) = tls {
        door.set_tls(tls);
    }
    let listener = plan.bound.listener.try_clone().context("can't share the listening socket")?;
    let shared = Arc::new(Shared::new(&plan, store.clone(), door.clone())?);
    if plan.deployment.keys_required && shared.keys().is_empty() {
        note("requests need a key and there is none yet; make one with: consort key create --name NAME");
    }
    door.set_extra(Box::new(fleet_page::FleetPage(shared.clone())));

    let (stop_door, door_stopped) = tokio::sync::oneshot::channel::<()>();
    let (stop_fleet, fleet_stopped) = tokio::sync::oneshot::channel::<()>();
    let director = director::Director::new(plan, hub, located, rollouts, shared.clone());
    let fleet = std::thread::Builder::new()
        .name("fleet".into())
        .spawn(move || -> Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .max_blocking_threads(4)
                .thread_name("consort-fleet")
                .build()
                .context("can't start the supervisor's runtime")?;
            let ended = runtime.block_on(direct(director, store, shared, folder, fleet_stopped));
            // The door has nothing behind it any more.
            let _ = stop_door.send(());
            ended
        })
        .context("can't start the supervisor's thread")?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .thread_name("consort-door")
        .build()
        .context("can't start the HTTP runtime")?;
    let served = runtime.block_on(async {
        let stop = async {
            tokio::select! {
                stopped = signals::stop() => {
                    if let Err(error) = stopped {
                        tracing::error!(%error, "can't listen for signals");
                    }
                }
                _ = door_stopped => {}
            }
            // Both at once: what runs at the replicas goes on while the door takes nothing new.
            let _ = stop_fleet.send(());
        };
        let listener =
            tokio::net::TcpListener::from_std(listener).context("can't watch the listening socket")?;
        anyhow::Ok(door.serve(listener, stop).await?)
    });
    let directed = fleet.join().map_err(|_| anyhow!("the supervisor's thread panicked"))?;
    served.and(directed)
}

async fn direct(
    mut director: director::Director,
    store: Arc<Store>,
    shared: Arc<Shared>,
    folder: PathBuf,
    stopped: tokio::sync::oneshot::Receiver<()>,
) -> Result<()> {
    let seed = director::seed();
    let start = start::command(shared.replica_key.clone())?;
    let say = {
        let shared = shared.clone();
        move |notice| shared.say(notice)
    };
    let (keeper, task) = Keeper::start(director.options(), seed, store, start, say);
    shared.set_keeper(keeper.clone());
    let admin = Admin::start(shared.clone(), &folder).await?;
    let ended = tokio::select! {
        ended = director.run(&keeper) => ended,
        _ = stopped => Ok(()),
    };
    keeper.stop().await;
    let mut task = task;
    let mut routes = keeper.routes();
    let stopped = loop {
        tokio::select! {
            stopped = &mut task => break stopped.map_err(|_| anyhow!("the supervisor panicked")),
            // The door learns which replicas drain and which are gone, so that it keeps nobody waiting for one.
            changed = routes.changed() => match changed {
                Ok(()) => director.publish(&routes.borrow_and_update())?,
                Err(_) => break (&mut task).await.map_err(|_| anyhow!("the supervisor panicked")),
            },
        }
    };
    director.publish(&[])?;
    drop(admin);
    ended.and(stopped)
}

/// The front door's certificate.
fn tls(files: &TlsFiles, deployment: &Deployment) -> Result<Tls> {
    let read = |path: &std::path::Path| {
        std::fs::read(path).with_context(|| format!("[tls]: can't read {}", path.display()))
    };
    Ok(match files {
        TlsFiles::Files { certificate, key } => Tls::new(&read(certificate)?, &read(key)?)?,
        TlsFiles::SelfSigned => {
            let mut names = vec!["localhost".to_owned(), deployment.listen.ip().to_string()];
            names.extend(deployment.allowed_hosts.iter().cloned());
            Tls::self_signed(&names)?
        }
    })
}

/// Where a client on this machine reaches the front door.
pub(crate) fn url(bound: &Bound, deployment: &Deployment) -> String {
    let url = bound.url();
    if deployment.tls.is_some() { url.replacen("http://", "https://", 1) } else { url }
}

/// The front door's settings, at the start and after an edit.
fn settings(deployment: &Deployment) -> Settings {
    let mut settings = Settings::default();
    settings.clients.allowed_hosts = deployment.allowed_hosts.clone();
    settings.clients.allowed_origins = deployment.allowed_origins.clone();
    settings.clients.max_body_bytes = usize::try_from(deployment.limits.body_bytes).unwrap_or(usize::MAX);
    settings.clients.max_connections = deployment.limits.connections as usize;
    settings.clients.request_timeout = deployment.timeouts.route;
    settings.replicas.connect_timeout = deployment.timeouts.connect;
    settings.replicas.silence_timeout = deployment.timeouts.token;
    settings.replicas.stalled_after = deployment.timeouts.step;
    settings.replicas.balancing = deployment.balancing;
    settings.replicas.max_pending = deployment.limits.pending as usize;
    settings.retries.attempts = deployment.retries.attempts;
    settings.retries.budget.ratio = deployment.retries.budget;
    settings.retries.budget.floor = deployment.retries.floor;
    settings.hedging.enabled = deployment.hedging.enabled;
    settings.hedging.after = deployment.hedging.after;
    settings.hedging.budget = deployment.hedging.budget;
    settings.retries.wait = deployment.timeouts.attempt;
    settings.retries.begin = deployment.timeouts.attempt;
    settings
}
