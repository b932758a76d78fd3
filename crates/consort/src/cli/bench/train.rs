//! `consort bench train`: how fast this machine takes training steps, and how near that is to what it can do.
//!
//! The peak beside each line is measured in the same run ([`consort_tensor::limits`]): how many multiply-adds all threads
//! finish from registers. What a step is: [`consort_training::bench`].

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use consort_tensor::{Cpu, Pool, limits};
use consort_training::Precision;
use consort_training::bench::{Bare, Load, Setting, together};
use consort_training::data;
use consort_training::job::{Machine, ModelSource, in_count, plan};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::plot::{self, Chart};
use crate::cli::UsageError;
use crate::terminal::{line, note, table};
use crate::{environment, loading, train};

/// Steps before those that are timed.
const WARM_UP: u64 = 2;

/// A training step on this machine: tokens a second, and how much of the machine that is
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  consort bench train\n  consort bench train --shape smollm2 --precision bf16\n  consort bench train --job examples/train/tiny.toml\n  consort bench train --workers 1,2 --plot train.svg"
)]
pub(crate) struct TrainBench {
    /// tiny, small (6 layers, 384 wide) or smollm2 (SmolLM2-135M's shape)
    #[arg(long, value_name = "NAME", default_value = "small", value_parser = Load::names(), conflicts_with = "job")]
    shape: String,
    /// A job's file, for its model's shape, its batch and how it trains; its data isn't read
    #[arg(long, value_name = "FILE")]
    job: Option<PathBuf>,
    /// What products round their inputs to [default: f32,bf16, or what the job says]
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = precision)]
    precision: Vec<Precision>,
    /// Samples of a step
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    batch: Option<u32>,
    /// Samples that are computed at once; divides the batch
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    micro_batch: Option<u32>,
    /// Tokens of a sample
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=1 << 20))]
    context: Option<u32>,
    /// Compute threads of all workers together [default: one a core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: Option<u16>,
    /// Take the steps as a job does, on so many workers that add their gradients
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: Vec<u16>,
    /// Steps that are timed for each line
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    steps: u32,
    /// Draw it, as an SVG picture
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn precision(name: &str) -> Result<Precision, String> {
    match name {
        "f32" => Ok(Precision::F32),
        "bf16" => Ok(Precision::Bf16),
        _ => Err("write f32 or bf16".into()),
    }
}

fn name(precision: Precision) -> &'static str {
    match precision {
        Precision::F32 => "f32",
        Precision::Bf16 => "bf16",
    }
}

#[derive(Serialize)]
struct Report {
    shape: String,
    parameters: u64,
    layers: usize,
    hidden: usize,
    vocabulary: usize,
    batch: usize,
    micro_batch: usize,
    context: usize,
    tokens_per_step: u64,
    threads: usize,
    kernels: &'static str,
    steps: u32,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    precision: &'static str,
    /// Workers that add their gradients; none for the bare step of one process.
    #[serde(skip_serializing_if = "Option::is_none")]
    workers: Option<u16>,
    threads_per_worker: usize,
    step_ms: Spread,
    tokens_per_second: f64,
    gflops: f64,
    peak_gflops: f64,
    share_of_peak: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Spread {
    median: f64,
    lowest: f64,
    highest: f64,
}

impl Spread {
    /// Of at least one value.
    fn of(mut values: Vec<f64>) -> Option<Spread> {
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            0 => (values.get(middle.checked_sub(1)?)? + values.get(middle)?) / 2.0,
            _ => *values.get(middle)?,
        };
        Some(Spread { median, lowest: *values.first()?, highest: *values.last()? })
    }
}

impl TrainBench {
    pub(crate) fn run(self) -> Result<()> {
        plot::check(self.plot.as_deref())?;
        let load = self.load()?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = load.job.threads.unwrap_or(cores);
        let pool = Pool::new(threads, Cpu::detect());
        let precisions = match (self.precision.is_empty(), &self.job) {
            (false, _) => self.precision.clone(),
            (true, Some(_)) => vec![load.job.train.precision],
            (true, None) => vec![Precision::F32, Precision::Bf16],
        };
        let parameters = self.fits(&load, threads)?;
        let mut report = Report {
            shape: self.job.as_ref().map_or_else(|| self.shape.clone(), |job| job.display().to_string()),
            parameters,
            layers: load.model.layers,
            hidden: load.model.hidden,
            vocabulary: load.model.vocab,
            batch: load.job.train.batch,
            micro_batch: load.job.train.micro_batch,
            context: load.job.data.context,
            tokens_per_step: load.tokens(),
            threads,
            kernels: pool.cpu().family().name(),
            steps: self.steps,
            rows: Vec::new(),
        };
        if !self.json {
            note(&report.about());
        }
        let lines = precisions.len() * self.workers.len().max(1);
        let progress = self.progress(lines as u64 * u64::from(self.steps));
        for precision in precisions {
            let load = Load { job: precise(&load, precision), ..load.clone() };
            self.measure(&load, &pool, &progress, &mut report.rows)?;
        }
        progress.finish_and_clear();
        if self.json {
            line(serde_json::to_string_pretty(&report)?)?;
        } else {
            report.print()?;
        }
        self.plot.as_ref().map_or(Ok(()), |file| report.chart().write(file))
    }

