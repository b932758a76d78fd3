//! The conversation in a terminal: line editing, commands, Ctrl-C for the answer and Ctrl-D for the program.

use anyhow::{Context, Result};
use rustyline::error::ReadlineError;
use rustyline::history::MemHistory;
use rustyline::{Config, Editor};

use super::session::Session;
use crate::terminal::{Silent, Style, Wrap, flow, line, note, said};

const HELP: &str = "\
/help           this list
/reset          forget the conversation
/system [TEXT]  set how the model should behave (without text: nothing set) and start over
/stats          figures after each answer, on or off
/quit           end (also Ctrl-D)
Ctrl-C stops an answer. \"\"\" opens and closes a message of several lines.";

/// Talks until the user leaves.
pub(super) fn chat(session: &mut Session, name: &str) -> Result<()> {
    // Ctrl-C must reach the answer, not end the process: the runtime is there to wait for both.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("can't start the runtime that watches for Ctrl-C")?;
    let config = Config::builder().auto_add_history(false).build();
    let mut editor: Editor<(), MemHistory> =
        Editor::with_history(config, MemHistory::new()).context("can't read from this terminal")?;
    let style = Style::stdout();
    line(format_args!("{}  {}", style.bold(name), style.dim("/help lists commands, Ctrl-D ends")))?;
    if session.loaded.template.is_none() {
        note("this model has no chat template: it continues your text instead of answering it");
    }
    let mut stats = false;
    loop {
        let Some(text) = read(&mut editor)? else { return Ok(()) };
        let text = text.trim();
        if text.is_empty() {
            continue;
        }
        // A history entry that can't be kept is no reason to stop talking.
        let _ = editor.add_history_entry(text);
        if let Some(command) = text.strip_prefix('/') {
            let (word, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
            match (word, rest.trim()) {
                ("quit" | "exit" | "bye", _) => return Ok(()),
                ("help" | "?", _) => line(HELP)?,
                ("reset" | "clear", _) => {
                    session.reset();
                    line(style.dim("a new conversation"))?;
                }
                ("system", text) => {
                    session.set_system((!text.is_empty()).then(|| text.to_string()));
                    line(style.dim("a new conversation"))?;
                }
                ("stats", _) => {
                    stats = !stats;
                    line(style.dim(if stats { "figures on" } else { "figures off" }))?;
                }
                _ => line(format_args!("/{word} is no command; /help lists them"))?,
            }
            continue;
        }
        if let Err(error) = answer(&runtime, session, text, stats, style) {
            if crate::terminal::is_closed_output(&error) {
                return Err(error);
            }
            note(&format!("error: {}", said(&error)));
        }
    }
}

/// A line, or several between `"""`; nothing at Ctrl-D.
fn read(editor: &mut Editor<(), MemHistory>) -> Result<Option<String>> {
    const FENCE: &str = "\"\"\"";
    let mut lines: Option<Vec<String>> = None;
    loop {
        let prompt = if lines.is_some() { "  " } else { "> " };
        let text = match editor.readline(prompt) {
            Ok(text) => text,
            Err(ReadlineError::Interrupted) => {
                if lines.take().is_none() {
                    note("(Ctrl-D or /quit ends)");
                }
                continue;
            }
            Err(ReadlineError::Eof) => {
                // Where it can edit lines, the editor has ended this one.
                if !crate::environment::line_editing() {
                    line("")?;
                }
                return Ok(None);
            }
            Err(error) => return Err(error).context("can't read from this terminal"),
        };
        match &mut lines {
            None => match text.trim_start().strip_prefix(FENCE) {
                Some(rest) => match rest.strip_suffix(FENCE) {
                    Some(whole) => return Ok(Some(whole.to_string())),
                    None => lines = Some(vec![rest.to_string()]),
                },
                None => return Ok(Some(text)),
            },
            Some(collected) => match text.trim_end().strip_suffix(FENCE) {
                Some(rest) => {
                    collected.push(rest.to_string());
                    return Ok(Some(collected.join("\n")));
                }
                None => collected.push(text),
            },
        }
    }
}

/// Streams one answer; Ctrl-C drops it, which frees its place in the engine.
fn answer(
    runtime: &tokio::runtime::Runtime,
    session: &mut Session,
    text: &str,
    stats: bool,
    style: Style,
) -> Result<()> {
    let _silent = Silent::begin();
    let mut answer = session.ask(text)?;
    let mut wrap = Wrap::default();
    let stopped = runtime.block_on(async {
        let interrupted = tokio::signal::ctrl_c();
        tokio::pin!(interrupted);
        loop {
            tokio::select! {
                biased;
                _ = &mut interrupted => return Ok::<_, anyhow::Error>(true),
                event = answer.events().recv() => match event {
                    Some(event) => flow(&mut wrap, &answer.take(event)?)?,
                    None => return Ok(false),
                },
            }
        }
    })?;
    let done = answer.finish()?;
    line("")?;
    if stopped {
        line(style.dim("(stopped)"))?;
    } else if let Some(why) = done.cut_short() {
        line(style.dim(&format!("({why})")))?;
    }
    if stats {
        line(style.dim(&done.figures()))?;
    }
    line("")?;
    Ok(())
}
