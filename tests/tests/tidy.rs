//! What the compiler does not check: structure, names, documents, configs, licences.
//!
//! Owns the rules of ARCHITECTURE.md and CONTRIBUTING.md as far as a program can see them. Each rule gathers every offence before it fails, so
//! that one run shows all there is to mend. Reads the files that git knows, and never writes.

#![allow(clippy::unwrap_used, reason = "a rule that cannot read a file has failed")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::CommandFactory;
use longhaul_agent::settings::AgentSettings;
use longhaul_agent::vm::incoming::{Template, Values};
use longhaul_common::settings::parse;
use longhaul_gateway::job::spec::JobSpec;
use longhaul_gateway::operator::Arguments;
use longhaul_gateway::settings::GatewaySettings;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Lines of a source file, its tests left out.
const FILE_LINES_MAX: usize = 500;
const ARCHITECTURE_LINES_MAX: usize = 200;

/// One dependency, one door: the places that may use a crate.
const DOORS: &[(&str, &[&str])] = &[
    ("quinn", &["common/src/link/"]),
    ("quinn_proto", &["common/src/link/"]),
    ("rustls", &["common/src/link/"]),
    ("webpki", &["common/src/link/"]),
    ("x509_parser", &["common/src/link/"]),
    ("socket2", &["common/src/link/"]),
    ("arc_swap", &["common/src/link/"]),
    ("postcard", &["common/src/wire/"]),
    ("config", &["common/src/settings/"]),
    ("serde_path_to_error", &["common/src/settings/"]),
    ("strsim", &["common/src/settings/"]),
    ("toml", &["common/src/settings/", "gateway/src/operator/check.rs"]),
    ("metrics_exporter_prometheus", &["common/src/telemetry.rs"]),
    ("tracing_subscriber", &["common/src/telemetry.rs"]),
    ("lz4_flex", &["gateway/src/reduction/"]),
    ("zstd", &["gateway/src/reduction/"]),
    ("aws_lc_rs", &["gateway/src/reduction/"]),
    ("rusqlite", &["gateway/src/store/"]),
    ("rcgen", &["gateway/src/pki/"]),
    ("axum", &["gateway/src/api/"]),
    ("tokio_rustls", &["gateway/src/api/"]),
    ("futures_core", &["gateway/src/api/"]),
    // Types that the API shows describe themselves where they are declared.
    (
        "utoipa",
        &["gateway/src/api/", "gateway/src/job/", "gateway/src/store/"],
    ),
    (
        "hyper",
        &["gateway/src/api/connections.rs", "gateway/src/operator/client.rs"],
    ),
    (
        "hyper_util",
        &["gateway/src/api/connections.rs", "gateway/src/operator/client.rs"],
    ),
    ("http_body_util", &["gateway/src/operator/client.rs"]),
    ("indicatif", &["gateway/src/operator/bars.rs"]),
    // Times of day in caps; dates in certificates and in the journal.
    (
        "jiff",
        &[
            "common/src/link/congestion/",
            "common/src/settings/sections.rs",
            "gateway/src/job/driver.rs",
            "gateway/src/pki/",
        ],
    ),
    // QMP, QEMU's tools and records on disk; the API and what it shows.
    (
        "serde_json",
        &[
            "agent/src/disk/apply/qcow2_server.rs",
            "agent/src/disk/image/",
            "agent/src/session/live/",
            "agent/src/session/target_disks.rs",
            "agent/src/vm/",
            "common/src/link/identity.rs",
            "gateway/src/api/",
            "gateway/src/operator/",
            "gateway/src/pki/",
            "gateway/src/store/",
            "benches/src/",
            "tests/src/",
        ],
    ),
    // Open-file-description locks, the one thing that rustix lacks.
    (
        "nix",
        &[
            "agent/src/disk/image/locks.rs",
            "agent/src/disk/apply/image_lock.rs",
        ],
    ),
    ("crc32c", &["agent/src/disk/"]),
    ("crc32fast", &["agent/src/disk/volume/"]),
    (
        "blake3",
        &[
            "agent/src/disk/scan.rs",
            "agent/src/vm/facts/cpu.rs",
            "agent/src/vm/journal/slot.rs",
            "common/src/digest.rs",
            "common/src/link/reset.rs",
            "common/src/wire/batch.rs",
            "gateway/src/reduction/",
            "tests/src/guest/",
        ],
    ),
    ("tun_rs", &["tests/src/wan/"]),
];

