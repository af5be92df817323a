//! The same cold move by the tools that people use for it, over the emulated link: the measure that Longhaul is held against.
//!
//! Owns each tool's command lines at both ends, starting them in their order, and counting. Leaves alone the link and the
//! judgement, which is the same for all (`compare`): every byte equal. Promises the settings that made each tool fastest:
//! holes and zeros are not sent, what a tool can compress it compresses, data is on disk before the time is taken. Only the
//! pipeline is encrypted, as Longhaul is; that is in the others' favour.

use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use longhaul_common::units::Span;

use crate::compare;
use crate::lab::{End, Lab};
use crate::move_disk::Moment;
use crate::process::end_group;
use crate::report::{LinkReport, ProgramReport, Report};
use crate::usage::{GroupUsage, wait_until};
use crate::wan::spec::LinkSpec;

const PORT: u16 = 7603;
const TICK: Duration = Duration::from_millis(50);
const LISTEN_LIMIT: Duration = Duration::from_secs(20);
/// How long the receiving end may take once the sending one has ended.
const END_LIMIT: Duration = Duration::from_secs(60);

/// A tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Tool {
    /// rsync -S with zstd, to a daemon
    Rsync,
    /// libnbd's nbdcopy to qemu-nbd
    Nbdcopy,
    /// qemu-img convert to qemu-nbd
    QemuImg,
    /// tar and zstd, over TLS
    TarZstd,
}

/// What is copied, by whom, over which link.
#[derive(Args, Clone, Debug)]
pub struct CopyArgs {
    /// The disk to copy, raw; it is only read
    #[arg(long)]
    pub image: PathBuf,
    /// Who copies
    #[arg(long, value_enum)]
    pub by: Tool,
    #[command(flatten)]
    pub link: LinkSpec,
    /// Folder in which the lab's directory is made; needs room for the copy
    #[arg(long)]
    pub directory: Option<PathBuf>,
    /// Give up after this time
    #[arg(long, default_value = "2h")]
    pub limit: Span,
}

/// Where everything of one copy is.
struct Place<'a> {
    image: &'a Path,
    directory: &'a Path,
    address: Ipv4Addr,
}

impl Place<'_> {
    /// The copy, under the image's own name: rsync and tar keep it.
    fn copy(&self) -> PathBuf {
        self.directory
            .join("copy")
            .join(self.image.file_name().unwrap_or_default())
    }

    fn text(&self, path: impl AsRef<Path>) -> String {
        path.as_ref().display().to_string()
    }
}

