//! One module per command. Each has `Args` and `main(Args)`.

pub mod agent;
pub mod bridge;
pub mod doctor;
pub mod export;
pub mod ls;
pub mod run;
pub mod show;
pub mod verify;
