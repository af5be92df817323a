//! QMP's lines: from bytes to messages.
//!
//! Pure. Owns the splitting into lines and the reading of one line. Promises: whatever the bytes are, no panic, no line
//! kept beyond its limit, and nesting is bounded (by the JSON reader, 128 levels).

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::ErrorClass;
use super::event::Event;

/// Longest line that is taken, in bytes. The longest answers (block nodes of hundreds of disks) have some hundred KiB; as
/// values in memory a line is at most some twenty times as large.
pub const LINE_MAX: usize = 4 << 20;

/// Why bytes are not QMP.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("it sent a line of more than {LINE_MAX} bytes")]
    TooLong,
    #[error("it sent a line that is no QMP message: {0}")]
    Nonsense(String),
}

/// Bytes on their way to lines.
#[derive(Debug, Default)]
pub struct Lines {
    bytes: Vec<u8>,
    /// Where the first line that was not given out yet begins.
    start: usize,
    /// Up to where no line's end was found.
    seen: usize,
}

impl Lines {
    /// Takes what was read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.seen -= self.start; // `seen` never lies before `start`.
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole line without its end; none until more was read.
    ///
    /// # Errors
    /// [`WireError::TooLong`] as soon as a line is longer than [`LINE_MAX`].
    pub fn next_line(&mut self) -> Result<Option<&[u8]>, WireError> {
        let end = self.bytes[self.seen..].iter().position(|&byte| byte == b'\n');
        let len = end.map_or(self.bytes.len(), |at| self.seen + at) - self.start;
        if len > LINE_MAX {
            return Err(WireError::TooLong);
        }
        let Some(at) = end else {
            self.seen = self.bytes.len();
            return Ok(None);
        };
        let line = self.start..self.seen + at;
        self.seen += at + 1;
        self.start = self.seen;
        Ok(Some(&self.bytes[line]))
    }
}

/// QEMU's version.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub micro: u32,
    /// What a distribution says of its package; may be empty.
    pub package: String,
}

impl Version {
    /// Whether it is at least `major.minor`.
    pub fn at_least(&self, major: u32, minor: u32) -> bool {
        (self.major, self.minor) >= (major, minor)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// What a monitor says first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    pub version: Version,
}

/// One line's meaning.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    Greeting(Greeting),
    /// An answer; without `id` it answers what could not even be read.
    Return {
        id: Option<u64>,
        value: Value,
    },
    Error {
        id: Option<u64>,
        class: ErrorClass,
        desc: String,
    },
    Event(Event),
}

/// Reads one line.
///
/// # Errors
/// [`WireError::Nonsense`] for everything that is no message of QMP.
pub fn decode(line: &[u8]) -> Result<Message, WireError> {
    let nonsense = |what: &str| WireError::Nonsense(what.to_owned());
    let value: Value = serde_json::from_slice(line).map_err(|error| nonsense(&error.to_string()))?;
    let Value::Object(mut fields) = value else {
        return Err(nonsense("not an object"));
    };
    let id = fields.get("id").and_then(Value::as_u64);
    if let Some(value) = fields.remove("return") {
        return Ok(Message::Return { id, value });
    }
    if let Some(error) = fields.get("error") {
        let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or_default();
        let class = ErrorClass::named(text("class"));
        let desc = printable(text("desc"));
        return Ok(Message::Error { id, class, desc });
    }
    if let Some(name) = fields.get("event").and_then(Value::as_str) {
        let name = name.to_owned();
        let data = fields.remove("data").unwrap_or_default();
        return Ok(Message::Event(Event::named(&name, data)));
    }
    let version = fields.get("QMP").and_then(|qmp| qmp.get("version"));
    let version = version.ok_or_else(|| nonsense("neither answer nor event"))?;
    Ok(Message::Greeting(Greeting {
        version: version_of(version),
    }))
}

fn version_of(version: &Value) -> Version {
    let number = |key: &str| {
        let number = version
            .get("qemu")
            .and_then(|qemu| qemu.get(key))
            .and_then(Value::as_u64);
        number
            .and_then(|number| u32::try_from(number).ok())
            .unwrap_or_default()
    };
    let package = version.get("package").and_then(Value::as_str);
    Version {
        major: number("major"),
        minor: number("minor"),
        micro: number("micro"),
        package: printable(package.unwrap_or_default()),
    }
}

/// Text of a peer made fit for a sentence: no control characters, at most 1,000 characters.
pub(crate) fn printable(text: &str) -> String {
    text.trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(1000)
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn all(lines: &mut Lines) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| lines.next_line().unwrap().map(<[u8]>::to_vec)).collect()
    }

    #[test]
    fn messages_are_told_apart() {
        let greeting = br#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "D"}, "capabilities": []}}"#;
        let Message::Greeting(greeting) = decode(greeting).unwrap() else {
            panic!("no greeting")
        };
        assert_eq!(greeting.version.to_string(), "7.2.22");
        assert!(greeting.version.at_least(7, 2) && !greeting.version.at_least(9, 1));
        let answer = decode(br#"{"return": {"a": 1}, "id": 9}"#).unwrap();
        let value = json!({"a": 1});
        assert_eq!(answer, Message::Return { id: Some(9), value });
        let error =
            decode(br#"{"error": {"class": "CommandNotFound", "desc": "no\nsuch"}, "id": 1}"#).unwrap();
        let (class, desc) = (ErrorClass::CommandNotFound, "no such".to_owned());
        let id = Some(1);
        assert_eq!(error, Message::Error { id, class, desc });
        let event = decode(br#"{"event": "MIGRATION", "data": {"status": "pre-switchover"}}"#).unwrap();
        let status = super::super::MigrationStatus::PreSwitchover;
        assert_eq!(event, Message::Event(Event::Migration(status)));
    }

    #[test]
    fn nonsense_is_refused() {
        let deep = "[".repeat(100_000);
        for line in [
            "",
            "7",
            "[]",
            "{}",
            "{\"return\":",
            "{\"QMP\": 1}",
            "\u{0}",
            &deep,
        ] {
            assert!(decode(line.as_bytes()).is_err(), "{line:.20}");
        }
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let mut lines = Lines::default();
        let piece = vec![b'x'; 64 * 1024];
        let refused = (0..1000).find(|_| {
            lines.push(&piece);
            lines.next_line().is_err()
        });
        assert_eq!(refused, Some(LINE_MAX / piece.len()));
        assert!(lines.bytes.len() <= LINE_MAX + piece.len());
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(text in "[a-c\n]{0,200}", cuts in proptest::collection::vec(0usize..20, 0..40)) {
            let mut whole = Lines::default();
            whole.push(text.as_bytes());
            let expected = all(&mut whole);
            let mut lines = Lines::default();
            let mut got = Vec::new();
            let mut rest = text.as_bytes();
            for cut in cuts {
                let (now, later) = rest.split_at(cut.min(rest.len()));
                lines.push(now);
                rest = later;
                if cut % 2 == 0 {
                    got.extend(lines.next_line().unwrap().map(<[u8]>::to_vec));
                }
            }
            lines.push(rest);
            got.extend(all(&mut lines));
            prop_assert_eq!(got, expected);
        }

        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut lines = Lines::default();
            lines.push(&bytes);
            while let Ok(Some(line)) = lines.next_line() {
                let _ = decode(line);
            }
        }

        #[test]
        fn any_object_is_survived(
            key in "(return|error|event|QMP|data|id|class)", inner in "(return|version|class|desc|qemu)", n in any::<i64>()
        ) {
            let _ = decode(json!({ key: { inner: n } }).to_string().as_bytes());
        }
    }
}
