//! The run directory: its format, and what writes it.

pub mod format;
pub mod manifest;
pub mod stats;
#[cfg(test)]
pub mod testing;
