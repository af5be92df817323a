//! What a server says of the thing it serves: size, abilities, block sizes, contexts.
//!
//! Owns these facts as checked values. Leaves alone how they were negotiated.

use super::decode::WireError;

/// Largest payload this client sends or asks for in one request, whatever the server allows: QEMU's own
/// limit.
pub(super) const PAYLOAD_MAX: u32 = 32 << 20;

/// The layout of requests and replies that both sides agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Headers {
    /// Neither chunks nor metadata: an old server.
    Simple,
    /// Replies in chunks; 32-bit lengths.
    Structured,
    /// Replies in chunks; 64-bit lengths.
    Extended,
}

/// What is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Size in bytes.
    pub size: u64,
    pub flags: ExportFlags,
    pub block: BlockSizes,
    pub headers: Headers,
    /// The metadata contexts that were asked for and granted.
    pub contexts: Vec<Context>,
}

/// A metadata context that block status can be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Context {
    pub id: u32,
    pub name: String,
}

/// The export's transmission flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportFlags(pub u16);

impl ExportFlags {
    const fn has(self, bit: u32) -> bool {
        self.0 & (1 << bit) != 0
    }

    /// Writes are refused.
    pub const fn read_only(self) -> bool {
        self.has(1)
    }

    /// The flush command exists.
    pub const fn flush(self) -> bool {
        self.has(2)
    }

    /// Writes can be made durable one by one.
    pub const fn fua(self) -> bool {
        self.has(3)
    }

    /// The trim command exists.
    pub const fn trim(self) -> bool {
        self.has(5)
    }

    /// The write-zeroes command exists.
    pub const fn write_zeroes(self) -> bool {
        self.has(6)
    }

    /// Reads can be asked for unfragmented.
    pub const fn unfragmented(self) -> bool {
        self.has(7)
    }

    /// What one connection flushed, all others see: several connections may write.
    pub const fn multi_conn(self) -> bool {
        self.has(8)
    }
}

/// The request sizes that the server takes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this: a power of two, at most 64 KiB.
    pub min: u32,
    /// Best size, for efficiency.
    pub preferred: u32,
    /// Largest payload of one request: a multiple of `min`, at most 32 MiB here.
    pub max: u32,
}

impl BlockSizes {
    /// What holds where a server states nothing: by the protocol it then takes requests of any alignment up
    /// to 32 MiB.
    pub const UNSTATED: Self = Self {
        min: 1,
        preferred: 4096,
        max: PAYLOAD_MAX,
    };

    pub(super) fn checked(min: u32, preferred: u32, max: u32) -> Result<Self, WireError> {
        if !min.is_power_of_two() || min > 64 * 1024 {
            return Err(WireError::Unexpected {
                field: "smallest block",
                got: min.into(),
                expected: "a power of two up to 64 KiB",
            });
        }
        if !preferred.is_power_of_two() || preferred < min || preferred > PAYLOAD_MAX {
            return Err(WireError::Unexpected {
                field: "preferred block",
                got: preferred.into(),
                expected: "a power of two from the smallest block to 32 MiB",
            });
        }
        let max = max.min(PAYLOAD_MAX) / min * min;
        if max < preferred {
            return Err(WireError::Unexpected {
                field: "largest block",
                got: max.into(),
                expected: "at least the preferred block",
            });
        }
        Ok(Self { min, preferred, max })
    }
}
