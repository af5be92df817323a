//! How a program's settings are read.
//!
//! Owns the layering (file, then `LONGHAUL__SECTION__KEY` from the environment) and the words in which a mistake is explained:
//! file, key, and the nearest key that exists. Leaves alone which settings there are: each program declares its own. Promises
//! that no unknown key is silently ignored.

pub mod sections;

use std::path::{Path, PathBuf};

use config::{Config, Environment, File, FileFormat};
use serde::de::DeserializeOwned;

/// Why settings cannot be used. A sentence with file, key and remedy.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is not valid TOML: {cause}")]
    Syntax { path: PathBuf, cause: String },
    #[error("{path}: unknown key '{key}'{hint}; known here: {known}")]
    UnknownKey {
        path: PathBuf,
        key: String,
        hint: String,
        known: String,
    },
    #[error("{path}: {key}: {cause}")]
    Value {
        path: PathBuf,
        key: String,
        cause: String,
    },
}

/// A settings file larger than this is a mistake, not a config.
const SIZE_MAX: u64 = 1 << 20;

/// Reads settings from `path`, overlaid with `LONGHAUL__*` from the environment.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T, SettingsError> {
    let environment = Environment::with_prefix("LONGHAUL")
        .prefix_separator("__")
        .separator("__");
    read(path, Some(environment))
}

/// Reads a file that the environment does not touch, such as a job.
pub fn load_file<T: DeserializeOwned>(path: &Path) -> Result<T, SettingsError> {
    read(path, None)
}

/// As [`load_file`], from text that came from `path` by another way.
pub fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, SettingsError> {
    build(path, text, None)
}

fn read<T: DeserializeOwned>(path: &Path, environment: Option<Environment>) -> Result<T, SettingsError> {
    let failed = |source| SettingsError::Read {
        path: path.to_owned(),
        source,
    };
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if size > SIZE_MAX {
        return Err(failed(std::io::Error::other(format!(
            "{size} bytes are too many for a config file"
        ))));
    }
    let text = std::fs::read_to_string(path).map_err(failed)?;
    build(path, &text, environment)
}

fn build<T: DeserializeOwned>(
    path: &Path,
    text: &str,
    environment: Option<Environment>,
) -> Result<T, SettingsError> {
    let syntax = |cause: String| SettingsError::Syntax {
        path: path.to_owned(),
        cause,
    };
    // Parsed once by itself: its messages carry line and column, and duplicate keys are refused.
    toml::from_str::<toml::Table>(text).map_err(|error| syntax(placed(text, &error)))?;
    let Some(environment) = environment else {
        let file = toml::Deserializer::parse(text).map_err(|error| syntax(placed(text, &error)))?;
        let read = serde_path_to_error::deserialize(file);
        return read.map_err(|error| explain(path, &error.path().to_string(), error.inner().message()));
    };
    let builder = Config::builder()
        .add_source(File::from_str(text, FileFormat::Toml))
        .add_source(environment);
    let config = builder.build().map_err(|error| syntax(error.to_string()))?;
    serde_path_to_error::deserialize(config).map_err(|error| {
        let place = error.path().to_string();
        // The file by itself has the same mistake, unless it came from the environment; of the file it is said better.
        let better = said_of_file::<T>(text, &place);
        explain(path, &place, &better.unwrap_or_else(|| error.inner().to_string()))
    })
}

/// "line 3, column 7: what is wrong", on one line.
fn placed(text: &str, error: &toml::de::Error) -> String {
    let message = error.message().trim_end().replace('\n', " ");
    let before = error.span().and_then(|span| text.get(..span.start));
    before.map_or_else(
        || message.clone(),
        |before| {
            let line = before.matches('\n').count() + 1;
            let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
            format!("line {line}, column {column}: {message}")
        },
    )
}

fn said_of_file<T: DeserializeOwned>(text: &str, place: &str) -> Option<String> {
    let file = toml::Deserializer::parse(text).ok()?;
    let error = serde_path_to_error::deserialize::<_, T>(file).err()?;
    let same = error.path().to_string().trim_start_matches('.') == place.trim_start_matches('.');
    same.then(|| error.inner().message().trim_end().to_owned())
}

fn explain(path: &Path, place: &str, cause: &str) -> SettingsError {
    let path = path.to_owned();
    let Some((unknown, known)) = unknown_field(cause) else {
        let cause = cause
            .split(" for key `")
            .next()
            .unwrap_or(cause)
            .replace('\n', " ");
        return SettingsError::Value {
            path,
            key: place.to_owned(),
            cause,
        };
    };
    let near = known
        .iter()
        .map(|key| (strsim::damerau_levenshtein(key, &unknown), key))
        .min();
    let hint = match near {
        Some((distance, key)) if distance <= 1 + key.len() / 3 => format!(" (did you mean '{key}'?)"),
        _ => String::new(),
    };
    let section = place.strip_suffix(&unknown).unwrap_or("").trim_end_matches('.');
    let key = if section.is_empty() || section == "." {
        unknown
    } else {
        format!("{section}.{unknown}")
    };
    SettingsError::UnknownKey {
        path,
        key,
        hint,
        known: known.join(", "),
    }
}

/// serde's sentence "unknown field `x`, expected one of `a`, `b`", taken apart.
fn unknown_field(cause: &str) -> Option<(String, Vec<String>)> {
    let rest = &cause[cause.find("unknown field `")? + "unknown field `".len()..];
    let (unknown, rest) = rest.split_once('`')?;
    let known = rest.split('`').skip(1).step_by(2).map(str::to_owned).collect();
    Some((unknown.to_owned(), known))
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::units::Rate;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        #[serde(default)]
        peer: Vec<Inner>,
        #[serde(rename = "name")]
        _name: String,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        rate: Rate,
    }

    fn refused(text: &str) -> String {
        parse::<Outer>(Path::new("x.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn a_mistake_is_named_with_file_key_and_remedy() {
        let typo = refused("nmae = 'a'");
        assert!(
            typo.contains("x.toml") && typo.contains("'nmae'") && typo.contains("did you mean 'name'"),
            "{typo}"
        );
        let nested = refused("name = 'a'\n[[peer]]\nrat = '1 Mbit/s'");
        assert!(
            nested.contains("rat'") && nested.contains("did you mean 'rate'"),
            "{nested}"
        );
        let value = refused("name = 'a'\n[[peer]]\nrate = '5'");
        assert!(
            value.contains("peer[0].rate") && value.contains("200 Mbit/s"),
            "{value}"
        );
        assert!(refused("name = ").contains("line 1"), "{}", refused("name = "));
        assert!(
            refused("peer = []").contains("missing"),
            "{}",
            refused("peer = []")
        );
    }

    #[test]
    fn a_good_file_is_read() {
        let outer: Outer = parse(Path::new("x.toml"), "name = 'a'\n[[peer]]\nrate = '5 Mbit/s'").unwrap();
        assert_eq!(outer.peer[0].rate, Rate(5_000_000));
    }
}
