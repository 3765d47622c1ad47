//! From "torch is loading" to "the shim watches for models".
//!
//! The preload has seen `torch/_C` and we ask for a pending call, which runs inside `import torch`, with the GIL. There
//! the bridge for exactly this torch is found and opened, and the shim started. Whatever fails is one line.

use std::{
    ffi::{CStr, c_int, c_void},
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use wire::{
    bridge_marker::{LIBRARY, Marker, OLDEST_PYTHON, cache_folder, folder_name, keys_of},
    bridge_sources::{self, Sources},
    env,
    tap_abi::{BridgeTable, OPEN_SYMBOL, OpenBridge, TAP_ABI},
    trust,
};

use capture::{Capture, plan::HookPlan};

use crate::{
    host,
    instance::{self, ThisProcess},
    python, settings, state,
};

/// Loads the shim package under a name of its own, without touching `sys.path`, and starts it.
const BOOTSTRAP: &CStr = cr#"
error = None
try:
    import importlib.util, sys
    spec = importlib.util.spec_from_file_location(
        "flexmodel_inside", folder + "/__init__.py", submodule_search_locations=[folder])
    shim = importlib.util.module_from_spec(spec)
    sys.modules["flexmodel_inside"] = shim
    spec.loader.exec_module(shim)
    shim.start(bridge)
except BaseException as e:
    error = "the shim did not start: %s: %s" % (type(e).__name__, e)
"#;

/// Called from the job's `dlopen`, once.
pub fn torch_is_loading() {
    state::on();
    if let Err(why) = python::add_pending_call(pending) {
        state::off(&why);
    }
}

extern "C" fn pending(_: *mut c_void) -> c_int {
    match std::panic::catch_unwind(start) {
        Ok(Ok(())) => {}
        Ok(Err(why)) => state::off(&why),
        Err(_) => state::off("a panic while starting"),
    }
    0
}

fn start() -> Result<(), String> {
    // Panics end at our boundaries, which say one line; std's own report would be many. This hook is this library's
    // alone: it has a copy of std of its own.
    std::panic::set_hook(Box::new(|_| {}));
    host::injected("panic-in-load");
    let found = suits(python::version().unwrap_or_default())?;
    let text = settings::hooks()?;
    let plan = HookPlan::parse(0, &text)?;
    let mut settings = settings::transport(&text)?;
    let home = home()?;
    let torch = Torch::running(found)?;
    let table = open_bridge(&torch, &home)?;
    (settings.hello.torch, settings.hello.python) = (torch.version, format!("{}.{}", found.0, found.1));
    instance::set(Capture::new(plan, settings, Arc::new(ThisProcess), table));
    // SAFETY: the table is the bridge's and static; the GIL is held in a pending call.
    let module = unsafe { (table.python_module)() };
    if module.is_null() {
        return Err("the bridge could not make its Python module".into());
    }
    let folder = home.join("flexmodel_inside");
    let folder = folder.to_str().ok_or("the install folder is not UTF-8")?;
    let outcome = python::run(BOOTSTRAP, &[(c"folder", folder)], &[(c"bridge", module)]);
    python::decref(module);
    outcome
}

/// Major and minor version of a Python that taps work in, from what it says it is.
fn suits(version: &str) -> Result<(u32, u32), String> {
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().ok());
    let (Some(Some(major)), Some(Some(minor))) = (numbers.next(), numbers.next()) else {
        return Err("this Python does not tell its version".into());
    };
    let oldest = OLDEST_PYTHON;
    if (major, minor) < oldest {
        return Err(format!("Python {major}.{minor} is too old, {}.{} or newer is needed", oldest.0, oldest.1));
    }
    if version.contains("free-threading") {
        return Err(format!("free-threaded Python {major}.{minor} is not supported, ordinary CPython is needed"));
    }
    Ok((major, minor))
}

/// The folder this library lies in.
fn home() -> Result<PathBuf, String> {
    // SAFETY: Dl_info is plain data, filled by dladdr from the address of a function in this library.
    let name = unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        if libc::dladdr(pending as *const c_void, &mut info) == 0 || info.dli_fname.is_null() {
            return Err("the loader does not know where libflexmodel_engine.so is".into());
        }
        CStr::from_ptr(info.dli_fname)
    };
    let path = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
    let path = fs::canonicalize(path).map_err(|e| format!("{}: {e}", path.display()))?;
    path.parent().map(Path::to_owned).ok_or_else(|| "libflexmodel_engine.so has no folder".into())
}

/// What a bridge must be built for, but for the C++ ABI, which only the build can know.
struct Torch {
    version: String,
    cuda: Option<String>,
    python: (u32, u32),
}

