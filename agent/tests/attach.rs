//! Ranks attach to the real agent over a real socket, alone, again, as others, or as no rank at all.

mod rank;

use std::{fs, io::Write, os::unix::net::UnixStream, sync::atomic::Ordering, time::Duration};

use rank::*;
use wire::{
    control::{FromAgent, ModuleInfo, ToAgent},
    hooks::Kind,
    loss_scale::LossScale,
    record::RecordMeta,
};

const SLAB: u64 = 1 << 20;

#[test]
fn what_ranks_ship_is_there_when_the_agent_finishes() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let (out, socket) = (agent.out.clone(), agent.socket.clone());
    let mut ranks = [0, 1].map(|n| Rank::attached(&agent, n, 2, SLAB));
    let modules = vec![ModuleInfo { name: "a".into(), class: "MLP".into(), kinds: 1 }];
    for rank in &mut ranks {
        rank.say(&ToAgent::Model { model: 0, modules: modules.clone() });
        rank.say(&ToAgent::Notice("said by every rank".into()));
        for step in 0..50 {
            rank.ship("a", step, 3);
        }
        rank.say(&ToAgent::Bye);
        rank.stream = None;
    }
    let said = agent.finish();
    assert!(said.contains("50 records"), "{said}");
    assert!(!socket.exists());
    verify(&out);
    let info = info(&out);
    assert_eq!((total(&out, "records"), total(&out, "parts"), total(&out, "dropped")), (50, 100, 0));
    assert_eq!(info["notices"].as_array().unwrap().len(), 1);
    assert_eq!(info["models"][0]["modules"][0]["name"], "a");
    assert_eq!((&info["world"], &info["torch"]), (&2.into(), &"2.11.0".into()));
    assert!(info["finished_ns"].is_u64());
    for part in parts(&out) {
        let mut record = meta("a", part["step"].as_u64().unwrap(), 3);
        record.rank = part["rank"].as_u64().unwrap() as u32;
        assert_eq!(bytes_at(&out, &part), bytes_of(&record));
    }
}

#[test]
fn secrets_of_a_ranks_command_line_are_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let mut rank = Rank::new(0, 1, SLAB);
    let command = ["train.py", "--api-key", "SECRET123", "--hf_token=SECRET123", "--tokenizer", "gpt2"];
    let hello = wire::control::Hello { command: command.map(str::to_owned).to_vec(), ..rank.hello() };
    assert_eq!(rank.attach_as(&agent.socket, hello), FromAgent::Welcome);
    rank.ship("a", 0, 1);
    rank.drained();
    let (_, page) = agent.ask("/api/run");
    assert!(page.contains("gpt2") && !page.contains("SECRET123"), "{page}");
    let out = agent.out.clone();
    agent.finish();
    let shown = ["train.py", "--api-key", "***", "--hf_token=***", "--tokenizer", "gpt2"];
    assert_eq!(info(&out)["command"], serde_json::json!(shown));
}

/// What a rank says of itself is not kept at any length.
#[test]
fn a_hello_of_many_megabytes_leaves_a_short_run_json() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let mut rank = Rank::new(0, 1, SLAB);
    let long = || "é".repeat(1 << 20);
    let command = (0..100_000).map(|n| format!("argument {n}")).collect();
    let hello =
        wire::control::Hello { node: long(), torch: long(), hooks: long(), wrapper: long(), command, ..rank.hello() };
    assert_eq!(rank.attach_as(&agent.socket, hello), FromAgent::Welcome);
    let out = agent.out.clone();
    agent.finish();
    assert!(std::fs::metadata(out.join("run.json")).unwrap().len() < 1 << 20);
    let command = info(&out)["command"].clone();
    assert_eq!(command[5], "argument 5");
    assert!(command.as_array().unwrap().last().unwrap().as_str().unwrap().contains("more arguments"));
}

#[test]
fn a_loss_scale_that_is_no_number_is_kept_and_no_damage() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let out = agent.out.clone();
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    let scales = [f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 0.0, 1.0 / 3.0];
    for (step, scale) in scales.into_iter().enumerate() {
        let record = RecordMeta { kind: Kind::Backward, loss_scale: LossScale(scale), ..meta("a", step as u64, 3) };
        rank.ship_record(&record, &bytes_of(&record));
    }
    rank.drained();
    agent.finish();
    verify(&out);
    assert_eq!((total(&out, "records"), total(&out, "dropped")), (5, 0));
    let kept: Vec<LossScale> =
        parts(&out).iter().map(|part| serde_json::from_value(part["loss_scale"].clone()).unwrap()).collect();
    assert_eq!(kept, scales.map(LossScale));
}

