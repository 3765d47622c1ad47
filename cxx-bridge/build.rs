//! Writes the C++ half of the cxx bridge, and the C++ form of what `wire` defines for it, to `target/PROFILE/bridge/`, beside
//! the hand-written sources.
//!
//! It is *not* compiled here: that happens against the user's own torch, by `flexmodel bridge build`, with a C++
//! compiler alone. That folder plus `libflexmodel_bridge.a` is all it needs.

use std::{env, error::Error, fs, path::Path};

/// What C++ shares with the engine, in the sources of `wire` that define it.
const SHARED: [&str; 3] = ["codes.rs", "placement.rs", "tap_abi.rs"];
/// What of it C++ uses, and with it what these are made of.
const ITEMS: [&str; 4] = ["HostTable", "PlacementCode", "Refusal", "Flag"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=src/ffi.rs");
    println!("cargo::rerun-if-changed=cpp");
    println!("cargo::rerun-if-changed=../wire/src");
    let source = fs::read_to_string("src/ffi.rs")?;
    let generated = cxx_gen::generate_header_and_cc(source.parse()?, &cxx_gen::Opt::default())?;
    // OUT_DIR is target/PROFILE/build/CRATE-HASH/out.
    let out = env::var("OUT_DIR")?;
    let profile = Path::new(&out).ancestors().nth(3).ok_or("OUT_DIR is not in a target folder")?;
    let stage = profile.join("bridge");
    let include = stage.join("include");
    if stage.exists() {
        fs::remove_dir_all(&stage)?;
    }
    fs::create_dir_all(include.join("rust"))?;
    fs::create_dir_all(include.join("flexmodel"))?;
    fs::write(include.join("rust/cxx.h"), cxx_gen::HEADER)?;
    fs::write(include.join("flexmodel/ffi.h"), generated.header)?;
    fs::write(stage.join("ffi.cc"), generated.implementation)?;
    shared().generate()?.write_to_file(include.join("flexmodel/wire.h"));
    for entry in fs::read_dir("cpp")? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "cc") {
            fs::copy(&path, stage.join(path.file_name().ok_or("a source without a name")?))?;
        }
    }
    for entry in fs::read_dir("cpp/include/flexmodel")? {
        let path = entry?.path();
        fs::copy(&path, include.join("flexmodel").join(path.file_name().ok_or("a header without a name")?))?;
    }
    Ok(())
}

/// The header of what is shared.
fn shared() -> cbindgen::Builder {
    let config = cbindgen::Config {
        language: cbindgen::Language::Cxx,
        namespace: Some("flexmodel".into()),
        pragma_once: true,
        header: Some("// Generated from wire/src by cxx-bridge/build.rs.".into()),
        no_includes: true,
        sys_includes: vec!["cstddef".into(), "cstdint".into()],
        trailer: Some(trailer()),
        documentation_style: cbindgen::DocumentationStyle::Cxx,
        line_length: 120,
        ..cbindgen::Config::default()
    };
    let mut builder = cbindgen::Builder::new().with_config(config);
    for source in SHARED {
        builder = builder.with_src(Path::new("../wire/src").join(source));
    }
    ITEMS.iter().fold(builder, |builder, name| builder.include_item(name))
}

/// Masks, which cbindgen cannot compute, and what holds if the compiler lays structs out as Rust does.
fn trailer() -> String {
    let mut out = String::from("namespace flexmodel {\n\n");
    for (name, mask) in wire::codes::masks() {
        out += &format!("inline constexpr uint32_t {name} = {mask};\n");
    }
    for wire::tap_abi::Layout { name, size, align, fields } in wire::tap_abi::layouts() {
        out += &format!("\nstatic_assert(sizeof({name}) == {size} && alignof({name}) == {align});\n");
        for (field, offset) in fields {
            out += &format!("static_assert(offsetof({name}, {field}) == {offset});\n");
        }
    }
    out + "\n}  // namespace flexmodel\n"
}
