//! What the processes of a tapped job agree on, and nothing else.
//!
//! | module | one definition of | used by |
//! |---|---|---|
//! | [`env`] | environment variables | launcher, interposer |
//! | [`hooks`] | the `FLEXMODEL_HOOKS` grammar and selector matching | launcher, interposer |
//! | [`descriptor`] | how descriptors of ours are held in a process of the job | interposer |
//! | [`dtype`] | element types and their names | all |
//! | [`loss_scale`] | by how much a job scaled its loss, also in JSON | interposer, agent |
//! | [`record`] | what a captured tensor is (module, kind, step, layout, ...) | interposer, agent |
//! | [`slab`] | the shared-memory ring that carries tensor bytes | interposer, agent |
//! | [`counts`] | what ranks have captured, for who started them | interposer, launcher |
//! | [`codes`] | numbers that mean the same to engine, bridge and shim | interposer, bridge |
//! | [`control`] | messages on the unix socket | interposer, agent |
//! | [`passing`] | descriptors that go with messages | interposer, agent |
//! | [`register`] | what a change of hooks is decided in, as shared memory | interposer, agent |
//! | [`revision`] | how the hooks of a running job change, on all ranks or on none | interposer, agent |
//! | [`store`] | what is done in the job's own store for that, between nodes | interposer, agent |
//! | [`bridge_marker`] | what distinguishes a bridge from others | launcher, interposer |
//! | [`bridge_sources`] | what a bridge is built from | launcher, interposer |
//! | [`preload`] | what the preloaded object and the engine tell each other, inside one process | interposer |
//! | [`trust`] | what may be run as code | launcher, interposer |
//! | [`tap_abi`] | the C tables between interposer and bridge, inside one process | interposer, bridge |
//!
//! Every decoder takes hostile bytes and does no I/O. Three definitions are of files, and read them: [`hooks::parse`] a TOML
//! file that is named instead of clauses, [`bridge_sources`] a folder, and [`trust`] whose a file and the folders above are.

pub mod bridge_marker;
pub mod bridge_sources;
pub mod codes;
pub mod control;
pub mod counts;
pub mod descriptor;
pub mod dtype;
pub mod env;
pub mod hooks;
pub mod loss_scale;
pub mod passes;
pub mod passing;
pub mod placement;
pub mod preload;
pub mod record;
pub mod register;
pub mod revision;
pub mod slab;
pub mod store;
pub mod tap_abi;
pub mod trust;
