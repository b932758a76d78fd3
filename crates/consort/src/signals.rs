//! Being told to stop: once to finish what runs, twice to end at once.

use std::io;

use anyhow::{Context, Result};

use crate::terminal::note;

/// Calls `told` at the first SIGINT or SIGTERM, and ends the process at the second SIGINT.
pub(crate) fn on_stop(told: impl FnOnce() + Send + 'static) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("can't start the runtime that watches for Ctrl-C")?;
    let wait = move || {
        runtime.block_on(async {
            if stop().await.is_ok() {
                told();
                // The second one ends the process from a task of this runtime.
                std::future::pending::<()>().await;
            }
        });
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).context("can't start a thread")?;
    Ok(())
}

/// Resolves at the first SIGINT or SIGTERM; a second SIGINT ends the process at once (exit status 130).
pub(crate) async fn stop() -> io::Result<()> {
    first().await?;
    tokio::spawn(async {
        if tokio::signal::ctrl_c().await.is_ok() {
            note("ended at once");
            std::process::exit(130);
        }
    });
    Ok(())
}

#[cfg(unix)]
async fn first() -> io::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted,
        _ = terminate.recv() => Ok(()),
    }
}

#[cfg(not(unix))]
async fn first() -> io::Result<()> {
    tokio::signal::ctrl_c().await
}
