//! The chat page: one static file without a build step, compiled in.

use std::sync::LazyLock;

use sha2::{Digest, Sha256};

const SOURCE: &str = include_str!("page/index.html");

/// Where the page carries its content policy.
const PLACE: &str = "{{policy}}";

/// Where it is told whether there is a fleet to show.
const FLEET: &str = "{{fleet}}";

static CHAT: LazyLock<String> = LazyLock::new(|| page("no"));
static WITH_FLEET: LazyLock<String> = LazyLock::new(|| page("yes"));

fn page(fleet: &str) -> String {
    let hash =
        |tag: &str| base64(&Sha256::digest(between(&format!("<{tag}>"), &format!("</{tag}>")).as_bytes()));
    let policy = format!(
        "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'",
        hash("script"),
        hash("style")
    );
    SOURCE.replacen(PLACE, &policy, 1).replacen(FLEET, fleet, 1)
}

/// The page, with a policy that lets exactly its own script and style run: whatever a model writes stays text, and
/// should it ever not, it still can't act. The policy travels in the page, so it holds behind any server.
pub(crate) fn chat() -> &'static str {
    &CHAT
}

/// The same with the fleet beside the chat.
pub(crate) fn with_fleet() -> &'static str {
    &WITH_FLEET
}

/// What stands between the first `open` and the `close` after it.
fn between(open: &str, close: &str) -> &'static str {
    let inner = SOURCE.split_once(open).and_then(|(_, rest)| rest.split_once(close));
    inner.map_or("", |(inner, _)| inner)
}

/// Base64 with padding (RFC 4648).
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let word = three.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - three.len()));
        for i in 0..4 {
            let digit = DIGITS[(word >> (18 - 6 * i)) as usize & 63];
            text.push(if i > three.len() { '=' } else { char::from(digit) });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_needs_nothing_from_elsewhere_and_makes_no_markup_from_text() {
        assert_eq!(SOURCE.matches("<script>").count(), 1);
        assert_eq!(SOURCE.matches("<style>").count(), 1);
        for forbidden in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            " onclick=",
            " style=",
            "src=\"http",
            "@import",
            "url(http",
        ] {
            assert!(!SOURCE.contains(forbidden), "{forbidden}");
        }
    }

    #[test]
    fn the_policy_names_the_hash_of_the_script() {
        assert!(!chat().contains("{{") && !with_fleet().contains("{{"));
        let hash = base64(&Sha256::digest(between("<script>", "</script>")));
        assert!(between("<script>", "</script>").contains("use strict"));
        assert!(chat().contains(&format!("script-src 'sha256-{hash}'")));
    }

    #[test]
    fn base64_is_the_rfcs() {
        for (text, expected) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
            ("fooba", "Zm9vYmE="),
        ] {
            assert_eq!(base64(text.as_bytes()), expected);
        }
    }
}
