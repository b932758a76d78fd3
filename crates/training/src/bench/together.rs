//! Steps of workers that add their gradients, as a job takes them.

use std::time::Duration;

use consort_collectives::{JoinOptions, Store, StoreOptions, TransportKind};

use super::Load;
use crate::checkpoint::CheckpointConfig;
use crate::parallel::{Control, Event, Membership, StepEvent, Worker};
use crate::{Error, parallel};

/// Who takes the steps.
#[derive(Clone, Debug)]
pub struct Setting {
    /// Workers. Each is a thread of this process; they share nothing but the transport.
    pub workers: usize,
    /// Computing threads of each.
    pub threads: usize,
    /// What gradients travel over; `None` takes shared memory.
    pub transport: Option<TransportKind>,
    /// What lets workers meet; somebody else on this machine who knows it could join them.
    pub token: Vec<u8>,
    /// A folder for a checkpoint every second step.
    pub checkpoints: Option<String>,
}

/// Takes `steps` steps, and one before that is no measure; returns them as the first worker saw them. `watch` hears of
/// each as it is taken.
///
/// # Errors
/// Those of [`Worker::run`]; the first worker's that has one.
pub fn together(
    load: &Load,
    setting: &Setting,
    steps: u64,
    watch: &(dyn Fn() + Sync),
) -> Result<Vec<StepEvent>, Error> {
    let store = Store::listen("127.0.0.1:0", &setting.token, StoreOptions::new(setting.workers))?;
    let address = store.address().to_string();
    let plan = parallel::Plan {
        checkpoint_every: setting.checkpoints.is_some().then_some(2),
        ..load.job.plan(steps + 1)
    };
    let work = || {
        let join = JoinOptions {
            transport: setting.transport,
            deadline: load.job.train.deadline,
            ..JoinOptions::new(address.clone(), &setting.token)
        };
        let place = setting.checkpoints.as_ref().map(|location| CheckpointConfig {
            location: location.clone(),
            options: Vec::new(),
            keep: 1,
            worker: 0,
            workers: 1,
            patience: Duration::from_secs(30),
            files: Default::default(),
        });
        let (trainer, numbers) = (load.trainer(setting.threads)?, load.numbers());
        let worker = Worker::new(trainer, &numbers, plan.clone(), Membership::Group(join), place)?;
        let (mut first, mut taken) = (false, Vec::new());
        worker.run(&mut |event| {
            match event {
                Event::Started { rank, .. } => first = *rank == 0,
                Event::Step(step) if first && step.step > 0 => {
                    taken.push(step.clone());
                    watch();
                }
                _ => {}
            }
            Control::Go
        })?;
        Ok(taken)
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..setting.workers).map(|_| scope.spawn(work)).collect();
        let mut taken = Vec::new();
        for worker in workers {
            let own: Vec<StepEvent> = worker
                .join()
                .map_err(|_| Error::Disagreement("a worker of the benchmark panicked".into()))
                .and_then(|ended| ended)?;
            taken.extend(own);
        }
        Ok(taken)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_take_every_step_together() {
        let mut load = Load::named("tiny").unwrap();
        load.job.train.micro_batch = 2;
        let setting = Setting {
            workers: 2,
            threads: 1,
            transport: None,
            token: b"a token of a test, long enough".to_vec(),
            checkpoints: None,
        };
        let steps = together(&load, &setting, 3, &|| ()).unwrap();
        let seen: Vec<_> = steps.iter().map(|step| (step.step, step.workers, step.rows)).collect();
        assert_eq!(seen, [(1, 2, 512), (2, 2, 512), (3, 2, 512)]);
        assert!(steps.iter().all(|step| step.took_us >= step.computed_us && step.computed_us > 0));
    }
}
