//! What happens when the library is loaded: it reads the environment and nothing else.

use wire::env;

use crate::{log, state};

/// Runs before `main` of every process that inherits the preload.
#[ctor::ctor(unsafe)]
fn at_load() {
    if !wanted() {
        return;
    }
    log::remember_stderr();
    state::watch_forks();
    state::arm();
}

/// INERT-1.
fn wanted() -> bool {
    std::env::var_os(env::DISABLE).is_none_or(|v| v != "1")
        && std::env::var_os(env::HOOKS).is_some_and(|v| !v.is_empty())
}
