//! Attaching to a running VM by its QMP socket.
//!
//! Owns how the process behind a monitor is found. A VM that libvirt or Proxmox started is attached to by a second monitor
//! that their configuration adds; QEMU serves any number of them side by side.

mod process;

pub use self::process::process_of;
