//! The HTTP API and the metrics: every described route answers as described, and no client can hold the others up.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::site::{PATIENCE, Running, SOURCE, Sites, wait};

/// One request on a connection of its own: status, content type, body.
fn ask(running: &Running, method: &str, path: &str, body: &str) -> (u16, String, String) {
    let mut stream = UnixStream::connect(running.sites.api(SOURCE)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let _ = stream.write_all(body.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("{method} {path}: {answer:?}"));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .unwrap();
    let kind = head
        .lines()
        .find_map(|line| line.strip_prefix("content-type: "))
        .unwrap_or("")
        .to_owned();
    (
        status,
        kind,
        if head.contains("chunked") {
            unchunk(body)
        } else {
            body.to_owned()
        },
    )
}

fn unchunk(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((len, rest)) = body.split_once("\r\n") {
        let len = usize::from_str_radix(len, 16).unwrap();
        whole += &rest[..len];
        body = rest[len..].trim_start_matches("\r\n");
    }
    whole
}

/// That `value` has the properties its description asks for, and no others; follows references.
fn assert_described(api: &Value, schema: &Value, value: &Value, place: &str) {
    if let Some(reference) = schema["$ref"].as_str() {
        let described = api.pointer(reference.trim_start_matches('#')).unwrap();
        return assert_described(api, described, value, place);
    }
    if let Some(all) = schema["allOf"].as_array() {
        return all
            .iter()
            .for_each(|part| assert_described(api, part, value, place));
    }
    if let Some(items) = schema.get("items") {
        let values = value.as_array().unwrap_or_else(|| panic!("{place}: {value}"));
        return values
            .iter()
            .for_each(|value| assert_described(api, items, value, place));
    }
    let Some(properties) = schema["properties"].as_object() else {
        return;
    };
    let object = value
        .as_object()
        .unwrap_or_else(|| panic!("{place} is no object: {value}"));
    for required in schema["required"].as_array().into_iter().flatten() {
        assert!(
            object.contains_key(required.as_str().unwrap()),
            "{place} lacks {required}: {value}"
        );
    }
    for (key, value) in object {
        let described = properties
            .get(key)
            .unwrap_or_else(|| panic!("{place}.{key} is not described"));
        if !value.is_null() {
            assert_described(api, described, value, &format!("{place}.{key}"));
        }
    }
}

/// Every path and method of the description is asked for, and its answer held against the described status and body.
#[test]
fn every_described_route_answers_as_described() {
    let mut running = Running::start(Sites::new(&[]));
    std::fs::write(running.sites.path("source-agent/disks/disk"), vec![7; 200_000]).unwrap();
    let output = running
        .sites
        .finish(running.sites.command("longhaul", &["openapi"]));
    let api: Value = serde_json::from_slice(&output.stdout).unwrap();
    let (status, kind, served) = ask(&running, "GET", "/openapi.json", "");
    assert!(
        status == 200 && kind == "application/json" && serde_json::from_str::<Value>(&served).unwrap() == api
    );
    let spec = |copy: &str| {
        let text = running.sites.job("disk", copy);
        let spec: longhaul_gateway::job::spec::JobSpec =
            longhaul_common::settings::parse("job.toml".as_ref(), &text).unwrap();
        serde_json::to_string(&spec).unwrap()
    };
    let (_, _, made) = ask(&running, "POST", "/v1/jobs", &spec("copy"));
    let id = serde_json::from_str::<Value>(&made).unwrap()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    wait("the job is done", || {
        ask(&running, "GET", &format!("/v1/jobs/{id}"), "")
            .2
            .contains("completed")
            .then_some(())
    });
    let mut asked = 0;
    for (path, methods) in api["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let real = path.replace("{id}", &id);
            let body = match operation.get("requestBody") {
                None => String::new(),
                Some(_) if path.ends_with("/resolve") => r#"{"run_at": "source"}"#.to_owned(),
                Some(_) if path.ends_with("/forget") => "{}".to_owned(),
                Some(_) => spec("again"),
            };
            let (status, kind, answer) = ask(&running, &method.to_uppercase(), &real, &body);
            let place = format!("{method} {path}");
            let described = &operation["responses"][status.to_string()];
            assert!(
                described.is_object(),
                "{place}: status {status} is not described: {answer}"
            );
            // What is asked of a finished job of a powered-off VM conflicts, and such a VM cannot be prepared; all else succeeds.
            let conflict = ["/pause", "/resume", "/cancel", "/resolve", "/forget"]
                .iter()
                .any(|end| path.ends_with(end));
            assert_eq!(
                status,
                if conflict {
                    409
                } else if path.starts_with("/v1/prepare") {
                    422
                } else if path == "/v1/jobs" && method == "post" {
                    201
                } else {
                    200
                },
                "{place}"
            );
            if let Some(content) = described["content"].as_object() {
                let schema = &content
                    .get(&kind)
                    .unwrap_or_else(|| panic!("{place}: {kind} is not described"))["schema"];
                let last = answer.lines().last().unwrap_or("");
                let value = if kind.contains("ndjson") { last } else { &answer };
                match serde_json::from_str(value) {
                    Ok(value) => assert_described(&api, schema, &value, &place),
                    Err(_) => assert!(kind.starts_with("text/"), "{place}: {value}"),
                }
            }
            if path.contains("{id}") {
                let (status, _, answer) = ask(
                    &running,
                    &method.to_uppercase(),
                    &path.replace("{id}", "ffffffff"),
                    &body,
                );
                assert!(
                    status == 404 && answer.contains("no job"),
                    "{place}: {status} {answer}"
                );
                assert!(
                    operation["responses"]["404"].is_object(),
                    "{place}: 404 is not described"
                );
            }
            asked += 1;
        }
    }
    assert!(asked >= 10, "{asked}");
    running.assert_well();
}

