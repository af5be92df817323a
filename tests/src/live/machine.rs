//! QEMU's command line for a lab guest.
//!
//! Owns the words, for a machine that starts now and for the template from which an agent starts the target.
//! Leaves alone sockets and guests. Promises that source and template differ in nothing that a migration
//! compares: machine type, CPU, memory, devices and their order.

use std::path::Path;
use std::process::Command;

use crate::guest::boot::accelerator;
use crate::guest::workload::{Workload, command_line};
use crate::guest::{Fs, Kernel};

/// Known by QEMU 7.2 and all later versions of this machine type.
pub const MACHINE_TYPE: &str = "pc-q35-7.2";

/// The firmware of a machine with a flash: QEMU's own BIOS, which knows no variables, so that the store stays as it was made.
const BIOS: &str = "/usr/share/seabios/bios-256k.bin";

/// Added to a guest's memory where QEMU is older than 9.0, so that it is no multiple of 256 KiB. Such a QEMU forgets under
/// software emulation to watch pages again that its fast scan of such memory found dirty: after the second
/// pass writes are missed, and the guest dies at the target. Memory of another size takes the slow scan,
/// which is right, but stops the guest for half a second as RAM begins to flow. Seen in 8 of 8 migrations by
/// QEMU 7.2 alone without this, and in none with it.
const ODD_KIB: u64 = 8;
/// The first major version whose fast scan is right.
const FAST_SCAN_FROM: u32 = 9;

/// What the guest is called.
pub const NAME: &str = "web";

/// A disk of the machine; its device is called `disk0`, `disk1`, and so on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// A path, or a placeholder of a template.
    pub path: String,
    pub format: String,
}

/// A machine. Paths are strings, because in a template they are placeholders.
#[derive(Clone, Debug)]
pub struct Machine {
    program: String,
    /// Beside `ram_mib`.
    odd_kib: u64,
    pub name: String,
    pub uuid: String,
    pub ram_mib: u64,
    pub cpus: u32,
    pub disks: Vec<Disk>,
    /// A store of firmware variables: a path, or a placeholder of a template.
    pub vars: Option<String>,
    pub vmlinuz: String,
    pub initrd: String,
    /// The kernel's command line.
    pub append: String,
    /// Socket on which the lab listens for the serial console.
    pub console: String,
    /// Socket on which the lab listens for its own QMP connection.
    pub lab_qmp: String,
    /// Socket on which QEMU listens for Longhaul.
    pub qmp: String,
    pub pidfile: String,
    /// Socket on which QEMU listens for those who talk to the guest agent.
    pub guest_agent: Option<String>,
    /// The one core that all of it runs on.
    pub core: Option<u32>,
    /// Stopped, and waiting for a migration.
    pub incoming: bool,
}

/// What this QEMU's guests have beside their MiB of memory; one that does not tell its version is taken for an old one.
fn odd_kib(program: &str) -> u64 {
    let output = Command::new(program).arg("--version").output();
    let said = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let version = said.unwrap_or_default();
    let major = version
        .split_once("version ")
        .and_then(|(_, version)| version.split('.').next()?.parse::<u32>().ok());
    if major.is_some_and(|major| major >= FAST_SCAN_FROM) {
        0
    } else {
        ODD_KIB
    }
}

