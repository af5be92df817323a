//! The operator's program `longhaul`: its commands, and the exit code of each.
//!
//! Owns arguments and what is printed where: results on standard output, progress on standard error. Leaves jobs to the gateway, which
//! it reaches through the HTTP API. Exit codes are part of the interface ([`Code`]).

mod bars;
mod check;
mod client;
mod orders;
mod path;
mod show;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use longhaul_common::settings::{self, SettingsError};
use longhaul_common::wire::session::chain;

use self::bars::Bars;
use self::client::{Client, ClientError, job_path};
use crate::api::{Event, Status};
use crate::job::plan::Plan;
use crate::job::prepare::PreparedReport;
use crate::job::progress::JobState;
use crate::job::spec::{JobSpec, SpecError};
use crate::pki::{self, PkiCommand, PkiError};
use crate::store::JobRecord;

/// Moves whole virtual machines between sites.
///
/// Exit codes: 0 done; 1 the job failed, or a plan or test is not good; 2 a command or file is wrong; 3 no gateway answers; 4 the
/// gateway refused; 5 the job was cancelled or paused meanwhile.
#[derive(Debug, Parser)]
#[command(name = "longhaul", version, about, long_about)]
pub struct Arguments {
    /// The gateway's unix socket.
    #[arg(
        long,
        global = true,
        env = "LONGHAUL_API",
        default_value = "/run/longhaul/gateway.sock"
    )]
    api: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check a config or job file, and say what is wrong with it.
    Check { file: PathBuf },
    /// Ask both sides what a run would do; touch nothing.
    Plan {
        file: PathBuf,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Run a job and watch it.
    Run {
        file: PathBuf,
        /// Print one JSON object per line; the last is the report.
        #[arg(long)]
        json: bool,
        /// Do not watch: print the job's number and leave.
        #[arg(long)]
        detach: bool,
    },
    /// Switch a running VM's dirty bitmaps on ahead of a planned run, so that more of its free blocks can stay behind.
    Prepare {
        /// The job file; with --end also a job's number, or the start of it.
        file: PathBuf,
        /// Take the bitmaps away again: there will be no run.
        #[arg(long)]
        end: bool,
        #[arg(long)]
        json: bool,
    },
    /// Show agents, peers, prepared VMs and jobs.
    Status {
        /// One job, by its number or the start of it.
        job: Option<String>,
        #[arg(long)]
        json: bool,
    },
    /// Watch a job until it is at rest.
    Watch {
        job: String,
        #[arg(long)]
        json: bool,
    },
    /// End a job's attempt; what is durable stays, the job can be resumed.
    Pause { job: String },
    /// Go on with a paused or failed job.
    Resume { job: String },
    /// End a job and remove its partial copy.
    Cancel { job: String },
    /// Decide a handover in doubt without the other side. Says first what that risks.
    Resolve {
        /// The job, by its number or the start of it.
        job: String,
        /// Where the VM is to run.
        #[arg(long, value_enum)]
        run_at: orders::RunAt,
        /// The other host is off, or its QEMU of this VM is gone: without this nothing is done.
        #[arg(long)]
        the_other_side_is_off: bool,
        /// An agent of this gateway's site, for a job that this gateway does not know; default: the job's source.
        #[arg(long)]
        agent: Option<String>,
    },
    /// Remove the images that a completed move of a running VM left at its source.
    Forget {
        /// The job, by its number or the start of it.
        job: String,
        /// An agent of this gateway's site, for a job that this gateway does not know; default: the job's source.
        #[arg(long)]
        agent: Option<String>,
    },
    /// Show the newest jobs.
    History {
        #[arg(long, default_value_t = 20)]
        limit: u32,
        #[arg(long)]
        json: bool,
    },
    /// Test the path to another site: reachability, certificate, MTU, delay, clock, loss, rate.
    Link(path::LinkArguments),
    /// State the digest of an image's content, as a job's report does.
    Digest { image: PathBuf },
    /// Run the certificate authority of your sites.
    Pki {
        #[command(subcommand)]
        command: PkiCommand,
    },
    /// Print the API's OpenAPI description.
    Openapi,
}

