//! Values that are each possible and together can't work.
//!
//! A deadline that holds another one must be the longer of the two: `connect ≤ try ≤ route ≤ drain`, `token ≤ route`.
//! A chain that is broken anywhere makes some deadline meaningless, and its owner believes in it until an incident.

use std::net::SocketAddr;
use std::time::Duration;

use super::Deadlines;
use consort_config::Placed;
use consort_config::Problem;
use consort_config::values::show;

pub(super) fn timeouts(d: &Deadlines, problems: &mut Vec<Problem>) {
    let (connect, attempt, token) = (("connect", &d.connect), ("try", &d.attempt), ("token", &d.token));
    let (route, drain) = (("route", &d.route), ("drain", &d.drain));
    let (start, probe, step) = (("start", &d.start), ("probe", &d.probe), ("step", &d.step));
    within(problems, connect, attempt, "a try would end before its connection can be made");
    within(
        problems,
        attempt,
        route,
        "the request would end before its first try, so no second one could happen",
    );
    within(problems, token, route, "the request would end before a silent replica is noticed");
    within(problems, route, drain, "a drain would cut requests that are within their time");
    within(problems, probe, start, "a replica's start would end before its first health check may");
    within(problems, probe, step, "a step that is slow would be noticed before a health check could be");
}

/// `inner` must not be longer than `outer`.
fn within(
    problems: &mut Vec<Problem>,
    (inner_name, inner): (&str, &Placed<Duration>),
    (outer_name, outer): (&str, &Placed<Duration>),
    why: &str,
) {
    if inner.value <= outer.value {
        return;
    }
    let (longer, shorter) = (show(inner.value), show(outer.value));
    let default = |placed: &Placed<_>| if placed.span.is_some() { "" } else { ", the default" };
    // What the user wrote is shown; of two that they wrote, the inner one.
    let (span, label) = match (&inner.span, &outer.span) {
        (Some(span), _) => (span, format!("longer than `{outer_name}` ({shorter}{}): {why}", default(outer))),
        (None, Some(span)) => {
            (span, format!("shorter than `{inner_name}` ({longer}{}): {why}", default(inner)))
        }
        // Our own defaults agree; a test holds them to it.
        (None, None) => return,
    };
    // One broken link often breaks the next: the first says it.
    if problems.iter().any(|p| p.span == *span) {
        return;
    }
    problems.push(Problem {
        span: span.clone(),
        message: format!(
            "timeouts that can't work: `{inner_name}` ({longer}) is longer than `{outer_name}` ({shorter})"
        ),
        label,
        help: Some(format!("make `{inner_name}` at most {shorter}, or `{outer_name}` at least {longer}")),
    });
}

pub(super) fn hedging(
    enabled: bool,
    after: &Placed<Duration>,
    attempt: &Placed<Duration>,
    problems: &mut Vec<Problem>,
) {
    if !enabled || after.value < attempt.value {
        return;
    }
    let Some(span) = after.span.clone().or_else(|| attempt.span.clone()) else { return };
    problems.push(Problem {
        span,
        message: "hedging that can't happen".into(),
        label: format!(
            "a second replica would be asked after {}, when the first try is over ({})",
            show(after.value),
            show(attempt.value)
        ),
        help: Some("make `after` shorter than `timeouts.try`".into()),
    });
}

/// A front door that others can reach needs keys.
pub(super) fn reach(listen: &Placed<SocketAddr>, keys_required: bool, problems: &mut Vec<Problem>) {
    let loopback = listen.value.ip().to_canonical().is_loopback();
    let Some(span) = listen.span.clone().filter(|_| !loopback && !keys_required) else { return };
    problems.push(Problem {
        span,
        message: "anyone on the network could use this deployment".into(),
        label: "this address can be reached from other machines, and no key is required".into(),
        help: Some(
            "add [keys] with `required = true` and make a key with `consort key create`, or listen on 127.0.0.1"
                .into(),
        ),
    });
}
