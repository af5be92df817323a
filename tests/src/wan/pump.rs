//! Moves real packets between two TUN devices through a [`Path`].
//!
//! Owns the devices (one in each namespace), the clock and the loop: read what came, release what is due,
//! sleep until the next deadline. Leaves alone what happens to a packet. Promises that packets are released
//! by deadline with catch-up: a late wake-up releases all that became due, so that the rate holds however
//! coarse the sleeps are. Under load it looks every [`GRAIN`] and moves all there is, instead of waking for
//! each packet: the CPU time is the programs', who share the machine.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tun_rs::{DeviceBuilder, SyncDevice};

use super::control::{Command, Event, Lines, Stats, parse};
use super::direction::Nanos;
use super::path::{Path, Way};
use crate::namespace::{self, Site};

/// Pause between two looks while packets flow (the kernel adds some 50 us): the coarseness of arrival and
/// release.
const GRAIN: Duration = Duration::from_micros(100);
/// Packets read from one device before the other has its turn.
const READ_BATCH: usize = 64;
/// Spare packet buffers kept.
const SPARE_MAX: usize = 4096;
/// Packets that may wait in the kernel for the emulator's next read.
const DEVICE_QUEUE: u32 = 4000;
/// The name of the device in either namespace.
pub const DEVICE: &str = "wan0";

/// Opens the device of one site inside its namespace.
pub fn open(site: &Site, mtu: u16) -> io::Result<SyncDevice> {
    let (address, prefix) = (site.address, 24u8);
    namespace::inside(&site.namespace, move || {
        // Router solicitations and the like would be counted as traffic.
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        let device = DeviceBuilder::new()
            .name(DEVICE)
            .mtu(mtu)
            .ipv4(address, prefix, None)
            .tx_queue_len(DEVICE_QUEUE)
            .build_sync()?;
        device.set_nonblocking(true)?;
        Ok(device)
    })?
}

/// The loop's state.
pub struct Pump {
    path: Path,
    start: Instant,
    source: SyncDevice,
    target: SyncDevice,
    mtu: usize,
    spare: VecDeque<Vec<u8>>,
    late_max: Nanos,
    /// A packet was moved in the last round.
    flowing: bool,
}

impl Pump {
    /// Joins two open devices.
    pub fn new(path: Path, source: SyncDevice, target: SyncDevice, mtu: u16) -> Self {
        let (start, spare) = (Instant::now(), VecDeque::new());
        Self {
            path,
            start,
            source,
            target,
            mtu: usize::from(mtu),
            spare,
            late_max: 0,
            flowing: false,
        }
    }

    /// Runs until standard input ends.
    pub fn run(mut self) -> io::Result<()> {
        say(&Event::Ready)?;
        let stdin = io::stdin();
        let mut lines = Lines::default();
        loop {
            let mut readable = self.wait(&stdin)?;
            if readable.control && !self.obey(&stdin, &mut lines)? {
                // Nobody may be left to read it.
                let _ = say(&Event::Stats(self.stats()));
                return Ok(());
            }
            self.flowing = false;
            // Reading goes on while there is something to read, but what is due is released in between.
            loop {
                readable.source = readable.source && self.take(Way::Forth)?;
                readable.target = readable.target && self.take(Way::Back)?;
                self.release(Way::Forth)?;
                self.release(Way::Back)?;
                if !readable.source && !readable.target {
                    break;
                }
            }
        }
    }

    fn now(&self) -> Nanos {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(Nanos::MAX)
    }

    /// Sleeps until something can be read or the next packet is due; while packets flow, for a grain.
    fn wait(&self, stdin: &io::Stdin) -> io::Result<Readable> {
        if self.flowing {
            std::thread::sleep(GRAIN);
        }
        let deadline = if self.flowing {
            Some(0)
        } else {
            self.path.next_deadline()
        };
        let left = deadline.map(|due| due.saturating_sub(self.now()));
        let timeout = left.map(|left| Timespec {
            tv_sec: (left / 1_000_000_000) as i64,
            tv_nsec: (left % 1_000_000_000) as i64,
        });
        let mut fds = [
            PollFd::from_borrowed_fd(self.source.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.target.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        Ok(Readable {
            source: ready(&fds[0]),
            target: ready(&fds[1]),
            control: ready(&fds[2]),
        })
    }

    /// Reads a batch from one device; gives whether more may be waiting.
    fn take(&mut self, way: Way) -> io::Result<bool> {
        for _ in 0..READ_BATCH {
            let mut packet = self.spare.pop_front().unwrap_or_default();
            packet.resize(self.mtu, 0);
            let device = if way == Way::Forth {
                &self.source
            } else {
                &self.target
            };
            match device.recv(&mut packet) {
                Ok(length) => {
                    packet.truncate(length);
                    self.flowing = true;
                    let now = self.now();
                    self.path.push(now, way, packet);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.recycle(packet);
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Writes everything that is due one way to the other device.
    fn release(&mut self, way: Way) -> io::Result<()> {
        let now = self.now();
        if let Some(due) = self.path.next_deadline() {
            self.late_max = self.late_max.max(now.saturating_sub(due));
        }
        while let Some(packet) = self.path.pop(now, way) {
            self.flowing = true;
            let device = if way == Way::Forth {
                &self.target
            } else {
                &self.source
            };
            match device.send(&packet) {
                // A full socket buffer at the receiver drops the packet inside the kernel, as on a real host.
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Not IP, or the address is gone: a real link would not deliver it either.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                Err(error) => return Err(error),
            }
            self.recycle(packet);
        }
        Ok(())
    }

    fn recycle(&mut self, packet: Vec<u8>) {
        if self.spare.len() < SPARE_MAX {
            self.spare.push_back(packet);
        }
    }

    /// Reads commands and follows them; gives false at the end of input.
    fn obey(&mut self, stdin: &io::Stdin, lines: &mut Lines) -> io::Result<bool> {
        let mut bytes = [0; 4096];
        let length = rustix::io::read(stdin.as_fd(), &mut bytes)?;
        for line in lines.take(&bytes[..length]) {
            match parse(&line) {
                Ok(command) => self.follow(command)?,
                Err(message) => say(&Event::Error { message })?,
            }
        }
        Ok(length > 0)
    }

    fn follow(&mut self, command: Command) -> io::Result<()> {
        let now = self.now();
        let nanos = |span: Duration| u64::try_from(span.as_nanos()).unwrap_or(u64::MAX / 2);
        match command {
            Command::Cut(cut) => self.path.set_cut(cut),
            Command::CutBetween(window) => {
                self.path.cut_between(
                    now,
                    now.saturating_add(nanos(window.from)),
                    now.saturating_add(nanos(window.until)),
                );
            }
            Command::Loss(loss) => self.path.reshape(|shape| shape.loss = loss),
            Command::Stats => say(&Event::Stats(self.stats()))?,
        }
        Ok(())
    }

    fn stats(&self) -> Stats {
        let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Stats {
            seconds: self.start.elapsed().as_secs_f64(),
            forth: self.path.counters(Way::Forth),
            back: self.path.counters(Way::Back),
            cpu_seconds: cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9,
            late_max_ms: self.late_max as f64 / 1e6,
            forth_per_second: self.path.delivered_per_second(Way::Forth).to_vec(),
            back_per_second: self.path.delivered_per_second(Way::Back).to_vec(),
        }
    }
}

/// What can be read.
struct Readable {
    source: bool,
    target: bool,
    control: bool,
}

fn say(event: &Event) -> io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    let mut stdout = io::stdout().lock();
    stdout.write_all(&line)?;
    stdout.flush()
}
