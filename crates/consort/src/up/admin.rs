//! Administration of a running `up` from this machine: `consort status` and `consort key` come here.
//!
//! A socket of its own on loopback, at a port that the system picks; its address and a secret made at each start stand
//! in `admin.json` in the state folder, which its owner alone can read. So who may read that folder may administrate,
//! and nobody else.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::extract::{Path as Named, State};
use axum::http::{HeaderMap, StatusCode, header::AUTHORIZATION};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use consort_api::KeyLimits;
use consort_control::keys;
use consort_control::rollout::Spec;
use consort_control::store::StoreError;
use serde::{Deserialize, Serialize};

use super::rollouts::{Ask, What};
use super::shared::Shared;

/// The file's name within the state folder.
pub(crate) const FILE: &str = "admin.json";

/// Where a running `up` is administrated.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Door {
    pub(crate) pid: u32,
    pub(crate) address: SocketAddr,
    pub(crate) token: String,
}

/// A key to be made.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewKey {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) limits: KeyLimits,
}

/// Runs as long as this is held.
pub(crate) struct Admin {
    file: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Admin {
    fn drop(&mut self) {
        self.task.abort();
        // It may be gone already.
        let _ = std::fs::remove_file(&self.file);
    }
}

impl Admin {
    /// Opens the socket and writes down where it is.
    pub(crate) async fn start(shared: Arc<Shared>, folder: &Path) -> Result<Admin> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
        let listener = listener.context("can't listen for administration on this machine")?;
        let address = listener.local_addr().context("can't read the administration socket's address")?;
        let door = Door { pid: std::process::id(), address, token: shared.admin_token.clone() };
        let file = folder.join(FILE);
        write_private(&file, &serde_json::to_vec(&door)?)
            .with_context(|| format!("can't write {}", file.display()))?;
        let router = Router::new()
            .route("/fleet", get(fleet))
            .route("/keys", get(list).post(create))
            .route("/keys/{id}", delete(revoke))
            .route("/rollouts", get(rollouts).post(start))
            .route("/rollouts/{model}/promote", post(promote))
            .route("/rollouts/{model}/abort", post(abort))
            .layer(axum::middleware::from_fn_with_state(shared.clone(), check))
            .with_state(shared);
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!(%error, "the administration socket failed");
            }
        });
        Ok(Admin { file, task })
    }
}

/// A file that its owner alone can read, whole or not at all.
fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write as _;
    let part = path.with_extension("part");
    // Left by a process that died in between; it could have other permissions.
    let _ = std::fs::remove_file(&part);
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&part)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&part, path)
}

async fn check(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    request: axum::extract::Request,
    next: Next,
) -> Response {
    let token =
        headers.get(AUTHORIZATION).and_then(|h| h.to_str().ok()).and_then(|h| h.strip_prefix("Bearer "));
    // Hashes compare in constant time.
    let right =
        token.is_some_and(|t| blake3::hash(t.as_bytes()) == blake3::hash(shared.admin_token.as_bytes()));
    if right { next.run(request).await } else { refuse(StatusCode::UNAUTHORIZED, "the secret is wrong") }
}

fn refuse(status: StatusCode, message: impl ToString) -> Response {
    (status, Json(serde_json::json!({ "error": message.to_string() }))).into_response()
}

fn failed(error: &anyhow::Error) -> Response {
    let many = error.downcast_ref::<StoreError>().is_some_and(|e| matches!(e, StoreError::TooManyKeys));
    refuse(if many { StatusCode::CONFLICT } else { StatusCode::INTERNAL_SERVER_ERROR }, format!("{error:#}"))
}

async fn fleet(State(shared): State<Arc<Shared>>) -> Response {
    Json(shared.status()).into_response()
}

async fn list(State(shared): State<Arc<Shared>>) -> Response {
    match shared.store.keys() {
        Ok(keys) => Json(keys).into_response(),
        Err(error) => failed(&error.into()),
    }
}

async fn create(State(shared): State<Arc<Shared>>, Json(new): Json<NewKey>) -> Response {
    let minted = match keys::mint(&new.name, new.limits) {
        Ok(minted) => minted,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, error),
    };
    let kept =
        shared.store.add_key(&minted.record).map_err(anyhow::Error::from).and_then(|()| shared.reload_keys());
    match kept {
        Ok(()) => Json(serde_json::json!({ "secret": minted.secret, "key": minted.record })).into_response(),
        Err(error) => failed(&error),
    }
}

async fn revoke(State(shared): State<Arc<Shared>>, Named(id): Named<String>) -> Response {
    let gone = shared.store.revoke_key(&id).map_err(anyhow::Error::from);
    match gone.and_then(|gone| shared.reload_keys().map(|()| gone)) {
        Ok(gone) => Json(serde_json::json!({ "revoked": gone })).into_response(),
        Err(error) => failed(&error),
    }
}

async fn rollouts(State(shared): State<Arc<Shared>>) -> Response {
    let rollouts = shared.state().rollouts.clone();
    Json(rollouts).into_response()
}

async fn start(State(shared): State<Arc<Shared>>, Json(spec): Json<Spec>) -> Response {
    ask(&shared, What::Start(Box::new(spec))).await
}

async fn promote(State(shared): State<Arc<Shared>>, Named(model): Named<String>) -> Response {
    ask(&shared, What::Promote(model)).await
}

async fn abort(State(shared): State<Arc<Shared>>, Named(model): Named<String>) -> Response {
    ask(&shared, What::Abort(model)).await
}

/// Asks the director, who decides what runs.
async fn ask(shared: &Shared, what: What) -> Response {
    let (answer, answered) = tokio::sync::oneshot::channel();
    let gone = || refuse(StatusCode::SERVICE_UNAVAILABLE, "it is shutting down");
    if shared.asks.send(Ask { what, answer }).await.is_err() {
        return gone();
    }
    match answered.await {
        Ok(Ok(rollout)) => Json(rollout).into_response(),
        Ok(Err(message)) => refuse(StatusCode::CONFLICT, message),
        Err(_) => gone(),
    }
}
