//! What unit tests share: a folder, a model, and stand-ins for the process, the transport, the bridge and the agent.

mod agent;
mod bridge;

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use wire::{
    codes::Role,
    control::{Answer, CONTROL_VERSION, Hello, ToAgent},
    env::OnFull,
    hooks::Kind,
    revision::Since,
    tap_abi::{MeshAxis, ModelDesc, ModuleDesc, Rank, Selected, Str, Trigger},
};

use crate::{engine::Reports, process::Process, switch::Switch};

pub use agent::{Agent, heard};
pub use bridge::{BRIDGE, Member, Store, Tensor};

/// What a rank says of a plan of these clauses, numbered from 1, with which its process began.
pub fn plan_of(revision: u64, clauses: &[&str]) -> Answer {
    let ids = (1..).take(clauses.len()).collect();
    let clauses = clauses.iter().map(|&text| text.to_owned()).collect();
    Answer::Plan { revision, since: Since::default(), heard: 0, open: None, clauses, ids }
}

/// A folder that goes with the test.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("flexmodel-capture-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A process with a switch, that writes down what it is to say.
#[derive(Default)]
pub struct StandInProcess {
    pub switch: Switch,
    pub lines: Mutex<Vec<String>>,
}

impl StandInProcess {
    pub fn on() -> Arc<Self> {
        let process = Self::default();
        process.switch.turn_on();
        Arc::new(process)
    }
}

impl Process for StandInProcess {
    fn line(&self, text: &str) {
        self.lines.lock().unwrap().push(text.to_owned());
    }

    fn set_rank(&self, _: u32) {}

    fn who(&self) -> String {
        "rank 0".into()
    }

    fn ranks_of_node(&self) -> Option<u32> {
        None
    }

    fn is_on(&self) -> bool {
        self.switch.is_on()
    }

    fn off(&self, why: &str) {
        if self.switch.turn_off() {
            self.line(why);
        }
    }

    fn now_ns(&self) -> u64 {
        1
    }
}

/// In place of the transport: what an engine has reported.
#[derive(Default)]
pub struct StandInTransport {
    pub described: Mutex<Vec<(u32, u32, String)>>,
    pub said: Mutex<Vec<ToAgent>>,
    pub notices: Mutex<Vec<String>>,
}

impl StandInTransport {
    /// What was said since the last time.
    pub fn news(&self) -> Vec<String> {
        std::mem::take(&mut self.notices.lock().unwrap())
    }
}

impl Reports for StandInTransport {
    fn describe(&self, rank: Rank, wrapper: &str) {
        self.described.lock().unwrap().push((rank.rank, rank.world, wrapper.to_owned()));
    }

    fn say(&self, message: ToAgent) {
        self.said.lock().unwrap().push(message);
    }

    fn notice(&self, text: String) {
        self.notices.lock().unwrap().push(text);
    }
}

/// The ranks of any axis.
const RANKS: [u32; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

/// A model of modules with a name each, and parameters.
#[derive(Clone, Default)]
pub struct Model {
    pub serial: u64,
    pub modules: Vec<&'static str>,
    pub parameters: Vec<&'static str>,
    /// Name, coordinate, size.
    pub mesh: Vec<(&'static str, u32, u32, Role)>,
}

impl Model {
    pub fn of(serial: u64, modules: &[&'static str]) -> Self {
        Self { serial, modules: modules.to_vec(), ..Self::default() }
    }

    /// What the engine selects of it.
    pub fn select_in(&self, engine: &mut crate::engine::Engine, rank: u32, world: u32) -> Vec<Selected> {
        let module = |name: &&'static str| ModuleDesc {
            name: Str::new(name),
            class_name: Str::new("Linear"),
            qualified: Str::new("Linear"),
            order: 0,
        };
        let modules: Vec<ModuleDesc<'_>> = self.modules.iter().map(module).collect();
        let parameters: Vec<Str<'_>> = self.parameters.iter().copied().map(Str::new).collect();
        let axis = |&(name, index, size, role): &(&'static str, u32, u32, Role)| MeshAxis {
            name: Str::new(name),
            index,
            size,
            role: role as u8,
            ranks: RANKS.as_ptr(),
            rank_count: size as usize,
        };
        let mesh: Vec<MeshAxis<'_>> = self.mesh.iter().map(axis).collect();
        let desc = ModelDesc {
            serial: self.serial,
            modules: modules.as_ptr(),
            module_count: modules.len(),
            parameters: parameters.as_ptr(),
            parameter_count: parameters.len(),
            wrapper: Str::new("DDP"),
            mesh: mesh.as_ptr(),
            axis_count: mesh.len(),
            signature: 0,
        };
        // SAFETY: the arrays have these lengths and live through the call.
        unsafe { engine.select(&desc, Rank { rank, world, group: 0 }) }
    }
}

/// After the forward of a training pass on a batch of 4.
pub fn training() -> Trigger {
    Trigger { grad_enabled: true, train: true, first: [4, 8, -1], ..Trigger::default() }
}

/// A mask of kinds.
pub fn mask(kinds: &[Kind]) -> u32 {
    kinds.iter().fold(0, |mask, kind| mask | kind.bit())
}

/// What a process says of itself before it knows its rank.
pub fn hello(on_full: OnFull) -> Hello {
    Hello {
        version: CONTROL_VERSION,
        rank: 0,
        world: 1,
        pid: 1,
        node: "node".into(),
        torch: "2.11".into(),
        python: "3.11".into(),
        command: vec!["python".into()],
        hooks: "*".into(),
        on_full,
        wrapper: String::new(),
        job: Box::default(),
    }
}
