//! `cargo xtask overload`: four times more clients than a replica has room for, for a minute, on a release build.
//!
//! The flood is the one of the system tests (tests/system/overload.rs), which in the suite lasts ten seconds and
//! holds nobody to a time. Here the goodput must stay within a tenth of the peak.

use std::path::Path;

use anyhow::Result;

use crate::command::{cargo, watched};
use crate::stages;

/// Runs the flood for this many seconds.
pub(crate) fn flood(root: &Path, seconds: u64) -> Result<()> {
    let (variable, model) = stages::release_model(root)?;
    let mut test = cargo(root, ["test", "--release", "-p", "consort", "--test", "system"]);
    test.args(["overload_refuses_some_and_serves_the_rest_as_before", "--", "--nocapture"]);
    test.env("CONSORT_TEST_OVERLOAD_SECONDS", seconds.to_string()).env(variable, model);
    watched(&mut test, |_| {})
}
