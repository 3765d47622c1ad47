//! The run directory: its format, and what writes it.

pub mod format;
pub mod manifest;
#[cfg(test)]
pub mod testing;
