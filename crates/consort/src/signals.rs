//! Being told to stop: once to finish what runs, twice to end at once.

use std::io;

use crate::terminal::note;

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
