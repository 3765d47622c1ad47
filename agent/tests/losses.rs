//! Ranks and agents that die, a slab that is damaged, a disk that is full: what is lost is counted, and once.

mod rank;

use std::sync::atomic::Ordering;

use rank::*;
use wire::control::{FromAgent, ToAgent};

const SLAB: u64 = 1 << 20;

/// AGENT-1.
#[test]
fn a_killed_agent_loses_nothing_and_its_successor_takes_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let out = agent.out.clone();
    let mut ranks = [0, 1].map(|n| Rank::attached(&agent, n, 2, 8 << 20));
    for step in 0..100 {
        for rank in &mut ranks {
            rank.ship("a", step, 8);
        }
        if step == 60 {
            wait_until("some parts", || agent.parts() > 20);
        }
    }
    agent.kill();
    let before = parts(&out).len();
    assert!(before > 20);
    // What was journalled is readable before any recovery.
    for part in parts(&out) {
        let mut record = meta("a", part["step"].as_u64().unwrap(), 8);
        record.rank = part["rank"].as_u64().unwrap() as u32;
        assert_eq!(bytes_at(&out, &part), bytes_of(&record));
    }
    for rank in &mut ranks {
        rank.ship("a", 100, 8);
    }
    let agent = Agent::start(dir.path());
    for rank in &mut ranks {
        assert_eq!(rank.attach(&agent.socket), FromAgent::Welcome);
        rank.drained();
        rank.stream = None;
    }
    agent.finish();
    verify(&out);
    assert_eq!((parts(&out).len(), total(&out, "records")), (202, 101), "each part exactly once");
}

#[test]
fn a_rank_that_loses_its_connection_goes_on_with_the_same_slab() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    for step in 0..20 {
        rank.ship("a", step, 8);
        if step % 5 == 4 {
            // The new connection may come before the old one's end is noticed, and after.
            let old = rank.stream.take();
            if step % 2 == 0 {
                drop(old);
                assert_eq!(rank.attach(&agent.socket), FromAgent::Welcome);
            } else {
                assert_eq!(rank.attach(&agent.socket), FromAgent::Welcome);
                drop(old);
            }
        }
    }
    rank.drained();
    let out = agent.out.clone();
    agent.finish();
    verify(&out);
    assert_eq!(parts(&out).len(), 20);
}

/// AGENT-4.
#[test]
fn a_damaged_slab_ends_that_rank_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let mut ranks = [0, 1].map(|n| Rank::attached(&agent, n, 2, SLAB));
    for rank in &mut ranks {
        rank.ship("a", 0, 3);
        rank.drained();
    }
    // A head far outside the ring.
    ranks[0].slab.mapping().header().head.store(1 << 50, Ordering::Release);
    ranks[0].slab.mapping().header().doorbell.fetch_add(1, Ordering::SeqCst);
    assert!(matches!(answer(ranks[0].stream.as_ref().unwrap()), FromAgent::Refused(_)));
    ranks[1].ship("a", 1, 3);
    ranks[1].drained();
    let out = agent.out.clone();
    let said = agent.finish();
    assert_eq!(said.matches("rank 0").count(), 1, "{said}");
    verify(&out);
    assert_eq!(parts(&out).len(), 3);
    assert!(info(&out)["notices"][0].as_str().unwrap().contains("rank 0"));
}

/// AGENT-4.
#[test]
fn records_that_lie_about_themselves_are_counted_and_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    let mut wrong_rank = meta("a", 0, 1);
    wrong_rank.rank = 7;
    rank.ship_record(&wrong_rank, &[0; 64]);
    rank.ship_record(&meta("a", 1, 2), &[0; 64]);
    let mut overflow = meta("a", 2, u64::MAX);
    overflow.shape.push(u64::MAX);
    rank.ship_record(&overflow, &[0; 64]);
    let mut refused = meta("a", 3, 1);
    refused.refused = "a sparse tensor".into();
    rank.ship_record(&refused, &[]);
    rank.ship("a", 4, 1);
    rank.drained();
    let out = agent.out.clone();
    agent.finish();
    verify(&out);
    assert_eq!((total(&out, "parts"), total(&out, "dropped"), total(&out, "refused")), (1, 3, 1));
    assert_eq!(lines(&out, "refused")[0]["reason"], "a sparse tensor");
}

