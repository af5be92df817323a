//! Images that somebody else uses, and images that must not be followed to other files: refused by name.

#![allow(clippy::unwrap_used)] // A step that fails is a test that fails.

mod image_bench;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use image_bench::{Bench, everything, random_content, run};
use longhaul_agent::disk::ReadAt;
use longhaul_agent::disk::image::{self, Flatten, Format, ImageError, OpenOptions, SourceImage};

const MIB: u64 = 1 << 20;

fn open(bench: &Bench, path: &Path, format: Option<Format>) -> Result<SourceImage, ImageError> {
    let flatten = Flatten::Yes;
    image::open(
        path,
        &OpenOptions {
            format,
            flatten,
            ..OpenOptions::new(bench.run_dir(), &everything)
        },
    )
}

fn refusal(bench: &Bench, path: &Path, format: Format) -> String {
    open(bench, path, Some(format)).unwrap_err().to_string()
}

/// A program that is ended with the test.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        let name = command.get_program().to_owned();
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        Self(child.unwrap_or_else(|error| panic!("{name:?} of qemu-utils or qemu-system-x86: {error}")))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `qemu-io` that has opened the image, and has answered a command to prove it.
fn holding(path: &Path, format: &str, options: &[&str]) -> Running {
    let mut holder = Running::start(
        Command::new("qemu-io")
            .args(["-f", format])
            .args(options)
            .arg(path),
    );
    holder.0.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
    let mut answer = String::new();
    BufReader::new(holder.0.stdout.as_mut().unwrap())
        .read_line(&mut answer)
        .unwrap();
    assert!(answer.contains("MiB"), "{answer}");
    holder
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen within 20 s");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn qcow2(bench: &Bench, name: &str) -> PathBuf {
    let raw = bench.write(&format!("{name}.raw"), &random_content(4 * MIB, 11));
    let path = bench.path(name);
    bench.qemu_img(&["convert", "-O", "qcow2"], &[&raw, &path]);
    path
}

#[test]
fn an_image_that_qemu_may_write_is_refused_with_its_process() {
    let bench = Bench::new();
    let image = qcow2(&bench, "disk.qcow2");
    let raw = bench.path("disk.qcow2.raw");
    for (path, format) in [(&image, Format::Qcow2), (&raw, Format::Raw)] {
        let holder = holding(path, format.name(), &[]);
        let error = refusal(&bench, path, format.clone());
        let wanted = format!(
            "{} is in use by qemu-io (process {}): it may write to it; stop it first",
            path.display(),
            holder.0.id()
        );
        assert_eq!(error, wanted);
        drop(holder);
        open(&bench, path, Some(format.clone())).unwrap();
        // Readers do not disturb each other.
        let reader = holding(path, format.name(), &["-r"]);
        open(&bench, path, Some(format)).unwrap();
        drop(reader);
    }
}

#[test]
fn a_virtual_machine_and_its_backing_file_are_refused() {
    let bench = Bench::new();
    let image = qcow2(&bench, "base.qcow2");
    let top = bench.path("top.qcow2");
    bench.qemu_img(
        &[
            "create",
            "-f",
            "qcow2",
            "-o",
            "backing_file=base.qcow2,backing_fmt=qcow2",
        ],
        &[&top],
    );
    let drive = format!("if=virtio,format=qcow2,file={}", image.display());
    let mut machine = Running::start(
        Command::new("qemu-system-x86_64")
            .args([
                "-accel",
                "tcg",
                "-m",
                "32",
                "-nodefaults",
                "-display",
                "none",
                "-S",
                "-qmp",
                "stdio",
            ])
            .args(["-drive", &drive]),
    );
    // It greets once its disks are open.
    let mut greeting = String::new();
    BufReader::new(machine.0.stdout.as_mut().unwrap())
        .read_line(&mut greeting)
        .unwrap();
    assert!(greeting.contains("QMP"), "{greeting}");
    for path in [&image, &top] {
        let error = refusal(&bench, path, Format::Qcow2);
        let holder = format!("in use by qemu-system-x86 (process {})", machine.0.id());
        assert!(
            error.contains("base.qcow2 is") && error.contains(&holder),
            "{error}"
        );
    }
}

