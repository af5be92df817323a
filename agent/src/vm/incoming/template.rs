//! From the config's command template to the command line that starts the target's QEMU.
//!
//! Pure. Promises: every placeholder is known and every disk is used; nothing that a path contains can become an option of
//! its own; a command without `-S` and `-incoming defer` is refused, for it would run the VM twice.

use std::path::Path;

use serde::{Deserialize, Serialize};

/// The command that starts the target's QEMU: program and arguments, no shell.
///
/// Placeholders: `{disk0}`, `{disk1}` ... paths of the disks; `{qmp}` the monitor's unix socket; `{pidfile}`; `{name}`;
/// `{uuid}`; `{incoming}`, which becomes `defer`. Braces around anything that is not a plain word (JSON) stay as they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Template(pub Vec<String>);

/// What the placeholders stand for.
#[derive(Clone, Copy, Debug)]
pub struct Values<'a> {
    pub disks: &'a [&'a Path],
    pub qmp: &'a Path,
    pub pid_file: &'a Path,
    pub name: &'a str,
    /// As text, 36 characters; None where the source has none.
    pub uuid: Option<&'a str>,
}

/// What is wrong with a template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    #[error("the target's command is empty; give the program and its arguments")]
    Empty,
    #[error("the target's command lacks {0}; without it the VM could run twice: add it")]
    Unsafe(&'static str),
    #[error("the target's command does not use {{{0}}}; add it where QEMU needs it")]
    Unused(String),
    #[error(
        "'{{{0}}}' in the target's command stands for nothing; known are disk0.., qmp, pidfile, name, uuid and incoming"
    )]
    Unknown(String),
    #[error(
        "{{{name}}} would be '{value}', which has a character that QEMU's options treat as special; rename it"
    )]
    Special { name: String, value: String },
    #[error("the target's command uses {{uuid}}, but the source VM has no UUID; remove it from the command")]
    NoUuid,
}

impl Template {
    /// The command line.
    ///
    /// # Errors
    /// See [`TemplateError`].
    pub fn command(&self, values: &Values<'_>) -> Result<Vec<String>, TemplateError> {
        if self.0.first().is_none_or(String::is_empty) {
            return Err(TemplateError::Empty);
        }
        let mut used = Vec::new();
        let filled = self.0.iter().map(|part| fill(part, values, &mut used));
        let command: Vec<String> = filled.collect::<Result<_, _>>()?;
        if !command.iter().any(|part| part == "-S") {
            return Err(TemplateError::Unsafe("-S"));
        }
        let is_incoming = |pair: &[String]| matches!(pair[0].as_str(), "-incoming" | "--incoming");
        if !command
            .windows(2)
            .any(|pair| is_incoming(pair) && pair[1] == "defer")
        {
            return Err(TemplateError::Unsafe("-incoming {incoming}"));
        }
        let disks = (0..values.disks.len()).map(|n| format!("disk{n}"));
        let needed = disks.chain(["qmp".to_owned(), "pidfile".to_owned()]);
        for name in needed {
            if !used.contains(&name) {
                return Err(TemplateError::Unused(name));
            }
        }
        Ok(command)
    }

    /// The machine type that the command names, as written; None where it names none.
    pub fn machine(&self) -> Option<&str> {
        let pair = self
            .0
            .windows(2)
            .find(|pair| matches!(pair[0].as_str(), "-M" | "-machine" | "--machine"))?;
        let first = pair[1].split(',').next()?;
        let named = pair[1].split(',').find_map(|option| option.strip_prefix("type="));
        named.or_else(|| (!first.contains('=')).then_some(first))
    }
}

fn fill(part: &str, values: &Values<'_>, used: &mut Vec<String>) -> Result<String, TemplateError> {
    let mut filled = String::with_capacity(part.len());
    let mut rest = part;
    while let Some(at) = rest.find('{') {
        filled.push_str(&rest[..at]);
        rest = &rest[at..];
        let word = rest[1..].split('}').next().filter(|word| is_word(word));
        let Some(word) = word.filter(|word| rest.len() > word.len() + 1) else {
            filled.push('{');
            rest = &rest[1..];
            continue;
        };
        filled.push_str(&value(word, values)?);
        used.push(word.to_owned());
        rest = &rest[word.len() + 2..];
    }
    filled.push_str(rest);
    Ok(filled)
}