#[test]
fn a_job_that_dies_in_the_middle_of_a_frame_loses_that_one() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    rank.ship("a", 0, 3);
    let number = rank.slab.begin_record();
    let mut encoded = Vec::new();
    meta("a", 1, 3).encode(&mut encoded);
    let unfinished = rank.slab.try_reserve(number, &encoded, 0, 192, 192).unwrap();
    std::mem::forget(unfinished);
    rank.ship("a", 2, 3);
    rank.stream = None;
    rank.drained();
    let out = agent.out.clone();
    wait_until("the frames behind it", || parts(&out).len() == 2);
    agent.finish();
    verify(&out);
    assert_eq!((total(&out, "parts"), total(&out, "dropped")), (2, 1));
}

#[test]
fn what_a_rank_dropped_itself_is_counted_once_over_two_agents() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    rank.count_dropped(5);
    rank.ship("a", 0, 3);
    rank.drained();
    let out = agent.out.clone();
    wait_until("the count", || !lines(&out, "dropped").is_empty());
    agent.kill();
    rank.count_dropped(2);
    let agent = Agent::start(dir.path());
    assert_eq!(rank.attach(&agent.socket), FromAgent::Welcome);
    rank.stream = None;
    agent.finish();
    assert_eq!(total(&out, "dropped"), 7);
    assert_eq!(lines(&out, "dropped").iter().map(|l| l["count"].as_u64().unwrap()).sum::<u64>(), 7);
}

#[test]
fn a_tensor_that_the_job_gave_up_in_the_middle_is_not_counted_twice() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    let number = rank.slab.begin_record();
    let mut encoded = Vec::new();
    meta("a", 0, 100).encode(&mut encoded);
    rank.slab.try_reserve(number, &encoded, 0, 640, 6400).unwrap().commit();
    rank.count_dropped(1);
    rank.ship("a", 1, 3);
    rank.drained();
    rank.say(&ToAgent::Bye);
    rank.stream = None;
    let out = agent.out.clone();
    agent.finish();
    verify(&out);
    assert_eq!((total(&out, "parts"), total(&out, "dropped")), (1, 1));
}

#[test]
fn a_full_disk_is_said_once_counted_and_survived() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let limit = |bytes: u64| {
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: a valid limit for our own child.
        let done = unsafe { libc::prlimit(agent.child.id() as i32, libc::RLIMIT_FSIZE, &limit, std::ptr::null_mut()) };
        assert_eq!(done, 0);
    };
    let mut rank = Rank::attached(&agent, 0, 1, 8 << 20);
    // Files may hold the header and some of the tensors.
    limit((1 << 20) + 100_000);
    for step in 0..20 {
        rank.ship("a", step, 256);
    }
    rank.drained();
    limit(libc::RLIM_INFINITY);
    for step in 20..30 {
        rank.ship("a", step, 256);
    }
    rank.drained();
    rank.stream = None;
    let out = agent.out.clone();
    let said = agent.finish();
    assert_eq!(said.matches("cannot write").count(), 1, "{said}");
    assert_eq!(said.matches("works again").count(), 1, "{said}");
    verify(&out);
    let kept = total(&out, "parts");
    assert!((10..30).contains(&kept), "{kept}");
    assert_eq!(kept + total(&out, "dropped"), 30);
    assert_eq!(lines(&out, "dropped").iter().map(|l| l["count"].as_u64().unwrap()).sum::<u64>(), 30 - kept);
}

#[test]
fn a_job_that_dies_in_the_middle_of_a_tensor_loses_that_one() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let mut rank = Rank::attached(&agent, 0, 1, SLAB);
    rank.ship("a", 0, 3);
    let number = rank.slab.begin_record();
    let mut encoded = Vec::new();
    meta("a", 1, 100).encode(&mut encoded);
    rank.slab.try_reserve(number, &encoded, 0, 640, 6400).unwrap().commit();
    rank.stream = None;
    rank.drained();
    let out = agent.out.clone();
    agent.finish();
    verify(&out);
    assert_eq!((total(&out, "parts"), total(&out, "dropped")), (1, 1));
}
