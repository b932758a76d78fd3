use std::collections::BTreeMap;
use std::fs;

use serde_json::json;

use super::*;

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A folder with a vocabulary, learned from words.
struct Setting {
    folder: tempfile::TempDir,
    tokenizer: Tokenizer,
}

impl Setting {
    fn new() -> Setting {
        let folder = tempfile::tempdir().unwrap();
        let words = folder.path().join("words.txt");
        fs::write(&words, "a question and its answer, said by the assistant to the user. ".repeat(40))
            .unwrap();
        let out = folder.path().join("vocabulary");
        train_vocabulary(
            &VocabularyConfig { paths: vec![words], size: 320, bad_lines: BadLines::Fatal },
            &out,
        )
        .unwrap();
        Setting { tokenizer: Tokenizer::from_folder(&out).unwrap(), folder }
    }

    fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    fn config(&self, paths: &[PathBuf], context: usize) -> DataConfig {
        DataConfig {
            paths: paths.to_vec(),
            text: TextDocuments::Line,
            bad_lines: BadLines::Fatal,
            context,
            cache: self.folder.path().join("cache"),
        }
    }

    fn open(&self, config: &DataConfig, threads: usize) -> Result<Dataset, DataError> {
        let template = ChatTemplate::new(TEMPLATE).unwrap();
        let reading =
            Reading { tokenizer: &self.tokenizer, template: Some(&template), tokenizer_hash: "words" };
        Dataset::open(config, &reading, threads, &mut |_| ())
    }
}

fn batch(data: &Dataset, index: u64) -> MicroBatch {
    let mut batch = MicroBatch::new();
    data.push(index, &mut batch);
    batch
}

/// What is predicted of all samples, as text, with how often.
fn predicted(setting: &Setting, data: &Dataset) -> BTreeMap<String, usize> {
    let mut texts = BTreeMap::new();
    for index in 0..data.samples() {
        let batch = batch(data, index);
        let (rows, weight) = data.rows(index);
        assert_eq!((rows, weight), (batch.rows(), batch.weights.iter().filter(|&&w| w == 1.0).count()));
        let ends = batch.starts.iter().skip(1).copied().chain([rows]);
        for (&start, end) in batch.starts.iter().zip(ends) {
            let ids: Vec<u32> =
                (start..end).filter(|&i| batch.weights[i] == 1.0).map(|i| batch.targets[i]).collect();
            let texts_of = ids.iter().map(|&id| setting.tokenizer.token_text(id).unwrap().replace('Ġ', " "));
            *texts.entry(texts_of.collect()).or_default() += 1;
        }
    }
    texts
}

#[test]
fn every_token_of_a_text_is_predicted_once_an_epoch() {
    let setting = Setting::new();
    let lines: Vec<String> =
        (0..300).map(|i| format!("line {i} is {}.", "a long question ".repeat(i % 17))).collect();
    let path = setting.file("lines.txt", &lines.join("\n"));
    let data = setting.open(&setting.config(&[path], 32), 1).unwrap();
    let report = data.report().clone();
    let rows: usize = (0..data.samples()).map(|i| data.rows(i).0).sum();
    assert_eq!((report.files, report.documents), (1, 300));
    assert_eq!(rows as u64, report.tokens - report.documents);
    assert_eq!(report.predicted, rows as u64);
    assert_eq!(report.samples, data.samples());
    assert!((0..data.samples()).all(|i| data.rows(i).0 <= 32));
    // Pieces of one document overlap in one token, so the targets of all pieces are the lines without their first.
    let mut targets: Vec<u32> = (0..data.samples()).flat_map(|i| batch(&data, i).targets).collect();
    let end = setting.tokenizer.token_id("<|endoftext|>").unwrap();
    let mut expected: Vec<u32> = lines
        .iter()
        .flat_map(|line| {
            setting
                .tokenizer
                .encode(line, consort_model::tokenizer::Specials::AsText)
                .into_iter()
                .skip(1)
                .chain([end])
        })
        .collect();
    targets.sort_unstable();
    expected.sort_unstable();
    assert_eq!(targets, expected);
}

