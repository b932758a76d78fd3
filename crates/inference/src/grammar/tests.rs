//! Grammars over a vocabulary of single bytes and a few longer tokens.

use super::*;
use consort_model::tokenizer::GgufVocab;
use std::path::Path;

const END: u32 = 0;
const OTHER_END: u32 = 1;

/// Tokens: two ends, every byte, and some of several bytes; a byte's id is its value plus two.
fn tokenizer() -> Arc<Tokenizer> {
    let mut next = 0x100;
    let mut alphabet = Vec::new();
    for byte in 0..=255u32 {
        let shown = matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
        alphabet.push(char::from_u32(if shown { byte } else { next }).expect("a character").to_string());
        next += u32::from(!shown);
    }
    let mut tokens = vec!["<|end|>", "<|endoftext|>"];
    tokens.extend(alphabet.iter().map(String::as_str));
    tokens.extend(["{\"", "\":", "true", "}}", "ĠĠĠĠ", "ĊĠĠ", "\"}", "ab"]);
    let vocab = GgufVocab {
        model: "gpt2",
        pre: Some("gpt-2"),
        token_types: (0..tokens.len()).map(|id| if id < 2 { 3 } else { 1 }).collect(),
        tokens,
        merges: vec!["a b"],
        eos: Some(END),
        ..GgufVocab::default()
    };
    Arc::new(Tokenizer::from_vocab(&vocab, Path::new("test.gguf")).expect("a sound vocabulary"))
}

fn engine() -> GrammarEngine {
    GrammarEngine::new(tokenizer())
}

fn compile(grammar: Grammar) -> GrammarState {
    engine().compile(&grammar).expect("it compiles")
}

fn schema(schema: Value) -> Grammar {
    Grammar::JsonSchema(schema)
}

/// Bytes of `text` that the grammar takes, one token each.
fn taken(state: &mut GrammarState, text: &str) -> usize {
    text.bytes().take_while(|&byte| state.accept(u32::from(byte) + 2).is_ok()).count()
}

/// Whether the grammar takes the whole of `text` and can end there.
fn matches(grammar: Grammar, text: &str) -> bool {
    let mut state = compile(grammar);
    taken(&mut state, text) == text.len() && state.can_end()
}

