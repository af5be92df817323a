//! UDP sockets with buffers that a fast link needs.
//!
//! Owns making and sizing them. The kernel silently grants less than asked and reports twice what it granted, so the size is
//! read back and a short grant is warned about with the name of the setting that raises it. Leaves alone what is sent.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use socket2::{Domain, Protocol, Socket, Type};

use super::refusal::LinkError;

/// What a socket got. Sizes in bytes, as usable (half of what Linux reports).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Granted {
    pub(crate) receive: usize,
    pub(crate) send: usize,
}

/// The warning is given once per process, not once per connection.
static WARNED: AtomicBool = AtomicBool::new(false);

/// A bound UDP socket whose buffers are as near to `buffer` bytes as the kernel grants.
pub(crate) fn bind(address: SocketAddr, buffer: usize) -> Result<UdpSocket, LinkError> {
    let failed = |source: std::io::Error| LinkError::Socket {
        address,
        source: Arc::new(source),
    };
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM.nonblocking(),
        Some(Protocol::UDP),
    )
    .map_err(failed)?;
    if address.is_ipv6() {
        // One socket for both families on `[::]`; where the system forbids it, IPv6 alone is still right.
        let _ = socket.set_only_v6(false);
    }
    let granted = size(&socket, buffer).map_err(failed)?;
    socket.bind(&address.into()).map_err(failed)?;
    if let Some(warning) = shortage(granted, buffer).filter(|_| !WARNED.swap(true, Ordering::Relaxed)) {
        tracing::warn!("{warning}");
    }
    Ok(socket.into())
}

fn size(socket: &Socket, buffer: usize) -> std::io::Result<Granted> {
    socket.set_recv_buffer_size(buffer)?;
    socket.set_send_buffer_size(buffer)?;
    Ok(Granted {
        receive: socket.recv_buffer_size()? / 2,
        send: socket.send_buffer_size()? / 2,
    })
}

/// A sentence with the remedy, where the kernel granted less than asked.
pub(crate) fn shortage(granted: Granted, wanted: usize) -> Option<String> {
    let mut remedies = Vec::new();
    if granted.receive < wanted {
        remedies.push(format!("sysctl -w net.core.rmem_max={wanted}"));
    }
    if granted.send < wanted {
        remedies.push(format!("sysctl -w net.core.wmem_max={wanted}"));
    }
    (!remedies.is_empty()).then(|| {
        format!(
            "the kernel grants UDP buffers of {} KiB (receive) and {} KiB (send) only, {} KiB were asked for; \
             fast links lose packets in them: {}",
            granted.receive >> 10,
            granted.send >> 10,
            wanted >> 10,
            remedies.join(" && ")
        )
    })
}

/// What the kernel grants on this host, for the probe's report.
pub(crate) fn granted(buffer: usize) -> std::io::Result<Granted> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    size(&socket, buffer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_grant_names_the_setting() {
        let granted = Granted {
            receive: 212_992,
            send: 8 << 20,
        };
        let warning = shortage(granted, 8 << 20).unwrap();
        assert!(warning.contains("208 KiB (receive)"), "{warning}");
        assert!(warning.contains("net.core.rmem_max=8388608"), "{warning}");
        assert!(!warning.contains("wmem_max"), "{warning}");
        assert_eq!(
            shortage(
                Granted {
                    receive: 8 << 20,
                    send: 9 << 20
                },
                8 << 20
            ),
            None
        );
    }

    #[test]
    fn a_socket_is_bound_where_asked() {
        let socket = bind("127.0.0.1:0".parse().unwrap(), 1 << 20).unwrap();
        assert!(socket.local_addr().unwrap().ip().is_loopback());
        let taken = socket.local_addr().unwrap();
        assert!(
            bind(taken, 1 << 20)
                .unwrap_err()
                .to_string()
                .contains(&taken.to_string())
        );
    }
}