fn is_word(word: &str) -> bool {
    !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn value(word: &str, values: &Values<'_>) -> Result<String, TemplateError> {
    let path = |path: &Path| {
        let text = path.to_str().unwrap_or("\u{fffd}");
        plain(word, text)
    };
    match word {
        "qmp" => path(values.qmp),
        "pidfile" => path(values.pid_file),
        "name" => plain(word, values.name),
        "uuid" => plain(word, values.uuid.ok_or(TemplateError::NoUuid)?),
        "incoming" => Ok("defer".to_owned()),
        _ => {
            let number = word.strip_prefix("disk").and_then(|n| n.parse::<usize>().ok());
            let disk = number.and_then(|n| values.disks.get(n));
            path(disk.ok_or_else(|| TemplateError::Unknown(word.to_owned()))?)
        }
    }
}

/// A value that is one and the same in a plain argument, in an option list and in JSON.
fn plain(name: &str, value: &str) -> Result<String, TemplateError> {
    let special = |c: char| c.is_control() || matches!(c, ',' | '"' | '\\' | '\u{fffd}');
    if value.is_empty() || value.starts_with('-') || value.chars().any(special) {
        return Err(TemplateError::Special {
            name: name.to_owned(),
            value: value.escape_debug().take(200).collect(),
        });
    }
    Ok(value.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn template(parts: &[&str]) -> Template {
        Template(parts.iter().map(|&part| part.to_owned()).collect())
    }

    fn values<'a>(disks: &'a [&'a Path]) -> Values<'a> {
        Values {
            disks,
            qmp: Path::new("/run/q"),
            pid_file: Path::new("/run/p"),
            name: "web",
            uuid: None,
        }
    }

    const GOOD: [&str; 11] = [
        "qemu",
        "-S",
        "-incoming",
        "{incoming}",
        "-qmp",
        "unix:{qmp},server=on,wait=off",
        "-pidfile",
        "{pidfile}",
        "-blockdev",
        r#"{"driver":"raw","file":{"driver":"file","filename":"{disk0}"}}"#,
        "{{name}}",
    ];

    #[test]
    fn placeholders_are_filled_and_json_stays() {
        let disk = Path::new("/images/a b.raw");
        let command = template(&GOOD).command(&values(&[disk])).unwrap();
        assert_eq!(command[3], "defer");
        assert_eq!(command[5], "unix:/run/q,server=on,wait=off");
        assert_eq!(
            command[9],
            r#"{"driver":"raw","file":{"driver":"file","filename":"/images/a b.raw"}}"#
        );
        assert_eq!(command[10], "{web}");
    }

    #[test]
    fn each_defect_is_named() {
        let disk = [Path::new("/d")];
        let without = |index: usize| {
            let mut parts = GOOD.to_vec();
            parts.remove(index);
            template(&parts).command(&values(&disk)).unwrap_err()
        };
        assert_eq!(without(1), TemplateError::Unsafe("-S"));
        assert_eq!(without(2), TemplateError::Unsafe("-incoming {incoming}"));
        assert_eq!(without(5), TemplateError::Unused("qmp".into()));
        assert_eq!(without(7), TemplateError::Unused("pidfile".into()));
        assert_eq!(without(9), TemplateError::Unused("disk0".into()));
        assert_eq!(template(&[]).command(&values(&disk)), Err(TemplateError::Empty));
        let with = |part: &str| template(&[&GOOD[..], &[part]].concat()).command(&values(&disk));
        assert_eq!(with("{uuid}"), Err(TemplateError::NoUuid));
        assert_eq!(with("{disk1}"), Err(TemplateError::Unknown("disk1".into())));
        assert_eq!(with("{typo}"), Err(TemplateError::Unknown("typo".into())));
        assert!(with("{").is_ok() && with("{}").is_ok() && with("{name").is_ok());
    }

    #[test]
    fn a_path_cannot_add_options() {
        for path in ["/a,readonly=on", "/a\",\"x\":\"", "/a\\", "-S", "", "/a\n"] {
            let disks = [Path::new(path)];
            let refused = template(&GOOD).command(&values(&disks));
            assert!(matches!(refused, Err(TemplateError::Special { .. })), "{path}");
        }
    }

    #[test]
    fn the_machine_type_is_found() {
        assert_eq!(template(&["q", "-M", "q35"]).machine(), Some("q35"));
        assert_eq!(
            template(&["q", "-machine", "accel=kvm,type=pc"]).machine(),
            Some("pc")
        );
        assert_eq!(
            template(&["q", "-machine", "pc-q35-7.2,accel=tcg"]).machine(),
            Some("pc-q35-7.2")
        );
        assert_eq!(template(&["q", "-machine", "accel=tcg"]).machine(), None);
    }

    proptest! {
        #[test]
        fn any_template_is_survived(parts in proptest::collection::vec("[{}a-z0-9\"é,-]{0,12}", 0..6)) {
            let disks = [Path::new("/d")];
            let _ = Template(parts.clone()).command(&values(&disks));
            let _ = Template(parts).machine();
        }
    }
}