/// Exit codes. Stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Code {
    Done = 0,
    NotGood = 1,
    Wrong = 2,
    NoGateway = 3,
    Refused = 4,
    Stopped = 5,
}

/// Why a command ended without its result.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error("the job cannot be run")]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error(transparent)]
    Check(#[from] check::CheckError),
    #[error(transparent)]
    Path(#[from] path::PathError),
    #[error("the gateway ended the stream of events; the job goes on, see: longhaul status")]
    StreamEnded,
}

impl Failure {
    /// Whether the gateway is away, perhaps only for a moment.
    fn is_absence(&self) -> bool {
        matches!(
            self,
            Self::Client(ClientError::NoGateway { .. } | ClientError::Broken(_)) | Self::StreamEnded
        )
    }

    fn code(&self) -> Code {
        match self {
            Self::Client(ClientError::NoGateway { .. } | ClientError::Broken(_)) | Self::StreamEnded => {
                Code::NoGateway
            }
            Self::Client(_) => Code::Refused,
            _ => Code::Wrong,
        }
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("longhaul: cannot start: {error}");
            return ExitCode::from(Code::Wrong as u8);
        }
    };
    let code = runtime.block_on(run(arguments)).unwrap_or_else(|failure| {
        eprintln!("longhaul: {}", chain(&failure));
        failure.code()
    });
    ExitCode::from(code as u8)
}

async fn run(arguments: Arguments) -> Result<Code, Failure> {
    let client = Client::new(&arguments.api);
    match arguments.command {
        Command::Check { file } => println!("{}", check::check(&file)?),
        Command::Plan { file, json } => return plan(&client, &read_job(&file)?, json).await,
        Command::Run { file, json, detach } => return submit(&client, &read_job(&file)?, json, detach).await,
        Command::Prepare { file, end, json } => {
            let (spec, path) = match end {
                false => (read_job(&file)?, "/v1/prepare"),
                true => (prepared_job(&client, &file).await?, "/v1/prepare/end"),
            };
            let body = serde_json::to_vec(&spec).map_err(ClientError::Answer)?;
            let report: PreparedReport = client.post(path, body).await?;
            print(json, &report, show::prepared);
        }
        Command::Status { job: Some(job), json } => {
            let record: JobRecord = client.get(&job_path(&job, "")?).await?;
            print(json, &record, |record| {
                show::history(std::slice::from_ref(record))
            });
        }
        Command::Status { job: None, json } => {
            let status: Status = client.get("/v1/status").await?;
            print(json, &status, show::status);
        }
        Command::Watch { job, json } => {
            let record: JobRecord = client.get(&job_path(&job, "")?).await?;
            return watch(&client, &record, json).await;
        }
        Command::Pause { job } => tell(&client, &job, "pause").await?,
        Command::Resume { job } => tell(&client, &job, "resume").await?,
        Command::Cancel { job } => tell(&client, &job, "cancel").await?,
        Command::Resolve {
            job,
            run_at,
            the_other_side_is_off,
            agent,
        } => orders::resolve(&client, &job, run_at, the_other_side_is_off, agent).await?,
        Command::Forget { job, agent } => orders::forget(&client, &job, agent).await?,
        Command::History { limit, json } => {
            let jobs: Vec<JobRecord> = client.get(&format!("/v1/jobs?limit={limit}")).await?;
            print(json, &jobs, |jobs| show::history(jobs));
        }
        Command::Link(arguments) => {
            return Ok(if path::test(&arguments).await? {
                Code::Done
            } else {
                Code::NotGood
            });
        }
        Command::Digest { image } => println!("{}", path::digest(&image)?),
        Command::Pki { command } => pki::run(command)?,
        Command::Openapi => println!("{}", crate::api::description()),
    }
    Ok(Code::Done)
}

fn read_job(file: &std::path::Path) -> Result<JobSpec, Failure> {
    let spec: JobSpec = settings::load_file(file)?;
    spec.check()?;
    Ok(spec)
}

