//! One module per command. Each has `Args` and `main(Args)`.

pub mod agent;
pub mod bridge;
pub mod certify;
pub mod doctor;
pub mod export;
pub mod hooks;
pub mod ls;
pub mod run;
mod selection;
pub mod show;
pub mod verify;
