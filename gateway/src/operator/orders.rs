//! `longhaul resolve` and `longhaul forget`.
//!
//! Owns their request and what is printed. Leaves the rest to the gateway, and the decision to its agent.

use clap::ValueEnum;

use super::client::{Client, job_path};
use super::{Failure, body};
use crate::job::order::{ForgetOrder, OrderDone, ResolveOrder, Side};

/// Where a VM is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum RunAt {
    Source,
    Target,
}

pub(super) async fn resolve(
    client: &Client,
    job: &str,
    run_at: RunAt,
    the_other_side_is_off: bool,
    agent: Option<String>,
) -> Result<(), Failure> {
    let order = ResolveOrder {
        run_at: match run_at {
            RunAt::Source => Side::Source,
            RunAt::Target => Side::Target,
        },
        the_other_side_is_off,
        agent,
    };
    let done = client.post(&job_path(job, "/resolve")?, body(&order)?).await?;
    print(&done);
    Ok(())
}

pub(super) async fn forget(client: &Client, job: &str, agent: Option<String>) -> Result<(), Failure> {
    let done = client
        .post(&job_path(job, "/forget")?, body(&ForgetOrder { agent })?)
        .await?;
    print(&done);
    Ok(())
}

fn print(done: &OrderDone) {
    for line in &done.lines {
        println!("{line}");
    }
}