#[test]
fn while_it_is_open_nobody_can_start_on_it() {
    let bench = Bench::new();
    let image = qcow2(&bench, "disk.qcow2");
    let raw = bench.path("disk.qcow2.raw");
    for (path, format) in [(&image, "qcow2"), (&raw, "raw")] {
        let source = open(&bench, path, Some(format.parse().unwrap())).unwrap();
        let write = Command::new("qemu-io")
            .args(["-f", format, "-c", "write 0 4096"])
            .arg(path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&write.stderr).into_owned();
        assert!(
            !write.status.success() && said.contains("Failed to get \"write\" lock"),
            "{said}"
        );
        source.unchanged().unwrap();
        source.close();
        run(Command::new("qemu-io")
            .args(["-f", format, "-c", "write 0 4096"])
            .arg(path));
    }
}

#[test]
fn a_writer_without_locks_is_refused() {
    let bench = Bench::new();
    let path = bench.write("disk.raw", &random_content(MIB, 12));
    let file = std::fs::File::options().append(true).open(&path).unwrap();
    let writer = Running(Command::new("sleep").arg("100").stdout(file).spawn().unwrap());
    let error = refusal(&bench, &path, Format::Raw);
    let holder = format!(
        "in use by sleep (process {}): it has it open for writing",
        writer.0.id()
    );
    assert!(error.contains(&holder), "{error}");
    drop(writer);
    open(&bench, &path, Some(Format::Raw)).unwrap();
}

#[test]
fn nothing_outside_of_the_allowed_directories_is_opened() {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("allowed")).unwrap();
    let secret = bench.write("secret.raw", &random_content(MIB, 13));
    let root = std::fs::canonicalize(bench.path("allowed")).unwrap();
    let allowed = |path: &Path| path.starts_with(&root);
    let outside = std::fs::canonicalize(&secret).unwrap();
    let refuse = |path: &Path, format: Format| {
        let options = OpenOptions {
            format: Some(format),
            flatten: Flatten::Yes,
            ..OpenOptions::new(bench.run_dir(), &allowed)
        };
        let error = image::open(path, &options).unwrap_err();
        assert!(
            matches!(&error, ImageError::NotAllowed { path, .. } if *path == outside),
            "{error}"
        );
    };
    refuse(&secret, Format::Raw);
    let link = bench.path("allowed/link.raw");
    std::os::unix::fs::symlink(&secret, &link).unwrap();
    refuse(&link, Format::Raw);
    let overlay = bench.path("allowed/overlay.qcow2");
    let backing = format!("backing_file={},backing_fmt=raw", secret.display());
    bench.qemu_img(&["create", "-f", "qcow2", "-o", &backing], &[&overlay]);
    refuse(&overlay, Format::Qcow2);
    bench.qemu_img(&["rebase", "-u", "-b", "../secret.raw", "-F", "raw"], &[&overlay]);
    refuse(&overlay, Format::Qcow2);
    let external = bench.path("allowed/external.qcow2");
    let data_file = format!("data_file={}", bench.path("allowed/data").display());
    bench.qemu_img(
        &["create", "-f", "qcow2", "-o", &data_file],
        &[&external, Path::new("1M")],
    );
    bench.qemu_img(
        &["amend", "-o", &format!("data_file={}", secret.display())],
        &[&external],
    );
    refuse(&external, Format::Qcow2);
    let vmdk = bench.path("allowed/disk.vmdk");
    let descriptor = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n\
        createType=\"monolithicFlat\"\n\
        RW 2048 FLAT \"../secret.raw\" 0\n";
    std::fs::write(&vmdk, descriptor).unwrap();
    refuse(&vmdk, Format::Vmdk);
}

#[test]
fn a_part_of_a_vmdk_cannot_name_further_files() {
    let bench = Bench::new();
    let text =
        "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentSparse\"\n";
    let outer = bench.write(
        "disk.vmdk",
        format!("{text}RW 2048 SPARSE \"part.vmdk\"\n").as_bytes(),
    );
    // A sparse header without capacity, whose descriptor QEMU would follow.
    let mut part = vec![0; 4096];
    part[..5].copy_from_slice(b"KDMV\x01");
    part[28] = 1;
    part[36] = 2;
    let inner = format!("{text}RW 2048 FLAT \"/etc/shadow\" 0\n");
    part[512..512 + inner.len()].copy_from_slice(inner.as_bytes());
    bench.write("part.vmdk", &part);
    let error = refusal(&bench, &outer, Format::Vmdk);
    assert!(
        error.contains("part.vmdk cannot be trusted as vmdk: its sparse header states no capacity"),
        "{error}"
    );
}

