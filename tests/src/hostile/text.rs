//! What people and scripts write: config files, units, names, jobs.

use std::io;
use std::path::Path;
use std::time::Duration;

use longhaul_agent::settings::AgentSettings;
use longhaul_common::ids::JobId;
use longhaul_common::link::{Identity, check_name, check_trust_domain};
use longhaul_common::settings;
use longhaul_common::units::{ByteSize, Rate, Span};
use longhaul_gateway::job::spec::JobSpec;
use longhaul_gateway::settings::GatewaySettings;

pub(super) fn settings(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let path = Path::new("hostile.toml");
    if let Ok(job) = settings::parse::<JobSpec>(path, text) {
        let _ = job.check().map_err(|error| one_line(&error.to_string()));
    }
    if let Ok(gateway) = settings::parse::<GatewaySettings>(path, text) {
        let _ = gateway.check();
    }
    match settings::parse::<AgentSettings>(path, text) {
        Ok(agent) => drop(agent.check()),
        Err(error) => one_line(&error.to_string()),
    }
}

fn one_line(sentence: &str) {
    assert!(
        !sentence.contains('\n'),
        "a refusal of several lines: {sentence:?}"
    );
}

pub(super) fn configs() -> io::Result<Vec<Vec<u8>>> {
    let identity = "[identity]\ncertificate = '/c'\nkey = '/k'\nca = '/a'\n";
    let gateway = "state = '/s'\n[agents]\nlisten = '127.0.0.1:1'\n[[peer]]\nsite = 'b'\nname = 'gw'\naddress = 'b:7401'\n\
        [peer.link]\nrate = '200 Mbit/s'\nrtt = '80 ms'\n[limits]\nsend_memory = '64 MiB'\n";
    let agent = "[gateway]\naddress = 'gw:7402'\nname = 'gw'\n[paths]\nread = ['/d']\nwrite = []\nrun = '/r'\nstate = '/s'\n\
        [limits]\nflush_time = '500 ms'\n[target]\nmode = '0640'\nowner = [1, 2]\n";
    let job = "kind = 'move'\nname = 'web'\nsource.agent = 'hv1'\n[target]\nsite = 'b'\nagent = 'hv2'\n\
        [[disk]]\nsource = '/a.img'\ntarget = '/b.img'\n";
    Ok([
        format!("{gateway}{identity}"),
        format!("{agent}{identity}"),
        job.to_owned(),
    ]
    .map(String::into_bytes)
    .to_vec())
}

pub(super) fn units(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(size) = text.parse::<ByteSize>() {
        let _ = size.to_string();
    }
    if let Ok(rate) = text.parse::<Rate>() {
        let _ = rate.to_string();
    }
    if let Ok(span) = text.parse::<Span>() {
        assert!(span.0 <= Duration::MAX);
        let _ = span.to_string();
    }
    let _ = text.parse::<JobId>();
}

pub(super) fn unit_texts() -> io::Result<Vec<Vec<u8>>> {
    let texts = [
        "64 MiB",
        "1.5 GiB",
        "200 Mbit/s",
        "80 ms",
        "1h",
        "0123456789abcdef0123456789abcdef",
    ];
    Ok(texts.map(|text| text.as_bytes().to_vec()).to_vec())
}

pub(super) fn identity(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let (_, _) = (check_name(text), check_trust_domain(text));
    if let Ok(identity) = Identity::try_from(text.to_owned()) {
        let again = Identity::try_from(identity.uri());
        assert_eq!(again.ok(), Some(identity), "a name that is not its own name");
    }
}

pub(super) fn identities() -> io::Result<Vec<Vec<u8>>> {
    Ok(vec![
        b"longhaul://example.org/site/berlin/gateway/gw-1".to_vec(),
        b"longhaul.example.org".to_vec(),
    ])
}

pub(super) fn job_json(bytes: &[u8]) {
    if let Ok(job) = serde_json::from_slice::<JobSpec>(bytes) {
        let _ = job.check();
        assert!(serde_json::to_vec(&job).is_ok());
    }
}

pub(super) fn job_jsons() -> io::Result<Vec<Vec<u8>>> {
    let job = r#"{"kind":"move","name":"web","definition":null,"filter":true,"source":{"agent":"hv1"},"target":{"site":"b",
        "agent":"hv2","overwrite":true,"preallocate":false},"disk":[{"source":"/a","format":"raw","target":"/b"}]}"#;
    Ok(vec![job.as_bytes().to_vec()])
}
