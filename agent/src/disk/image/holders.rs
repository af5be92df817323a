//! Who else has an image open or mounted: for what image locks do not show, and to name the holder in errors.
//!
//! Owns looking through /proc and /sys. Leaves alone image locks. Best effort by nature: an agent without
//! privileges does not see other users' files, and a holder may come a moment later; what slips through is
//! found by `change`.

use std::fmt;
use std::fs::{self, File, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A process that has the image open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    pub(super) pid: u32,
    pub(super) name: String,
    /// Whether it may write.
    pub(super) writes: bool,
    /// Whether it holds locks of the kind QEMU uses.
    pub(super) locks: bool,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {})", self.name, self.pid)
    }
}

/// What identifies the file: for a block device the device itself, whichever of its nodes was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Identity {
    File { dev: u64, ino: u64 },
    Device(u64),
}

impl From<&Metadata> for Identity {
    fn from(metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            Self::Device(metadata.rdev())
        } else {
            Self::File {
                dev: metadata.dev(),
                ino: metadata.ino(),
            }
        }
    }
}

/// Other processes that have this file open, found by the name they opened it under.
pub(super) fn processes(path: &Path, metadata: &Metadata) -> Vec<Holder> {
    let Some(name) = fs::canonicalize(path)
        .ok()
        .and_then(|path| path.file_name().map(ToOwned::to_owned))
    else {
        return Vec::new();
    };
    let identity = Identity::from(metadata);
    let mut found = Vec::new();
    for process in entries("/proc") {
        let Some(pid) = process
            .file_name()
            .and_then(|name| name.to_str()?.parse::<u32>().ok())
        else {
            continue;
        };
        if pid == std::process::id() {
            continue;
        }
        for fd in entries(process.join("fd")) {
            // The name first: asking for metadata of a strange file may wait for a dead file server.
            let named = fs::read_link(&fd).is_ok_and(|target| target.file_name() == Some(&name));
            if named && fs::metadata(&fd).is_ok_and(|metadata| Identity::from(&metadata) == identity) {
                found.extend(holder(pid, &process, &fd));
            }
        }
    }
    found
}

fn holder(pid: u32, process: &Path, fd: &Path) -> Option<Holder> {
    let details = fs::read_to_string(process.join("fdinfo").join(fd.file_name()?)).ok()?;
    let flags = details.lines().find_map(|line| line.strip_prefix("flags:"))?;
    let flags = u32::from_str_radix(flags.trim(), 8).ok()?;
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    Some(Holder {
        pid,
        name: name.trim().chars().filter(|c| !c.is_control()).collect(),
        writes: flags & 0b11 != 0, // O_WRONLY is 1, O_RDWR is 2.
        locks: details.contains("OFDLCK"),
    })
}

/// A loop device that shows this file and may write to it.
pub(super) fn writable_loop(metadata: &Metadata) -> Option<PathBuf> {
    writable_loop_in(Path::new("/sys/block"), metadata)
}

fn writable_loop_in(sys_block: &Path, metadata: &Metadata) -> Option<PathBuf> {
    let identity = Identity::from(metadata);
    entries(sys_block).find_map(|device| {
        let backing = fs::read_to_string(device.join("loop/backing_file")).ok()?;
        let backing = fs::metadata(backing.trim_end_matches('\n')).ok()?;
        let writable = fs::read_to_string(device.join("ro")).is_ok_and(|ro| ro.trim() != "1");
        let name = device.file_name()?;
        (writable && Identity::from(&backing) == identity).then(|| Path::new("/dev").join(name))
    })
}

/// Why the kernel says that a block device is busy: its mount points, or the devices built upon it.
pub(crate) fn of_device(rdev: u64) -> String {
    let number = format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let sys = Path::new("/sys/dev/block").join(&number);
    let mut numbers = vec![number];
    // The partitions of a disk are folders inside the disk's own.
    numbers.extend(entries(&sys).filter_map(|part| read_trimmed(&part.join("dev"))));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mounted = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let device = fields.nth(2)?;
        let place = fields.nth(1)?;
        numbers
            .iter()
            .any(|number| number == device)
            .then(|| format!("the file system mounted at {place}"))
    });
    mounted
        .or_else(|| held_by_devices(&sys))
        .unwrap_or_else(|| "the kernel (mount, swap, LVM, RAID or another program)".into())
}

fn held_by_devices(sys: &Path) -> Option<String> {
    let holder = entries(sys.join("holders")).next().or_else(|| {
        let mut parts = entries(sys).filter(|part| part.join("partition").exists());
        parts.find_map(|part| entries(part.join("holders")).next())
    })?;
    let name = read_trimmed(&holder.join("dm/name")).map(|name| format!("/dev/mapper/{name}"));
    Some(name.unwrap_or_else(|| {
        format!(
            "/dev/{}",
            holder.file_name().unwrap_or_default().to_string_lossy()
        )
    }))
}

/// Sectors written to a block device so far, by the kernel's count.
pub(super) fn written_sectors(file: &File) -> Option<u64> {
    let rdev = file.metadata().ok()?.rdev();
    let stat = format!(
        "/sys/dev/block/{}:{}/stat",
        rustix::fs::major(rdev),
        rustix::fs::minor(rdev)
    );
    fs::read_to_string(stat)
        .ok()?
        .split_whitespace()
        .nth(6)?
        .parse()
        .ok()
}

fn read_trimmed(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// The paths inside a folder; none where it cannot be read.
fn entries(folder: impl AsRef<Path>) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writable_loop_device_is_found_by_what_it_shows() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.raw");
        fs::write(&image, "x").unwrap();
        let metadata = fs::metadata(&image).unwrap();
        let device = folder.path().join("sys/loop7");
        fs::create_dir_all(device.join("loop")).unwrap();
        fs::create_dir_all(folder.path().join("sys/sda")).unwrap();
        // Under another name, by way of a hard link.
        let alias = folder.path().join("alias");
        fs::hard_link(&image, &alias).unwrap();
        fs::write(device.join("loop/backing_file"), format!("{}\n", alias.display())).unwrap();
        fs::write(device.join("ro"), "0\n").unwrap();
        let sys = folder.path().join("sys");
        assert_eq!(
            writable_loop_in(&sys, &metadata),
            Some(PathBuf::from("/dev/loop7"))
        );
        fs::write(device.join("ro"), "1\n").unwrap();
        assert_eq!(writable_loop_in(&sys, &metadata), None);
    }

    #[test]
    fn a_process_is_found_with_what_it_may_do() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .stdout(image.reopen().unwrap())
            .spawn()
            .unwrap();
        let found = processes(image.path(), &image.as_file().metadata().unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        let sleeper = found.iter().find(|holder| holder.pid == child.id()).unwrap();
        assert!(sleeper.writes && !sleeper.locks);
    }
}
