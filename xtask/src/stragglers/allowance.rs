//! An allowance of processor time for a process, kept by the kernel: a control group, of either version.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How often the kernel gives the allowance anew: short beside what a worker computes at a time.
const PERIOD_US: u64 = 20_000;
/// How long a group may hold processes that are ending.
const ENDING: Duration = Duration::from_secs(5);

/// The group, which is removed with this.
pub(super) struct Allowance(PathBuf);

impl Allowance {
    /// Gives a process `share` of a core from now on, with all its threads.
    pub(super) fn give(name: &str, pid: u32, share: f64) -> Result<Allowance> {
        let quota = ((PERIOD_US as f64 * share) as u64).max(1000);
        let name = format!("consort-stragglers-{}-{name}", std::process::id());
        let (root, settings) = match (Path::new("/sys/fs/cgroup/cpu"), Path::new("/sys/fs/cgroup")) {
            (first, _) if first.join("cpu.cfs_quota_us").exists() => (
                first,
                vec![("cpu.cfs_period_us", PERIOD_US.to_string()), ("cpu.cfs_quota_us", quota.to_string())],
            ),
            (_, second) if second.join("cgroup.controllers").exists() => {
                // It may be so already.
                let _ = fs::write(second.join("cgroup.subtree_control"), "+cpu");
                (second, vec![("cpu.max", format!("{quota} {PERIOD_US}"))])
            }
            _ => bail!("this machine has no control groups for processor time under /sys/fs/cgroup"),
        };
        let group = root.join(name);
        fs::create_dir(&group)
            .with_context(|| format!("cannot make {}; this needs root", group.display()))?;
        let allowance = Allowance(group);
        for (file, value) in settings {
            allowance.write(file, &value)?;
        }
        allowance.write("cgroup.procs", &pid.to_string())?;
        Ok(allowance)
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.0.join(file);
        fs::write(&path, value).with_context(|| format!("cannot write {value} to {}", path.display()))
    }
}

impl Drop for Allowance {
    fn drop(&mut self) {
        let until = Instant::now() + ENDING;
        // A group goes when its last process has ended, which tells nobody.
        while fs::remove_dir(&self.0).is_err() && self.0.exists() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
