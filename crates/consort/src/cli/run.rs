//! `consort run MODEL [PROMPT]`: chat in the terminal, or answer one prompt for a pipe.
//!
//! Nothing but the answer goes to standard output. With a prompt (an argument or standard input) there is no runtime and
//! no line editor: the process reads the weights, answers and ends.

mod chat;
pub(crate) mod session;

use std::io::{IsTerminal, Read};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;

use self::session::{Limits, Session};
use super::UsageError;
use crate::settings::Compute;
use crate::terminal::{Wrap, flow, line, note, piece};
use crate::{environment, loading};

/// The longest prompt read from standard input; far past any model's context.
const MAX_PROMPT_BYTES: u64 = 64 << 20;

/// Chat in the terminal, or answer one prompt
///
/// Without a prompt, on a terminal, this is a conversation (/help lists what it understands). With one, or with text on
/// standard input, only the answer is printed.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  consort run smollm2-135m-instruct\n  consort run model.gguf \"Name three rivers.\" --temperature 0\n  git diff | consort run smollm2-135m-instruct --system \"Summarise this change in one line.\""
)]
pub(crate) struct Run {
    /// A name from `consort models`, `hf:org/repo[/file]`, a .gguf file or a Hugging Face folder
    model: String,
    /// What to answer [default: standard input, where something is piped in]
    prompt: Option<String>,
    /// How the model should behave
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.7, allow_negative_numbers = true, value_parser = within(0.0, 100.0))]
    temperature: f32,
    /// Keep the smallest set of tokens whose probability reaches this
    #[arg(long, value_name = "P", default_value_t = 0.95, allow_negative_numbers = true, value_parser = within(0.0, 1.0))]
    top_p: f32,
    /// Same model, prompt and seed: the same answer [default: another each time]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = seed)]
    seed: Option<u64>,
    /// Longest answer in tokens [default: what the context leaves]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,
    #[command(flatten)]
    compute: Compute,
    /// Print one JSON object: text, tokens, times, seed and fingerprint
    #[arg(long)]
    json: bool,
}

impl Run {
    pub(crate) fn run(self, started: Instant) -> Result<()> {
        super::log("warn")?;
        let hub = environment::hub()?;
        let model = loading::reference(&hub, &self.model)?;
        let prompt = self.whole_prompt()?;
        let pool = self.compute.pool()?;
        let fetched = loading::fetch(&hub, &model, false, self.json)?;
        let loaded = loading::load(
            &fetched.path,
            pool,
            consort_inference::EngineOptions { max_running: 1, ..Default::default() },
        )?;
        let limits = Limits {
            temperature: self.temperature,
            top_p: self.top_p,
            seed: self.seed,
            max_tokens: self.max_tokens.map(|n| n as usize),
        };
        let mut session = Session::new(loaded, self.system.clone(), limits);
        match prompt {
            Some(prompt) => self.once(&mut session, &prompt, started, &model.short_name()),
            None => chat::chat(&mut session, &model.short_name()),
        }
    }

    /// The argument, else what is piped in; nothing on a terminal without an argument. Beside an argument standard
    /// input is left alone: a parent that never closes its end would hold the answer up for ever.
    fn whole_prompt(&self) -> Result<Option<String>> {
        let mut stdin = std::io::stdin();
        let prompt = match &self.prompt {
            Some(prompt) => prompt.clone(),
            None if stdin.is_terminal() => {
                if self.json {
                    return Err(UsageError(
                        "--json needs a prompt, as an argument or on standard input".into(),
                    )
                    .into());
                }
                return Ok(None);
            }
            None => {
                let mut bytes = Vec::new();
                (&mut stdin)
                    .take(MAX_PROMPT_BYTES + 1)
                    .read_to_end(&mut bytes)
                    .context("can't read standard input")?;
                if bytes.len() as u64 > MAX_PROMPT_BYTES {
                    return Err(UsageError(
                        "standard input holds more than 64 MB; no model takes that much".into(),
                    )
                    .into());
                }
                String::from_utf8(bytes).map_err(|_| UsageError("standard input is not UTF-8 text".into()))?
            }
        };
        let prompt = prompt.trim_end_matches(['\n', '\r']);
        if prompt.is_empty() {
            return Err(UsageError(
                "the prompt is empty: give one as an argument or on standard input".into(),
            )
            .into());
        }
        Ok(Some(prompt.to_string()))
    }

    fn once(&self, session: &mut Session, prompt: &str, started: Instant, name: &str) -> Result<()> {
        let tame = std::io::stdout().is_terminal();
        let mut wrap = Wrap::default();
        let mut show = |text: &str| match (self.json, tame) {
            (true, _) => Ok(()),
            (false, true) => flow(&mut wrap, text),
            (false, false) => piece(text),
        };
        let mut answer = session.ask(prompt)?;
        while let Some(event) = answer.events().blocking_recv() {
            let text = answer.take(event)?;
            show(&text)?;
        }
        let done = answer.finish()?;
        if self.json {
            return Ok(line(done.json(name, started, session))?);
        }
        show("\n")?;
        if let Some(why) = done.cut_short() {
            note(&format!("({why})"));
        }
        Ok(())
    }
}

/// A seed, as the API takes it: negative ones too.
fn seed(text: &str) -> Result<u64, String> {
    let signed = || text.parse::<i64>().map(|n| n as u64);
    text.parse().or_else(|_| signed()).map_err(|_| "write a whole number of up to 64 bits".to_string())
}

/// A number between two others.
fn within(low: f32, high: f32) -> impl Fn(&str) -> Result<f32, String> + Clone {
    move |text| {
        let value: f32 = text.parse().map_err(|_| format!("write a number from {low} to {high}"))?;
        if (low..=high).contains(&value) {
            Ok(value)
        } else {
            Err(format!("write a number from {low} to {high}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_64_bits_signed_or_not() {
        assert_eq!(seed("7"), Ok(7));
        assert_eq!(seed("-1"), Ok(u64::MAX));
        assert_eq!(seed("18446744073709551615"), Ok(u64::MAX));
        for bad in ["", "x", "1.5", "18446744073709551616", "-9223372036854775809"] {
            assert!(seed(bad).is_err(), "{bad}");
        }
    }
}