impl Torch {
    fn running(python: (u32, u32)) -> Result<Self, String> {
        let version =
            python::imported_string(c"torch.version", c"__version__").ok_or("torch does not tell its version")?;
        Ok(Self { version, cuda: python::imported_string(c"torch.version", c"cuda"), python })
    }

    fn keys(&self) -> [String; 2] {
        keys_of(&self.version, self.cuda.as_deref(), self.python)
    }
}

fn open_bridge(torch: &Torch, home: &Path) -> Result<&'static BridgeTable, String> {
    let path = find_bridge(torch, home)?;
    // SAFETY: the file carries our marker for this torch, this ABI and our own sources; its initialisers only set up its own statics.
    let library = unsafe { libloading::Library::new(&path) }.map_err(|e| format!("{}: {e}", path.display()))?;
    // The bridge stays for the life of the process: taps point into it.
    let library = std::mem::ManuallyDrop::new(library);
    // SAFETY: the marker says that the symbol has the type of this TAP_ABI.
    let open = unsafe { library.get::<OpenBridge>(OPEN_SYMBOL) }.map_err(|e| format!("{}: {e}", path.display()))?;
    // SAFETY: HOST is static.
    let table = unsafe { open(&host::HOST).as_ref() };
    let table = table.filter(|t| t.abi == TAP_ABI && t.size as usize == size_of::<BridgeTable>());
    table.ok_or_else(|| format!("{}: the bridge refused this interposer", path.display()))
}

/// The bridge that `FLEXMODEL_BRIDGE` names, which must fit, or the one in the cache that fits.
fn find_bridge(torch: &Torch, home: &Path) -> Result<PathBuf, String> {
    let cuda = torch.cuda.as_deref().unwrap_or("none");
    let wanted = format!("torch {} with CUDA {cuda} and cp{}{}", torch.version, torch.python.0, torch.python.1);
    let keys = torch.keys();
    let folder = home.join(bridge_sources::FOLDER);
    let digest = Sources::read(&folder).map_err(|e| format!("{}: {e}; run scripts/setup", folder.display()))?.digest;
    if let Some(path) = std::env::var_os(env::BRIDGE).filter(|p| !p.is_empty()) {
        let path = PathBuf::from(path);
        return match marker(&path).map_err(|e| format!("{e}; or unset {}", env::BRIDGE))? {
            None => Err(format!("{} is not a FlexModel bridge", path.display())),
            Some(m) if !keys.contains(&m.key) => Err(format!(
                "the bridge {} is for {}, this process has {wanted}; run: flexmodel bridge build",
                path.display(),
                m.key
            )),
            Some(m) if !m.fits(&m.key, &digest) => Err(format!(
                "the bridge {} is from other sources than {}; run: flexmodel bridge build",
                path.display(),
                home.display()
            )),
            Some(_) => Ok(path),
        };
    }
    let cache = cache_folder(|name| std::env::var_os(name)).ok_or("there is no home folder to look for a bridge in")?;
    for key in &keys {
        let path = cache.join(folder_name(key, &digest)).join(LIBRARY);
        let found = marker(&path).map_err(|e| format!("{e}; or set {} to a folder of yours", env::BRIDGE_CACHE))?;
        if found.is_some_and(|m| m.fits(key, &digest)) {
            return Ok(path);
        }
    }
    Err(format!("no bridge of ours for {wanted} in {}; run: flexmodel bridge build", cache.display()))
}

/// What a library says that it is, before it is run as code. It is an error where others may have put it there.
fn marker(path: &Path) -> Result<Option<Marker>, String> {
    match trust::check(path) {
        Err(e) if e.is_absent() => Ok(None),
        Err(e) => Err(format!("the bridge is not loaded: {e}")),
        Ok(()) => Ok(fs::read(path).ok().and_then(|bytes| Marker::find(&bytes))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_python_that_taps_do_not_work_in_is_refused_by_name() {
        assert_eq!(suits("3.11.7 (main, Dec  8 2023, 18:56:57) [GCC 12.2.0]"), Ok((3, 11)));
        assert_eq!(suits("3.14.0+ (main)"), Ok((3, 14)));
        assert!(suits("3.9.18 (main)").is_err_and(|why| why.contains("3.9 is too old")));
        for version in ["3.13.1 experimental free-threading build (main)", "3.14.0 free-threading build (main)"] {
            assert!(suits(version).is_err_and(|why| why.contains("free-threaded")), "{version}");
        }
        assert!(suits("").is_err());
    }
}
