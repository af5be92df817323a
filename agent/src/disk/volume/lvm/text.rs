//! The text format of LVM metadata: nested sections of `key = value`.
//!
//! Owns the syntax: comments, bare and quoted keys, strings, numbers, lists. Leaves the meaning to `group`. Promises that nesting
//! and size are bounded ([`DEPTH_LIMIT`], [`NODE_LIMIT`]), that a key occurs once in its section, and that nothing is skipped:
//! what is not understood is an error with its line.

use std::fmt;

use super::LvmUnproven;
use crate::disk::volume::printable;

/// Volume group, logical volumes, one of them, a segment: real texts nest four deep.
const DEPTH_LIMIT: usize = 8;
/// Keys and list items in total; ten thousand logical volumes have about this many.
const NODE_LIMIT: usize = 1 << 17;

/// A value without structure. Text is as written: escapes are kept, so that it equals no name that needs none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Scalar<'a> {
    Number(i64),
    Text(&'a str),
    /// A number with a point; nothing that matters here is one.
    Float,
}

impl fmt::Display for Scalar<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => printable(text).fmt(f),
            Self::Float => "a fraction".fmt(f),
        }
    }
}

/// What stands behind a key.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value<'a> {
    One(Scalar<'a>),
    List(Vec<Scalar<'a>>),
    Section(Section<'a>),
}

/// Keys and values in the order of the text.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Section<'a> {
    pub(crate) entries: Vec<(&'a str, Value<'a>)>,
}

impl<'a> Section<'a> {
    pub(crate) fn get(&self, key: &str) -> Option<&Value<'a>> {
        self.entries
            .iter()
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value)
    }

    /// A number of zero or more.
    pub(crate) fn number(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Value::One(Scalar::Number(number)) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    pub(crate) fn text(&self, key: &str) -> Option<&'a str> {
        match self.get(key)? {
            Value::One(Scalar::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// A list; a lone scalar counts as a list of one, as LVM reads it.
    pub(crate) fn list(&self, key: &str) -> Option<&[Scalar<'a>]> {
        match self.get(key)? {
            Value::One(scalar) => Some(std::slice::from_ref(scalar)),
            Value::List(items) => Some(items),
            Value::Section(_) => None,
        }
    }

    pub(crate) fn section(&self, key: &str) -> Option<&Self> {
        match self.get(key)? {
            Value::Section(section) => Some(section),
            _ => None,
        }
    }

    /// Every section directly in this one.
    pub(crate) fn sections(&self) -> impl Iterator<Item = (&'a str, &Self)> {
        self.entries.iter().filter_map(|(name, value)| match value {
            Value::Section(section) => Some((*name, section)),
            _ => None,
        })
    }
}

/// Parses a whole text. Bytes from the first NUL on must all be NUL.
pub(crate) fn parse(bytes: &[u8]) -> Result<Section<'_>, LvmUnproven> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let text = str::from_utf8(&bytes[..end]);
    let (Ok(text), true) = (text, bytes[end..].iter().all(|byte| *byte == 0)) else {
        return Err(LvmUnproven::Text {
            line: 1,
            what: "it is not text",
        });
    };
    let mut parser = Parser {
        text,
        at: 0,
        nodes: 0,
    };
    parser.section(0).map_err(|what| LvmUnproven::Text {
        line: 1 + text[..parser.at].matches('\n').count(),
        what,
    })
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    nodes: usize,
}

type Parsed<T> = Result<T, &'static str>;

impl<'a> Parser<'a> {
    fn section(&mut self, depth: usize) -> Parsed<Section<'a>> {
        if depth > DEPTH_LIMIT {
            return Err("sections nest too deep");
        }
        let mut section = Section::default();
        loop {
            match self.peek() {
                None if depth == 0 => break,
                Some('}') if depth > 0 => {
                    self.at += 1;
                    break;
                }
                None | Some('}') => return Err("a brace is missing"),
                Some(_) => section.entries.push(self.entry(depth)?),
            }
        }
        let mut keys: Vec<&str> = section.entries.iter().map(|(key, _)| *key).collect();
        keys.sort_unstable();
        match keys.windows(2).any(|pair| pair[0] == pair[1]) {
            true => Err("a key occurs twice"),
            false => Ok(section),
        }
    }

    fn entry(&mut self, depth: usize) -> Parsed<(&'a str, Value<'a>)> {
        self.count()?;
        let key = match self.peek() {
            Some('"') => self.quoted('"')?,
            _ => self.word(|c| c.is_ascii_alphanumeric() || "_-+.".contains(c)),
        };
        if key.is_empty() {
            return Err("a key is missing");
        }
        let value = match self.next() {
            Some('{') => Value::Section(self.section(depth + 1)?),
            Some('=') => self.value()?,
            _ => return Err("neither '=' nor '{' follows a key"),
        };
        Ok((key, value))
    }

    fn value(&mut self) -> Parsed<Value<'a>> {
        if self.peek() != Some('[') {
            return self.scalar().map(Value::One);
        }
        self.at += 1;
        let mut items = Vec::new();
        loop {
            match self.peek() {
                Some(']') => break,
                Some(',') if !items.is_empty() => self.at += 1,
                Some(_) if items.is_empty() => {}
                _ => return Err("a list is not closed"),
            }
            if self.peek() == Some(']') {
                break;
            }
            items.push(self.scalar()?);
        }
        self.at += 1;
        Ok(Value::List(items))
    }

    fn scalar(&mut self) -> Parsed<Scalar<'a>> {
        self.count()?;
        match self.peek() {
            Some(quote @ ('"' | '\'')) => self.quoted(quote).map(Scalar::Text),
            _ => {
                let word = self.word(|c| c.is_ascii_digit() || "+-.".contains(c));
                match word.parse() {
                    Ok(number) => Ok(Scalar::Number(number)),
                    Err(_) if word.parse::<f64>().is_ok() => Ok(Scalar::Float),
                    Err(_) => Err("a value is neither text nor a number"),
                }
            }
        }
    }

    fn quoted(&mut self, quote: char) -> Parsed<&'a str> {
        self.at += 1;
        let rest = &self.text[self.at..];
        let mut escaped = false;
        for (i, c) in rest.char_indices() {
            if c == quote && !escaped {
                self.at += i + 1;
                return Ok(&rest[..i]);
            }
            escaped = c == '\\' && !escaped && quote == '"';
        }
        Err("a string is not closed")
    }

    fn word(&mut self, belongs: impl Fn(char) -> bool) -> &'a str {
        let rest = &self.text[self.at..];
        let end = rest.find(|c| !belongs(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    /// The next character that is neither blank nor comment.
    fn peek(&mut self) -> Option<char> {
        loop {
            self.word(|c| c.is_ascii_whitespace());
            let next = self.text[self.at..].chars().next()?;
            if next != '#' {
                return Some(next);
            }
            self.word(|c| c != '\n');
        }
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += next.len_utf8();
        Some(next)
    }

    fn count(&mut self) -> Parsed<()> {
        self.nodes += 1;
        match self.nodes > NODE_LIMIT {
            true => Err("it has too many entries"),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn all_forms_of_values_are_read() {
        let text = b"# comment\nvg { id = \"a-b\" # more\n n = -3\n list = [ \"pv0\", 0,\n 'x' ]\n e = []\n f = 1.5\n\
            \"odd key\" = \"q\\\"uote\"\n sub { lone = \"pv1\" } }\ncontents=\"c\"\0\0";
        let root = parse(text).unwrap();
        let vg = root.section("vg").unwrap();
        assert_eq!(vg.text("id"), Some("a-b"));
        assert_eq!(vg.get("n"), Some(&Value::One(Scalar::Number(-3))));
        assert_eq!(vg.number("n"), None);
        let list = [Scalar::Text("pv0"), Scalar::Number(0), Scalar::Text("x")];
        assert_eq!(vg.list("list"), Some(&list[..]));
        assert_eq!(vg.list("e"), Some(&[][..]));
        assert_eq!(vg.get("f"), Some(&Value::One(Scalar::Float)));
        assert_eq!(vg.text("odd key"), Some("q\\\"uote"));
        assert_eq!(
            vg.section("sub").unwrap().list("lone"),
            Some(&[Scalar::Text("pv1")][..])
        );
        assert_eq!(root.text("contents"), Some("c"));
    }

    #[test]
    fn broken_and_absurd_texts_are_refused() {
        let deep = format!("{}{}", "a{".repeat(100_000), "}".repeat(100_000));
        let many = "a=[1,1,1,1,1,1,1,1]".repeat(50_000);
        let wide: String = (0..200_000).map(|i| format!("k{i}=1\n")).collect();
        let cases = [
            "a",
            "a=",
            "a={",
            "a{",
            "}",
            "a=[1",
            "a=[1 2]",
            "a=[,1]",
            "a=\"x",
            "a=1 a=2",
            "=1",
            "a=b",
            "a=[[1]]",
            "a=99999999999999999999999x",
            "ä=1",
            "a\0b",
            &deep,
            &many,
            &wide,
        ];
        for case in cases {
            assert!(parse(case.as_bytes()).is_err(), "{}", &case[..case.len().min(40)]);
        }
        assert!(parse(&[b'a', b'=', 0xff]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_a_tree_or_an_error(bytes in prop::collection::vec(prop_oneof![
            Just(b'{'), Just(b'}'), Just(b'='), Just(b'['), Just(b']'), Just(b'"'), Just(b'#'), Just(b','), Just(b'a'),
            Just(b'1'), Just(b'\n'), Just(b'\\'), any::<u8>(),
        ], 0..400)) {
            let _ = parse(&bytes);
        }
    }
}