#[test]
fn any_object_and_nothing_else() {
    for (text, fits) in [
        (r#"{"a": [1, true, null, "x\n"], "b": {"c": -1.5e3}}"#, true),
        ("{}", true),
        ("{\n  \"a\": 1\n}", true),
        ("[1]", false),
        ("1", false),
        (r#"{"a": 1"#, false),
        (r#"{"a" 1}"#, false),
    ] {
        assert_eq!(matches(Grammar::JsonObject, text), fits, "{text}");
    }
}

#[test]
fn a_schema_is_followed() {
    let person = json!({
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name", "age"],
        "additionalProperties": false
    });
    assert!(matches(schema(person.clone()), r#"{"name": "Ann", "age": 30}"#));
    assert!(!matches(schema(person.clone()), r#"{"name": "Ann"}"#));
    assert!(!matches(schema(person.clone()), r#"{"name": "Annabel", "age": 30}"#));
    assert!(!matches(schema(person), r#"{"name": "Ann", "age": -1}"#));
    let tree = json!({"$ref": "#/$defs/node", "$defs": {"node": {
        "type": "object", "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
        "required": ["next"], "additionalProperties": false}}});
    assert!(matches(schema(tree), r#"{"next":{"next":null}}"#));
}

#[test]
fn end_tokens_are_allowed_exactly_where_it_can_end() {
    let mut state = compile(Grammar::Regex("ab(cd)?".into()));
    for (byte, can_end) in [(b'a', false), (b'b', true), (b'c', false)] {
        assert_eq!(state.accept(u32::from(byte) + 2), Ok(()));
        assert_eq!(state.can_end(), can_end);
        assert_eq!(state.allows(END), Ok(can_end));
        assert_eq!(state.allows(OTHER_END), Ok(can_end));
        assert!(!state.is_finished());
    }
    assert_eq!(state.accept(END), Err(GrammarError::Forbidden { token: END }));
    assert_eq!(state.accept(u32::from(b'd') + 2), Ok(()));
    assert!(state.is_finished() && state.can_end());
    // Nothing but an end, and it stays that way.
    assert_eq!(state.allows(u32::from(b'x') + 2), Ok(false));
    assert_eq!(state.accept(OTHER_END), Ok(()));
    assert!(state.is_finished());

    let mut state = compile(Grammar::Regex("ab(cd)?".into()));
    assert_eq!(taken(&mut state, "ab"), 2);
    assert_eq!(state.accept(END), Ok(()));
    assert!(state.is_finished());
}

#[test]
fn a_model_cant_write_white_space_for_ever() {
    for start in ["{", "{\"a\":", "{\"a\": 1,"] {
        for space in [" ", "\n", "\t", "\n ", "\n\t", "    "] {
            let mut state = compile(Grammar::JsonObject);
            assert_eq!(taken(&mut state, start), start.len());
            let long = space.repeat(100);
            assert!(taken(&mut state, &long) < 45, "{start:?} then {space:?}");
        }
    }
    let mut state = compile(Grammar::JsonObject);
    assert_eq!(taken(&mut state, "{\"a\": 1}"), 8);
    assert!(taken(&mut state, &" ".repeat(50)) < 45);
}

#[test]
fn what_is_wrong_is_named() {
    let error = |grammar: Grammar| engine().compile(&grammar).expect_err("it is wrong").to_string();
    for (grammar, named) in [
        (schema(json!({"type": "array", "uniqueItems": true})), "uniqueItems"),
        (schema(json!({"type": "object", "properties": {"a": {"not": {"type": "null"}}}})), "not"),
        (schema(json!({"type": "thing"})), "thing"),
        (schema(json!({"$ref": "#/$defs/none"})), "none"),
        (schema(json!({"$ref": "https://example.com/s.json"})), "https://example.com/s.json"),
        (schema(json!({"type": "integer", "minimum": 3, "maximum": 2})), "nsatisfiable"),
        (schema(json!({"$ref": "#"})), "no answer"),
        (schema(json!([1])), "object"),
        (schema(json!({"enum": []})), "nsatisfiable"),
        (Grammar::Regex("a(".into()), "("),
        (Grammar::Lark("start: nothing".into()), "nothing"),
    ] {
        let text = error(grammar);
        assert!(text.contains(named), "{named}: {text}");
        assert!(!text.contains("backtrace") && text.len() < 600, "{text}");
    }
    // Options of llguidance's own can't be set from outside.
    let sneaky = json!({"type": "object", "x-guidance": {"whitespace_pattern": " *", "lenient": true}});
    assert_eq!(
        prepare_schema(&sneaky).expect("it is a schema")["x-guidance"]["whitespace_pattern"],
        JSON_SPACE
    );
}

#[test]
fn hostile_grammars_are_refused_or_bounded() {
    let mut deep = json!({"type": "null"});
    for _ in 0..500 {
        deep = json!({"items": deep});
    }
    let nested = (0..200).fold(String::from("a"), |inner, _| format!("({inner})*"));
    let many: Vec<Value> = (0..5000).map(|i| json!(format!("value number {i}"))).collect();
    let wide: serde_json::Map<String, Value> = (0..2000).map(|i| (format!("key{i}"), json!({}))).collect();
    for grammar in [
        Grammar::JsonSchema(deep),
        Grammar::Regex("a".repeat(MAX_REGEX_BYTES + 1)),
        Grammar::Regex("(a{1000}){1000}".into()),
        Grammar::Regex("(.*a.{500}){50}".into()),
        Grammar::Regex(nested),
        Grammar::Lark("start: start start |".into()),
        Grammar::Lark(format!("start: {}", "(".repeat(100_000))),
        Grammar::Regex("(".repeat(10_000)),
        Grammar::Lark("x".repeat(MAX_GRAMMAR_BYTES + 1)),
        schema(json!({"$ref": "#"})),
        schema(json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})),
        schema(json!({"allOf": [{"$ref": "#"}, {"$ref": "#"}]})),
        schema(json!({"enum": many})),
        schema(json!({"type": "object", "properties": wide})),
        schema(json!({"type": "string", "pattern": "^(a+)+$", "minLength": 1_000_000_000})),
        schema(json!({"type": "array", "items": {"type": "string"}, "minItems": 1_000_000_000})),
        schema(json!({"description": "x".repeat(MAX_GRAMMAR_BYTES)})),
    ] {
        let shown: String = format!("{grammar:?}").chars().take(60).collect();
        let start = std::time::Instant::now();
        match engine().compile(&grammar) {
            Ok(mut state) => {
                let bits = state.mask().map(|mask| mask.iter().map(|word| word.count_ones()).sum::<u32>());
                println!("{shown}: {bits:?} allowed, {:?}", start.elapsed());
            }
            Err(error) => println!("{shown}: {error}, {:?}", start.elapsed()),
        }
    }
}

/// Walks at random through what is allowed and gives the ids and the masks before each.
fn walk(mut state: GrammarState, mut random: u32, steps: usize) -> (Vec<u32>, Vec<Vec<u32>>) {
    let (mut ids, mut masks) = (Vec::new(), Vec::new());
    while ids.len() < steps && !state.is_finished() {
        let mask = state.mask().expect("within the limits").to_vec();
        let allowed: Vec<u32> =
            (0..mask.len() as u32 * 32).filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let id = allowed[(random >> 16) as usize % allowed.len()];
        state.accept(id).expect("it was allowed");
        ids.push(id);
        masks.push(mask);
    }
    (ids, masks)
}

#[test]
fn masks_are_a_function_of_the_accepted_ids() {
    let person = schema(
        json!({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "number"}}}}),
    );
    let warm = engine();
    for grammar in [Grammar::JsonObject, person, Grammar::Regex("(ab|true)*[0-9]{2,5}".into())] {
        for seed in 0..8 {
            let (ids, masks) = walk(warm.compile(&grammar).expect("it compiles"), seed, 60);
            // Another replica: its engine is new, it never asked for a mask on the way, and it was cloned.
            let mut state = engine().compile(&grammar).expect("it compiles");
            for (at, (&id, mask)) in ids.iter().zip(&masks).enumerate() {
                if at % 7 == 3 {
                    state = state.clone();
                    assert_eq!(state.mask(), Ok(&mask[..]));
                }
                assert_eq!(state.accept(id), Ok(()));
            }
        }
    }
}

#[test]
fn a_clone_goes_its_own_way() {
    let mut state = compile(Grammar::Regex("(ab|true)".into()));
    let mut other = state.clone();
    assert_eq!(taken(&mut state, "ab"), 2);
    assert_eq!(taken(&mut other, "true"), 4);
    fn is_send<T: Send>(_: &T) {}
    is_send(&state);
}

#[test]
fn forbidden_logits_are_minus_infinity() {
    let mut state = compile(Grammar::Regex("ab".into()));
    let vocab = tokenizer().vocab();
    // A model's logits may be wider than the vocabulary.
    let mut logits = vec![1.0f32; vocab + 100];
    state.apply(&mut logits).expect("within the limits");
    let left: Vec<usize> = (0..logits.len()).filter(|&id| logits[id].is_finite()).collect();
    assert_eq!(left, [usize::from(b'a') + 2, vocab - 1], "`a` and `ab`");
    let mut narrow = vec![1.0f32; 10];
    state.apply(&mut narrow).expect("within the limits");
    assert!(narrow.iter().all(|x| *x == f32::NEG_INFINITY));
}

#[test]
fn a_tool_call_in_lark() {
    let arguments = prepare_schema(
        &json!({"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": false}),
    );
    let source =
        format!("start: \"<call>\" args \"</call>\"\nargs: %json {}\n", arguments.expect("it is a schema"));
    assert!(matches(Grammar::Lark(source.clone()), "<call>{\"x\": 1}</call>"));
    assert!(!matches(Grammar::Lark(source), "<call>{\"y\": 1}</call>"));
}

#[test]
fn the_last_grammars_are_kept_and_told_apart_by_every_letter() {
    let engine = engine();
    let keys = |a: &str, b: &str| {
        schema(serde_json::from_str(&format!(
        r#"{{"type": "object", "properties": {{"{a}": {{"type": "null"}}, "{b}": {{"type": "null"}}}}, "required": ["a", "b"]}}"#,
    )).expect("JSON"))
    };
    let text = r#"{"a": null, "b": null}"#;
    let of = |grammar: &Grammar| taken(&mut engine.compile(grammar).expect("it compiles"), text);
    // Equal as JSON values; but answers have a schema's properties in its own order.
    let (forth, back) = (keys("a", "b"), keys("b", "a"));
    assert_eq!(forth, back);
    for _ in 0..2 {
        assert_eq!((of(&forth), of(&back)), (text.len(), 2));
    }
    // A kept state begins anew each time, and the same text is another grammar as an expression.
    assert_eq!((of(&Grammar::Regex("x".into())), of(&forth)), (0, text.len()));
    assert_eq!(engine.kept.lock().expect("no panic").len(), 3);
    for i in 0..10 {
        of(&Grammar::Regex(format!("a{i}")));
        of(&forth);
    }
    let kept = engine.kept.lock().expect("no panic");
    assert_eq!(kept.len(), KEPT);
    assert!(kept.iter().any(|(key, _)| *key == Key::of(&forth)), "the one in use stays");
}
