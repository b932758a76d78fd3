//! `consort train status` of a job around parameter servers: what the coordinator knows, and what the system says of the
//! processes.

use std::fmt::Write as _;

use consort_training::server::{ShardView, View, Waits, WorkerView};

use super::{Place, SILENT_MS, seconds};

/// Lines for a person. `places` are the launcher's processes, `now` is in milliseconds since 1970.
pub(super) fn explain(view: &View, places: &[Place], now: u64) -> String {
    let mut out = String::new();
    let named = |worker: &WorkerView| worker.name.clone();
    // Writing to a String doesn't fail.
    for worker in &view.workers {
        let _ = writeln!(out, "  {}{}{}", worker.name, process(places, &worker.name), doing(view, worker));
    }
    for place in places.iter().filter(|p| !view.workers.iter().any(|w| w.name == p.name) && !p.is_server()) {
        let what = match place.pid {
            Some(pid) => {
                format!("process {pid}  is starting ({})", seconds(now.saturating_sub(place.heard_unix_ms)))
            }
            None => "is gone; a new process is due".to_owned(),
        };
        let _ = writeln!(out, "  {}  {what}{}", place.name, stopped(place));
    }
    for place in places.iter().filter(|place| place.is_server()) {
        let what = match place.pid {
            Some(pid) => format!("process {pid}{}", holds(view, &place.name)),
            None => "is gone; a new process is due".to_owned(),
        };
        let _ = writeln!(out, "  {}  {what}{}", place.name, stopped(place));
    }
    for (number, shard) in view.shards.iter().enumerate() {
        if let Some(trouble) = trouble(shard) {
            let _ = writeln!(out, "  shard {number}  {trouble}");
        }
    }
    let waiting: Vec<String> = view.workers.iter().filter(|w| w.waits.is_some()).map(named).collect();
    match (failing(view, places), whom(view, places)) {
        // Who isn't waiting for it yet soon is: with a push, or for weights.
        (Some(failing), _) => {
            let _ = writeln!(out, "everybody waits for {failing}");
        }
        (None, Some(whom)) if !waiting.is_empty() => {
            let verb = if waiting.len() == 1 { "waits" } else { "wait" };
            let _ = writeln!(out, "{} {verb} for {whom}", waiting.join(", "));
        }
        _ => {}
    }
    out
}

/// `  process 77`, where this launcher started it.
fn process(places: &[Place], name: &str) -> String {
    let pid = places.iter().find(|place| place.name == name).and_then(|place| place.pid);
    pid.map_or_else(String::new, |pid| format!("  process {pid}"))
}

fn stopped(place: &Place) -> String {
    match place.pid.filter(|_| place.stopped) {
        Some(pid) => format!("; STOPPED: a signal stopped the process (kill -CONT {pid} lets it go on)"),
        None => String::new(),
    }
}

/// What a worker does.
fn doing(view: &View, worker: &WorkerView) -> String {
    let mut out = match (&worker.waits, worker.computes) {
        (Some((waits, ms)), _) => format!("  waits {} for {}", seconds(*ms), waits_for(view, waits)),
        (None, Some((group, ms))) => format!("  has group {group} for {}", seconds(ms)),
        (None, None) => "  between two groups".to_owned(),
    };
    let _ = write!(out, "  ({} done)", worker.clock);
    if worker.silent_ms > SILENT_MS {
        let _ = write!(out, "; SILENT for {}", seconds(worker.silent_ms));
    }
    out
}

/// Workers by their names.
fn names(view: &View, workers: &[u64]) -> String {
    let name = |id: &u64| {
        let known = view.workers.iter().find(|worker| worker.worker == *id);
        known.map_or_else(|| "a worker that is being fenced".to_owned(), |worker| worker.name.clone())
    };
    workers.iter().map(name).collect::<Vec<_>>().join(", ")
}

fn waits_for(view: &View, waits: &Waits) -> String {
    match waits {
        Waits::Workers { there, expected } => {
            format!("the beginning: {there} of {expected} workers are there")
        }
        Waits::Held { by } if by.is_empty() => "a checkpoint".into(),
        Waits::Held { by } => format!("a checkpoint, before which {} has a group to finish", names(view, by)),
        Waits::Slowest { by, behind } => format!("the slowest, {}, {behind} groups behind", names(view, by)),
        Waits::Groups { by, .. } if by.is_empty() => "the servers, which move the weights".into(),
        Waits::Groups { by, shared: false } => format!("the last groups, which {} has", names(view, by)),
        Waits::Groups { by, shared: true } => format!("the others' gradients: {}", names(view, by)),
        Waits::Weights => "the first weights, which servers get".into(),
        Waits::Servers => "servers: a shard has nobody yet who answers for it".into(),
    }
}

/// What a server holds.
fn holds(view: &View, name: &str) -> String {
    let of = |of: fn(&ShardView) -> Option<&String>| -> Vec<String> {
        let own = view.shards.iter().enumerate().filter(|(_, shard)| of(shard).is_some_and(|n| n == name));
        own.map(|(number, _)| number.to_string()).collect()
    };
    let (primary, backup) = (of(|shard| shard.primary.as_ref()), of(|shard| shard.backup.as_ref()));
    let mut words = Vec::new();
    if !primary.is_empty() {
        words.push(format!("primary of shard {}", primary.join(", ")));
    }
    if !backup.is_empty() {
        words.push(format!("backup of shard {}", backup.join(", ")));
    }
    if words.is_empty() { "  has no shard".into() } else { format!("  {}", words.join(", ")) }
}