impl Tool {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rsync => "rsync",
            Self::Nbdcopy => "nbdcopy",
            Self::QemuImg => "qemu-img",
            Self::TarZstd => "tar-zstd",
        }
    }

    /// Makes what it needs at the target before it starts.
    fn prepare(self, place: &Place<'_>) -> io::Result<()> {
        fs::create_dir(place.directory.join("copy"))?;
        match self {
            Self::Rsync => {
                let config = format!(
                    "use chroot = no\n{}[copy]\npath = {}\nread only = no\n",
                    // A daemon of root writes as nobody, if not told otherwise.
                    if rustix::process::geteuid().is_root() {
                        "uid = 0\ngid = 0\n"
                    } else {
                        ""
                    },
                    place.text(place.directory.join("copy"))
                );
                fs::write(place.directory.join("rsyncd.conf"), config)
            }
            Self::Nbdcopy | Self::QemuImg => {
                File::create(place.copy())?.set_len(fs::metadata(place.image)?.len())
            }
            Self::TarZstd => certificate(place.directory),
        }
    }

    /// What runs at the target and waits for a connection.
    fn receiver(self, place: &Place<'_>) -> Vec<String> {
        let (copy, directory) = (place.text(place.copy()), place.text(place.directory));
        let address = place.address;
        match self {
            Self::Rsync => words(&[
                "rsync",
                "--daemon",
                "--no-detach",
                &format!("--config={directory}/rsyncd.conf"),
                &format!("--address={address}"),
                &format!("--port={PORT}"),
            ]),
            // One connection more than nbdcopy opens; a writer may drop what it writes as zeros.
            Self::Nbdcopy | Self::QemuImg => words(&[
                "qemu-nbd",
                "--format=raw",
                "--discard=unmap",
                "--persistent",
                "--shared=9",
                "--cache=writeback",
                &format!("--bind={address}"),
                &format!("--port={PORT}"),
                &copy,
            ]),
            Self::TarZstd => script(&format!(
                "socat -u -b 1048576 OPENSSL-LISTEN:{PORT},bind={address},reuseaddr,cert={directory}/tls.pem,verify=0 - \
                 | zstd -q -d --long=27 | tar -C {directory}/copy -x -S -f - && sync -f {directory}/copy"
            )),
        }
    }

    /// What runs at the source.
    fn sender(self, place: &Place<'_>) -> Vec<String> {
        let (image, address) = (place.text(place.image), place.address);
        match self {
            Self::Rsync => words(&[
                "rsync",
                "--sparse",
                "--whole-file",
                "--compress",
                "--compress-choice=zstd",
                "--compress-level=3",
                "--fsync",
                &image,
                &format!("rsync://{address}:{PORT}/copy/"),
            ]),
            Self::Nbdcopy => words(&[
                "nbdcopy",
                "--destination-is-zero",
                "--flush",
                "--connections=4",
                "--requests=64",
                &image,
                &format!("nbd://{address}:{PORT}"),
            ]),
            Self::QemuImg => words(&[
                "qemu-img",
                "convert",
                "-n",
                "--target-is-zero",
                "-W",
                "-m",
                "16",
                "-f",
                "raw",
                "-O",
                "raw",
                &image,
                &format!("nbd://{address}:{PORT}"),
            ]),
            Self::TarZstd => {
                let folder = place.text(place.image.parent().unwrap_or_else(|| Path::new("/")));
                let name = place.text(place.image.file_name().unwrap_or_default());
                script(&format!(
                    "tar -C '{folder}' -c -S -f - '{name}' | zstd -q -3 --long=27 -T0 \
                     | socat -u -b 1048576 - OPENSSL:{address}:{PORT},verify=0"
                ))
            }
        }
    }

    /// The programs that it needs, with the packages of Debian that have them.
    fn programs(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Rsync => &[("rsync", "rsync")],
            Self::Nbdcopy => &[("nbdcopy", "libnbd-bin"), ("qemu-nbd", "qemu-utils")],
            Self::QemuImg => &[("qemu-img", "qemu-utils"), ("qemu-nbd", "qemu-utils")],
            Self::TarZstd => &[
                ("socat", "socat"),
                ("tar", "tar"),
                ("zstd", "zstd"),
                ("openssl", "openssl"),
            ],
        }
    }

    /// Refuses before anything is made where one of them is not there.
    fn require_programs(self) -> io::Result<()> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let is_there = |name: &str| std::env::split_paths(&path).any(|folder| folder.join(name).is_file());
        match self.programs().iter().find(|(name, _)| !is_there(name)) {
            Some((name, package)) => Err(io::Error::other(format!(
                "{name} is not installed; it comes with the package {package}"
            ))),
            None => Ok(()),
        }
    }

    /// Whether the receiving end stays until it is ended.
    fn stays(self) -> bool {
        self != Self::TarZstd
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn script(text: &str) -> Vec<String> {
    words(&["bash", "-c", &format!("set -eo pipefail; {text}")])
}

fn certificate(directory: &Path) -> io::Result<()> {
    let pem = directory.join("tls.pem");
    let made = std::process::Command::new("openssl")
        .args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=lab",
        ])
        .arg("-keyout")
        .arg(&pem)
        .arg("-out")
        .arg(directory.join("tls.crt"))
        .stderr(Stdio::null())
        .status()?;
    if !made.success() {
        return Err(io::Error::other("openssl cannot make a certificate"));
    }
    let both = fs::read_to_string(&pem)? + &fs::read_to_string(directory.join("tls.crt"))?;
    fs::write(pem, both)
}

/// Runs it.
///
/// # Errors
/// When the lab itself cannot work: no image, no tool, no directory.
pub fn run(args: &CopyArgs, watch: &mut dyn FnMut(Moment)) -> io::Result<Report> {
    args.by.require_programs()?;
    let image = args.image.canonicalize()?;
    if image.to_string_lossy().contains(['\'', '"', '\\', '\n', '?']) {
        let problem = format!("{}: please give it a plainer name", image.display());
        return Err(io::Error::other(problem));
    }
    let parent = args.directory.clone().unwrap_or_else(std::env::temp_dir);
    let mut lab = Lab::start(&args.link, &parent, false)?;
    let mut report = Report {
        tcp: Some(lab.favour_tcp()?),
        emulated: lab.not_emulated().is_empty(),
        not_emulated: lab.not_emulated().to_vec(),
        ..Report::default()
    };
    let directory = lab.directory().to_owned();
    let place = Place {
        image: &image,
        directory: &directory,
        address: lab.address(End::Target),
    };
    args.by.prepare(&place)?;
    let mut receiver = Part::start(&mut lab, End::Target, &args.by.receiver(&place))?;
    receiver.wait_listening()?;
    watch(Moment::Step(format!("copying by {}", args.by.name())));
    let link_began = seconds_of(&mut lab)?;
    let began = Instant::now();
    let mut sender = Part::start(&mut lab, End::Source, &args.by.sender(&place))?;
    if let Err(error) = copy(args, began, &mut sender, &mut receiver) {
        report.cause = Some(error.to_string());
    }
    report.seconds = began.elapsed().as_secs_f64();
    for (name, part) in [("sender", sender), ("receiver", receiver)] {
        report.programs.insert(name.to_owned(), part.end());
    }
    report.wan_bytes = lab.delivered()?.map_or(0, |(forth, _)| forth);
    if let Some(link) = lab.take_link() {
        let link = LinkReport::new(&args.link, link.stop()?, link_began, link_began + report.seconds);
        report.link = Some(link);
    }
    if report.cause.is_none() {
        watch(Moment::Step("comparing both disks, block by block".to_owned()));
        let found = compare::compare(&image, &place.copy(), 0)?;
        report.raw_bytes = found.bytes;
        report.ok = found.equal;
        report.equal = found.equal;
        report.cause = (!found.equal).then(|| "the copy differs".to_owned());
        report.comparison = Some(found);
    }
    Ok(report)
}

