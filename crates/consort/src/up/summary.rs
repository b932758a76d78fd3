//! What `up` prints once everything is ready.

use std::time::Instant;

use anyhow::Result;
use consort_api::deployment::Deployment;
use consort_control::supervisor::SlotView;

use crate::listen::{Bound, Origin};
use crate::terminal::{Style, line};

/// Prints where everything is, and a request that works as pasted.
pub(crate) fn print(
    deployment: &Deployment,
    bound: &Bound,
    slots: &[SlotView],
    started: Instant,
    json: bool,
) -> Result<()> {
    let url = super::url(bound, deployment);
    let minted = bound.key.as_ref().filter(|key| key.origin == Origin::Minted).map(|key| &key.secret);
    if json {
        return Ok(line(serde_json::json!({
            "url": url,
            "address": bound.address.to_string(),
            "models": deployment.models.iter().map(|m| &m.name).collect::<Vec<_>>(),
            "replicas": slots,
            "pid": std::process::id(),
            "ready_ms": started.elapsed().as_millis() as u64,
            "api_key": minted,
        }))?);
    }
    let style = Style::stdout();
    let field =
        |name: &str, value: &str| line(format_args!("  {}  {value}", style.dim(&format!("{name:<11}"))));
    let count = slots.iter().map(|slot| slot.replicas.len()).sum::<usize>();
    let plural = if count == 1 { "" } else { "s" };
    line("")?;
    let took = started.elapsed().as_secs_f64();
    line(format_args!("  {}", style.bold(&format!("{count} replica{plural} ready ({took:.2} s)"))))?;
    line("")?;
    if deployment.page {
        field("Page", &format!("{url}/"))?;
    }
    field("OpenAI API", &format!("{url}/v1"))?;
    if let Some(secret) = minted {
        field("API key", &format!("{secret}   (made just now, shown once)"))?;
    } else if deployment.keys_required {
        field("API keys", "required; consort key create --name NAME makes one")?;
    }
    field("Watch", "consort status --watch")?;
    field("Stop", "Ctrl-C")?;
    line("")?;
    let rows = if slots.is_empty() {
        vec!["the first request starts the first replica".to_owned()]
    } else {
        rows(slots)
    };
    for row in rows {
        line(format_args!("  {row}"))?;
    }
    if let Some(model) = deployment.models.first() {
        line("")?;
        line(format_args!("  {}", style.dim("Try it:")))?;
        line(curl(&url, &model.name, bound, deployment.keys_required))?;
    }
    line("")?;
    Ok(())
}

/// One aligned line a replica, under a heading.
fn rows(slots: &[SlotView]) -> Vec<String> {
    let mut cells = vec![["REPLICA", "STATE", "PID", "ADDRESS", "THREADS"].map(str::to_owned)];
    for slot in slots {
        let replica = slot.replicas.first();
        cells.push([
            replica.map_or(slot.slot.clone(), |r| r.id.clone()),
            slot.state.text().to_owned(),
            replica.and_then(|r| r.pid).map(|pid| pid.to_string()).unwrap_or_default(),
            replica.and_then(|r| r.address.clone()).unwrap_or_default(),
            slot.threads.to_string(),
        ]);
    }
    crate::terminal::table(&cells)
}

/// A request that works as pasted.
fn curl(url: &str, model: &str, bound: &Bound, keys: bool) -> String {
    let bearer = match &bound.key {
        Some(key) if key.origin == Origin::Environment => {
            " -H \"authorization: Bearer $CONSORT_API_KEY\"".to_owned()
        }
        Some(key) => format!(" -H 'authorization: Bearer {}'", key.secret.replace('\'', r"'\''")),
        None if keys => " -H \"authorization: Bearer $KEY\"".to_owned(),
        None => String::new(),
    };
    let body = serde_json::json!({
        "model": model, "messages": [{ "role": "user", "content": "Say hello." }], "max_tokens": 64,
    });
    format!(
        "  curl {url}/v1/chat/completions{bearer} -H 'content-type: application/json' -d '{}'",
        body.to_string().replace('\'', r"'\''")
    )
}