/// What is wrong with a shard, if anything.
fn trouble(shard: &ShardView) -> Option<String> {
    let Some(primary) = &shard.primary else { return Some("has nobody".into()) };
    let mut words = Vec::new();
    if shard.promoting {
        words.push(format!("fails over: {primary} takes it (epoch {})", shard.epoch));
    }
    if shard.silent_ms > SILENT_MS {
        words.push(format!("{primary} is SILENT for {}", seconds(shard.silent_ms)));
    }
    match &shard.backup {
        None => words.push("has no backup".into()),
        Some(backup) if !shard.in_sync => words.push(format!("{backup} is being given a copy")),
        Some(_) => {}
    }
    (!words.is_empty()).then(|| words.join("; "))
}

fn is_stopped(places: &[Place], name: &str) -> bool {
    places.iter().any(|place| place.name == name && place.stopped)
}

/// A shard that nobody gets an answer from, if there is one.
fn failing(view: &View, places: &[Place]) -> Option<String> {
    view.shards.iter().enumerate().find_map(|(number, shard)| {
        let primary = shard.primary.as_ref()?;
        let why = match () {
            () if shard.promoting => "has just taken it over".to_owned(),
            () if is_stopped(places, primary) => {
                "is stopped; past the lease its backup takes over".to_owned()
            }
            () if shard.silent_ms > SILENT_MS => format!("is silent for {}", seconds(shard.silent_ms)),
            () => return None,
        };
        Some(format!("shard {number}, whose primary {primary} {why}"))
    })
}

/// Whom those who wait wait for, in the end.
fn whom(view: &View, places: &[Place]) -> Option<String> {
    let mut by: Vec<u64> = Vec::new();
    for worker in &view.workers {
        if let Some((
            Waits::Held { by: others } | Waits::Slowest { by: others, .. } | Waits::Groups { by: others, .. },
            _,
        )) = &worker.waits
        {
            by.extend(others);
        }
    }
    by.sort_unstable();
    by.dedup();
    // Who waits itself is not whom the others wait for.
    let waits = |id: &u64| view.workers.iter().any(|worker| worker.worker == *id && worker.waits.is_some());
    by.retain(|id| !waits(id));
    let name = |id: &u64| {
        let Some(worker) = view.workers.iter().find(|worker| worker.worker == *id) else {
            return "a worker that is being fenced".to_owned();
        };
        let how = if is_stopped(places, &worker.name) {
            "stopped".to_owned()
        } else if worker.silent_ms > SILENT_MS {
            format!("silent for {}", seconds(worker.silent_ms))
        } else {
            format!("at its group for {}", seconds(worker.computes.map_or(0, |(_, ms)| ms)))
        };
        format!("{} ({how})", worker.name)
    };
    (!by.is_empty()).then(|| by.iter().map(name).collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(number: u64, computes: Option<(u64, u64)>, waits: Option<Waits>) -> WorkerView {
        WorkerView {
            worker: number + 1,
            name: format!("worker {number}"),
            clock: 7,
            silent_ms: 100,
            computes,
            waits: waits.map(|waits| (waits, 1200)),
        }
    }

    fn shard(primary: &str, backup: &str) -> ShardView {
        ShardView {
            epoch: 2,
            primary: Some(primary.into()),
            silent_ms: 10,
            backup: Some(backup.into()),
            in_sync: true,
            promoting: false,
            lag: 0,
        }
    }

    fn place(number: usize, name: &str) -> Place {
        Place { pid: Some(70 + number as u32), heard_unix_ms: 10_000, ..Place::new(number, name) }
    }

    fn job() -> (View, Vec<Place>) {
        let view = View {
            workers: vec![
                worker(0, None, Some(Waits::Slowest { by: vec![2], behind: 3 })),
                worker(1, Some((17, 4200)), None),
            ],
            shards: vec![shard("server 0", "server 1"), shard("server 1", "server 0")],
            servers: 2,
        };
        let names = ["worker 0", "worker 1", "server 0", "server 1"];
        (view, names.iter().enumerate().map(|(number, name)| place(number, name)).collect())
    }

    #[test]
    fn the_slowest_is_named_by_those_who_wait() {
        let (view, mut places) = job();
        let text = explain(&view, &places, 10_100);
        assert!(
            text.contains("worker 0  process 70  waits 1.2 s for the slowest, worker 1, 3 groups behind"),
            "{text}"
        );
        assert!(text.contains("worker 1  process 71  has group 17 for 4.2 s  (7 done)"), "{text}");
        assert!(text.contains("server 0  process 72  primary of shard 0, backup of shard 1"), "{text}");
        assert!(text.ends_with("worker 0 waits for worker 1 (at its group for 4.2 s)\n"), "{text}");
        places[1].stopped = true;
        assert!(explain(&view, &places, 10_100).contains("worker 0 waits for worker 1 (stopped)"));
    }

    #[test]
    fn a_shard_that_fails_over_is_named() {
        let (mut view, mut places) = job();
        view.workers[0].waits = Some((Waits::Servers, 300));
        (view.shards[0].primary, view.shards[0].backup) = (Some("server 1".into()), None);
        (view.shards[0].promoting, view.shards[0].in_sync) = (true, false);
        places[2].pid = None;
        let text = explain(&view, &places, 10_100);
        assert!(text.contains("shard 0  fails over: server 1 takes it (epoch 2); has no backup"), "{text}");
        assert!(text.contains("server 0  is gone; a new process is due"), "{text}");
        assert!(
            text.contains("everybody waits for shard 0, whose primary server 1 has just taken it over"),
            "{text}"
        );
        (view.shards[0].promoting, view.shards[0].silent_ms) = (false, 1900);
        let text = explain(&view, &places, 10_100);
        assert!(text.contains("shard 0, whose primary server 1 is silent for 1.9 s"), "{text}");
    }
}