#[test]
fn of_a_conversation_only_the_assistant_is_learned() {
    let setting = Setting::new();
    let line = json!({"messages": [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one <|im_end|>"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "second answer"},
    ]});
    let path = setting.file("chat.jsonl", &line.to_string());
    let data = setting.open(&setting.config(&[path], 256), 1).unwrap();
    let expected = "first answer<|im_end|>second answer<|im_end|>".to_owned();
    assert_eq!(predicted(&setting, &data), BTreeMap::from([(expected, 1)]));
    assert_eq!(data.report().documents, 1);
}

#[test]
fn a_template_that_rewrites_turns_gives_a_document_a_turn() {
    let setting = Setting::new();
    // Thoughts stay in the last turn only.
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}\
                    [{{ m.thought }}]{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}\
                    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let template = ChatTemplate::new(template).unwrap();
    let reading =
        Reading { tokenizer: &setting.tokenizer, template: Some(&template), tokenizer_hash: "words" };
    let turn =
        |thought: &str, content: &str| json!({"role": "assistant", "thought": thought, "content": content});
    let user = json!({"role": "user", "content": "q"});
    let line = json!({"messages": [user, turn("t1", "a1"), user, turn("t2", "a2")]});
    let path = setting.file("chat.jsonl", &line.to_string());
    let data = Dataset::open(&setting.config(&[path], 256), &reading, 1, &mut |_| ()).unwrap();
    let expected = ["[t1]a1<|im_end|>", "[t2]a2<|im_end|>"].map(|text| (text.to_owned(), 1));
    assert_eq!(predicted(&setting, &data), BTreeMap::from(expected));
}

#[test]
fn long_conversations_are_cut_and_those_without_an_answer_left_are_counted() {
    let setting = Setting::new();
    let chat = |question: &str| {
        json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "an answer, said to the user"}]})
            .to_string()
    };
    let path = setting.file("chat.jsonl", &[chat("q"), chat(&"q ".repeat(200))].join("\n"));
    let data = setting.open(&setting.config(&[path], 16), 1).unwrap();
    let report = data.report();
    assert_eq!((report.documents, report.empty, report.cut), (1, 1, 2));
    assert_eq!(data.rows(0).0, 16);
}

#[test]
fn threads_change_nothing_and_a_second_run_reads_the_cache() {
    let setting = Setting::new();
    let lines: String = (0..3000).map(|i| format!("line {i} of {}\n", i * i)).collect();
    let path = setting.file("lines.txt", &lines);
    let config = setting.config(&[path], 64);
    let one = setting.open(&config, 1).unwrap();
    let batches: Vec<_> = (0..one.samples()).map(|i| batch(&one, i)).collect();
    fs::remove_dir_all(&config.cache).unwrap();
    let mut heard = Vec::new();
    let template = ChatTemplate::new(TEMPLATE).unwrap();
    let reading =
        Reading { tokenizer: &setting.tokenizer, template: Some(&template), tokenizer_hash: "words" };
    let three = Dataset::open(&config, &reading, 3, &mut |p| heard.push(p)).unwrap();
    assert_eq!(one.id(), three.id());
    assert!((0..one.samples()).map(|i| batch(&three, i)).eq(batches));
    assert!(heard.last().is_some_and(|p| p.bytes == p.total && p.tokens == three.report().tokens));
    heard.clear();
    let again = Dataset::open(&config, &reading, 3, &mut |p| heard.push(p)).unwrap();
    assert_eq!(again.report(), three.report());
    assert!(heard.is_empty(), "nothing is tokenized twice");
    let names: Vec<_> = fs::read_dir(&config.cache).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, [one.id()], "nothing else is left in the folder");
}

