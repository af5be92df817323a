//! Mistakes in job files, images and paths: what the operator reads, and the exit code.

use std::fs;

use crate::site::{Running, Sites, said, wait};

fn running() -> Running {
    let running = Running::start(Sites::new(&[]));
    let sites = &running.sites;
    fs::write(sites.path("source-agent/disks/disk"), vec![7; 300_000]).unwrap();
    fs::write(sites.path("target-agent/disks/there"), "mine").unwrap();
    running
}

/// `longhaul run`, `plan` and `check` refuse the file itself.
#[test]
fn a_mistake_in_the_file_is_named_before_anything_is_asked() {
    let running = running();
    let good = running.sites.job("disk", "copy");
    let cases: &[(&str, String, &[&str])] = &[
        (
            "unknown key",
            good.replace("format", "fromat"),
            &["disk[0].fromat", "did you mean 'format'"],
        ),
        (
            "unknown section",
            good.clone() + "[soruce]\n",
            &["'soruce'", "did you mean 'source'"],
        ),
        (
            "kind",
            good.replace("\"move\"", "\"teleport\""),
            &["kind", "move"],
        ),
        (
            "no disk",
            good.split("[[disk]]").next().unwrap().to_owned(),
            &["disk"],
        ),
        (
            "relative",
            good.replace(&running.sites.path("source-agent").display().to_string(), "here"),
            &["not absolute"],
        ),
        (
            "target format",
            good.clone() + "target_format = \"vmdk\"\n",
            &["target_format", "vmdk", "qcow2"],
        ),
        ("empty", good.replace("\"bad\"", "\"\""), &["name is empty"]),
        (
            "twice",
            good.clone() + &good[good.find("[[disk]]").unwrap()..],
            &["disks 0 and 1", "same"],
        ),
        ("type", good.replace("\"bad\"", "7"), &["name"]),
        (
            "control",
            good.replace("/copy\"", "/co\\npy\""),
            &["target", "control"],
        ),
    ];
    for (what, text, words) in cases {
        let file = running.sites.write("bad-job.toml", text).display().to_string();
        for command in ["run", "plan", "check"] {
            let output = running.sites.finish(running.longhaul(&[command, &file]));
            let text = said(&output);
            assert_eq!(output.status.code(), Some(2), "{what}, {command}: {text}");
            assert_eq!(text.lines().count(), 1, "{what}, {command}: {text}");
            for word in *words {
                assert!(
                    text.contains(word),
                    "{what}, {command}: '{word}' is missing in {text}"
                );
            }
        }
    }
    let output = running
        .sites
        .finish(running.longhaul(&["run", "/nowhere/job.toml"]));
    assert!(output.status.code() == Some(2) && said(&output).contains("/nowhere/job.toml"));
    let lonely = running
        .sites
        .command("longhaul", &["--api", "/nowhere/api", "status"]);
    let output = running.sites.finish(lonely);
    assert!(
        output.status.code() == Some(3) && said(&output).contains("/nowhere/api"),
        "{}",
        said(&output)
    );
    for (words, code, said_word) in [
        (vec!["status", "ffff"], 4, "no job 'ffff'"),
        (vec!["watch", "../../etc"], 4, "no job"),
        (vec!["cancel", "a b"], 4, "no job"),
        (vec!["pause", "\u{1}"], 4, "no job"),
    ] {
        let output = running.sites.finish(running.longhaul(&words));
        let text = said(&output);
        assert!(
            output.status.code() == Some(code) && text.contains(said_word),
            "{words:?}: {text}"
        );
    }
}

#[test]
fn a_job_of_a_tenant_that_the_gateway_does_not_know_never_begins() {
    let running = running();
    let good = running.sites.job("disk", "copy");
    let job = good.replace("name = \"bad\"", "name = \"bad\"\ntenant = \"nobody\"");
    let file = running.sites.write("tenant.toml", &job).display().to_string();
    let output = running.sites.finish(running.longhaul(&["run", &file]));
    let text = said(&output);
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(
        text.contains("tenant 'nobody'; add it to reduction.tenants") && text.contains("known: none"),
        "{text}"
    );
    let output = running.sites.finish(running.longhaul(&["status", "--json"]));
    assert!(
        !String::from_utf8_lossy(&output.stdout).contains("nobody"),
        "{output:?}"
    );
}

