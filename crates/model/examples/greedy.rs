//! Loads a model and continues token ids greedily: the crate's whole face in forty lines.
//!
//! `cargo run --release -p consort-model --example greedy -- MODEL 1,2,3 [TOKENS [THREADS]]`
#![allow(clippy::print_stdout)]

use std::path::Path;
use std::time::Instant;

use consort_model::{Batch, Scratch, arch::Span};
use consort_tensor::kv::{BLOCK_TOKENS, KvCache};
use consort_tensor::{Cpu, Pool, reduce};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, ids, rest @ ..] = arguments.as_slice() else {
        return Err("usage: greedy MODEL 1,2,3 [TOKENS [THREADS]]".into());
    };
    let ids: Vec<u32> = ids.split(',').map(str::parse).collect::<Result<_, _>>()?;
    let wanted: usize = rest.first().map_or(Ok(16), |n| n.parse())?;
    let threads: usize = rest.get(1).map_or(Ok(2), |n| n.parse())?;

    let pool = Pool::new(threads, Cpu::detect());
    let started = Instant::now();
    let opened = consort_model::open(Path::new(path))?;
    let opened_after = started.elapsed();
    let model = opened.load(&pool)?;
    println!(
        "opened in {opened_after:?}, loaded in {:?}, {} bytes packed, hash {}",
        started.elapsed(),
        model.weight_bytes(),
        model.weights_hash()
    );

    let blocks: Vec<u32> = (0..(ids.len() + wanted).div_ceil(BLOCK_TOKENS) as u32).collect();
    let mut cache = KvCache::new(model.kv_shape(), blocks.len())?;
    let (mut scratch, mut logits) = (Scratch::new(), Vec::new());
    let (mut position, mut rows, mut answer) = (0, ids, Vec::new());
    for _ in 0..wanted {
        let started = Instant::now();
        let span = Span { first_row: 0, rows: rows.len(), first_position: position, blocks: &blocks };
        let batch = Batch { tokens: &rows, spans: &[span], logit_rows: &[rows.len() - 1] };
        model.forward(&pool, batch, &mut cache, &mut scratch, &mut logits)?;
        let next = reduce::argmax(pool.cpu(), &logits) as u32;
        if answer.len() < 3 {
            println!(
                "{} rows in {:?}, token {next} with logit {}",
                rows.len(),
                started.elapsed(),
                logits[next as usize]
            );
        }
        position += rows.len();
        rows = vec![next];
        answer.push(next);
    }
    println!("{answer:?}");
    Ok(())
}
