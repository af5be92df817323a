//! Values with units, as people write them.