#[test]
fn a_guest_cannot_forge_its_way_to_another_file() {
    let bench = Bench::new();
    let secret = bench.write("secret.raw", &random_content(MIB, 14));
    let forged = bench.path("guest.raw");
    let backing = format!("backing_file={},backing_fmt=raw", secret.display());
    bench.qemu_img(&["create", "-f", "qcow2", "-o", &backing], &[&forged]);
    // Stated as raw it is raw, whatever it holds.
    let image = open(&bench, &forged, Some(Format::Raw)).unwrap();
    assert_eq!(
        (image.format(), image.size()),
        (&Format::Raw, std::fs::metadata(&forged).unwrap().len())
    );
    let mut magic = [0; 4];
    image.read_exact_at(&mut magic, 0).unwrap();
    assert_eq!(&magic, b"QFI\xfb");
    drop(image);
    // Recognised, it is not followed.
    let error = open(&bench, &forged, None).unwrap_err();
    assert!(matches!(&error, ImageError::ProbedReference { .. }), "{error}");
    // As raw again where a chain says so: its own header is content.
    let overlay = bench.path("overlay.qcow2");
    bench.qemu_img(
        &[
            "create",
            "-f",
            "qcow2",
            "-o",
            "backing_file=guest.raw,backing_fmt=raw",
        ],
        &[&overlay],
    );
    let image = open(&bench, &overlay, Some(Format::Qcow2)).unwrap();
    image.read_exact_at(&mut magic, 0).unwrap();
    assert_eq!(&magic, b"QFI\xfb");
}

#[test]
fn formats_are_recognised_and_said_to_be() {
    let bench = Bench::new();
    let raw = bench.write("disk.raw", &random_content(2 * MIB, 15));
    for format in ["qcow2", "vmdk", "vhdx", "vdi", "vpc", "qed", "parallels", "qcow"] {
        let path = bench.path(&format!("disk.{format}"));
        bench.qemu_img(&["convert", "-O", format], &[&raw, &path]);
        let image = open(&bench, &path, None).unwrap();
        assert_eq!(image.format().name(), format);
        assert!(
            image.notes()[0].contains("recognised by the content"),
            "{:?}",
            image.notes()
        );
    }
    let image = open(&bench, &raw, None).unwrap();
    assert_eq!((image.format(), image.notes().len()), (&Format::Raw, 0));
}

#[test]
fn marked_images_are_refused() {
    let bench = Bench::new();
    let encrypted = bench.path("encrypted.qcow2");
    run(Command::new("qemu-img")
        .args([
            "create",
            "-q",
            "-f",
            "qcow2",
            "--object",
            "secret,id=key,data=1234567",
        ])
        .args([
            "-o",
            // Not luks: on a busy machine qemu-img fails to time its key derivation.
            "encrypt.format=aes,encrypt.key-secret=key",
        ])
        .args([&encrypted, Path::new("1M")]));
    let error = refusal(&bench, &encrypted, Format::Qcow2);
    assert!(error.contains("is an encrypted qcow2 image"), "{error}");

    // The feature bits of a qcow2 header: 1 dirty, 2 corrupt, 32 not invented yet.
    let image = qcow2(&bench, "disk.qcow2");
    for (bits, wanted) in [
        (1, "is marked dirty"),
        (2, "is marked corrupt"),
        (32, "features newer than this program"),
    ] {
        let mut content = std::fs::read(&image).unwrap();
        content[79] = bits;
        let marked = bench.write(&format!("{bits}.qcow2"), &content);
        let error = refusal(&bench, &marked, Format::Qcow2);
        assert!(error.contains(wanted), "{error}");
    }
}

#[test]
fn references_that_are_no_plain_files_are_refused() {
    let bench = Bench::new();
    let path = bench.path("disk.qcow2");
    bench.qemu_img(&["create", "-f", "qcow2"], &[&path, Path::new("1M")]);
    for name in [
        "nbd:unix:/tmp/none",
        "json:{\"driver\":\"null-co\"}",
        "nbd://host/disk",
    ] {
        bench.qemu_img(&["rebase", "-u", "-b", name, "-F", "raw"], &[&path]);
        let error = refusal(&bench, &path, Format::Qcow2);
        assert!(error.contains("which is no plain file name"), "{error}");
    }
    // A chain that bites its tail.
    bench.qemu_img(&["rebase", "-u", "-b", "disk.qcow2", "-F", "qcow2"], &[&path]);
    let error = refusal(&bench, &path, Format::Qcow2);
    assert!(error.contains("disk.qcow2 twice"), "{error}");
    // A name without a format, as old programs wrote it: the extension that holds it is made unknown.
    let mut content = std::fs::read(&path).unwrap();
    let place = content
        .windows(4)
        .position(|window| window == [0xe2, 0x79, 0x2a, 0xca])
        .unwrap();
    content[place] = 0;
    let unnamed = bench.write("unnamed.qcow2", &content);
    let error = refusal(&bench, &unnamed, Format::Qcow2);
    assert!(
        error.contains("does not record the format of its backing file \"disk.qcow2\""),
        "{error}"
    );
}

