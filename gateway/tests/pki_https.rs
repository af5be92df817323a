//! The API's TLS: which certificates it takes, and that changed files count for the next connection.

#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use clap::Parser;
use jiff::Timestamp;
use longhaul_common::link::{Credentials, Role, TlsState, https_client_config, https_server_config};
use longhaul_gateway::pki::{PkiCommand, run_to};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::{TlsAcceptor, TlsConnector};

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: PkiCommand,
}

fn pki(home: &Path, line: &str) {
    let words = std::iter::once("pki")
        .chain(line.split_whitespace())
        .chain(["--dir", home.to_str().unwrap()]);
    let cli = Cli::try_parse_from(words).unwrap();
    run_to(&cli.command, Timestamp::now(), &mut Vec::new()).unwrap();
}

fn state(home: &Path, role: Role, name: &str) -> Arc<TlsState> {
    pki(home, &format!("issue --site berlin --role {role} --name {name}"));
    let file = |kind: &str| home.join("issued").join(format!("{name}.{role}.berlin.{kind}"));
    let files = Credentials {
        cert: file("pem"),
        key: file("key"),
        ca: home.join("ca.pem"),
        crl: Some(home.join("crl.pem")),
    };
    TlsState::load(files, Some(role)).unwrap()
}

async fn serve(gateway: &Arc<TlsState>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = TlsAcceptor::from(https_server_config(gateway, &[Role::Operator]).unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if let Ok(mut stream) = acceptor.accept(stream).await {
                let _ = stream.write_all(b"hello").await;
                let _ = stream.shutdown().await;
            }
        }
    });
    address
}

/// What the caller reads, or why it reads nothing.
async fn call(address: SocketAddr, caller: &Arc<TlsState>) -> Result<String, String> {
    let connector = TlsConnector::from(https_client_config(caller).unwrap());
    let name = ServerName::try_from("gw-1.gateway.berlin.longhaul").unwrap();
    let stream = TcpStream::connect(address).await.unwrap();
    let mut stream = connector
        .connect(name, stream)
        .await
        .map_err(|error| error.to_string())?;
    let mut text = String::new();
    stream
        .read_to_string(&mut text)
        .await
        .map_err(|error| error.to_string())?;
    Ok(text)
}

#[tokio::test]
async fn only_a_good_certificate_of_an_accepted_role_is_served() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    pki(home, "init --trust-domain test.example");
    let gateway = state(home, Role::Gateway, "gw-1");
    let address = serve(&gateway).await;
    let (alice, bob) = (
        state(home, Role::Operator, "alice"),
        state(home, Role::Operator, "bob"),
    );
    let agent = state(home, Role::Agent, "host-1");
    assert_eq!(call(address, &alice).await.unwrap(), "hello");
    let refused = call(address, &agent).await.unwrap_err();
    assert!(refused.contains("AccessDenied"), "{refused}");

    pki(home, "revoke bob");
    gateway.reload().unwrap();
    let refused = call(address, &bob).await.unwrap_err();
    assert!(refused.contains("CertificateRevoked"), "{refused}");
    assert_eq!(call(address, &alice).await.unwrap(), "hello");
}
