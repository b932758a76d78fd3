//! `consort.toml`: read, checked, and refused with the line, the reason and the cure.
//!
//! [`read`] is a function from text to a [`Deployment`]: it opens no file and asks nothing of the machine, so that
//! `up --check`, a start and a live edit are judged by the same rule. All mistakes are reported at once.

mod check;
mod models;

use std::ops::Range;
use std::time::Duration;

use consort_api::deployment::{Balancing, Deployment, Hedging, Limits, Retries, Timeouts, TlsFiles};
use toml::de::{DeTable, DeValue};

use consort_config::values::{Wrong, address, bytes, count, duration, flag, kind, share, text, texts};
pub use consort_config::{MOST_BYTES, Problem, Problems, parse_duration};
use consort_config::{Placed, Section};

const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(86_400);

/// Reads a deployment from the text of a file that messages call `file`.
///
/// # Errors
/// [`Problems`]: everything that is wrong with it.
pub fn read(file: &str, source: &str) -> Result<Deployment, Problems> {
    consort_config::read(file, source, |section, problems| deployment(section, source, problems))
}

/// The deadlines with their places, for the checks that compare them.
struct Deadlines {
    connect: Placed<Duration>,
    attempt: Placed<Duration>,
    token: Placed<Duration>,
    route: Placed<Duration>,
    drain: Placed<Duration>,
    start: Placed<Duration>,
    probe: Placed<Duration>,
    step: Placed<Duration>,
}

fn deployment(mut file: Section<'_>, source: &str, problems: &mut Vec<Problem>) -> Deployment {
    let default = Deployment::default();
    let listen = file.get("listen", default.listen, problems, address);
    let page = file.get("page", default.page, problems, flag).value;
    let allowed_hosts = file.get("allowed_hosts", Vec::new(), problems, texts).value;
    let allowed_origins = file.get("allowed_origins", Vec::new(), problems, texts).value;
    let cross_class = file.get("cross_class", default.cross_class, problems, flag).value;
    let balancing = file.get("balancing", default.balancing, problems, balancing).value;
    let keys_required = file.table("keys", problems).is_some_and(|mut keys| {
        let required = keys.get("required", false, problems, flag).value;
        keys.finish(problems);
        required
    });
    check::reach(&listen, keys_required, problems);
    let tls = file.table("tls", problems).and_then(|tls| tls_files(tls, problems));
    let limits =
        file.table("limits", problems).map_or(default.limits, |s| limits(s, default.limits, problems));
    let deadlines = deadlines(file.table("timeouts", problems), problems);
    check::timeouts(&deadlines, problems);
    let retries =
        file.table("retries", problems).map_or(default.retries, |s| retries(s, default.retries, problems));
    let hedging = file
        .table("hedging", problems)
        .map_or(default.hedging, |s| hedging(s, default.hedging, &deadlines.attempt, problems));
    let drain_tokens = file.table("drain", problems).map_or(default.drain_tokens, |mut drain| {
        let tokens = drain.get("tokens", default.drain_tokens, problems, count(0, 1_000_000)).value;
        drain.finish(problems);
        tokens
    });
    let models = models::models(&mut file, source, problems);
    file.finish(problems);
    let timeouts = Timeouts {
        connect: deadlines.connect.value,
        attempt: deadlines.attempt.value,
        token: deadlines.token.value,
        route: deadlines.route.value,
        drain: deadlines.drain.value,
        start: deadlines.start.value,
        probe: deadlines.probe.value,
        step: deadlines.step.value,
    };
    Deployment {
        listen: listen.value,
        page,
        allowed_hosts,
        allowed_origins,
        keys_required,
        tls,
        limits,
        timeouts,
        retries,
        hedging,
        drain_tokens,
        cross_class,
        balancing,
        models,
    }
}