    /// The job with what the command line says of it.
    fn load(&self) -> Result<Load> {
        let mut load = match &self.job {
            None => Load::named(&self.shape).ok_or_else(|| UsageError("no such shape".into()))?,
            Some(path) => of_job(path)?,
        };
        let train = &mut load.job.train;
        let most = self.workers.iter().copied().max().unwrap_or(1).into();
        train.batch = self.batch.map_or(train.batch, |n| n as usize);
        let share = train.batch / most;
        train.micro_batch = match self.micro_batch {
            Some(n) => n as usize,
            None if self.job.is_none() => divisor(train.batch, share),
            // A step of other micro-batches is another step: the job's own stay where they can.
            None if self.batch.is_none() => train.micro_batch,
            None => divisor(train.batch, share.min(train.micro_batch)),
        };
        let (batch, micro) = (train.batch, train.micro_batch);
        if !batch.is_multiple_of(micro) {
            let (whole, left) = (batch / micro, batch % micro);
            let what = format!(
                "{batch} samples can't be cut into micro-batches of {micro}: {batch} = {whole} × {micro} + {left}"
            );
            return Err(UsageError(what).into());
        }
        if let Some(context) = self.context {
            load.job.data.context = context as usize;
            if self.job.is_none() {
                load.model.max_context = load.model.max_context.max(context as usize);
            }
        }
        if let Some(threads) = self.threads {
            load.job.threads = Some(threads.into());
        }
        load.job.workers = most;
        Ok(load)
    }

    /// Refuses what the machine has no memory for; the model's parameters.
    fn fits(&self, load: &Load, threads: usize) -> Result<u64> {
        let memory = consort_inference::machine_memory().map(|bytes| bytes as u64);
        let machine = Machine { memory, cores: threads, workers: load.job.workers };
        let report = data::Report { samples: 1 << 20, predicted: load.tokens(), ..data::Report::default() };
        let plan = plan(&load.job, &load.model, &report, machine)
            .map_err(|refusal| UsageError(refusal.to_string()))?;
        Ok(plan.parameters)
    }