impl Machine {
    /// A guest with one disk and a workload; its sockets lie in `directory`.
    pub fn new(directory: &Path, kernel: &Kernel, disk: Disk, fs: Fs, workload: Workload, seed: u64) -> Self {
        let place = |name: &str| directory.join(name).display().to_string();
        let program = std::env::var("LONGHAUL_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned());
        Self {
            odd_kib: odd_kib(&program),
            program,
            name: NAME.to_owned(),
            uuid: "5e0a1c2f-7c56-4a1b-9d43-3a4f6b1c8e21".to_owned(),
            ram_mib: 128,
            cpus: 1,
            disks: vec![disk],
            vars: None,
            vmlinuz: kernel.vmlinuz.display().to_string(),
            initrd: kernel.initrd.display().to_string(),
            append: command_line("/dev/vda", fs, workload, seed),
            console: place("console.sock"),
            lab_qmp: place("lab-qmp.sock"),
            qmp: place("qmp.sock"),
            pidfile: place("qemu.pid"),
            guest_agent: None,
            core: None,
            incoming: false,
        }
    }

    /// The same machine under another name, with another command line for its kernel.
    pub fn renamed(&self, name: &str, append: String) -> Self {
        Self {
            name: name.to_owned(),
            append,
            ..self.clone()
        }
    }

    /// Runs on another QEMU.
    pub fn set_program(&mut self, program: String) {
        self.odd_kib = odd_kib(&program);
        self.program = program;
    }

    /// All memory, in KiB.
    pub fn ram_kib(&self) -> u64 {
        self.ram_mib * 1024 + self.odd_kib
    }

    /// The template of the same machine at the target: placeholders for what the agent decides, the lab's own
    /// sockets as given.
    pub fn template(&self, console: &Path, lab_qmp: &Path) -> Self {
        let disks = self.disks.iter().enumerate().map(|(number, disk)| Disk {
            path: format!("{{disk{number}}}"),
            format: disk.format.clone(),
        });
        Self {
            name: "{name}".to_owned(),
            disks: disks.collect(),
            vars: self
                .vars
                .as_ref()
                .map(|_| format!("{{disk{}}}", self.disks.len())),
            console: console.display().to_string(),
            lab_qmp: lab_qmp.display().to_string(),
            qmp: "{qmp}".to_owned(),
            pidfile: "{pidfile}".to_owned(),
            incoming: true,
            ..self.clone()
        }
    }

    /// Program and arguments.
    pub fn words(&self) -> Vec<String> {
        let mut words = Vec::new();
        if let Some(core) = self.core {
            words.extend(["taskset", "-c", &core.to_string()].map(str::to_owned));
        }
        words.push(self.program.clone());
        words.extend(self.base());
        for (number, disk) in self.disks.iter().enumerate() {
            words.extend(disk.words(number));
        }
        if let Some(vars) = &self.vars {
            words.extend([
                "-drive".to_owned(),
                format!("if=pflash,unit=0,format=raw,readonly=on,file={BIOS}"),
                "-drive".to_owned(),
                format!("if=pflash,unit=1,format=raw,file={}", quoted(vars)),
            ]);
        }
        if let Some(socket) = &self.guest_agent {
            words.extend([
                "-device".to_owned(),
                "virtio-serial-pci,id=serial0".to_owned(),
                "-chardev".to_owned(),
                format!("socket,id=agent,path={},server=on,wait=off", quoted(socket)),
                "-device".to_owned(),
                "virtserialport,chardev=agent,name=org.qemu.guest_agent.0".to_owned(),
            ]);
        }
        if self.incoming {
            words.extend(["-S", "-incoming", "defer"].map(str::to_owned));
        }
        words
    }

    fn base(&self) -> Vec<String> {
        let mut accelerator = accelerator();
        if accelerator == "tcg" {
            accelerator += ",thread=multi";
        }
        let chardev = |id: &str, path: &str| format!("socket,id={id},path={}", quoted(path));
        let pairs = [
            ("-name", self.name.clone()),
            ("-uuid", self.uuid.clone()),
            ("-machine", MACHINE_TYPE.to_owned()),
            ("-accel", accelerator),
            ("-cpu", "max".to_owned()),
            ("-smp", self.cpus.to_string()),
            ("-m", format!("{}k", self.ram_kib())),
            ("-display", "none".to_owned()),
            ("-kernel", self.vmlinuz.clone()),
            ("-initrd", self.initrd.clone()),
            ("-append", self.append.clone()),
            ("-chardev", chardev("console", &self.console)),
            ("-serial", "chardev:console".to_owned()),
            ("-chardev", chardev("lab", &self.lab_qmp)),
            ("-mon", "chardev=lab,mode=control".to_owned()),
            ("-qmp", format!("unix:{},server=on,wait=off", quoted(&self.qmp))),
            ("-pidfile", self.pidfile.clone()),
        ];
        let flags = ["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned);
        let pairs = pairs
            .into_iter()
            .flat_map(|(name, value)| [name.to_owned(), value]);
        flags.into_iter().chain(pairs).collect()
    }
}

impl Disk {
    fn words(&self, number: usize) -> [String; 6] {
        [
            "-blockdev".to_owned(),
            format!(
                "driver=file,node-name=file{number},discard=unmap,filename={}",
                quoted(&self.path)
            ),
            "-blockdev".to_owned(),
            format!(
                "driver={},node-name=node{number},discard=unmap,file=file{number}",
                self.format
            ),
            "-device".to_owned(),
            format!("virtio-blk-pci,id=disk{number},drive=node{number}"),
        ]
    }
}

/// A comma separates QEMU's options; doubled, it is part of a value.
fn quoted(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn machine() -> Machine {
        let kernel = Kernel {
            vmlinuz: PathBuf::from("/k/vmlinuz"),
            initrd: PathBuf::from("/k/initrd"),
        };
        let disk = Disk {
            path: "/d/a,b.qcow2".to_owned(),
            format: "qcow2".to_owned(),
        };
        Machine::new(Path::new("/lab"), &kernel, disk, Fs::Ext4, Workload::Fsync, 9)
    }

    #[test]
    fn the_template_differs_only_in_names_and_places() {
        let machine = machine();
        let template = machine.template(Path::new("/t/console"), Path::new("/t/lab"));
        let (source, target) = (machine.words(), template.words());
        assert_eq!(target[source.len()..], ["-S", "-incoming", "defer"]);
        let changed: Vec<_> = source
            .iter()
            .zip(&target)
            .filter(|(one, two)| one != two)
            .map(|(_, two)| two.as_str())
            .collect();
        assert_eq!(
            changed,
            [
                "{name}",
                "socket,id=console,path=/t/console",
                "socket,id=lab,path=/t/lab",
                "unix:{qmp},server=on,wait=off",
                "{pidfile}",
                "driver=file,node-name=file0,discard=unmap,filename={disk0}",
            ]
        );
    }

    #[test]
    fn commas_in_names_are_kept_and_more_disks_have_a_place() {
        let mut machine = machine();
        machine.disks.push(Disk {
            path: "/d/two".to_owned(),
            format: "raw".to_owned(),
        });
        machine.guest_agent = Some("/lab/agent".to_owned());
        let words = machine.words().join(" ");
        assert!(words.contains("filename=/d/a,,b.qcow2"));
        assert!(words.contains("id=disk1,drive=node1"));
        assert!(words.contains("name=org.qemu.guest_agent.0"));
    }
}