fn tls_files(mut tls: Section<'_>, problems: &mut Vec<Problem>) -> Option<TlsFiles> {
    let certificate = tls.get("certificate", None, problems, |value| text(value).map(Some));
    let key = tls.get("key", None, problems, |value| text(value).map(Some));
    let own = tls.get("self_signed", false, problems, flag);
    tls.finish(problems);
    let mut refuse = |span: Option<Range<usize>>, message: &str, label: &str, help: &str| {
        let span = span.unwrap_or(0..0);
        problems.push(Problem {
            span,
            message: message.into(),
            label: label.into(),
            help: Some(help.into()),
        });
        None
    };
    match (certificate.value, key.value, own.value) {
        (Some(_), _, true) | (_, Some(_), true) => refuse(
            own.span,
            "[tls] names files and asks for a self-signed certificate",
            "only one of them can be used",
            "remove `self_signed`, or `certificate` and `key`",
        ),
        (Some(certificate), Some(key), false) => {
            Some(TlsFiles::Files { certificate: certificate.into(), key: key.into() })
        }
        (Some(_), None, false) => refuse(
            certificate.span,
            "[tls] has a certificate and no key",
            "its private key is missing",
            "add `key = \"key.pem\"`",
        ),
        (None, Some(_), false) => refuse(
            key.span,
            "[tls] has a key and no certificate",
            "its certificate is missing",
            "add `certificate = \"cert.pem\"`",
        ),
        (None, None, true) => Some(TlsFiles::SelfSigned),
        (None, None, false) => None,
    }
}

fn limits(mut section: Section<'_>, default: Limits, problems: &mut Vec<Problem>) -> Limits {
    let limits = Limits {
        pending: section.get("pending", default.pending, problems, count(0, 1_000_000)).value,
        body_bytes: section.get("body", default.body_bytes, problems, bytes(1024, 1 << 30)).value,
        connections: section.get("connections", default.connections, problems, count(1, 1_000_000)).value,
    };
    section.finish(problems);
    limits
}

fn deadlines(section: Option<Section<'_>>, problems: &mut Vec<Problem>) -> Deadlines {
    let empty = DeTable::new();
    let mut section = section.unwrap_or_else(|| Section::new("timeouts", &empty));
    let default = Timeouts::default();
    let ms = Duration::from_millis;
    let mut read = |key, default, low, high| section.get(key, default, problems, duration(low, high));
    let deadlines = Deadlines {
        connect: read("connect", default.connect, ms(1), 60 * SECOND),
        attempt: read("try", default.attempt, ms(10), DAY),
        token: read("token", default.token, SECOND, DAY),
        route: read("route", default.route, ms(10), DAY),
        drain: read("drain", default.drain, Duration::ZERO, DAY),
        start: read("start", default.start, SECOND, DAY),
        probe: read("probe", default.probe, ms(100), 600 * SECOND),
        step: read("step", default.step, SECOND, DAY),
    };
    section.finish(problems);
    deadlines
}

/// A way to choose among replicas.
fn balancing(value: &DeValue<'_>) -> Result<Balancing, Wrong> {
    let names = Balancing::ALL.map(|way| format!("\"{}\"", way.name()));
    let name = value.as_str().ok_or_else(|| {
        (format!("expected a string, found {}", kind(value)), Some(format!("it may be {}", names.join(", "))))
    })?;
    Balancing::from_name(name).ok_or_else(|| {
        ("there is no such way to balance".into(), Some(format!("it may be {}", names.join(", "))))
    })
}

fn retries(mut section: Section<'_>, default: Retries, problems: &mut Vec<Problem>) -> Retries {
    let retries = Retries {
        budget: section.get("budget", default.budget, problems, share(0.0, 1.0)).value,
        floor: section.get("floor", default.floor, problems, count(0, 10_000)).value,
        attempts: section.get("attempts", default.attempts, problems, count(1, 10)).value,
    };
    section.finish(problems);
    retries
}

fn hedging(
    mut section: Section<'_>,
    default: Hedging,
    attempt: &Placed<Duration>,
    problems: &mut Vec<Problem>,
) -> Hedging {
    let enabled = section.get("enabled", default.enabled, problems, flag).value;
    let after = section.get("after", default.after, problems, duration(Duration::from_millis(1), DAY));
    let budget = section.get("budget", default.budget, problems, share(0.0, 1.0)).value;
    section.finish(problems);
    check::hedging(enabled, &after, attempt, problems);
    Hedging { enabled, after: after.value, budget }
}

#[cfg(test)]
mod tests;
