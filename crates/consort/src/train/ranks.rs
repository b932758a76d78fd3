//! What a cluster's starter says of this process: which of how many, and where the others are.
//!
//! Slurm's `srun`, Open MPI's `mpirun` and PyTorch's `torchrun` each start one process a task and tell it its number in the
//! environment. All that is needed is the number, how many there are, and a name for this run; where the first process
//! listens is told through a file in the job's folder, which all of them see, or named by `MASTER_ADDR` and
//! `MASTER_PORT`.

use crate::cli::UsageError;

/// This process among those that a starter started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rank {
    /// Its number, from 0.
    pub(crate) rank: usize,
    /// How many there are.
    pub(crate) world_size: usize,
    /// How many of them are on this machine, where the starter says so.
    pub(crate) local_world_size: Option<usize>,
    /// Who started them.
    pub(crate) starter: &'static str,
    /// What tells this run from others.
    pub(crate) run: String,
}

/// Variables that make a process one of several.
pub(crate) const VARIABLES: [&str; 3] = ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_RANK", "RANK"];

/// Reads it from variables; `None` where nobody started this process as one of several.
///
/// # Errors
/// Which variable makes no sense.
pub(crate) fn rank(get: impl Fn(&str) -> Option<String>) -> Result<Option<Rank>, UsageError> {
    let starters = [
        // The ids of srun's step: a batch script itself has SLURM_PROCID too, but no step of its own.
        (
            "srun",
            "SLURM_PROCID",
            "SLURM_STEP_NUM_TASKS",
            "SLURM_STEP_TASKS_PER_NODE",
            &["SLURM_JOB_ID", "SLURM_STEP_ID"][..],
        ),
        (
            "mpirun",
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
            &["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"][..],
        ),
        (
            "torchrun",
            "RANK",
            "WORLD_SIZE",
            "LOCAL_WORLD_SIZE",
            &["TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"][..],
        ),
    ];
    for (starter, rank, size, local, run) in starters {
        let number = |name: &str| match get(name) {
            None => Ok(None),
            Some(text) => text.trim().parse::<usize>().map(Some).map_err(|_| {
                UsageError(format!("{name} is {text:?}, which is no number; {starter} sets it"))
            }),
        };
        let (Some(rank), Some(world_size)) = (number(rank)?, number(size)?) else { continue };
        if rank >= world_size || world_size > 4096 {
            return Err(UsageError(format!(
                "{starter} says that this is process {rank} of {world_size}: numbers go from 0 to 4095, below their count"
            )));
        }
        // Slurm writes `2(x3),1`; only a plain number is of use, and it is only for dividing threads.
        let local_world_size = get(local).and_then(|text| text.trim().parse().ok());
        let parts: Vec<String> = run.iter().filter_map(|name| get(name)).collect();
        let run = if parts.is_empty() { starter.to_owned() } else { parts.join("-") };
        let tame = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
        let run = run.chars().map(tame).take(80).collect();
        return Ok(Some(Rank { rank, world_size, local_world_size, starter, run }));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Rank>, UsageError> {
        rank(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn each_starter_is_understood() {
        let slurm = [
            ("SLURM_PROCID", "3"),
            ("SLURM_STEP_NUM_TASKS", "4"),
            ("SLURM_JOB_ID", "77"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_STEP_TASKS_PER_NODE", "2(x2)"),
        ];
        let found = read(&slurm).unwrap().unwrap();
        assert_eq!((found.rank, found.world_size, found.local_world_size), (3, 4, None));
        assert_eq!((found.starter, found.run.as_str()), ("srun", "77-0"));
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "0"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("PMIX_NAMESPACE", "prterun-host-1@1"),
        ];
        let found = read(&mpi).unwrap().unwrap();
        assert_eq!((found.local_world_size, found.run.as_str()), (Some(2), "prterun-host-1_1"));
        let torch =
            [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "29500")];
        assert_eq!(read(&torch).unwrap().unwrap().run, "10_0_0_1-29500");
    }

    #[test]
    fn a_process_of_nobody_has_no_rank_and_nonsense_is_named() {
        assert_eq!(read(&[]).unwrap(), None);
        // A batch script of Slurm's that isn't started by srun.
        assert_eq!(read(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")]).unwrap(), None);
        for wrong in [[("RANK", "x"), ("WORLD_SIZE", "2")], [("RANK", "2"), ("WORLD_SIZE", "2")]] {
            assert!(read(&wrong).unwrap_err().to_string().contains("torchrun"));
        }
    }
}
