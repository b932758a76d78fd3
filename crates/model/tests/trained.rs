//! A real model, read from its GGUF file into trainable weights and written as a Hugging Face folder, is the same model:
//! same tokens, nearly the same logits. Needs CONSORT_TEST_SMOLLM2.
#![allow(clippy::unwrap_used)]

mod support;

use consort_model::tokenizer::Specials;
use consort_model::train::{Arena, Decoder, MicroBatch, Options, SavedType, save};
use consort_tensor::buffer::Buffer;
use consort_tensor::{Cpu, Pool};

use support::Session;

#[test]
fn a_gguf_becomes_a_folder_that_says_the_same() {
    let path = std::env::var("CONSORT_TEST_SMOLLM2")
        .expect("CONSORT_TEST_SMOLLM2 names the GGUF file; `cargo xtask test` sets it");
    let opened = consort_model::open(path.as_ref()).unwrap();
    let decoder = Decoder::new(opened.config(), Options::default()).unwrap();
    let layout = decoder.layout();
    let mut weights = Buffer::zeroed(layout.len()).unwrap();
    opened.read_weights(layout, &mut weights).unwrap();
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), opened.config(), layout, &weights, SavedType::F32, Some(&opened)).unwrap();
    let saved = consort_model::open(folder.path()).unwrap();

    let (old, new) = (opened.tokenizer().unwrap(), saved.tokenizer().unwrap());
    for text in [
        "The capital of France is Paris, isn't it?",
        "  fn main() {\n\tprintln!(\"{}\", 12345);\n}\r\n\n",
        "日本語 ünïcödé 😀 I'LL <|im_end|> 3.14",
        "<|im_start|>user\nHello<|im_end|>\n",
    ] {
        for specials in [Specials::AsText, Specials::Parse] {
            assert_eq!(old.encode(text, specials), new.encode(text, specials), "{text:?} {specials:?}");
        }
    }
    assert!(saved.chat_template().unwrap().is_some());

    let pool = Pool::new(2, Cpu::detect());
    let tokens = old.encode("The capital of France is Paris, and that of Italy is Rome.", Specials::AsText);
    let mut batch = MicroBatch::new();
    batch.push(&tokens);
    let learned = decoder.logits(&pool, &weights, &batch, &mut Arena::new()).unwrap();
    let model = saved.load(&pool).unwrap();
    let rows: Vec<usize> = (0..tokens.len() - 1).collect();
    let answered = Session::new(&model).run(&model, &pool, &tokens[..tokens.len() - 1], &rows);
    for (learned, answered) in learned.iter().zip(&answered) {
        assert!((learned - answered).abs() < 0.05, "{learned} {answered}");
    }
    // A trained model finds its own text likely: under 4 nats a token where guessing costs 10.8.
    let loss = decoder.loss(&pool, &weights, &batch, &mut Arena::new()).unwrap();
    assert!(loss.mean() < 4.0, "{loss:?}");
}
