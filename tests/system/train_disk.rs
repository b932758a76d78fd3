//! `consort train` on disks that are really full: a tmpfs of some megabytes. Needs root, to mount it.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;

use crate::train::{Place, STEPS, Training, expected, send};

/// A file system of its own.
struct Disk(tempfile::TempDir);

impl Disk {
    fn new(megabytes: u32) -> Disk {
        let disk = Disk(tempfile::tempdir().unwrap());
        let size = format!("size={megabytes}m");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(disk.path()).output();
        let mounted = mounted.expect("this test mounts a tmpfs: it needs `mount`");
        let said = String::from_utf8_lossy(&mounted.stderr);
        assert!(mounted.status.success(), "this test mounts a tmpfs: it needs root: {said}");
        disk
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn ballast(&self) -> PathBuf {
        self.path().join("ballast")
    }

    /// Fills it but for so many kilobytes.
    fn fill(&self, but: usize) {
        let mut file = fs::File::create(self.ballast()).unwrap();
        let block = [1; 4096];
        let mut written = 0;
        while file.write_all(&block).is_ok() {
            written += block.len() as u64;
        }
        file.set_len(written.saturating_sub(but as u64 * 1024)).unwrap();
    }

    fn free(&self) {
        fs::remove_file(self.ballast()).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily, as a process that a failed test left behind may still use it.
        let _ = Command::new("umount").arg("-l").arg(self.path()).output();
    }
}

/// A job whose checkpoints go to this disk, which is full.
fn place(disk: &Disk) -> Place {
    disk.fill(64);
    let location = disk.path().join("checkpoints").display().to_string();
    Place::with(STEPS, |job| job.replace("every = 5", &format!("every = 25\nlocation = \"{location}\"")))
}

/// The same around two servers.
fn around_servers(disk: &Disk) -> Place {
    let place = place(disk);
    let job = fs::read_to_string(place.job()).unwrap();
    fs::write(place.job(), job.replace("[train]", "[train]\nsync = \"server\"")).unwrap();
    place
}

const HELD: &str = "the last checkpoint, of step 60, can't be written: ";

/// Hears of a job that no checkpoint finds room, and that its weights wait for it.
fn hear_that_they_wait(training: &mut Training) {
    training.hear("step 25 was not written, the job goes on: ");
    let line = training.hear(HELD);
    assert!(line.contains("No space left") && line.contains(" are free there"), "{line}");
}

/// Asks a job whose weights wait to give them up; what it then said.
fn given_up(place: &Place) -> String {
    let mut training = place.train(&["--workers", "2"]);
    training.hear(HELD);
    training.signal(Signal::INT);
    training.hear("giving up the weights that can't be written");
    let ended = training.end();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.errors);
    ended.errors
}

fn ends_with(training: Training, expected: &str) {
    let ended = training.end();
    assert_eq!(ended.weights(), expected, "{}", ended.errors);
}

#[test]
fn weights_wait_until_a_full_disk_has_room() {
    let expected = expected();
    let disk = Disk::new(6);
    let place = place(&disk);
    let mut training = place.train(&["--json", "--workers", "2"]);
    hear_that_they_wait(&mut training);
    disk.free();
    ends_with(training, expected);
}

/// Around servers the launcher has all weights by then, so that nobody else is needed for them.
#[test]
fn weights_around_servers_wait_too_whoever_is_killed_meanwhile() {
    let expected = expected();
    let disk = Disk::new(6);
    let place = around_servers(&disk);
    let mut training = place.train(&["--json", "--workers", "2"]);
    let servers = ["server 0", "server 1"].map(|server| training.process(server));
    hear_that_they_wait(&mut training);
    servers.iter().for_each(|pid| send(*pid, Signal::KILL));
    training.hear(&format!("server 1 (process {}) was killed", servers[1]));
    disk.free();
    ends_with(training, expected);
}

#[test]
fn weights_around_servers_are_given_up_with_a_word() {
    let disk = Disk::new(6);
    let said = given_up(&around_servers(&disk));
    assert!(said.contains("take the missing steps again with: consort train "), "{said}");
}

/// The workers that took the last step are killed, the one among them that kept the weights; with those everything is gone
/// that was behind the newest checkpoint.
#[test]
fn weights_that_are_killed_while_they_wait_are_trained_again() {
    let expected = expected();
    let disk = Disk::new(6);
    let place = place(&disk);
    let mut training = place.train(&["--json", "--workers", "2"]);
    let workers = [training.pid(0), training.pid(1)];
    training.hear(HELD);
    disk.free();
    // One of them has ended.
    for pid in workers {
        let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).output();
    }
    ends_with(training, expected);
}

#[test]
fn weights_that_nobody_makes_room_for_are_given_up_with_a_word() {
    let disk = Disk::new(6);
    let place = place(&disk);
    let said = given_up(&place);
    let job = place.job().display().to_string();
    let cure = format!("take the missing steps again with: consort train {job} --workers 2 --resume");
    assert!(said.contains(&cure), "{said}");
}

#[test]
fn a_model_that_finds_no_room_is_made_of_its_checkpoint_later() {
    let expected = expected();
    let disk = Disk::new(6);
    let checkpoints = tempfile::tempdir().unwrap();
    let location = format!("every = 25\nlocation = \"{}\"", checkpoints.path().join("here").display());
    let out = disk.path().join("out");
    let place = Place::with(STEPS, |job| {
        let line = job.lines().find(|line| line.starts_with("out = ")).unwrap().to_owned();
        job.replace(&line, &format!("out = \"{}\"", out.display())).replace("every = 5", &location)
    });
    let mut training = place.train(&[]);
    training.hear("worker 0 is process ");
    disk.fill(0);
    let ended = training.end();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.errors);
    assert!(
        ended.errors.contains("Nothing is lost: its weights are in the checkpoint of step 60"),
        "{}",
        ended.errors
    );
    disk.free();
    let resumed = place.train(&["--resume", "--json"]).end();
    assert_eq!(resumed.weights(), expected, "{}", resumed.errors);
    assert!(out.join("model.safetensors").exists());
}