/// One JSON object, or what people read.
fn print<T: serde::Serialize>(json: bool, value: &T, words: impl FnOnce(&T) -> String) {
    if json {
        println!("{}", serde_json::to_string(value).unwrap_or_default());
    } else {
        print!("{}", words(value));
    }
}

fn body<T: serde::Serialize>(value: &T) -> Result<Vec<u8>, Failure> {
    Ok(serde_json::to_vec(value).map_err(ClientError::Answer)?)
}

async fn plan(client: &Client, spec: &JobSpec, json: bool) -> Result<Code, Failure> {
    let plan: Plan = client.post("/v1/plan", body(spec)?).await?;
    print(json, &plan, show::plan);
    Ok(if plan.ready && !plan.is_hopeless() {
        Code::Done
    } else {
        Code::NotGood
    })
}

async fn submit(client: &Client, spec: &JobSpec, json: bool, detach: bool) -> Result<Code, Failure> {
    let record: JobRecord = client.post("/v1/jobs", body(spec)?).await?;
    if detach {
        print(json, &record, |record| format!("{}\n", record.id));
        return Ok(Code::Done);
    }
    if !json {
        eprintln!(
            "job {}; it goes on without this program: longhaul watch {}",
            record.id,
            &record.id[..8]
        );
    }
    watch(client, &record, json).await
}

/// The job that a VM was prepared for: its file, or its number where there is no such file.
async fn prepared_job(client: &Client, file: &std::path::Path) -> Result<JobSpec, Failure> {
    if file.exists() {
        return read_job(file);
    }
    let path = job_path(&file.to_string_lossy(), "")?;
    let record: JobRecord = client.get(&path).await?;
    Ok(record.spec)
}

async fn tell(client: &Client, job: &str, wish: &str) -> Result<(), Failure> {
    let record: JobRecord = client
        .post(&job_path(job, &format!("/{wish}"))?, Vec::new())
        .await?;
    println!("{} ({}): {wish} asked", record.spec.name, &record.id[..8]);
    Ok(())
}

/// How long a gateway may be away before the operator program gives up; a restart takes a second or two.
const AWAY_MAX: Duration = Duration::from_secs(60);
/// Between two tries to reach it again.
const AWAY_STEP: Duration = Duration::from_millis(300);

/// Watches until the job is at rest, also over restarts of the gateway.
async fn watch(client: &Client, record: &JobRecord, json: bool) -> Result<Code, Failure> {
    let mut bars = Bars::new(&record.spec.name);
    let mut seen = Instant::now();
    loop {
        let ended = match follow(client, record, json, &mut bars, &mut seen).await {
            Ok(code) => return Ok(code),
            Err(failure) => failure,
        };
        if !ended.is_absence() || seen.elapsed() > AWAY_MAX {
            return Err(ended);
        }
        tokio::time::sleep(AWAY_STEP).await;
    }
}

/// One stream of events, to its end; notes in `seen` when the gateway was last heard.
async fn follow(
    client: &Client,
    record: &JobRecord,
    json: bool,
    bars: &mut Bars,
    seen: &mut Instant,
) -> Result<Code, Failure> {
    let mut lines = client.lines(&format!("/v1/jobs/{}/events", record.id)).await?;
    while let Some(line) = lines.next().await? {
        *seen = Instant::now();
        let event = serde_json::from_str(&line).map_err(ClientError::Answer)?;
        if json {
            println!("{line}");
        }
        match event {
            Event::Progress { state, progress, .. } if !json => bars.show(state, &progress, Instant::now()),
            Event::Progress { .. } => {}
            Event::Report { job } => {
                bars.clear();
                if !json {
                    print!("{}", show::report(&job));
                }
                return Ok(match job.state {
                    JobState::Completed if job.report.is_some_and(|report| report.ok) => Code::Done,
                    JobState::Cancelled | JobState::Paused => Code::Stopped,
                    _ => Code::NotGood,
                });
            }
        }
    }
    Err(Failure::StreamEnded)
}