/// The text format of Prometheus, taken apart: name, labels, value.
fn series(text: &str) -> Vec<(String, String, f64)> {
    let mut described = std::collections::BTreeSet::new();
    let mut series = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (what, name, rest) = (
                words.next().unwrap(),
                words.next().unwrap(),
                words.next().unwrap_or(""),
            );
            assert!(matches!(what, "HELP" | "TYPE") && !rest.is_empty(), "{line}");
            described.insert((what.to_owned(), name.to_owned()));
            continue;
        }
        let (left, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
        let (name, labels) = left.split_once('{').unwrap_or((left, "}"));
        assert!(
            name.starts_with("longhaul_") && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'),
            "{line}"
        );
        let base = ["_bucket", "_sum", "_count"]
            .iter()
            .fold(name, |name, end| name.strip_suffix(end).unwrap_or(name));
        for what in ["HELP", "TYPE"] {
            let known = [name, base]
                .iter()
                .any(|name| described.contains(&(what.to_owned(), (*name).to_owned())));
            assert!(known, "{name} has no {what}");
        }
        series.push((
            name.to_owned(),
            labels.trim_end_matches('}').to_owned(),
            value.parse().unwrap(),
        ));
    }
    series
}

#[test]
fn metrics_are_prometheus_text_with_the_useful_series() {
    let running = Running::start(Sites::new(&[]));
    std::fs::write(running.sites.path("source-agent/disks/disk"), vec![7; 3 << 20]).unwrap();
    let (code, job, said) = running.run(&running.sites.job("disk", "copy"));
    assert_eq!(code, 0, "{job} {said}");
    let (status, kind, text) = ask(&running, "GET", "/metrics", "");
    assert!(status == 200 && kind.starts_with("text/plain"), "{status} {kind}");
    let series = series(&text);
    let value = |name: &str, label: &str| {
        let found = series
            .iter()
            .find(|(n, labels, _)| n == name && labels.contains(label));
        found
            .unwrap_or_else(|| panic!("{name}{{{label}}} is missing in:\n{text}"))
            .2
    };
    assert_eq!(value("longhaul_jobs", "state=\"completed\""), 1.0);
    assert_eq!(value("longhaul_jobs", "state=\"running\""), 0.0);
    assert!(value("longhaul_sent_raw_bytes_total", "") >= (3 << 20) as f64);
    assert!(value("longhaul_sent_wan_bytes_total", "") > 0.0);
    assert!(
        value("longhaul_sent_wan_bytes_total", "") < (3 << 20) as f64,
        "it compresses"
    );
    assert_eq!(value("longhaul_agents", ""), 1.0);
    assert_eq!(value("longhaul_peer_connections", "site=\"target\""), 2.0);
    assert!(value("longhaul_peer_sent_bytes_total", "site=\"target\"") > 0.0);
    for name in [
        "longhaul_peer_lost_packets_total",
        "longhaul_peer_rtt_seconds",
        "longhaul_peer_queue_bytes",
    ] {
        assert!(value(name, "site=\"target\"") >= 0.0, "{name}");
    }
    assert_eq!(value("longhaul_peer_queue_bytes", "site=\"target\""), 0.0);
    assert!(value("longhaul_send_memory_bytes", "") >= 0.0);
    for (name, labels, _) in &series {
        let job = job["id"].as_str().unwrap();
        assert!(
            !labels.contains(job),
            "{name}{{{labels}}} would grow with each job"
        );
    }
}

