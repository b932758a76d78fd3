//! Little stories that a program writes: text to try training on, as much as is wanted, and the same for the same seed.
//!
//! What they are about is small enough for a model of a million weights and rich enough that learning shows, first to
//! last: words, then grammar (articles, plurals, pronouns that agree with who is meant), then what a story remembers
//! (a name, the colour of a ball, how many apples are left) and what follows from what (who is out in the rain gets
//! wet). In the spirit of TinyStories (Eldan and Li 2023), whose stories a large model wrote; these come from a grammar,
//! so nothing has to be fetched and nobody's text is in them.
//!
//! Story *n* is a function of the seed and *n*. A second writes some hundred thousand of them.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;

use consort_base::Philox;
use serde_json::json;

use super::DataError;

/// Writes stories into `path`, one `{"text": …}` a line, until it has `bytes` bytes or slightly more; returns how many. The file
/// has its name when it is whole.
///
/// # Errors
/// [`DataError::Io`].
pub fn write(path: &Path, bytes: u64, seed: u64) -> Result<u64, DataError> {
    let fail = DataError::io(path);
    let part = path.with_extension("part");
    let written = (|| {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut file = BufWriter::with_capacity(1 << 20, File::create(&part)?);
        let (mut done, mut number) = (0, 0);
        while done < bytes {
            let line = json!({ "text": story(seed, number) }).to_string();
            writeln!(file, "{line}")?;
            done += line.len() as u64 + 1;
            number += 1;
        }
        file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
        fs::rename(&part, path)?;
        Ok(number)
    })();
    written.map_err(fail)
}

/// Story `number` under `seed`: five to ten sentences in one paragraph.
pub fn story(seed: u64, number: u64) -> String {
    let mut random = Philox::new(seed, number);
    let hero = Person::new(&mut random, None);
    let friend = Person::new(&mut random, Some(&hero));
    let mut teller = Teller { random, hero, friend, text: String::new() };
    teller.begin();
    match teller.random.below(6) {
        0 => teller.lost(),
        1 => teller.sharing(),
        2 => teller.weather(),
        3 => teller.broken(),
        4 => teller.hungry(),
        _ => teller.afraid(),
    }
    teller.end();
    teller.text
}

const GIRLS: &[&str] = &["Lily", "Mia", "Anna", "Sara", "Ella", "Rosa"];
const BOYS: &[&str] = &["Tom", "Ben", "Max", "Sam", "Leo", "Jack"];
const KINDS: &[&str] = &["cat", "dog", "rabbit", "fox", "bear", "mouse", "owl"];
const TRAITS: &[&str] = &["little", "kind", "brave", "funny", "small", "happy", "old"];
const PLACES: &[&str] = &["park", "garden", "forest", "beach", "farm", "river"];
const COLOURS: &[&str] = &["red", "blue", "green", "yellow", "orange"];
const TOYS: &[&str] = &["ball", "kite", "hat", "boat", "umbrella", "drum"];
const FRUIT: &[(&str, &str)] =
    &[("apple", "apples"), ("pear", "pears"), ("cookie", "cookies"), ("egg", "eggs"), ("berry", "berries")];
const NUMBERS: &[&str] = &["no", "one", "two", "three", "four", "five"];
const GAMES: &[&str] = &["run", "sing", "dance", "swim", "read", "play"];
const HIDDEN: &[&str] =
    &["under a tree", "behind a rock", "in the tall grass", "under the bed", "near the door"];

/// Someone a story is about.
struct Person {
    name: &'static str,
    /// An animal, or a girl or boy.
    kind: &'static str,
    she: bool,
}

impl Person {
    /// Someone else than `other`.
    fn new(random: &mut Philox, other: Option<&Person>) -> Person {
        loop {
            let she = random.chance(0.5);
            let name = pick(random, if she { GIRLS } else { BOYS });
            let kind = match random.chance(0.5) {
                true => pick(random, KINDS),
                false if she => "girl",
                false => "boy",
            };
            if other.is_none_or(|other| other.name != name) {
                return Person { name, kind, she };
            }
        }
    }

