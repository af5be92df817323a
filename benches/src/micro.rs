//! Figures of the micro-benchmarks, as criterion leaves them in its folder.
//!
//! Owns reading them and their table. Leaves alone measuring (`benches/`). Promises that what cannot be read is left out, not
//! guessed.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One benchmark.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Micro {
    pub group: String,
    pub name: String,
    /// Median time of one pass.
    pub nanoseconds: f64,
    /// Raw bytes of one pass; none where only time counts.
    pub bytes: Option<u64>,
}

/// Reads all that lies below criterion's folder (`target/criterion`).
///
/// # Errors
/// When a folder cannot be read; none where there is no such folder.
pub fn read(folder: &Path) -> io::Result<Vec<Micro>> {
    let mut found = Vec::new();
    look(folder, &mut found)?;
    found.sort_by(|one, two| (&one.group, &one.name).cmp(&(&two.group, &two.name)));
    Ok(found)
}

fn look(folder: &Path, found: &mut Vec<Micro>) -> io::Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.ends_with("new") {
            found.extend(one(&path));
        } else {
            look(&path, found)?;
        }
    }
    Ok(())
}

fn one(folder: &Path) -> Option<Micro> {
    let json = |name: &str| -> Option<Value> {
        serde_json::from_str(&fs::read_to_string(folder.join(name)).ok()?).ok()
    };
    let (about, estimates) = (json("benchmark.json")?, json("estimates.json")?);
    let group = about["group_id"].as_str()?.to_owned();
    Some(Micro {
        name: about["function_id"].as_str().unwrap_or(&group).to_owned(),
        group,
        nanoseconds: estimates["median"]["point_estimate"].as_f64()?,
        bytes: about["throughput"]["Bytes"].as_u64(),
    })
}

/// As a table, one row each.
pub fn table(all: &[Micro]) -> String {
    let mut text = String::from(
        "Per core, in bytes of raw data; `copy` is what the memory of this machine does, the ceiling of all that reads and writes.\n\n\
         | group | part | time | GB/s |\n|---|---|---:|---:|\n",
    );
    for one in all {
        let speed = one.bytes.map(|bytes| bytes as f64 / one.nanoseconds.max(1e-3));
        let speed = speed.map_or_else(|| "-".to_owned(), |speed| format!("{speed:.2}"));
        let _ = writeln!(
            text,
            "| {} | {} | {} | {speed} |",
            one.group,
            one.name,
            time(one.nanoseconds)
        );
    }
    text
}

fn time(nanoseconds: f64) -> String {
    match nanoseconds {
        ns if ns < 1e3 => format!("{ns:.0} ns"),
        ns if ns < 1e6 => format!("{:.1} us", ns / 1e3),
        ns => format!("{:.1} ms", ns / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn criterions_files_are_understood_and_others_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let put = |place: &str, about: &str| {
            let new = folder.path().join(place).join("new");
            fs::create_dir_all(&new).unwrap();
            fs::write(new.join("benchmark.json"), about).unwrap();
            fs::write(
                new.join("estimates.json"),
                r#"{"median": {"point_estimate": 50000.0}}"#,
            )
            .unwrap();
        };
        put(
            "blocks/xor",
            r#"{"group_id": "blocks", "function_id": "xor", "throughput": {"Bytes": 1000000}}"#,
        );
        put(
            "header encode",
            r#"{"group_id": "header encode", "function_id": null, "throughput": null}"#,
        );
        put("broken", "{");
        let found = read(folder.path()).unwrap();
        assert_eq!(found.len(), 2);
        let text = table(&found);
        assert!(text.contains("| blocks | xor | 50.0 us | 20.00 |"), "{text}");
        assert!(
            text.contains("| header encode | header encode | 50.0 us | - |"),
            "{text}"
        );
        assert_eq!(read(&folder.path().join("absent")).unwrap(), []);
    }
}