/// Garbage, slow and silent clients, and more event streams than anybody needs.
#[test]
fn no_client_of_the_api_holds_up_the_others() {
    let mut running = Running::start(Sites::new(&[]));
    let before = running.program("source-gateway").resident_kib();
    let socket = running.sites.api(SOURCE);
    let connect = || {
        let stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
        stream
    };
    for (body, words) in [
        ("", "not a job"),
        ("null", "not a job"),
        ("{\"kind\": 7}", "not a job"),
        ("[[[[[[[[[[", "not a job"),
        ("{\"kind\":\"move\",\"kind\":\"move\"}", "not a job"),
        ("\u{0}", "not a job"),
    ] {
        for path in ["/v1/jobs", "/v1/plan"] {
            let (status, _, answer) = ask(&running, "POST", path, body);
            assert!(
                status == 422 && answer.contains(words),
                "{body}: {status} {answer}"
            );
            assert!(serde_json::from_str::<Value>(&answer).unwrap()["error"].is_string());
        }
    }
    let deep = "[".repeat(200_000);
    assert_eq!(ask(&running, "POST", "/v1/jobs", &deep).0, 422);
    let (status, _, answer) = ask(&running, "POST", "/v1/jobs", &"x".repeat(2 << 20));
    assert!(status == 413 && answer.contains("error"), "{status} {answer}");
    for path in [
        "/",
        "/v1",
        "/v1/jobs/../../etc",
        "/v1/jobs?limit=-1",
        "/v1/jobs?limit=x",
        "/v1/jobs/%00",
    ] {
        let (status, _, answer) = ask(&running, "GET", path, "");
        assert!((400..500).contains(&status), "{path}: {status}");
        assert!(
            serde_json::from_str::<Value>(&answer).is_ok_and(|value| value["error"].is_string()),
            "{path}: {answer}"
        );
    }
    assert_eq!(ask(&running, "GET", "/v1/jobs?limit=4000000000", "").0, 200);
    assert_eq!(ask(&running, "DELETE", "/v1/jobs", "").0, 405);
    let mut clients = Vec::new();
    for n in 0..400 {
        let mut stream = connect();
        let bytes: &[u8] = match n % 4 {
            0 => b"",
            1 => b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n{",
            2 => b"GET /v1/sta",
            _ => b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 this is TLS, or so it says\r\n\r\n",
        };
        let _ = stream.write_all(bytes);
        clients.push(stream);
    }
    // They are there, and the operator is answered all the same, at once or when the slow ones were sent away.
    let began = Instant::now();
    let output = running.sites.finish(running.longhaul(&["status"]));
    assert!(output.status.success());
    println!(
        "status beside {} bad clients after {:?}",
        clients.len(),
        began.elapsed()
    );
    assert!(began.elapsed() < Duration::from_secs(30));
    drop(clients);
    let text = running
        .sites
        .job("disk", "copy")
        .replace("\"source-agent\"", "\"nobody\"");
    let file = running.sites.write("nobody.toml", &text).display().to_string();
    let output = running
        .sites
        .finish(running.longhaul(&["run", &file, "--detach", "--json"]));
    let record: Value = serde_json::from_slice(&output.stdout).unwrap();
    let path = format!("/v1/jobs/{}/events", record["id"].as_str().unwrap());
    let mut refused = 0;
    let watchers: Vec<_> = (0..120)
        .map(|_| {
            let mut stream = connect();
            let _ = stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes());
            let mut start = [0; 12];
            let _ = stream.read_exact(&mut start);
            refused += usize::from(start.ends_with(b"503"));
            stream
        })
        .collect();
    println!("{refused} of {} event streams were refused", watchers.len());
    assert!((1..120).contains(&refused), "{refused}");
    let (status, _, _) = ask(&running, "GET", "/v1/status", "");
    assert_eq!(status, 200);
    drop(watchers);
    // Their places are free again soon.
    wait("a new event stream", || {
        let mut stream = connect();
        let _ = stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes());
        let mut start = [0; 12];
        stream
            .read_exact(&mut start)
            .is_ok_and(|()| start.ends_with(b"200"))
            .then_some(())
    });
    let after = running.program("source-gateway").resident_kib();
    assert!(after < before + (64 << 10), "from {before} to {after} KiB");
    running.assert_well();
}
