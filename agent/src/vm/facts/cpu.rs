//! CPUs: what the guest sees, and what the host has.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{CpuFacts, FactsError};
use crate::vm::qmp::wire::printable;
use crate::vm::qmp::{Qmp, QmpError};

/// Ends the type's name of every x86 CPU model.
const TYPE_END: &str = "-x86_64-cpu";
/// Most CPUID words that are kept.
const WORDS_MAX: usize = 256;
/// What makes one host's CPU another than the next's: everything that `-cpu host` hands through.
const HOST_LINES: [&str; 6] = [
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "stepping",
    "flags",
];

/// The CPU of the host itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCpu {
    /// Its name, for people.
    pub name: String,
    /// Of family, model, stepping and all flags; None where the system does not tell.
    pub digest: Option<[u8; 32]>,
}

impl HostCpu {
    /// This host's; of nothing where /proc is not there. Reads one small file of the kernel.
    pub fn read() -> Self {
        let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self::from_cpuinfo(&text)
    }

    /// From the text of /proc/cpuinfo: its first processor.
    pub fn from_cpuinfo(text: &str) -> Self {
        let mut name = String::new();
        let mut told = String::new();
        for line in text.lines().take_while(|line| !line.trim().is_empty()) {
            let Some((key, value)) = line.split_once(':') else {
                continue;
            };
            let (key, value) = (key.trim(), value.trim());
            if key == "model name" {
                name = printable(value);
            }
            if HOST_LINES.contains(&key) {
                told.push_str(&format!("{key}={value}\n"));
            }
        }
        let digest = (!told.is_empty()).then(|| *blake3::hash(told.as_bytes()).as_bytes());
        Self { name, digest }
    }
}

/// What the guest sees, asked of the first virtual CPU.
pub(super) async fn gather(qmp: &Qmp) -> Result<CpuFacts, FactsError> {
    let cpus: Vec<Value> = qmp.query("query-cpus-fast").await?;
    let path = cpus.first().and_then(|cpu| cpu["qom-path"].as_str());
    let path = path.ok_or_else(|| QmpError::answer("query-cpus-fast", "no CPU"))?;
    let get = |property: &'static str| {
        qmp.query_with::<Value>("qom-get", json!({ "path": path, "property": property }))
    };
    let kind = get("type").await?;
    let kind = kind.as_str().unwrap_or_default();
    let model = printable(kind.strip_suffix(TYPE_END).unwrap_or(kind));
    let words = match get("feature-words").await {
        Ok(words) => words,
        // Not an x86 machine: no words to compare.
        Err(error) if error.is_refusal() => Value::Null,
        Err(error) => return Err(error.into()),
    };
    Ok(CpuFacts {
        is_migration_safe: is_migration_safe(qmp, kind).await?,
        count: u32::try_from(cpus.len()).unwrap_or(u32::MAX),
        features: features(&words),
        model,
    })
}

async fn is_migration_safe(qmp: &Qmp, kind: &str) -> Result<Option<bool>, FactsError> {
    let models: Vec<Value> = match qmp.query("query-cpu-definitions").await {
        Ok(models) => models,
        Err(error) if error.is_refusal() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let model = models.iter().find(|model| model["typename"] == kind);
    Ok(model.and_then(|model| model["migration-safe"].as_bool()))
}

fn features(words: &Value) -> BTreeMap<String, u32> {
    let words = words.as_array().into_iter().flatten().take(WORDS_MAX);
    let entries = words.filter_map(|word| {
        let leaf = word["cpuid-input-eax"].as_u64()?;
        let subleaf = word["cpuid-input-ecx"].as_u64().unwrap_or_default();
        let register = word["cpuid-register"].as_str()?;
        let bits = u32::try_from(word["features"].as_u64()?).ok()?;
        Some((format!("{leaf:#x}.{subleaf}.{}", printable(register)), bits))
    });
    // One word may come in parts.
    entries.fold(BTreeMap::new(), |mut all, (key, bits)| {
        *all.entry(key).or_default() |= bits;
        all
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_differ_by_flags_not_by_clock() {
        let host = |mhz: &str, flags: &str| {
            HostCpu::from_cpuinfo(&format!(
                "processor\t: 0\nmodel name\t: X 1\ncpu MHz\t: {mhz}\nflags\t: {flags}\n\nprocessor : 1\n"
            ))
        };
        assert_eq!(host("1", "sse"), host("2", "sse"));
        assert_ne!(host("1", "sse"), host("1", "sse avx"));
        assert_eq!(host("1", "sse").name, "X 1");
        assert_eq!(HostCpu::from_cpuinfo("").digest, None);
    }

    #[test]
    fn words_in_parts_are_one() {
        let words = json!([
            { "cpuid-register": "EAX", "cpuid-input-eax": 13, "cpuid-input-ecx": 1, "features": 1 },
            { "cpuid-register": "EAX", "cpuid-input-eax": 13, "cpuid-input-ecx": 1, "features": 4 },
            { "cpuid-register": 7, "features": -1 },
        ]);
        assert_eq!(features(&words), BTreeMap::from([("0xd.1.EAX".to_owned(), 5)]));
    }
}
