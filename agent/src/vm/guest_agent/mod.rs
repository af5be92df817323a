//! The program inside the guest that freezes and trims its file systems: QEMU's guest agent, over its channel's socket.
//!
//! Owns one connection to it, one command at a time. Leaves alone what a freeze proves (`disk::fs`) and that it is journaled
//! before it happens and thawed after a restart (`session`).
//!
//! Promises: the guest is not trusted: every answer is bounded and has a deadline; after anything unexpected the channel is
//! brought into step again before the next command, so that an answer never counts for another question.
//! Source: <https://www.qemu.org/docs/master/interop/qemu-ga-ref.html>.

mod fsinfo;
mod place;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::vm::qmp::wire::{self, Lines, Message, WireError};

pub use self::fsinfo::{FsDisk, FsInfo, PciPlace};
#[cfg(test)]
pub(crate) use self::place::tests::told;
pub use self::place::{DiskPlace, Pci, places};

/// Before a synchronising answer; no byte of any JSON text.
const DELIMITER: u8 = 0xff;
/// How long an agent may take that has nothing to do.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long freezing and thawing may take: every file system is flushed.
const FREEZE_LIMIT: Duration = Duration::from_secs(30);
/// How many lines are skipped in search of the right one.
const STALE_MAX: usize = 1000;
/// Most file systems that are taken.
const FILE_SYSTEMS_MAX: usize = 1024;

/// Why the guest agent did not do what it was asked for.
#[derive(Clone, Debug, thiserror::Error)]
pub enum GuestAgentError {
    #[error("cannot reach the guest agent's socket {}: {source}", socket.display())]
    Io {
        socket: PathBuf,
        #[source]
        source: Arc<io::Error>,
    },
    #[error(
        "the guest agent did not answer {command} within {} s; is qemu-guest-agent running in the guest?",
        limit.as_secs_f32()
    )]
    Timeout { command: String, limit: Duration },
    #[error("the guest agent refused {command}: {desc}")]
    Refused { command: String, desc: String },
    #[error("the guest agent's answer to {command} is not understood: {reason}")]
    Answer { command: String, reason: String },
}

/// A connection to a guest agent.
#[derive(Debug)]
pub struct GuestAgent {
    socket: PathBuf,
    stream: UnixStream,
    lines: Lines,
    /// Whether the next answer belongs to the next command.
    in_step: bool,
    syncs: u64,
}

impl GuestAgent {
    /// Connects to the channel's socket, and makes sure that an agent answers.
    ///
    /// # Errors
    /// [`GuestAgentError::Timeout`] where no agent runs in the guest.
    pub async fn connect(socket: &Path) -> Result<Self, GuestAgentError> {
        let failed = |source: io::Error| GuestAgentError::Io {
            socket: socket.to_owned(),
            source: Arc::new(source),
        };
        let stream = UnixStream::connect(socket).await.map_err(failed)?;
        let mut agent = Self::over(stream, socket);
        agent
            .limited("guest-sync-delimited", ANSWER_LIMIT, json!(null))
            .await?;
        Ok(agent)
    }

