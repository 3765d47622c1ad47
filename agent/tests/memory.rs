//! The agent's memory is bounded, whatever names a job invents.

mod rank;

use std::thread;

use rank::*;
use wire::control::{ModuleInfo, ToAgent};

const RANKS: u32 = 8;
const SLAB: u64 = 1 << 20;
/// Of the agent, with its program and beside the slabs.
const BOUND: u64 = 64 << 20;

/// A large mixture of experts: 61 layers of 256 experts, each with three layers.
fn experts(of: &str) -> Vec<ModuleInfo> {
    let module = |name: String, class: &str| ModuleInfo { name, class: class.into(), kinds: 1 };
    (0..61 * 256)
        .flat_map(|n| {
            let expert = format!("model.{of}layers.{}.mlp.experts.{}", n / 256, n % 256);
            let inner = ["gate_proj", "up_proj", "down_proj"].map(|p| module(format!("{expert}.{p}"), "Linear"));
            std::iter::once(module(expert.clone(), "DeepseekMLP")).chain(inner)
        })
        .collect()
}

/// Runs on all ranks at the same time; each says at the end that it has.
fn on_all(agent: &Agent, ranks: &mut [Rank], done: &str, say: impl Fn(&mut Rank) + Sync) {
    thread::scope(|scope| {
        for rank in ranks.iter_mut() {
            scope.spawn(|| {
                say(rank);
                rank.say(&ToAgent::Notice(format!("{done} {}", rank.rank)));
            });
        }
    });
    let last: Vec<String> = ranks.iter().map(|rank| format!("{done} {}", rank.rank)).collect();
    wait_until(done, || last.iter().all(|text| notices(agent).contains(text)));
}

fn notices(agent: &Agent) -> Vec<String> {
    let info = info(&agent.out);
    info["notices"].as_array().unwrap().iter().map(|n| n.as_str().unwrap().to_owned()).collect()
}

/// Its peak since it started, without the slabs.
fn peak(agent: &Agent) -> u64 {
    agent.memory("VmHWM").saturating_sub(u64::from(RANKS) * SLAB)
}

fn run_json(agent: &Agent) -> u64 {
    std::fs::metadata(agent.out.join("run.json")).unwrap().len()
}

#[test]
fn a_large_model_on_all_ranks_is_there_once_and_invented_names_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let mut ranks: Vec<Rank> = (0..RANKS).map(|n| Rank::attached(&agent, n, RANKS, SLAB)).collect();
    let modules = experts("");
    assert_eq!(modules.len(), 62_464);
    on_all(&agent, &mut ranks, "all alike", |rank| {
        rank.say(&ToAgent::Model { model: 0, modules: modules.clone() });
    });
    let info = info(&agent.out);
    assert_eq!(info["models"][0]["modules"].as_array().unwrap().len(), modules.len());
    assert_eq!(info["owners"].as_array().unwrap().len(), 1);
    assert!(peak(&agent) < BOUND, "{} MiB", peak(&agent) >> 20);

    // Each rank has others, all of them at once.
    on_all(&agent, &mut ranks, "all different", |rank| {
        rank.say(&ToAgent::Model { model: 0, modules: experts(&format!("stage{}.", rank.rank)) });
    });
    assert!(peak(&agent) < BOUND, "{} MiB", peak(&agent) >> 20);
    let told = |agent: &Agent| notices(agent).iter().filter(|n| n.contains("more modules than")).count();
    assert_eq!(told(&agent), 1);

    // A million more, in many models, and of modules that capture nothing.
    let (before, long) = (agent.memory("VmRSS"), run_json(&agent));
    on_all(&agent, &mut ranks, "a million", |rank| {
        let number = rank.rank;
        for part in 0..5u32 {
            let name = |n: u32| format!("invented.{number}.{part}.{n}");
            let modules = (0..12_500).map(|n| ModuleInfo { name: name(n), class: "C".into(), kinds: 1 }).collect();
            rank.say(&ToAgent::Model { model: 1 + number + RANKS * part, modules });
            rank.say(&ToAgent::Others { modules: (12_500..25_000).map(name).collect() });
        }
    });
    let after = agent.memory("VmRSS");
    assert!(after < before + (4 << 20), "{} MiB became {} MiB", before >> 20, after >> 20);
    assert!(peak(&agent) < BOUND, "{} MiB", peak(&agent) >> 20);
    assert_eq!((told(&agent), agent.ask("/api/modules").0), (1, 200));
    let grown = run_json(&agent).saturating_sub(long);
    assert!(grown < 1 << 20, "run.json grew by {grown} bytes");

    // What is captured of modules that are not listed is stored.
    for rank in &mut ranks {
        rank.ship("invented.0.4.3", 0, 2);
        rank.drained();
    }
    let out = agent.out.clone();
    agent.finish();
    assert_eq!((total(&out, "parts"), total(&out, "dropped")), (u64::from(RANKS), 0));
    verify(&out);
}

/// A job that builds a model anew in every step, with other names.
#[test]
fn models_without_end_are_bounded_and_their_captures_stored() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    let step = |rank: &mut Rank, step: u32| {
        let name = |n: u32| format!("{}.{step}.{n}", "n".repeat(200));
        let modules = (0..500).map(|n| ModuleInfo { name: name(n), class: "C".into(), kinds: 1 }).collect();
        rank.say(&ToAgent::Model { model: step, modules });
        for n in 0..5 {
            let record = wire::record::RecordMeta { model: step, ..meta(&name(n), u64::from(step), 1) };
            rank.ship_record(&record, &bytes_of(&record));
        }
    };
    (0..200).for_each(|n| step(&mut rank, n));
    rank.drained();
    (200..2500).for_each(|n| step(&mut rank, n));
    rank.say(&ToAgent::Notice("all said".into()));
    rank.drained();
    wait_until("the last word", || notices(&agent).iter().any(|n| n == "all said"));
    let told: Vec<String> = notices(&agent).into_iter().filter(|n| n.contains("more than")).collect();
    assert!(told.len() == 1 && told[0].contains("1024 models"), "{told:?}");
    assert!(agent.ask("/api/run").1.contains("more than 8192 tensors"), "what is not charted is not said");
    let peak = agent.memory("VmHWM").saturating_sub(SLAB);
    assert!(peak < BOUND, "{} MiB", peak >> 20);
    let out = agent.out.clone();
    agent.finish();
    assert_eq!((total(&out, "parts"), total(&out, "dropped")), (5 * 2500, 0));
}
