//! How two gateways agree on the window of blocks that one of them refers to.
//!
//! Owns the two words. The sender says which epoch of its window it goes on with; the receiver says whether it holds that. Each new
//! connection begins with it. Leaves the window itself to the gateways.

use serde::{Deserialize, Serialize};

/// The sender's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowHello {
    /// Grows whenever the sender's window starts anew.
    pub epoch: u64,
    /// Blocks that its end of the window holds.
    pub slots: u64,
}

/// The receiver's end, in answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowAnswer {
    /// The epoch that it holds now. One above the sender's means that the sender has to begin a later one.
    pub epoch: u64,
    /// False where that epoch begins empty.
    pub held: bool,
    /// Blocks that its end of the window holds.
    pub slots: u64,
}