/// The agents refuse; the job fails with their sentence, the plan shows it, nothing is left behind.
#[test]
fn what_only_the_agents_can_see_fails_the_job_in_one_sentence() {
    let mut running = running();
    let sites = &running.sites;
    let outside = sites.write("outside", "secret").display().to_string();
    std::os::unix::fs::symlink(&outside, sites.path("source-agent/disks/link")).unwrap();
    fs::create_dir(sites.path("source-agent/disks/folder")).unwrap();
    fs::write(sites.path("source-agent/disks/empty"), "").unwrap();
    let huge = fs::File::create(sites.path("source-agent/disks/huge")).unwrap();
    huge.set_len(1 << 42).unwrap();
    drop(huge);
    let good = sites.job("disk", "copy");
    let read = sites.path("source-agent/disks/disk").display().to_string();
    let written = sites.path("target-agent/disks/copy").display().to_string();
    let with = |from: &str, to: &str| good.replace(from, to);
    let cases: &[(String, &[&str])] = &[
        (sites.job("missing", "copy"), &["missing", "No such file"]),
        (sites.job("folder", "copy"), &["folder"]),
        (
            with(&read, &outside),
            &[&outside, "outside the allowed directories", "config"],
        ),
        (with(&read, "/etc/shadow"), &["/etc/shadow", "outside"]),
        (sites.job("../disks/disk", "copy"), &[".."]),
        (sites.job("link", "copy"), &["link", "outside"]),
        (with("\"raw\"", "\"floppy\""), &["floppy", "known"]),
        (with("\"raw\"", "\"qcow2\""), &["disk", "qcow2"]),
        (sites.job("disk", "there"), &["there", "exists"]),
        (sites.job("disk", "no/such/copy"), &["no/such", "create it"]),
        (with(&written, "/tmp/stranger"), &["/tmp/stranger", "outside"]),
        (
            with(&written, &sites.path("target-agent/disks").display().to_string()),
            &["disks"],
        ),
        (
            good.replace("name = \"bad\"", "name = \"bad\"\ndefinition = \"/etc/shadow\""),
            &["/etc/shadow", "outside"],
        ),
    ];
    for (text, words) in cases {
        let (code, job, said) = running.run(text);
        let message = job["message"].as_str().unwrap_or("").to_owned();
        assert!(
            code == 1 && job["state"] == "failed",
            "{words:?}: {code}, {job}, {said}"
        );
        assert!(
            !message.contains('\n') && !message.is_empty(),
            "{words:?}: {message:?} in {job}"
        );
        for word in *words {
            assert!(message.contains(word), "'{word}' is missing in: {message}");
        }
        let file = sites.write("plan.toml", text).display().to_string();
        let plan = sites.finish(running.longhaul(&["plan", &file, "--json"]));
        assert_eq!(plan.status.code(), Some(1), "{words:?}: {}", self::said(&plan));
    }
    // Too little space: the job waits for it, and says so.
    let agent = "agent = \"target-agent\"";
    let huge = sites
        .job("huge", "copy")
        .replace(agent, &format!("{agent}\npreallocate = true"));
    let file = sites.write("huge.toml", &huge).display().to_string();
    let output = sites.finish(running.longhaul(&["run", &file, "--detach"]));
    let id = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    wait("a message about space", || {
        let output = sites.finish(running.longhaul(&["status", &id, "--json"]));
        let status = String::from_utf8_lossy(&output.stdout).into_owned();
        (status.contains("space") && status.contains("make room")).then_some(())
    });
    let output = sites.finish(running.longhaul(&["cancel", &id]));
    assert!(output.status.success(), "{}", said(&output));
    let _ = sites.finish(running.longhaul(&["watch", &id, "--json"]));
    let unknown = good.replace("site = \"target\"", "site = \"mars\"");
    let (code, _, said) = running.run(&unknown);
    assert!(
        code == 4 && said.contains("'mars'") && said.contains("target"),
        "{code} {said}"
    );
    let left: Vec<_> = fs::read_dir(sites.path("target-agent/disks"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(left, ["there"], "partial copies stay behind");
    assert_eq!(fs::read(sites.path("target-agent/disks/there")).unwrap(), b"mine");
    // And after all that, a good job goes through.
    let (code, job, said) = running.run(&good);
    assert!(code == 0 && job["report"]["equal"] == true, "{job} {said}");
    running.assert_well();
}

/// An agent that is not there is waited for, in words, and a cancelled job ends.
#[test]
fn an_unknown_agent_is_said_to_be_missing() {
    let running = running();
    let text = running
        .sites
        .job("disk", "copy")
        .replace("\"source-agent\"", "\"nobody\"");
    let file = running.sites.write("nobody.toml", &text).display().to_string();
    let output = running
        .sites
        .finish(running.longhaul(&["run", &file, "--detach", "--json"]));
    let record: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let id = record["id"].as_str().unwrap().to_owned();
    wait("a message about the agent", || {
        let output = running.sites.finish(running.longhaul(&["status", &id, "--json"]));
        String::from_utf8_lossy(&output.stdout)
            .contains("agent 'nobody' is not linked")
            .then_some(())
    });
    let output = running.sites.finish(running.longhaul(&["cancel", &id]));
    assert!(output.status.success(), "{}", said(&output));
    let output = running.sites.finish(running.longhaul(&["watch", &id, "--json"]));
    assert_eq!(output.status.code(), Some(5), "{}", said(&output));
}