    /// A bar over all steps, on a terminal.
    fn progress(&self, steps: u64) -> ProgressBar {
        if self.json {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{wide_bar:.cyan/dim}  {pos}/{len} steps  {msg}") {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar
    }

    fn measure(&self, load: &Load, pool: &Pool, progress: &ProgressBar, rows: &mut Vec<Row>) -> Result<()> {
        let precision = load.job.train.precision;
        progress.set_message(name(precision));
        let first = rows.len();
        let before = limits::peak(pool, precision);
        let (tokens, operations) = (load.tokens() as f64, load.operations()? as f64);
        let mut push = |workers: Option<u16>, threads_per_worker: usize, times: Vec<f64>| {
            let Some(step_ms) = Spread::of(times) else { return };
            let seconds = step_ms.median / 1e3;
            rows.push(Row {
                precision: name(precision),
                workers,
                threads_per_worker,
                step_ms,
                tokens_per_second: tokens / seconds,
                gflops: operations / seconds / 1e9,
                peak_gflops: 0.0,
                share_of_peak: 0.0,
            });
        };
        if self.workers.is_empty() {
            let mut bench = Bare::new(load, pool.threads())?;
            for _ in 0..WARM_UP {
                bench.step()?;
            }
            let mut times = Vec::new();
            for _ in 0..self.steps {
                times.push(bench.step()?.as_secs_f64() * 1e3);
                progress.inc(1);
            }
            push(None, pool.threads(), times);
        }
        for workers in &self.workers {
            let threads = (pool.threads() / usize::from(*workers)).max(1);
            let setting = Setting {
                workers: (*workers).into(),
                threads,
                transport: None,
                token: train::secret()?.into_bytes(),
                checkpoints: None,
            };
            let steps = together(load, &setting, self.steps.into(), &|| progress.inc(1))?;
            push(Some(*workers), threads, steps.iter().map(|step| step.took_us as f64 / 1e3).collect());
        }
        // Clocks move; the better of both ends is nearer to what the machine could have done in between.
        let peak = before.max(limits::peak(pool, precision)) / 1e9;
        for row in &mut rows[first..] {
            (row.peak_gflops, row.share_of_peak) = (peak, row.gflops / peak);
        }
        Ok(())
    }
}

fn precise(load: &Load, precision: Precision) -> consort_training::job::Job {
    let mut job = load.job.clone();
    job.train.precision = precision;
    job
}

/// The largest divisor of `n` up to `most`, at least 1.
fn divisor(n: usize, most: usize) -> usize {
    (1..=most.clamp(1, n)).rev().find(|d| n.is_multiple_of(*d)).unwrap_or(1)
}

/// A job's file as a load: its model is opened for its shape alone.
fn of_job(path: &Path) -> Result<Load> {
    let job = train::read(path)?.job;
    let model = match &job.model {
        ModelSource::New(shape) => shape.config(shape.vocabulary),
        ModelSource::From(name) => {
            let hub = environment::hub()?;
            let reference = loading::reference(&hub, name)?;
            let file = loading::fetch(&hub, &reference, false, false)?.path;
            consort_model::open(&file)?.config().clone()
        }
    };
    Ok(Load { job, model })
}

impl Report {
    /// What is measured, for a person.
    fn about(&self) -> String {
        let Report {
            shape,
            layers,
            hidden,
            vocabulary,
            batch,
            micro_batch,
            context,
            threads,
            kernels,
            steps,
            ..
        } = self;
        let parameters = in_count(self.parameters);
        let micro =
            if micro_batch == batch { String::new() } else { format!(" in micro-batches of {micro_batch}") };
        format!(
            "{shape}: {layers} layers, {hidden} wide, {vocabulary} tokens, {parameters} parameters; {batch} × {context} tokens \
             a step{micro}; {threads} threads, {kernels} kernels; medians of {steps} steps"
        )
    }

    /// Tokens a second of each row, beside what they would be at the peak.
    fn chart(&self) -> Chart {
        let place = |row: &Row| match row.workers {
            None => row.precision.to_owned(),
            Some(1) => format!("{}, 1 worker", row.precision),
            Some(workers) => format!("{}, {workers} workers", row.precision),
        };
        let of = |figure: fn(&Row) -> f64| self.rows.iter().map(figure).collect();
        Chart {
            title: format!("{}: tokens a second, {} threads", self.shape, self.threads),
            places: self.rows.iter().map(place).collect(),
            series: vec![
                ("measured".into(), of(|row| row.tokens_per_second)),
                ("at this machine's peak".into(), of(|row| row.tokens_per_second / row.share_of_peak)),
            ],
            bars: true,
        }
    }

    fn print(&self) -> Result<()> {
        let heading = [
            "precision",
            "workers",
            "threads",
            "ms a step",
            "lowest–highest",
            "tok/s",
            "Gflop/s",
            "of the peak",
        ];
        let mut rows = vec![heading.map(str::to_owned)];
        for row in &self.rows {
            let Spread { median, lowest, highest } = row.step_ms;
            rows.push([
                row.precision.to_owned(),
                row.workers.map_or("–".to_owned(), |workers| workers.to_string()),
                row.threads_per_worker.to_string(),
                format!("{median:.1}"),
                format!("{lowest:.1}–{highest:.1}"),
                format!("{:.0}", row.tokens_per_second),
                format!("{:.1}", row.gflops),
                format!("{:.0} % of {:.0}", 100.0 * row.share_of_peak, row.peak_gflops),
            ]);
        }
        table(&rows).into_iter().try_for_each(line)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_has_its_middle() {
        let spread = |values: &[f64]| Spread::of(values.to_vec()).map(|s| (s.median, s.lowest, s.highest));
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some((2.0, 1.0, 3.0)));
        assert_eq!(spread(&[4.0, 1.0]), Some((2.5, 1.0, 4.0)));
        assert_eq!((spread(&[7.0]), spread(&[])), (Some((7.0, 7.0, 7.0)), None));
    }

    #[test]
    fn micro_batches_divide() {
        assert_eq!(
            [divisor(8, 8), divisor(8, 3), divisor(7, 4), divisor(8, 0), divisor(6, 100)],
            [8, 2, 1, 1, 6]
        );
    }
}