#[test]
fn what_qemu_says_reaches_the_operator() {
    let bench = Bench::new();
    let garbage = bench.write("garbage.vhdx", &[7; 4096]);
    let error = refusal(&bench, &garbage, Format::Vhdx);
    assert!(
        error.starts_with("qemu-img failed") && error.contains("garbage.vhdx"),
        "{error}"
    );
    let none = refusal(&bench, &bench.path("none.qcow2"), Format::Qcow2);
    assert!(
        none.starts_with("cannot find ") && none.contains("none.qcow2"),
        "{none}"
    );
    let options = OpenOptions {
        format: Some(Format::Qcow2),
        qemu_img: "/nonexistent/qemu-img".into(),
        ..OpenOptions::new(bench.run_dir(), &everything)
    };
    let error = image::open(&qcow2(&bench, "disk.qcow2"), &options)
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "qemu-img is not installed; it comes with the package qemu-utils"
    );
}

/// The process's own view of a server that its pid file names.
fn is_running(pid: u32) -> bool {
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !(state.is_empty() || state.contains(") Z "))
}

#[test]
fn servers_end_with_their_image_and_stale_ones_at_the_next_start() {
    let bench = Bench::new();
    let image = qcow2(&bench, "disk.qcow2");
    let source = open(&bench, &image, Some(Format::Qcow2)).unwrap();
    let pid_file = bench
        .leftovers()
        .into_iter()
        .find(|name| name.ends_with(".pid"))
        .unwrap();
    let pid_path = bench.run_dir().join(&pid_file);
    let pid: u32 = std::fs::read_to_string(&pid_path)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!(is_running(pid));
    drop(source);
    assert!(!is_running(pid));
    assert_eq!(bench.leftovers(), [] as [String; 0]);

    // A server whose agent was killed before it connected: it would wait for ever.
    let socket = pid_path.with_extension("sock");
    let mut stale = Running::start(
        Command::new("qemu-nbd")
            .args(["-r", "-f", "qcow2", "--pid-file"])
            .arg(&pid_path)
            .arg("--socket")
            .args([&socket, &image]),
    );
    until("the server's start", || socket.exists() && pid_path.exists());
    // And a pid file whose number now belongs to somebody else.
    let innocent = Running(Command::new("sleep").arg("100").spawn().unwrap());
    std::fs::write(bench.run_dir().join("nbd-1-1-1.pid"), innocent.0.id().to_string()).unwrap();
    assert_eq!(image::end_stale_servers(&bench.run_dir()), 1);
    stale.0.wait().unwrap();
    assert!(is_running(innocent.0.id()));
    assert_eq!(bench.leftovers(), [] as [String; 0]);
}

#[test]
fn a_server_ends_when_its_agent_is_killed() {
    // This test program stands for the agent: it runs itself once more, and kills that.
    const ROLE: &str = "LONGHAUL_TEST_IMAGE";
    if let Some(path) = std::env::var_os(ROLE) {
        let path = PathBuf::from(path);
        let run_dir = path.with_extension("run");
        let options = OpenOptions {
            format: Some(Format::Qcow2),
            ..OpenOptions::new(run_dir, &everything)
        };
        let source = image::open(&path, &options).unwrap();
        println!("opened {}", source.size());
        std::thread::sleep(Duration::from_secs(100));
        return;
    }
    let bench = Bench::new();
    let image = qcow2(&bench, "disk.qcow2");
    let mut agent = Running::start(
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_server_ends_when_its_agent_is_killed", "--nocapture"])
            .env(ROLE, &image),
    );
    let mut lines = BufReader::new(agent.0.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("opened ")));
    let run_dir = image.with_extension("run");
    let pid_file = std::fs::read_dir(&run_dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|extension| extension == "pid"));
    let pid: u32 = std::fs::read_to_string(pid_file.unwrap())
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!(is_running(pid));
    agent.0.kill().unwrap();
    until("the server's end", || !is_running(pid));
}
