//! Text from a peer, made fit to be shown: on a terminal, in a log, in a journal.
//!
//! Owns what happens to it while it is decoded: control characters become spaces, and it is cut where no sentence is so long. Names
//! inside a guest's disk (labels, volumes) come this way, too: they belong to whoever owns the guest.

use serde::{Deserialize, Deserializer};

/// Longest text that is kept, in characters.
pub const TEXT_MAX: usize = 2000;
/// Most texts of a list that are kept.
pub const LIST_MAX: usize = 1000;

/// `text` on one line, without characters that command a terminal, of at most [`TEXT_MAX`] characters.
pub fn cleaned(text: &str) -> String {
    let plain = |c: char| if is_plain(c) { c } else { ' ' };
    text.chars().take(TEXT_MAX).map(plain).collect()
}

/// Whether `c` only shows itself: no control character, no line end, no change of writing direction.
pub fn is_plain(c: char) -> bool {
    !(c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'))
}

pub(super) fn text<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    Ok(cleaned(&String::deserialize(from)?))
}

pub(super) fn maybe<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(from)?.map(|text| cleaned(&text)))
}

pub(super) fn list<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    let list = Vec::<String>::deserialize(from)?;
    Ok(list.iter().take(LIST_MAX).map(|text| cleaned(text)).collect())
}

#[cfg(test)]
mod tests {
    use super::super::frame;
    use super::super::session::{FromTarget, Refusal, RefusalKind};
    use super::*;

    #[test]
    fn text_of_a_peer_stays_on_its_line() {
        let said = Refusal::new(
            RefusalKind::Refused,
            format!("a\u{1b}[2Jb\nc{}", "x".repeat(9000)),
        );
        let bytes = frame::encode(&FromTarget::Failed(said)).unwrap();
        let FromTarget::Failed(heard) = frame::decode(&bytes[4..]).unwrap() else {
            panic!("another message")
        };
        assert!(heard.text.starts_with("a [2Jb cx"), "{}", heard.text);
        assert_eq!(heard.text.chars().count(), TEXT_MAX);
        assert_eq!(cleaned("Größe 3 \u{202e}"), "Größe 3  ");
    }
}