/// A module, and what it may see of its siblings: a whole module, or a single one within it.
type Layer = (&'static str, &'static [&'static str]);

/// The layers of each crate.
const LAYERS: &[(&str, &[Layer])] = &[
    (
        "gateway",
        &[
            ("operator", &["api", "job", "pki", "settings", "store"]),
            ("api", &["job", "metrics", "send", "settings", "store"]),
            ("metrics", &["job", "receive", "send", "store"]),
            ("job", &["agents", "send", "store"]),
            // Of `metrics`, names to count under.
            ("receive", &["agents", "metrics", "reduction", "settings"]),
            ("agents", &["send::ingest", "settings"]),
            ("send", &["job::ledger", "metrics", "reduction", "settings"]),
            (
                "store",
                &["job::ledger", "job::progress", "job::report", "job::spec"],
            ),
            ("reduction", &[]),
            ("pki", &[]),
            ("settings", &[]),
        ],
    ),
    (
        "agent",
        &[
            ("session", &["disk", "metrics", "settings", "vm"]),
            ("metrics", &[]),
            ("vm", &["disk"]),
            ("disk", &[]),
            ("settings", &[]),
        ],
    ),
    (
        "common",
        &[
            ("startup", &["link", "settings", "telemetry", "wire"]),
            ("wire", &["digest", "extent", "ids", "link"]),
            ("settings", &["link", "units"]),
            ("digest", &["extent"]),
            ("link", &[]),
            ("extent", &[]),
            ("ids", &[]),
            ("telemetry", &[]),
            ("units", &[]),
        ],
    ),
];

/// Crates of the workspace that a crate may not see.
const FOREIGN: &[(&str, &[&str])] = &[
    ("common", &["longhaul_agent", "longhaul_gateway", "longhaul_lab"]),
    ("agent", &["longhaul_gateway", "longhaul_lab"]),
    ("gateway", &["longhaul_agent", "longhaul_lab"]),
];

/// Names that say nothing.
const EMPTY_NAMES: [&str; 9] = [
    "util", "utils", "helper", "helpers", "manager", "managers", "misc", "stuff", "shared",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// What git knows, and what is new and not ignored.
fn files() -> Vec<String> {
    let mut git = Command::new("git");
    git.args([
        "-c",
        "safe.directory=*",
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
    ]);
    let output = git
        .current_dir(root())
        .output()
        .expect("git is needed: apt-get install git");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let listed = String::from_utf8(output.stdout).unwrap();
    let there = |path: &&str| root().join(path).is_file();
    listed.lines().filter(there).map(str::to_owned).collect()
}

fn rust_files() -> Vec<String> {
    files().into_iter().filter(|path| path.ends_with(".rs")).collect()
}

/// Source files of the programs: no tests, no benches.
fn program_files() -> Vec<String> {
    let program = |path: &String| path.contains("/src/") && !path.ends_with("/tests.rs");
    rust_files().into_iter().filter(program).collect()
}

/// The lines of a file up to its tests.
fn without_tests(text: &str) -> Vec<&str> {
    let lines: Vec<_> = text.lines().collect();
    let tests = lines
        .windows(2)
        .position(|pair| pair[0] == "#[cfg(test)]" && pair[1].contains("mod tests"));
    lines[..tests.unwrap_or(lines.len())].to_vec()
}

/// The same, comments left out.
fn code(text: &str) -> String {
    let lines = without_tests(text)
        .into_iter()
        .filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Whether `text` has `word` with nothing of a name before it.
fn has(text: &str, word: &str) -> bool {
    let apart = |at: usize| !text[..at].ends_with(|c: char| c.is_alphanumeric() || "_:.\"`$}".contains(c));
    text.match_indices(word).any(|(at, _)| apart(at))
}

#[track_caller]
fn none(offences: &[String], rule: &str) {
    assert!(offences.is_empty(), "{rule}:\n  {}", offences.join("\n  "));
}

#[test]
fn a_dependency_is_used_behind_its_door_only() {
    let mut offences = Vec::new();
    for path in program_files() {
        let code = code(&read(&path));
        for (dependency, doors) in DOORS {
            if has(&code, &format!("{dependency}::")) && !doors.iter().any(|door| path.starts_with(door)) {
                offences.push(format!(
                    "{path} uses {dependency}; its door is {}",
                    doors.join(", ")
                ));
            }
        }
    }
    none(&offences, "one dependency, one door");
}

#[test]
fn dependencies_point_one_way() {
    let mut offences = Vec::new();
    for path in program_files() {
        let code = code(&read(&path));
        let (package, rest) = path.split_once("/src/").unwrap();
        for (of, foreign) in FOREIGN {
            let seen = foreign
                .iter()
                .filter(|name| of == &package && has(&code, &format!("{name}::")));
            offences.extend(seen.map(|name| format!("{path} sees {name}")));
        }
        let Some((_, layers)) = LAYERS.iter().find(|(of, _)| of == &package) else {
            continue;
        };
        let module = rest.split(['/', '.']).next().unwrap();
        for (at, _) in code.match_indices("crate::") {
            let seen: String = code[at + 7..]
                .chars()
                .take_while(|c| c.is_alphanumeric() || "_:".contains(*c))
                .collect();
            let first = seen.split("::").next().unwrap();
            let known = layers.iter().any(|(name, _)| *name == first);
            let allowed = layers
                .iter()
                .find(|(name, _)| *name == module)
                .map(|(_, allowed)| *allowed);
            let fine = allowed.is_none_or(|allowed| {
                allowed
                    .iter()
                    .any(|name| seen == *name || seen.starts_with(&format!("{name}::")))
            });
            if known && first != module && !fine {
                offences.push(format!("{path} sees {seen}"));
            }
        }
    }
    none(&offences, "the layers of ARCHITECTURE.md");
}

#[test]
fn every_layer_is_a_module_and_every_module_has_a_layer() {
    for (package, layers) in LAYERS {
        let library = read(&format!("{package}/src/lib.rs"));
        let modules: BTreeSet<_> = library
            .lines()
            .filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'))
            .collect();
        let known: BTreeSet<_> = layers.iter().map(|(name, _)| *name).collect();
        assert_eq!(modules, known, "{package}/src/lib.rs and LAYERS");
    }
}

#[test]
fn every_source_file_says_what_it_is_and_stays_short() {
    let mut offences = Vec::new();
    for path in rust_files() {
        let text = read(&path);
        if !text.starts_with("//!") {
            offences.push(format!("{path} does not open with a //! header"));
        }
        let lines = without_tests(&text).len();
        if lines > FILE_LINES_MAX && path.contains("/src/") && !path.ends_with("/tests.rs") {
            offences.push(format!("{path} has {lines} lines without its tests"));
        }
        let parts = path.trim_end_matches(".rs").split('/');
        offences.extend(
            parts
                .filter(|part| EMPTY_NAMES.contains(part))
                .map(|part| format!("{path}: '{part}' says nothing")),
        );
    }
    none(&offences, "headers, lengths and names of files");
}

#[test]
fn nothing_is_left_for_later_or_switched_off() {
    // In two parts, so that this file does not offend itself.
    let marks = [
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
        concat!("dbg", "!("),
        concat!("#[ig", "nore"),
        concat!("FIX", "ME"),
        concat!("TO", "DO"),
        concat!("XX", "X"),
        concat!("allow(unsafe", "_code"),
    ];
    let mut offences = Vec::new();
    for path in rust_files() {
        for (number, line) in read(&path).lines().enumerate() {
            let found = marks.iter().filter(|mark| line.contains(**mark));
            offences.extend(found.map(|mark| format!("{path}:{}: {mark}", number + 1)));
            // A test may be one long table, and one of several that share a bench may not use all of it.
            let silenced = [
                concat!("allow(dead", "_code"),
                concat!("allow(clippy::too_many", "_lines"),
            ];
            if path.contains("/src/") && silenced.iter().any(|lint| line.contains(lint)) {
                offences.push(format!("{path}:{}: a lint is silenced", number + 1));
            }
            if silenced.iter().any(|lint| line.contains(lint)) && !line.contains("reason = ") {
                offences.push(format!(
                    "{path}:{}: a lint is silenced without a reason",
                    number + 1
                ));
            }
            let word = concat!("un", "safe ");
            if has(line, word) && !line.trim_start().starts_with("//") && !line.contains('"') {
                offences.push(format!("{path}:{}: {word}", number + 1));
            }
        }
    }
    none(
        &offences,
        "nothing is left for later, nothing is switched off, nothing is unsafe",
    );
    assert!(
        read("clippy.toml").contains("too-many-lines-threshold = 70"),
        "functions have at most 70 lines"
    );
}

#[test]
fn no_machine_is_known_here() {
    let places = [
        concat!("/ho", "me/"),
        concat!("/ro", "ot/"),
        concat!("/wo", "rk/"),
        concat!("/Us", "ers/"),
    ];
    let mut offences = Vec::new();
    for path in files() {
        let Ok(text) = std::fs::read_to_string(root().join(&path)) else {
            continue;
        };
        let markers = ["<<<<<<< ", ">>>>>>> "];
        if text
            .lines()
            .any(|line| markers.iter().any(|marker| line.starts_with(marker)))
        {
            offences.push(format!("{path} holds both sides of a merge"));
        }
        let found = places
            .iter()
            .filter(|place| has(&text, place) || text.contains(&format!("\"{place}")));
        offences.extend(found.map(|place| format!("{path} names {place}")));
    }
    let sources = read("Cargo.lock");
    let sources: BTreeSet<_> = sources
        .lines()
        .filter_map(|line| line.strip_prefix("source = "))
        .collect();
    let crates_io = "\"registry+https://github.com/rust-lang/crates.io-index\"";
    offences.extend(
        sources
            .into_iter()
            .filter(|from| *from != crates_io)
            .map(|from| format!("Cargo.lock: {from}")),
    );
    if read(".cargo/config.toml").contains("[source") {
        offences.push(".cargo/config.toml replaces a registry".to_owned());
    }
    none(&offences, "paths and hosts of one machine have no place here");
}

/// The file with every commented setting switched on, lists over several lines and tables included.
fn all_on(text: &str) -> String {
    let mut within = false;
    let mut on = |line: &str| {
        let Some(rest) = line.strip_prefix('#') else {
            return line.to_owned();
        };
        let setting = rest.starts_with(|c: char| c.is_ascii_lowercase()) && rest.contains(" = ");
        let table = rest.starts_with('[') && rest.ends_with(']');
        if !(within || setting || table) {
            return line.to_owned();
        }
        within = if within { rest != "]" } else { rest.ends_with('[') };
        rest.to_owned()
    };
    text.lines().map(&mut on).collect::<Vec<_>>().join("\n")
}

/// Every key below `value` and what it holds; entries of a list of tables share their names.
fn flatten(prefix: &str, value: &Value, into: &mut BTreeMap<String, Value>) {
    let below = |name: &str| {
        if prefix.is_empty() {
            name.to_owned()
        } else {
            format!("{prefix}.{name}")
        }
    };
    match value {
        Value::Object(map) => map
            .iter()
            .for_each(|(name, value)| flatten(&below(name), value, into)),
        Value::Array(list) if list.iter().any(Value::is_object) => {
            list.iter().for_each(|value| flatten(prefix, value, into));
        }
        value => drop(into.insert(prefix.to_owned(), value.clone())),
    }
}

fn flat<T: Serialize>(value: &T) -> BTreeMap<String, Value> {
    let mut keys = BTreeMap::new();
    flatten("", &serde_json::to_value(value).unwrap(), &mut keys);
    keys
}

fn settings<T: DeserializeOwned>(path: &str, text: &str) -> T {
    parse(Path::new(path), text).unwrap_or_else(|error| panic!("{error}"))
}

/// The example shows every key of `T`, and beside each commented one its true default (or an example, where there is none).
fn shows_every_setting<T: Serialize + DeserializeOwned>(path: &str) {
    let text = read(path);
    let (plain, full): (T, T) = (settings(path, &text), settings(path, &all_on(&text)));
    let shown: toml::Table = toml::from_str(&all_on(&text)).unwrap();
    let (plain, full, shown) = (flat(&plain), flat(&full), flat(&shown));
    let hidden = full.keys().filter(|key| !shown.contains_key(*key));
    let mut offences: Vec<_> = hidden.map(|key| format!("{key} is not shown")).collect();
    offences.extend(wrong_defaults(&plain, &full));
    none(&offences, path);
}

/// Settings whose true default is another than the one beside them.
fn wrong_defaults(plain: &BTreeMap<String, Value>, full: &BTreeMap<String, Value>) -> Vec<String> {
    let differs = |(key, value): &(&String, &Value)| {
        // Of a list of tables that is empty by default, an example is shown.
        let example = value.as_array().is_some_and(Vec::is_empty)
            && full
                .keys()
                .any(|shown| shown == *key || shown.starts_with(&format!("{key}.")));
        !value.is_null() && full.get(*key) != Some(*value) && !example
    };
    let wrong = plain.iter().filter(differs);
    wrong
        .map(|(key, value)| format!("{key}: the default is {value}, shown is {:?}", full.get(key)))
        .collect()
}

#[test]
fn the_examples_show_every_setting_and_its_default() {
    shows_every_setting::<AgentSettings>("configs/agent.toml");
    shows_every_setting::<GatewaySettings>("configs/gateway.toml");
    shows_every_setting::<JobSpec>("configs/move.toml");
    shows_every_setting::<JobSpec>("configs/live.toml");
    // Left out of a job where it is as by default: compared by itself.
    let text = read("configs/live.toml");
    let live = |text: &str| flat(&settings::<JobSpec>("configs/live.toml", text).live);
    none(
        &wrong_defaults(&live(&text), &live(&all_on(&text))),
        "[live] of configs/live.toml",
    );
}

/// The agent's example starts a QEMU that would wait, with the job's one disk.
#[test]
fn the_example_of_a_command_is_a_good_template() {
    let text = all_on(&read("configs/agent.toml"));
    let command = settings::<AgentSettings>("configs/agent.toml", &text).vm.command;
    let disk = Path::new("/images/web.img");
    let values = Values {
        disks: &[disk],
        qmp: Path::new("/run/vm.qmp"),
        pid_file: Path::new("/run/vm.pid"),
        name: "web",
        uuid: Some("5e0a1c2f-7c56-4a1b-9d43-3a4f6b1c8e21"),
    };
    let filled = Template(command).command(&values).unwrap();
    assert!(
        filled.iter().any(|word| word.contains("/images/web.img")),
        "{filled:?}"
    );
}

#[test]
fn the_two_sites_are_configured_well() {
    for name in ["gw-a", "gw-b"] {
        let path = format!("configs/two-sites/{name}.toml");
        settings::<GatewaySettings>(&path, &read(&path)).check().unwrap();
    }
    for name in ["hv-a1", "hv-b1"] {
        let path = format!("configs/two-sites/{name}.toml");
        settings::<AgentSettings>(&path, &read(&path)).check().unwrap();
    }
    let jobs = [
        "two-sites/web.toml",
        "two-sites/web-live.toml",
        "move.toml",
        "live.toml",
    ];
    for path in jobs.map(|name| format!("configs/{name}")) {
        settings::<JobSpec>(&path, &read(&path)).check().unwrap();
        settings::<JobSpec>(&path, &all_on(&read(&path))).check().unwrap();
    }
}

#[test]
fn every_metric_is_documented() {
    let text = read("configs/README.md");
    let mut offences = Vec::new();
    for path in program_files() {
        for name in code(&read(&path)).split("\"longhaul_").skip(1) {
            let name = format!("longhaul_{}", name.split('"').next().unwrap());
            let metric = name.ends_with("_total") || path.ends_with("/metrics.rs");
            if metric && !text.contains(&format!("`{name}")) {
                offences.push(format!("{path}: {name}"));
            }
        }
    }
    none(&offences, "metrics that configs/README.md does not name");
}

/// Lines of the `sh` blocks of a document, continued ones joined, comments cut off.
fn shell_lines(text: &str) -> Vec<String> {
    let blocks = text
        .split("```")
        .skip(1)
        .step_by(2)
        .filter_map(|block| block.strip_prefix("sh\n"));
    let joined = blocks
        .map(|block| block.replace("\\\n", " "))
        .collect::<Vec<_>>()
        .join("\n");
    joined
        .lines()
        .map(|line| line.split(" #").next().unwrap_or("").trim().to_owned())
        .collect()
}

#[test]
fn the_documents_name_commands_that_exist() {
    let makefile = read("Makefile");
    let mut offences = Vec::new();
    for document in ["README.md", "CONTRIBUTING.md", "configs/README.md"] {
        let text = read(document);
        let spans = text.split('`').skip(1).step_by(2).map(str::to_owned);
        let commands: Vec<_> = spans.chain(shell_lines(&text)).collect();
        let targets = commands
            .iter()
            .filter_map(|command| command.strip_prefix("make ")?.split(' ').next());
        let unknown = targets.filter(|target| !makefile.contains(&format!("\n{target}: ")));
        offences.extend(unknown.map(|target| format!("{document}: make {target}")));
        for line in shell_lines(&text) {
            let words: Vec<_> = line
                .split_whitespace()
                .skip_while(|word| *word == "sudo")
                .collect();
            if words.first() == Some(&"longhaul")
                && let Err(error) = Arguments::command().try_get_matches_from(&words)
            {
                offences.push(format!("{document}: {line}: {error}"));
            }
        }
    }
    none(&offences, "documents name only what exists");
}

#[test]
fn every_command_of_the_operator_is_documented() {
    let text = read("configs/README.md") + &read("README.md");
    let missing: Vec<_> = Arguments::command()
        .get_subcommands()
        .map(|command| command.get_name().to_owned())
        .filter(|name| {
            name != "help"
                && !text.contains(&format!("longhaul {name}"))
                && !text.contains(&format!("`{name} "))
                && !text.contains(&format!("`{name}`"))
        })
        .collect();
    none(&missing, "commands that no document names");
}

/// Whether a document has the heading that `#anchor` leads to.
fn has_title(document: &str, anchor: &str) -> bool {
    let text = read(document);
    let mut titles = text.lines().filter(|line| line.starts_with("## "));
    titles.any(|title| title[3..].to_lowercase().replace(' ', "-") == anchor)
}

#[test]
fn the_documents_name_paths_that_exist() {
    let architecture = read("ARCHITECTURE.md");
    let lines = architecture.lines().count();
    assert!(
        lines < ARCHITECTURE_LINES_MAX,
        "ARCHITECTURE.md has {lines} lines"
    );
    let mut offences = Vec::new();
    for span in architecture.split('`').skip(1).step_by(2) {
        let path = span.contains('/') && !span.contains([' ', '<', '{', '*', '"']) && !span.starts_with('/');
        if path && !root().join(span).exists() {
            offences.push(format!("ARCHITECTURE.md: {span}"));
        }
    }
    for document in files().iter().filter(|path| path.ends_with(".md")) {
        let folder = root().join(document).parent().unwrap().to_owned();
        for link in read(document)
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next().map(str::to_owned))
        {
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let there = file.is_empty() || folder.join(file).exists();
            let titled = !file.is_empty() || anchor.is_empty() || has_title(document, anchor);
            if !(link.starts_with("http") || there && titled) {
                offences.push(format!("{document}: {link}"));
            }
        }
    }
    none(&offences, "documents name only what exists");
}

/// An SPDX expression, judged by the licences that are allowed.
struct Licence<'a> {
    words: Vec<String>,
    at: usize,
    allowed: &'a BTreeSet<String>,
}

impl Licence<'_> {
    fn holds(text: &str, allowed: &BTreeSet<String>) -> bool {
        // Older crates write "A/B" for "A OR B".
        let text = text.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
        let words = text.split_whitespace().map(str::to_owned).collect();
        let mut licence = Licence {
            words,
            at: 0,
            allowed,
        };
        licence.any() && licence.at == licence.words.len()
    }

    fn take(&mut self, word: &str) -> bool {
        let found = self.words.get(self.at).is_some_and(|next| next == word);
        self.at += usize::from(found);
        found
    }

    fn any(&mut self) -> bool {
        let mut good = self.all();
        while self.take("OR") {
            good |= self.all();
        }
        good
    }

    fn all(&mut self) -> bool {
        let mut good = self.one();
        while self.take("AND") {
            good &= self.one();
        }
        good
    }

    fn one(&mut self) -> bool {
        if self.take("(") {
            let good = self.any();
            return self.take(")") && good;
        }
        let Some(mut name) = self.words.get(self.at).cloned() else {
            // No expression: it cannot end where it should.
            self.at = usize::MAX;
            return false;
        };
        self.at += 1;
        if self.take("WITH") {
            name += &format!(" WITH {}", self.words.get(self.at).map_or("", String::as_str));
            self.at += 1;
        }
        self.allowed.contains(&name)
    }
}

#[test]
fn an_spdx_expression_is_read_as_it_is_meant() {
    let allowed = BTreeSet::from(["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned));
    for good in [
        "MIT",
        "GPL-3.0 OR MIT",
        "MIT/Apache-2.0",
        "(GPL-3.0 OR ISC) AND MIT",
        "Apache-2.0 WITH LLVM-exception OR X",
    ] {
        assert!(Licence::holds(good, &allowed), "{good}");
    }
    for bad in [
        "",
        "GPL-3.0",
        "MIT AND GPL-3.0",
        "MIT OR",
        "(MIT",
        "MIT ISC",
        "Apache-2.0",
    ] {
        assert!(!Licence::holds(bad, &allowed), "{bad}");
    }
}

/// Each crate that is built, with its licence. Exact where the lock file is not: it lists what nobody switches on, too.
fn crates() -> BTreeMap<String, String> {
    let mut tree = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    tree.args([
        "tree",
        "--offline",
        "--locked",
        "--workspace",
        "--prefix",
        "none",
        "--format",
        "{p}\t{l}",
    ]);
    let output = tree.current_dir(root()).output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    let pairs = text.lines().filter_map(|line| line.split_once('\t'));
    pairs
        .map(|(name, licence)| (name.to_owned(), licence.trim_end_matches(" (*)").to_owned()))
        .collect()
}

#[test]
fn licences_and_bans_hold_for_every_crate_that_is_built() {
    let rules: toml::Table = toml::from_str(&read("deny.toml")).unwrap();
    let list = |section: &str, key: &str| rules[section][key].as_array().unwrap().clone();
    let allowed = list("licenses", "allow")
        .iter()
        .map(|name| name.as_str().unwrap().to_owned())
        .collect();
    let banned: BTreeSet<_> = list("bans", "deny")
        .iter()
        .map(|ban| ban["crate"].as_str().unwrap().to_owned())
        .collect();
    let crates = crates();
    assert!(crates.len() > 100, "only {} crates were listed", crates.len());
    let mut offences = Vec::new();
    for (name, licence) in &crates {
        if banned.contains(name.split(' ').next().unwrap()) {
            offences.push(format!("{name} is banned"));
        }
        if !Licence::holds(licence, &allowed) {
            offences.push(format!("{name} has the licence '{licence}'"));
        }
    }
    none(&offences, "deny.toml");
}

/// What our packages in a lock file depend on, by name.
fn locked(path: &str) -> BTreeMap<String, String> {
    let text = read(path);
    let packages = text.split("[[package]]").filter_map(|package| {
        let name = package.split('"').nth(1)?.to_owned();
        let needs = package
            .split_once("dependencies = [")
            .map_or("", |(_, needs)| needs);
        name.starts_with("longhaul-").then(|| (name, needs.to_owned()))
    });
    packages.collect()
}

/// Else they cannot be built without a network, or are built with something else than what is shipped.
#[test]
fn the_fuzz_targets_lock_what_the_programs_need() {
    let workspace: toml::Table = read("Cargo.toml").parse().unwrap();
    let locked = locked("tests/fuzz/Cargo.lock");
    for (folder, name) in [
        ("common", "longhaul-common"),
        ("agent", "longhaul-agent"),
        ("gateway", "longhaul-gateway"),
        ("tests", "longhaul-lab"),
    ] {
        let manifest: toml::Table = read(&format!("{folder}/Cargo.toml")).parse().unwrap();
        for key in manifest["dependencies"].as_table().unwrap().keys() {
            let package = workspace["workspace"]["dependencies"][key].get("package");
            let package = package.and_then(|package| package.as_str()).unwrap_or(key);
            // Where several versions are locked, the name is followed by one.
            let found = ["\"", " "].map(|end| locked[name].contains(&format!("\"{package}{end}")));
            assert!(
                found.contains(&true),
                "{name} needs {package}: run `cargo update --workspace` in tests/fuzz"
            );
        }
    }
}