/// Who may write to the folder above can do that.
#[test]
fn a_run_whose_place_is_taken_is_written_to_the_end_and_nothing_else_is() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::with(dir.path(), &["--shard-bytes", "1K"]);
    let (out, moved, other) = (agent.out.clone(), dir.path().join("moved"), dir.path().join("other"));
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    rank.ship("a", 0, 30);
    rank.drained();
    fs::rename(&out, &moved).unwrap();
    fs::create_dir(&other).unwrap();
    fs::write(other.join("run.json"), "precious").unwrap();
    std::os::unix::fs::symlink(&other, &out).unwrap();
    for step in 1..5 {
        rank.ship("a", step, 30);
    }
    rank.drained();
    agent.finish();
    let left: Vec<_> = fs::read_dir(&other).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["run.json"]);
    assert_eq!(fs::read(other.join("run.json")).unwrap(), b"precious");
    verify(&moved);
    assert_eq!(
        (total(&moved, "records"), total(&moved, "dropped"), info(&moved)["finished_ns"].is_u64()),
        (5, 0, true)
    );
    assert!(moved.join("shard-00003.safetensors").is_file());
}

#[test]
fn a_tensor_larger_than_the_slab_goes_through_in_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::with(dir.path(), &["--shard-bytes", "4M"]);
    let out = agent.out.clone();
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    for step in 0..3 {
        rank.ship("large", step, 100_000);
    }
    rank.stream = None;
    agent.finish();
    verify(&out);
    assert_eq!(total(&out, "bytes"), 3 * 6_400_000);
    assert_eq!(lines(&out, "sealed").len(), 3);
    assert_eq!(bytes_at(&out, &parts(&out)[2]), bytes_of(&meta("large", 2, 100_000)));
}

#[test]
fn what_is_no_rank_is_refused_and_hurts_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let mut good = Rank::attached(&agent, 0, 2, SLAB);
    let mut other = Rank::new(1, 2, SLAB);
    let mut hello = other.hello();
    hello.version = 99;
    let FromAgent::Refused(why) = other.attach_as(&agent.socket, hello) else { panic!("taken") };
    assert!(why.contains("version 99"), "{why}");
    // No descriptor, garbage, an endless message, nothing at all.
    let stream = UnixStream::connect(&agent.socket).unwrap();
    let bytes = wire::control::encode(&ToAgent::Hello(other.hello())).unwrap();
    (&stream).write_all(&bytes).unwrap();
    assert!(matches!(answer(&stream), FromAgent::Refused(why) if why.contains("shared memory")));
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 64], &[3, 0, 0, 0, 9, 9, 9]] {
        let stream = UnixStream::connect(&agent.socket).unwrap();
        (&stream).write_all(garbage).unwrap();
        assert!(matches!(answer(&stream), FromAgent::Refused(_)));
    }
    let _silent = UnixStream::connect(&agent.socket).unwrap();
    good.ship("a", 0, 3);
    good.drained();
    good.stream = None;
    let out = agent.out.clone();
    agent.finish();
    verify(&out);
    assert_eq!(parts(&out).len(), 1);
}

/// AGENT-3.
#[test]
fn the_heart_beats_while_nothing_comes() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let rank = Rank::attached(&agent, 0, 1, SLAB);
    let beat = || rank.slab.mapping().header().heartbeat.load(Ordering::Acquire);
    for _ in 0..3 {
        let before = beat();
        wait_until("a beat", || beat() != before);
    }
}

#[test]
fn a_second_agent_is_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let (out, socket) = (agent.out.to_str().unwrap(), agent.socket.to_str().unwrap());
    let elsewhere = dir.path().join("other.sock");
    let page = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = page.local_addr().unwrap().port().to_string();
    let other = dir.path().join("other");
    for (arguments, word) in [
        (["--socket", elsewhere.to_str().unwrap(), "--out", out, "--port", "0"], "another agent"),
        (["--socket", socket, "--out", other.to_str().unwrap(), "--port", "0"], "already"),
        (["--socket", elsewhere.to_str().unwrap(), "--out", other.to_str().unwrap(), "--port", &port], "--port"),
    ] {
        let done = flexmodel(&[&["agent"][..], &arguments].concat());
        let said = String::from_utf8(done.stderr).unwrap();
        assert!(!done.status.success() && said.lines().count() == 1 && said.contains(word), "{said}");
    }
    assert!(agent.socket.exists());
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    rank.ship("a", 0, 1);
    rank.drained();
}

