//! Codes for those who know them by name: Python, and C++ where torch has the names.

use wire::{codes, dtype::DType};

use crate::ffi::bridge::Constant;

pub fn constants() -> Vec<Constant> {
    codes::constants().into_iter().map(|(name, value)| Constant { name, value }).collect()
}

pub fn dtype_code(name: &str) -> u8 {
    DType::from_name(name).map_or(0, |dtype| dtype as u8)
}