fn seconds_of(lab: &mut Lab) -> io::Result<f64> {
    let stats = lab.link().map(|link| link.stats()).transpose()?;
    Ok(stats.map_or(0.0, |stats| stats.seconds))
}

/// Waits until the copy is whole and durable.
fn copy(args: &CopyArgs, began: Instant, sender: &mut Part, receiver: &mut Part) -> io::Result<()> {
    let left = |limit: Duration| limit.saturating_sub(began.elapsed());
    let given_up = || io::Error::other(format!("the copy was given up after {}", args.limit));
    sender.wait(left(args.limit.0))?.ok_or_else(given_up)?;
    if args.by.stays() {
        return Ok(());
    }
    receiver
        .wait(END_LIMIT)?
        .ok_or_else(|| io::Error::other("the receiving end does not end"))
}

/// One end's program, with whatever it starts.
struct Part {
    child: Child,
    name: String,
    log: PathBuf,
    used: GroupUsage,
}

impl Part {
    fn start(lab: &mut Lab, end: End, words: &[String]) -> io::Result<Self> {
        let log = lab.directory().join(format!("{}-copy.log", end.name()));
        let file = File::create(&log)?;
        let child = lab
            .command(end, Path::new(&words[0]))
            .args(&words[1..])
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .spawn()?;
        lab.adopt(child.id())?;
        Ok(Self {
            used: GroupUsage::of(child.id()),
            child,
            name: words[0].clone(),
            log,
        })
    }

    /// Waits until something in its namespace listens, without connecting to it.
    fn wait_listening(&mut self) -> io::Result<()> {
        let table = format!("/proc/{}/net/tcp", self.child.id());
        let port = format!(":{PORT:04X} ");
        let listening = || {
            let text = fs::read_to_string(&table).ok()?;
            let listens = |line: &str| line.contains(&port) && line.contains(" 00000000:0000 0A ");
            text.lines().any(listens).then_some(())
        };
        wait_until(LISTEN_LIMIT, listening).ok_or_else(|| self.failed("does not listen"))
    }

    /// Waits until it has ended well; nothing when it has not within `limit`.
    fn wait(&mut self, limit: Duration) -> io::Result<Option<()>> {
        let start = Instant::now();
        loop {
            self.used.look();
            match self.child.try_wait()? {
                Some(status) if status.success() => return Ok(Some(())),
                Some(status) => return Err(self.failed(&status.to_string())),
                None if start.elapsed() >= limit => return Ok(None),
                None => std::thread::sleep(TICK),
            }
        }
    }

    fn failed(&self, what: &str) -> io::Error {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let last = log.trim().lines().last().unwrap_or("it says nothing");
        io::Error::other(format!("{}: {what}: {last}", self.name))
    }

    fn end(mut self) -> ProgramReport {
        self.used.look();
        // One that has ended by itself has no group any more that could be named.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = end_group(&mut self.child);
        }
        ProgramReport {
            usage: self.used.sum(),
            ..ProgramReport::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tool_is_told_where_to_listen_and_where_to_connect() {
        let place = Place {
            image: Path::new("/images/disk"),
            directory: Path::new("/lab"),
            address: Ipv4Addr::new(10, 77, 0, 2),
        };
        assert_eq!(place.copy(), Path::new("/lab/copy/disk"));
        for tool in Tool::value_variants() {
            let (sender, receiver) = (tool.sender(&place).join(" "), tool.receiver(&place).join(" "));
            assert!(sender.contains("10.77.0.2:7603"), "{sender}");
            assert!(
                receiver.contains("7603") && receiver.contains("10.77.0.2"),
                "{receiver}"
            );
            assert!(sender.contains("disk"), "{sender}");
        }
    }
}