    fn he(&self) -> &'static str {
        if self.she { "she" } else { "he" }
    }

    fn his(&self) -> &'static str {
        if self.she { "her" } else { "his" }
    }

    fn him(&self) -> &'static str {
        if self.she { "her" } else { "him" }
    }
}

/// A story being told.
struct Teller {
    random: Philox,
    hero: Person,
    friend: Person,
    text: String,
}

impl Teller {
    fn pick(&mut self, from: &[&'static str]) -> &'static str {
        pick(&mut self.random, from)
    }

    /// Adds a sentence, with its first letter large.
    fn say(&mut self, sentence: String) {
        if !self.text.is_empty() {
            self.text.push(' ');
        }
        let mut letters = sentence.chars();
        self.text.extend(letters.next().map(|first| first.to_ascii_uppercase()));
        self.text.push_str(letters.as_str());
    }

    fn begin(&mut self) {
        let (trait_, game, place) = (self.pick(TRAITS), self.pick(GAMES), self.pick(PLACES));
        let Person { name, kind, .. } = self.hero;
        let someone = a(&format!("{trait_} {kind}"));
        match self.random.below(4) {
            0 => self.say(format!("Once upon a time, {someone} named {name} lived near the {place}.")),
            1 => self.say(format!("One day, {someone} named {name} went to the {place}.")),
            _ => self.say(format!("Once upon a time, there was {someone} named {name}.")),
        }
        let he = self.hero.he();
        match self.random.below(3) {
            0 => self.say(format!("{name} liked to {game} in the {place}.")),
            1 => self.say(format!("{he} loved to {game} every day.")),
            _ => {}
        }
    }

    /// The friend comes and asks; the hero says why.
    fn asked(&mut self, feeling: &str, reason: &str) {
        let (name, friend, he, kind) = (self.hero.name, self.friend.name, self.hero.he(), self.friend.kind);
        match self.random.below(3) {
            0 => self.say(format!("{friend} the {kind} saw that {name} was {feeling}.")),
            1 => self.say(format!("then {} named {friend} came by.", a(kind))),
            _ => self.say(format!("{his} friend {friend} came to help.", his = self.hero.his())),
        }
        self.say(format!("\"Why are you {feeling}, {name}?\" asked {friend}."));
        match self.random.chance(0.5) {
            true => self.say(format!("\"{reason},\" said {name}.")),
            false => self.say(format!("\"{reason},\" {he} said.")),
        }
    }

    /// A toy is lost, and found where it was.
    fn lost(&mut self) {
        let (colour, toy, place, hidden) =
            (self.pick(COLOURS), self.pick(TOYS), self.pick(PLACES), self.pick(HIDDEN));
        let (name, he, his) = (self.hero.name, self.hero.he(), self.hero.his());
        self.say(format!("{name} had {}.", a(&format!("{colour} {toy}"))));
        self.say(format!("one morning, {he} could not find {his} {toy}."));
        self.say(format!("{name} looked in the {place}, but the {colour} {toy} was not there."));
        self.asked("sad", &format!("I lost my {colour} {toy}"));
        let friend = self.friend.name;
        self.say(format!("{friend} looked {hidden} and found the {toy}."));
        self.say(format!("\"Here is your {colour} {toy}!\" said {friend}."));
        self.say(format!("{name} was very happy and said, \"Thank you, {friend}!\""));
    }

    /// Some are given away, and so many are left.
    fn sharing(&mut self) {
        let at = self.random.below(FRUIT.len() as u64) as usize;
        let things = |n: usize| format!("{} {}", NUMBERS[n], if n == 1 { FRUIT[at].0 } else { FRUIT[at].1 });
        let had = 2 + self.random.below(4) as usize;
        let gave = 1 + self.random.below(had as u64 - 1) as usize;
        let (name, he, his) = (self.hero.name, self.hero.he(), self.hero.his());
        let (friend, kind, him) = (self.friend.name, self.friend.kind, self.friend.him());
        self.say(format!("{name} had {} in {his} bag.", things(had)));
        self.say(format!("{he} met {friend} the {kind}, who had no {}.", FRUIT[at].1));
        self.say(format!("{friend} was hungry and asked, \"Can I have some?\""));
        self.say(format!("\"Yes, of course,\" said {name}, and gave {him} {}.", things(gave)));
        let left = had - gave;
        let are = if left == 1 { "was" } else { "were" };
        self.say(format!("now there {are} {} left in the bag.", things(left)));
        self.say(format!("{friend} smiled, because {name} was so kind."));
    }

    /// What the weather does to those who are out in it.
    fn weather(&mut self) {
        let (place, colour) = (self.pick(PLACES), self.pick(COLOURS));
        let (name, he, him) = (self.hero.name, self.hero.he(), self.hero.him());
        let (came, became, gave) = match self.random.below(3) {
            0 => ("it began to rain", "wet", format!("{} umbrella", colour)),
            1 => ("it began to snow", "cold", format!("{colour} coat")),
            _ => ("the sun was very strong", "hot", format!("{colour} hat")),
        };
        self.say(format!("{name} walked to the {place}."));
        self.say(format!("suddenly, {came}, so {name} got very {became}."));
        self.asked(became, &format!("I have no {}", gave.split_once(' ').map_or("", |(_, thing)| thing)));
        let friend = self.friend.name;
        self.say(format!("{friend} gave {him} {}.", a(&gave)));
        self.say(format!("soon {he} was not {became} any more."));
        self.say(format!("{name} and {friend} walked home together."));
    }

    /// Something breaks for a reason, and is mended.
    fn broken(&mut self) {
        let (colour, toy) = (self.pick(COLOURS), self.pick(&["boat", "kite", "drum", "cup", "chair"]));
        let (name, his, he) = (self.hero.name, self.hero.his(), self.hero.he());
        let why = match toy {
            "boat" => "it hit a big rock in the river",
            "kite" => "the wind was too strong",
            "drum" => "it fell down the stairs",
            "cup" => "it fell on the floor",
            _ => "it was very old",
        };
        self.say(format!("{his} best thing was {}.", a(&format!("{colour} {toy}"))));
        self.say(format!("one day, the {toy} broke because {why}."));
        self.asked("sad", &format!("My {colour} {toy} is broken"));
        let (friend, her) = (self.friend.name, self.friend.he());
        self.say(format!("\"I can fix it,\" said {friend}, and {her} worked all day."));
        self.say(format!("in the evening, the {colour} {toy} was as good as new."));
        self.say(format!("{name} was so happy that {he} jumped up and down."));
    }

    /// Who is hungry eats, and isn't.
    fn hungry(&mut self) {
        let at = self.random.below(FRUIT.len() as u64) as usize;
        let count = 1 + self.random.below(5) as usize;
        let food = if count == 1 { FRUIT[at].0 } else { FRUIT[at].1 };
        let (name, he, his) = (self.hero.name, self.hero.he(), self.hero.his());
        let (place, it) = (self.pick(PLACES), if count == 1 { "it" } else { "them" });
        self.say(format!("{name} played all morning and became very hungry."));
        self.say(format!("{he} wanted to eat, but there was no food in {his} house."));
        self.say(format!("so {name} went to the {place} with {his} friend {}.", self.friend.name));
        let number = if count == 1 { "only one" } else { NUMBERS[count] };
        self.say(format!("they found {number} {food} there."));
        match count {
            1 => self.say(format!("they cut the {food} in half and ate {it} together.")),
            _ => self.say(format!("they sat down and ate {it} all.")),
        }
        self.say(format!("after that, {name} was not hungry any more."));
    }

    /// A fear has a small cause.
    fn afraid(&mut self) {
        let (place, cause) = (self.pick(PLACES), self.pick(KINDS));
        let (name, he, him) = (self.hero.name, self.hero.he(), self.hero.him());
        self.say(format!("at night, {name} heard a loud noise from the {place}."));
        self.say(format!("{he} was afraid and hid under the bed."));
        self.asked("afraid", "There is a big monster outside");
        let friend = self.friend.name;
        self.say(format!("{friend} took {name} by the hand, and they looked outside."));
        self.say(format!("it was only {}!", a(&format!("small {cause}"))));
        self.say(format!("the {cause} looked at {him} and ran away."));
        self.say(format!("{name} laughed, and {he} was not afraid any more."));
    }

    fn end(&mut self) {
        let (name, friend, he) = (self.hero.name, self.friend.name, self.hero.he());
        match self.random.below(5) {
            0 => self.say(format!("from that day on, {name} and {friend} were best friends.")),
            1 => self.say(format!("{name} went home and slept well.")),
            2 => self.say(format!("it was a good day for {name}.")),
            3 => self.say(format!("then {he} went home to tell {his} mom.", his = self.hero.his())),
            _ => self.say("They all lived happily ever after.".to_owned()),
        }
    }
}

fn pick(random: &mut Philox, from: &[&'static str]) -> &'static str {
    from[random.below(from.len() as u64) as usize]
}

/// With its article.
fn a(noun: &str) -> String {
    let vowel = noun.starts_with(['a', 'e', 'i', 'o', 'u']);
    format!("{} {noun}", if vowel { "an" } else { "a" })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_story_is_a_function_of_seed_and_number() {
        assert_eq!(story(3, 14), story(3, 14));
        let some: BTreeSet<String> = (0..2000).map(|n| story(1, n)).collect();
        assert!(some.len() > 1990, "{} of 2,000 stories differ", some.len());
        assert_ne!(story(1, 0), story(2, 0));
    }

    #[test]
    fn grammar_agrees() {
        for n in 0..5000 {
            let text = story(7, n);
            let words: Vec<&str> = text.split(' ').collect();
            for pair in words.windows(2) {
                let vowel = pair[1].starts_with(['a', 'e', 'i', 'o', 'u']);
                assert!(!(pair[0] == "a" && vowel || pair[0] == "an" && !vowel), "{pair:?} in {text}");
                assert!(
                    !(pair[0] == "one" && pair[1].ends_with('s') && pair[1] != "was"),
                    "{pair:?} in {text}"
                );
                assert!(pair[0] != pair[1], "{pair:?} in {text}");
            }
            assert!(text.ends_with(['.', '"']) && text.starts_with('O'), "{text}");
            assert!((20..140).contains(&words.len()), "{} words: {text}", words.len());
        }
    }

    #[test]
    fn what_is_left_is_what_was_there_without_what_was_given() {
        let mut seen = 0;
        for n in 0..3000 {
            let text = story(5, n);
            let Some((before, rest)) = text.split_once(", and gave ") else { continue };
            let number = |text: &str| {
                text.split(' ')
                    .find_map(|word| NUMBERS.iter().skip(1).position(|n| *n == word))
                    .map(|n| n + 1)
            };
            let (_, had) = before.split_once(" had ").unwrap();
            let (gave, left) =
                rest.split_once("left").map(|(a, _)| a.split_once("Now there ").unwrap()).unwrap();
            assert_eq!(number(had).unwrap(), number(gave).unwrap() + number(left).unwrap(), "{text}");
            assert_eq!(left.starts_with("was "), number(left) == Some(1), "{text}");
            seen += 1;
        }
        assert!(seen > 200);
    }

    #[test]
    fn a_file_has_the_bytes_that_were_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x/stories.jsonl");
        let count = write(&path, 20_000, 1).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!((20_000..21_000).contains(&text.len()));
        assert_eq!(text.lines().count() as u64, count);
        let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(first["text"], story(1, 0));
    }
}
