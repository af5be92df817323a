//! What a live migration needs in the programs' settings beyond a cold move: the one place that knows.
//!
//! Owns the text that is added to the agents' files and the job file. Leaves alone everything else in them
//! (`programs`). Promises that a change of these keys touches this file only.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::args::LiveArgs;
use super::machine::Machine;
use crate::lab::End;
use crate::programs::JOB_FILE;

/// Folder of an agent for the QMP sockets of its machines.
pub fn qmp_folder(directory: &Path, end: End) -> PathBuf {
    directory.join(format!("{}-agent", end.name())).join("run")
}

/// Socket of the guest agent's channel at an end.
pub fn guest_agent(directory: &Path, end: End) -> String {
    qmp_folder(directory, end)
        .join("web-agent.sock")
        .display()
        .to_string()
}

/// Where the source's disks and, at the target, the copies lie.
pub fn disk(directory: &Path, end: End, number: usize) -> PathBuf {
    let folder = directory.join(format!("{}-agent", end.name())).join("disks");
    folder.join(format!("disk{number}.img"))
}

/// Where the powered-off disk of another job than the guest's lies at an end.
pub fn other_disk(directory: &Path, end: End, name: &str) -> PathBuf {
    disk(directory, end, 0).with_file_name(format!("{name}.img"))
}

/// Writes the file of the job that moves it.
///
/// # Errors
/// When it cannot be written.
pub fn write_other_job(directory: &Path, file: &str, name: &str, format: &str) -> io::Result<()> {
    let [source, target] = [End::Source, End::Target].map(|end| other_disk(directory, end, name));
    let job = format!(
        "kind = \"move\"\nname = \"{name}\"\n[source]\nagent = \"source-agent\"\n\
         [target]\nsite = \"target\"\nagent = \"target-agent\"\n\
         [[disk]]\nsource = \"{}\"\nformat = \"{format}\"\ntarget = \"{}\"\n",
        source.display(),
        target.display(),
    );
    fs::write(directory.join(file), job)
}

/// Adds the folder of QMP sockets to both agents' files, and the command template to the target's; to the source's the one for the way
/// back.
///
/// # Errors
/// When a file cannot be read or written, or has no paths to add to.
pub fn extend(directory: &Path, template: &Machine, home: Option<&Machine>) -> io::Result<()> {
    for end in [End::Source, End::Target] {
        let file = directory.join(format!("{}-agent.toml", end.name()));
        let text = fs::read_to_string(&file)?;
        let Some((before, after)) = text.split_once("[paths]\n") else {
            return Err(io::Error::other(format!("{} has no [paths]", file.display())));
        };
        let folder = qmp_folder(directory, end);
        let mut text = format!("{before}[paths]\nqmp = [\"{}\"]\n{after}", folder.display());
        let template = match end {
            End::Source => home,
            End::Target => Some(template),
        };
        if let Some(template) = template {
            let _ = writeln!(text, "[vm]\ncommand = {}", array(&template.words()));
        }
        fs::write(file, text)?;
    }
    Ok(())
}

/// Adds words at the end of an agent's file.
///
/// # Errors
/// When it cannot be written.
pub fn add(directory: &Path, end: End, words: &str) -> io::Result<()> {
    let file = directory.join(format!("{}-agent.toml", end.name()));
    let text = fs::read_to_string(&file)?;
    fs::write(file, text + words)
}

/// Writes the job file.
///
/// # Errors
/// When it cannot be written.
pub fn write_job(directory: &Path, machine: &Machine, args: &LiveArgs) -> io::Result<()> {
    let text = job(directory, machine, [End::Source, End::Target], args);
    fs::write(directory.join(JOB_FILE), text)
}

/// Writes the job file for the way back of a machine that the job `arrived` has brought; gives the file's name.
///
/// # Errors
/// When it cannot be written.
pub fn write_job_back(
    directory: &Path,
    machine: &Machine,
    arrived: &str,
    args: &LiveArgs,
) -> io::Result<&'static str> {
    let socket = format!("vm-{}.qmp", arrived.get(..8).unwrap_or_default());
    let socket = qmp_folder(directory, End::Target).join(socket);
    let mut machine = machine.clone();
    machine.qmp = socket.display().to_string();
    let text = job(directory, &machine, [End::Target, End::Source], args);
    fs::write(directory.join("back.toml"), text)?;
    Ok("back.toml")
}

fn job(directory: &Path, machine: &Machine, [from, to]: [End; 2], args: &LiveArgs) -> String {
    let (from, site) = (from.name(), to.name());
    let format = match to {
        End::Source => args.format.as_str(),
        End::Target => args.target_format(),
    };
    let mut job = format!(
        "kind = \"live\"\nname = \"{}\"\n{}[source]\nagent = \"{from}-agent\"\nqmp = \"{}\"\n",
        machine.name,
        args.ideas.job(),
        machine.qmp
    );
    if let Some(socket) = &machine.guest_agent {
        let _ = writeln!(job, "guest_agent = \"{socket}\"");
    }
    let _ = write!(
        job,
        "[target]\nsite = \"{site}\"\nagent = \"{site}-agent\"\n[live]\n"
    );
    let spans = [("blackout", args.blackout), ("give_up", args.give_up)];
    for (key, span) in spans {
        if let Some(span) = span {
            let _ = writeln!(job, "{key} = \"{} ms\"", span.0.as_millis());
        }
    }
    if let Some(age) = &args.proof_age {
        let _ = writeln!(job, "free_proof_age = \"{age}\"");
    }
    if args.fstrim {
        job += "fstrim = true\n";
    }
    for number in 0..machine.disks.len() {
        let target = disk(directory, to, number);
        let _ = write!(
            job,
            "[[disk]]\nsource = \"disk{number}\"\ntarget = \"{}\"\ntarget_format = \"{format}\"\n",
            target.display(),
        );
    }
    if machine.vars.is_some() {
        let target = disk(directory, to, machine.disks.len());
        let _ = write!(
            job,
            "[[disk]]\nsource = \"pflash1\"\ntarget = \"{}\"\n",
            target.display()
        );
    }
    job
}

/// A TOML array of strings.
fn array(words: &[String]) -> String {
    let quoted: Vec<_> = words
        .iter()
        .map(|word| format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\"")))
        .collect();
    format!("[{}]", quoted.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_in_a_toml_array() {
        let words = ["a b", "say \"x\"", "back\\slash"].map(str::to_owned);
        let text = format!("command = {}", array(&words));
        let table: toml::Table = text.parse().unwrap();
        let read: Vec<_> = table["command"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|word| word.as_str())
            .collect();
        assert_eq!(read, words);
    }
}
