//! Reading images.
use longhaul_common::extent::Extent;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    Data,
    Hole,
    Zero,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub extent: Extent,
    pub state: Allocation,
}