#[test]
fn finishing_does_not_wait_for_a_rank_that_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let out = agent.out.clone();
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut step = 0;
            while !stop.load(Ordering::Relaxed) {
                let mut encoded = Vec::new();
                meta("a", step, 3).encode(&mut encoded);
                let number = rank.slab.begin_record();
                match rank.slab.try_reserve(number, &encoded, 0, 192, 192) {
                    Some(slot) => slot.commit(),
                    None => std::thread::sleep(Duration::from_millis(1)),
                }
                step += 1;
            }
        });
        wait_until("some parts", || agent.parts() > 5);
        agent.finish();
        stop.store(true, Ordering::Relaxed);
    });
    verify(&out);
}

#[test]
fn a_job_that_is_started_again_is_put_together_with_itself_only() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let out = agent.out.clone();
    for start in 0..2 {
        let mut ranks = [0, 1].map(|n| {
            let mut rank = Rank::new(n, 2, SLAB);
            rank.pid += start * 10;
            rank
        });
        // The second start's rank 1 comes when its rank 0 has shipped already; the first start's rank 1 died before.
        for rank in &mut ranks[..if start == 0 { 1 } else { 2 }] {
            assert_eq!(rank.attach(&agent.socket), FromAgent::Welcome);
            rank.ship("a", 0, 3);
            rank.drained();
            rank.stream = None;
        }
    }
    agent.finish();
    verify(&out);
    let again = &parts(&out)[1..];
    let offset = |part: &serde_json::Value| part["at"]["offset"].as_u64().unwrap();
    assert_eq!(again.len(), 2);
    assert_eq!(offset(&again[1]), offset(&again[0]) + 3 * 64, "the pieces of the second start lie side by side");
    assert_eq!(parts(&out).iter().map(|part| part["job"].as_u64()).collect::<Vec<_>>(), [None, Some(1), Some(1)]);
    let jobs = lines(&out, "job");
    assert_eq!(jobs.iter().map(|job| &job["world"]).collect::<Vec<_>>(), [2, 2]);
    assert_eq!(total(&out, "records"), 2);
}

/// A process of one rank that tapped before it knew that it is another one.
#[test]
fn a_process_that_becomes_another_rank_goes_on_in_another_slab() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let mut early = [0, 1].map(|n| {
        let mut rank = Rank::new(0, 1, SLAB);
        rank.pid += n;
        assert_eq!(rank.attach(&agent.socket), FromAgent::Welcome);
        rank
    });
    for rank in &mut early {
        rank.ship("dry", 0, 3);
    }
    // Rank 0 stays what it is in a larger world; the other is rank 1, and comes first.
    let [mut late, mut first] = [1, 0].map(|n| {
        let (before, mut rank) = (&mut early[n as usize], Rank::new(n, 2, SLAB));
        rank.pid = before.pid;
        before.say(&ToAgent::Bye);
        before.stream = None;
        assert_eq!(rank.attach(&agent.socket), FromAgent::Welcome);
        rank
    });
    late.ship("a", 1, 3);
    late.drained();
    first.ship("a", 1, 3);
    let out = agent.out.clone();
    (first.stream, late.stream) = (None, None);
    agent.finish();
    verify(&out);
    assert_eq!((total(&out, "dropped"), &info(&out)["world"]), (0, &2.into()));
    let ranks: Vec<_> =
        parts(&out).iter().filter(|p| p["module"] == "a").map(|p| p["rank"].as_u64().unwrap()).collect();
    assert_eq!(ranks, [1, 0]);
    let offsets: Vec<_> =
        parts(&out).iter().filter(|p| p["module"] == "a").map(|p| p["at"]["offset"].as_u64()).collect();
    assert_eq!(offsets[0], offsets[1].map(|at| at + 3 * 64), "they lie side by side");
}

/// The same rank comes with other memory while what it had is still being read.
#[test]
fn two_slabs_of_one_rank_are_both_read() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let mut slabs = [0, 1].map(|_| Rank::attached(&agent, 0, 1, SLAB));
    for (step, rank) in slabs.iter_mut().enumerate() {
        rank.ship("a", step as u64, 3);
    }
    let out = agent.out.clone();
    agent.finish();
    verify(&out);
    assert_eq!(parts(&out).len(), 2);
}

#[test]
fn a_process_without_a_slab_may_leave_one_notice() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let bytes = wire::control::encode(&ToAgent::Notice("rank 3: taps are off: no bridge".into())).unwrap();
    UnixStream::connect(&agent.socket).unwrap().write_all(&bytes).unwrap();
    let out = agent.out.clone();
    let said = agent.finish();
    assert!(!said.contains("taps are off"), "the job says so on stderr itself: {said}");
    assert_eq!(info(&out)["notices"][0], "rank 3: taps are off: no bridge");
}
