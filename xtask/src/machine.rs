//! What the tests need beside Rust: a browser, a Python with the OpenAI client in it, and Open MPI's mpirun.
//!
//! System packages are installed only where a program is missing, with apt, through sudo where we are not root.
//! Python packages live in a virtual environment under the target folder, pinned, so nothing of the user's changes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{find, followed, logged, output, target_folder};

/// The Python packages that the tests drive Consort with. Pinned, so that a red run is ours and not a new release's.
const PYTHON_PACKAGES: [&str; 2] = ["openai==3.52.0", "jsonschema==4.26.0"];

/// How often pip may try: downloads of gigabytes break off.
const ATTEMPTS: u32 = 3;

/// What a prepared machine has.
pub(crate) struct Machine {
    /// A Python with the packages above.
    pub(crate) python: PathBuf,
    /// A Chromium that runs headless.
    pub(crate) chromium: PathBuf,
}

/// Makes sure of everything; says what it installs.
pub(crate) fn prepare(root: &Path) -> Result<Machine> {
    let work = target_folder(root).join("xtask");
    fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    let mut missing = Vec::new();
    if !python_makes_environments() {
        missing.extend(["python3", "python3-venv"]);
    }
    if chromium().is_none() {
        missing.extend(["chromium", "fonts-dejavu-core"]);
    }
    if find("mpirun").is_none() {
        missing.push("openmpi-bin");
    }
    install(&missing, &work)?;
    let chromium = chromium().context("chromium is installed but not on the PATH")?;
    Ok(Machine { python: python(&work, "test", &PYTHON_PACKAGES)?, chromium })
}

fn chromium() -> Option<PathBuf> {
    ["chromium", "chromium-browser", "google-chrome"].into_iter().find_map(find)
}

fn python_makes_environments() -> bool {
    Command::new("python3").args(["-c", "import venv, ensurepip"]).output().is_ok_and(|o| o.status.success())
}

/// Installs Debian packages; nothing to do where the list is empty.
pub(crate) fn install(packages: &[&str], work: &Path) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    if find("apt-get").is_none() {
        bail!("this machine lacks {list} and has no apt-get; install them and run this again");
    }
    println!("xtask: installing {list}");
    let apt = |arguments: &[&str]| -> Result<Command> {
        let mut command = if output(Command::new("id").arg("-u"))?.trim() == "0" {
            Command::new("apt-get")
        } else if find("sudo").is_some() {
            let mut sudo = Command::new("sudo");
            sudo.args(["--non-interactive", "apt-get"]);
            sudo
        } else {
            bail!("this machine lacks {list}; install them as root and run this again");
        };
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["-y", "-q"]).args(arguments);
        Ok(command)
    };
    logged(&mut apt(&["update"])?, &work.join("apt-update.log"))?;
    let mut arguments = vec!["install", "--no-install-recommends"];
    arguments.extend(packages);
    logged(&mut apt(&arguments)?, &work.join("apt-install.log"))
}

/// A virtual environment called `name` with exactly these packages asked for; made anew when the list changes.
pub(crate) fn python(work: &Path, name: &str, packages: &[&str]) -> Result<PathBuf> {
    let folder = work.join(format!("python-{name}"));
    let python = folder.join("bin/python");
    let stamp = folder.join("packages.txt");
    let wanted = packages.join("\n");
    if python.exists() && fs::read_to_string(&stamp).is_ok_and(|have| have == wanted) {
        return Ok(python);
    }
    let log = work.join(format!("python-{name}.log"));
    println!("xtask: making a Python environment with {}; its log is {}", packages.join(" "), log.display());
    unlink(&folder)?;
    logged(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder), &log)?;
    let mut attempt = 1;
    loop {
        // What pip has fetched whole stays in its cache, so a later attempt goes on from there.
        let pip = ["-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--retries", "5"];
        match followed(Command::new(&python).args(pip).args(["--timeout", "60"]).args(packages), &log) {
            Ok(()) => break,
            Err(error) if attempt < ATTEMPTS => println!("xtask: attempt {attempt} of {ATTEMPTS}: {error:#}"),
            Err(error) => {
                return Err(error).with_context(|| {
                    format!("no Python environment with {} after {ATTEMPTS} attempts", packages.join(" "))
                });
            }
        }
        attempt += 1;
    }
    fs::write(&stamp, wanted)?;
    Ok(python)
}

/// `venv --clear` empties what a link leads to and then refuses the link. The link is ours by its name; what it leads
/// to may be anybody's.
fn unlink(folder: &Path) -> Result<()> {
    match fs::symlink_metadata(folder) {
        Ok(metadata) if !metadata.is_dir() => {
            println!("xtask: {} is no folder of its own; it makes way for one", folder.display());
            fs::remove_file(folder).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An environment that was a link to another one: making it anew emptied the other one and then failed.
    #[cfg(unix)]
    #[test]
    fn a_link_makes_way_and_what_it_leads_to_stays() {
        let base = std::env::temp_dir().join(format!("consort-xtask-link-{}", std::process::id()));
        let (theirs, link) = (base.join("theirs"), base.join("python-x"));
        fs::create_dir_all(&theirs).unwrap();
        fs::write(theirs.join("kept"), "").unwrap();
        std::os::unix::fs::symlink(&theirs, &link).unwrap();
        unlink(&link).unwrap();
        assert!(!link.exists() && theirs.join("kept").exists());
        unlink(&theirs).unwrap();
        unlink(&link).unwrap();
        assert!(theirs.join("kept").exists());
        fs::remove_dir_all(&base).unwrap();
    }
}
