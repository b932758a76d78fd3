//! The line that goes on with a job: what was typed, every option of it, with `--resume`.

use super::ranks::Rank;

/// The command of this process's `arguments` (without the program) that goes on with its job.
pub(crate) fn command(arguments: impl IntoIterator<Item = String>, rank: Option<&Rank>) -> String {
    // What srun's or torchrun's own options were, nobody here knows.
    let starter = match rank {
        None => String::new(),
        Some(rank) if rank.starter == "torchrun" => "torchrun … ".to_owned(),
        Some(Rank { starter, world_size, .. }) => format!("{starter} -n {world_size} "),
    };
    let kept = arguments.into_iter().filter(|word| word != "--resume" && word != "--restart");
    let words: Vec<String> = kept.map(|word| quoted(&word)).collect();
    format!("{starter}consort {} --resume", words.join(" "))
}

/// As a shell takes it.
pub(crate) fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:=,@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    match text.contains(['"', '$', '`', '\\', '!']) {
        false => format!("\"{text}\""),
        true => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn again(typed: &str, rank: Option<&Rank>) -> String {
        command(typed.split(' ').map(str::to_owned), rank)
    }

    #[test]
    fn nothing_that_was_typed_is_lost() {
        let typed = "train job.toml --restart --workers 3 --threads=2 --metrics 127.0.0.1:9464 --json";
        let expected = "train job.toml --workers 3 --threads=2 --metrics 127.0.0.1:9464 --json --resume";
        assert_eq!(again(typed, None), format!("consort {expected}"));
        assert_eq!(again("train --resume job.toml", None), "consort train job.toml --resume");
        let words = ["train", "my job.toml"].map(str::to_owned);
        assert_eq!(command(words, None), "consort train \"my job.toml\" --resume");
    }

    #[test]
    fn a_clusters_starter_is_part_of_it() {
        let rank =
            |starter| Rank { rank: 0, world_size: 4, local_world_size: None, starter, run: "7".into() };
        let line = |starter| again("train job.toml", Some(&rank(starter)));
        assert_eq!(line("srun"), "srun -n 4 consort train job.toml --resume");
        assert_eq!(line("mpirun"), "mpirun -n 4 consort train job.toml --resume");
        assert_eq!(line("torchrun"), "torchrun … consort train job.toml --resume");
    }

    #[test]
    fn commands_can_be_pasted() {
        assert_eq!(quoted("out/tiny-1.2"), "out/tiny-1.2");
        assert_eq!(quoted("Once upon a time"), "\"Once upon a time\"");
        assert_eq!(quoted("it's $5"), "'it'\\''s $5'");
        assert_eq!(quoted(""), "\"\"");
    }
}