    fn over(stream: UnixStream, socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            stream,
            lines: Lines::default(),
            in_step: false,
            syncs: u64::from(std::process::id()) << 16, // Unlike those of a predecessor.
        }
    }

    /// Freezes all file systems, or those mounted at `mountpoints`; gives how many are frozen now.
    ///
    /// Writes of the guest wait from now on: journal it before, thaw soon.
    pub async fn freeze(&mut self, mountpoints: Option<&[String]>) -> Result<u64, GuestAgentError> {
        match mountpoints {
            None => self.ask("guest-fsfreeze-freeze", json!({}), FREEZE_LIMIT).await,
            Some(some) => {
                let some = json!({ "mountpoints": some });
                self.ask("guest-fsfreeze-freeze-list", some, FREEZE_LIMIT).await
            }
        }
    }

    /// Thaws all file systems; gives how many were frozen. May be repeated.
    pub async fn thaw(&mut self) -> Result<u64, GuestAgentError> {
        self.ask("guest-fsfreeze-thaw", json!({}), FREEZE_LIMIT).await
    }

    /// Whether any file system is frozen by the agent.
    pub async fn is_frozen(&mut self) -> Result<bool, GuestAgentError> {
        let command = "guest-fsfreeze-status";
        let status: String = self.ask(command, json!({}), ANSWER_LIMIT).await?;
        match status.as_str() {
            "frozen" => Ok(true),
            "thawed" => Ok(false),
            other => Err(unclear(
                command,
                &format!("the state '{}'", wire::printable(other)),
            )),
        }
    }

    /// The mounted file systems, and the disks they are on.
    pub async fn file_systems(&mut self) -> Result<Vec<FsInfo>, GuestAgentError> {
        let command = "guest-get-fsinfo";
        let all: Vec<FsInfo> = self.ask(command, json!({}), FREEZE_LIMIT).await?;
        if all.len() > FILE_SYSTEMS_MAX {
            return Err(unclear(command, "too many file systems"));
        }
        Ok(all)
    }

    /// Gives free blocks of all mounted file systems back (trim); gives the bytes that the guest says were trimmed.
    pub async fn trim(&mut self, limit: Duration) -> Result<u64, GuestAgentError> {
        let told: Value = self.ask("guest-fstrim", json!({}), limit).await?;
        let paths = told["paths"].as_array().into_iter().flatten();
        let trimmed = paths.filter_map(|path| path["trimmed"].as_u64());
        Ok(trimmed.fold(0, u64::saturating_add))
    }

    /// Runs any command.
    pub async fn ask<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<T, GuestAgentError> {
        let value = self.limited(command, limit, arguments).await?;
        serde_json::from_value(value).map_err(|error| unclear(command, &error.to_string()))
    }

    async fn limited(
        &mut self,
        command: &str,
        limit: Duration,
        arguments: Value,
    ) -> Result<Value, GuestAgentError> {
        tokio::time::timeout(limit, self.exchange(command, arguments))
            .await
            .unwrap_or_else(|_| {
                let command = command.to_owned();
                Err(GuestAgentError::Timeout { command, limit })
            })
    }

    /// May be dropped at any point: the next one brings the channel into step first. Null arguments: only that.
    async fn exchange(&mut self, command: &str, arguments: Value) -> Result<Value, GuestAgentError> {
        if !self.in_step {
            self.synchronise().await?;
        }
        if arguments.is_null() {
            return Ok(Value::Null);
        }
        self.in_step = false;
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.send(line.as_bytes()).await?;
        let line = self.line().await?;
        let message = wire::decode(&line).map_err(|error| unclear(command, &error.to_string()))?;
        self.in_step = true;
        match message {
            Message::Return { value, .. } => Ok(value),
            Message::Error { desc, .. } => Err(GuestAgentError::Refused {
                command: command.to_owned(),
                desc,
            }),
            _ => Err(unclear(command, "neither answer nor error")),
        }
    }

    async fn synchronise(&mut self) -> Result<(), GuestAgentError> {
        let command = "guest-sync-delimited";
        self.syncs = self.syncs.wrapping_add(1);
        let id = self.syncs & (i64::MAX as u64); // A signed number on the other side.
        // The delimiter makes the agent forget half a command, too.
        let mut request = vec![DELIMITER];
        request.extend(
            json!({ "execute": command, "arguments": { "id": id } })
                .to_string()
                .bytes(),
        );
        request.push(b'\n');
        self.send(&request).await?;
        for _ in 0..STALE_MAX {
            let line = self.line().await?;
            if is_sync(&line, id) {
                self.in_step = true;
                return Ok(());
            }
        }
        Err(unclear(command, "too many answers to older questions"))
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), GuestAgentError> {
        let sent = self.stream.write_all(bytes).await;
        sent.map_err(|source| self.failed(source))
    }

    async fn line(&mut self) -> Result<Vec<u8>, GuestAgentError> {
        let mut piece = [0; 4096];
        loop {
            match self.lines.next_line() {
                Ok(Some(line)) => return Ok(line.to_vec()),
                Ok(None) => {}
                Err(error) => return Err(self.broken(&error)),
            }
            match self.stream.read(&mut piece).await {
                Ok(0) => return Err(self.failed(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => self.lines.push(&piece[..count]),
                Err(source) => return Err(self.failed(source)),
            }
        }
    }

    fn broken(&mut self, error: &WireError) -> GuestAgentError {
        self.lines = Lines::default();
        unclear("a command", &error.to_string())
    }

    fn failed(&self, source: io::Error) -> GuestAgentError {
        GuestAgentError::Io {
            socket: self.socket.clone(),
            source: Arc::new(source),
        }
    }
}

fn unclear(command: &str, reason: &str) -> GuestAgentError {
    GuestAgentError::Answer {
        command: command.to_owned(),
        reason: reason.to_owned(),
    }
}

/// Whether a line is the answer to the synchronising request `id`; what precedes the delimiter is old.
fn is_sync(line: &[u8], id: u64) -> bool {
    let fresh = line.rsplit(|&byte| byte == DELIMITER).next().unwrap_or(line);
    matches!(wire::decode(fresh), Ok(Message::Return { value, .. }) if value.as_u64() == Some(id))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, BufReader};

    use super::*;

    /// A guest agent that answers each command as `answer` says; `None`: not at all.
    fn agent(answer: impl Fn(&str) -> Option<String> + Send + 'static) -> GuestAgent {
        let (ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn(async move {
            let mut stream = BufReader::new(theirs);
            let mut line = Vec::new();
            while stream.read_until(b'\n', &mut line).await.unwrap_or(0) > 0 {
                let text = line.rsplit(|&byte| byte == DELIMITER).next().unwrap();
                let asked: Value = serde_json::from_slice(text).unwrap();
                let reply = match asked["execute"].as_str().unwrap() {
                    "guest-sync-delimited" => {
                        let mut reply = vec![DELIMITER];
                        reply.extend(format!("{{\"return\": {}}}\n", asked["arguments"]["id"]).bytes());
                        reply
                    }
                    other => answer(other).unwrap_or_default().into_bytes(),
                };
                if stream.get_mut().write_all(&reply).await.is_err() {
                    return;
                }
                line.clear();
            }
        });
        GuestAgent::over(ours, Path::new("test"))
    }

    #[tokio::test]
    async fn freezing_and_thawing() {
        let mut agent = agent(|command| {
            Some(match command {
                "guest-fsfreeze-freeze" => "{\"return\": 2}\n".into(),
                "guest-fsfreeze-status" => "{\"return\": \"frozen\"}\n".into(),
                "guest-fstrim" => {
                    "{\"return\": {\"paths\": [{\"path\": \"/\", \"trimmed\": 7}, {\"path\": \"/x\", \"error\": \"no\"}]}}\n"
                        .into()
                }
                _ => "{\"error\": {\"class\": \"GenericError\", \"desc\": \"not allowed\"}}\n".into(),
            })
        });
        assert_eq!(agent.freeze(None).await.unwrap(), 2);
        assert!(agent.is_frozen().await.unwrap());
        assert_eq!(agent.trim(ANSWER_LIMIT).await.unwrap(), 7);
        let refused = agent.thaw().await.unwrap_err();
        assert!(matches!(refused, GuestAgentError::Refused { .. }), "{refused}");
        assert!(
            agent.is_frozen().await.unwrap(),
            "a refusal keeps the channel in step"
        );
    }

    #[tokio::test]
    async fn a_late_answer_is_not_taken_for_another() {
        // The first command is answered only with the next one's.
        let held = std::sync::atomic::AtomicBool::new(true);
        let mut agent = agent(move |_| {
            let first = held.swap(false, std::sync::atomic::Ordering::Relaxed);
            (!first).then(|| "{\"return\": 5}\n".to_owned())
        });
        let short = Duration::from_millis(50);
        let late = agent
            .ask::<u64>("guest-fsfreeze-thaw", json!({}), short)
            .await
            .unwrap_err();
        assert!(matches!(late, GuestAgentError::Timeout { .. }));
        assert!(!agent.in_step);
        assert_eq!(agent.thaw().await.unwrap(), 5);
        assert!(is_sync(b"{\"return\": 1}\xff{\"return\": 9}", 9));
        assert!(!is_sync(b"{\"return\": 9}\xff{\"return\": 1}", 9));
    }

    #[tokio::test]
    async fn a_guest_that_talks_without_end_is_refused() {
        let mut endless = agent(|_| Some("x".repeat(wire::LINE_MAX + 8192)));
        assert!(endless.thaw().await.is_err());
        let mut nonsense = agent(|_| Some("{\"return\": {}}\n".into()));
        assert!(nonsense.is_frozen().await.is_err());
        assert!(nonsense.file_systems().await.is_err());
    }
}