#[test]
fn what_decides_the_samples_names_the_cache() {
    let setting = Setting::new();
    let path = setting.file("lines.txt", "one line\nand a line\n");
    let config = setting.config(std::slice::from_ref(&path), 64);
    let id = |config: &DataConfig| setting.open(config, 1).unwrap().id().to_owned();
    let first = id(&config);
    assert_eq!(first, id(&config));
    let mut ids = vec![first];
    ids.push(id(&DataConfig { context: 65, ..config.clone() }));
    ids.push(id(&DataConfig { text: TextDocuments::File, ..config.clone() }));
    fs::write(&path, "one line\nand a lime\n").unwrap();
    ids.push(id(&config));
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 4);
}

#[test]
fn bad_lines_end_it_by_name_or_are_counted() {
    let setting = Setting::new();
    let lines: Vec<String> = (0..60)
        .map(|i| if i % 2 == 0 { json!({"text": format!("line {i}")}).to_string() } else { "oops".into() })
        .collect();
    let path = setting.file("lines.jsonl", &lines.join("\n"));
    let mut config = setting.config(&[path], 64);
    let fatal = setting.open(&config, 2).unwrap_err().to_string();
    assert!(fatal.contains("lines.jsonl:2: not JSON") && fatal.contains("skipped"), "{fatal}");
    assert!(fs::read_dir(&config.cache).unwrap().next().is_none(), "nothing is left behind");
    config.bad_lines = BadLines::Skip;
    let report = setting.open(&config, 2).unwrap().report().clone();
    assert_eq!((report.documents, report.skipped, report.skipped_lines.len()), (30, 30, NAMED_LINES));
    assert!(report.skipped_lines[1].contains("lines.jsonl:4: not JSON"), "{:?}", report.skipped_lines);
    let questions = setting.file("q.jsonl", r#"{"messages": [{"role": "user", "content": "q"}]}"#);
    config.paths = vec![questions];
    let nothing = setting.open(&config, 1).unwrap_err().to_string();
    assert!(
        nothing.starts_with("nothing to learn from in 1 files: 0 documents are empty, 1 lines"),
        "{nothing}"
    );
}

#[test]
fn conversations_need_a_template() {
    let setting = Setting::new();
    let line = r#"{"messages": [{"role": "assistant", "content": "a"}]}"#;
    let path = setting.file("q.jsonl", line);
    let reading = Reading { tokenizer: &setting.tokenizer, template: None, tokenizer_hash: "words" };
    let mut config = setting.config(&[path], 64);
    config.bad_lines = BadLines::Skip;
    let error = Dataset::open(&config, &reading, 1, &mut |_| ()).unwrap_err().to_string();
    assert!(
        error.contains("q.jsonl:1: a conversation (`messages`), but the model has no chat template"),
        "{error}"
    );
}

#[test]
fn a_changed_cache_is_refused_by_name() {
    let setting = Setting::new();
    let path = setting.file("lines.txt", &"a line of words\n".repeat(500));
    let config = setting.config(&[path], 64);
    let folder = config.cache.join(setting.open(&config, 1).unwrap().id());
    for name in ["tokens", "predicted", "pieces", "samples"] {
        let file = folder.join(name);
        let good = fs::read(&file).unwrap();
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        for bad in [flipped, good[..good.len() - 1].to_vec(), Vec::new()] {
            fs::write(&file, bad).unwrap();
            let error = setting.open(&config, 1).unwrap_err().to_string();
            assert!(error.contains(&format!("{name} is not what was written")), "{error}");
        }
        fs::write(&file, good).unwrap();
    }
    let manifest = folder.join("manifest.json");
    for bad in ["", "{}", "[]", r#"{"report": 1, "files": []}"#] {
        fs::write(&manifest, bad).unwrap();
        let error = setting.open(&config, 1).unwrap_err().to_string();
        assert!(error.contains("manifest.json can't be read") && error.contains("remove it"), "{error}");
    }
}
