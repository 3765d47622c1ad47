//! Ranks in processes of their own, over the stand-in: what they send arrives, and whatever fails, all return.

#[path = "ranks/harness.rs"]
mod harness;
#[path = "ranks/scenarios.rs"]
mod scenarios;

use harness::{Job, one_line};

/// What each rank of a test runs: this test program again, with the environment that the harness sets.
#[test]
#[ignore = "is a rank of the other tests"]
fn one_rank() {
    scenarios::run();
}

#[test]
fn bytes_arrive_in_order_between_2_and_between_4_ranks() {
    let jobs = [2, 4].map(|size| Job::new("transfers", size).faults("trace").start());
    for (job, size) in jobs.into_iter().zip([2, 4]) {
        let ended = job.end();
        assert_eq!(ended.said, vec!["whole"; size]);
        assert_eq!(ended.lines("violation"), Vec::<String>::new());
        assert_eq!(ended.lines("note"), Vec::<String>::new());
        // Every rank makes its own part of the first round before its part of the second.
        for rank in 0..size {
            let (next, prev) = ((rank + 1) % size, (rank + size - 1) % size);
            let made: Vec<_> =
                ended.lines("trace").into_iter().filter(|l| l.starts_with(&format!("rank {rank}:"))).collect();
            let expected = [1, 70_000].into_iter().enumerate().flat_map(|(round, bytes)| {
                let group = format!("rank {rank}: trace: group {}", round + 1);
                [
                    format!("{group}: send of {bytes} bytes to rank {next}"),
                    format!("{group}: receive of {bytes} bytes from rank {prev}"),
                ]
            });
            assert_eq!(made[..4], expected.collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_call_that_fails_is_named_and_ends_all_ranks() {
    // The rank that fails, what it says, and whether the stand-in is right to miss an end.
    let calls = [
        ("ncclGetVersion", 1, true, false),
        ("ncclGetUniqueId", 0, true, false),
        ("ncclCommInitRankConfig", 1, true, false),
        ("ncclCommGetAsyncError", 1, true, false),
        ("ncclGroupStart", 1, true, false),
        ("ncclSend", 1, true, false),
        ("ncclRecv", 1, true, false),
        ("ncclGroupEnd", 1, true, false),
        ("ncclCommFinalize", 1, false, false),
        ("ncclCommDestroy", 1, false, true),
    ];
    let jobs = calls.map(|(name, rank, ..)| {
        // No one waits long for a rank that will not join.
        let joins =
            !matches!(name, "ncclGetVersion" | "ncclGetUniqueId" | "ncclCommInitRankConfig" | "ncclCommGetAsyncError");
        Job::new(if joins { "exchange" } else { "lonely" }, 2).faults(&format!("fail={name}:1:2@{rank}")).start()
    });
    for (job, (name, rank, fails, remains)) in jobs.into_iter().zip(calls) {
        let ended = job.end();
        if fails {
            let expected = format!(
                "{name}: unhandled system error (stand-in) (code 2; NCCL's last warning: {name} was told to fail); \
                 assemble=agent needs no collective"
            );
            assert_eq!(ended.said[rank], expected);
            assert_ne!(ended.said[1 - rank], "whole", "{name}");
        } else {
            // The bytes had arrived: only the end was not in good order, and no one else's.
            assert_eq!(ended.said, ["whole", "whole"], "{name}");
        }
        let left = ["rank 1: violation: the process ends, and 1 of its communicators did not".to_string()];
        assert_eq!(ended.lines("violation"), left[..usize::from(remains)], "{name}");
    }
}

#[test]
fn an_abort_that_fails_changes_nothing_of_the_first_error() {
    let ended = Job::new("exchange", 2).faults("fail=ncclSend:1:2@1; fail=ncclCommAbort:1:3@1").start().end();
    assert!(ended.said[1].starts_with("ncclSend: unhandled system error"), "{}", ended.said[1]);
}

#[test]
fn a_transfer_that_never_completes_is_given_up_by_both_ranks() {
    let ended = Job::new("exchange", 2).faults("hang=ncclSend:1@0").start().end();
    for said in &ended.said {
        assert!(said.starts_with("ncclGroupEnd was not done after "), "{said}");
        assert!(said.ends_with("assemble=agent needs no collective"), "{said}");
    }
    assert_eq!(ended.lines("violation"), Vec::<String>::new());
    // Rank 0 has received what rank 1 sent; rank 1 has not been sent anything.
    let notes = [
        "rank 0: note: group 1: aborted with send of 1000 bytes to rank 1 under way",
        "rank 1: note: group 1: aborted with receive of 1000 bytes from rank 0 under way",
    ];
    assert_eq!(ended.lines("note"), notes);
}

#[test]
fn an_error_that_comes_later_is_found_by_waiting() {
    let jobs = ["error=1:6@1", "late; error=1:6@1"].map(|faults| Job::new("exchange", 2).faults(faults).start());
    for job in jobs {
        let ended = job.end();
        let said = &ended.said[1];
        assert!(said.starts_with("after ncclGroupEnd: remote process exited or there was a network error"), "{said}");
        assert!(ended.said[0].contains(" was not done after "), "{}", ended.said[0]);
        assert_eq!(ended.lines("violation"), Vec::<String>::new());
    }
}

#[test]
fn a_stream_is_waited_for_and_let_go_by_an_abort() {
    let fine = Job::new("stream", 2).faults("late").start();
    let hung = Job::new("stream", 2).faults("late; hang=ncclRecv:2@1").start();
    assert_eq!(fine.end().said, ["whole", "whole"]);
    let ended = hung.end();
    for said in &ended.said {
        assert!(said.starts_with("the stream was not done after "), "{said}");
        assert!(said.ends_with(" and then the stream was free"), "{said}");
    }
    assert_eq!(ended.lines("violation"), Vec::<String>::new());
}

#[test]
fn a_rank_that_dies_or_never_comes_costs_the_others_their_deadline_only() {
    let dies = Job::new("dies", 4).start();
    let absent = Job::new("absent", 2).start();
    let dead = dies.end();
    for rank in [0, 2] {
        assert!(dead.said[rank].starts_with("ncclGroupEnd was not done after "), "{}", dead.said[rank]);
    }
    // It has nothing to do with rank 1.
    assert_eq!(dead.said[3], "whole");
    assert_eq!(dead.said[1], "nothing");
    assert_eq!(dead.lines("violation"), Vec::<String>::new());
    let alone = absent.end();
    assert!(alone.said[0].starts_with("ncclCommInitRankConfig was not done after "), "{}", alone.said[0]);
    assert_eq!(alone.lines("violation"), Vec::<String>::new());
}

#[test]
fn an_abort_that_does_not_return_is_left_behind() {
    let in_group = Job::new("exchange", 2).faults("hang=ncclSend:1@0; hang=ncclCommAbort:1@0").start();
    let on_stream = Job::new("stream", 2).faults("late; hang=ncclSend:1@0; hang=ncclCommAbort:1@0").start();
    let said = in_group.end().said;
    assert!(said[0].starts_with("ncclGroupEnd did not return after "), "{}", said[0]);
    assert!(said[1].starts_with("ncclGroupEnd was not done after "), "{}", said[1]);
    let said = on_stream.end().said;
    assert!(said[0].starts_with("ncclCommAbort did not return after "), "{}", said[0]);
    assert!(said[0].ends_with(" and the stream was not free"), "{}", said[0]);
    assert!(said[1].ends_with(" and then the stream was free"), "{}", said[1]);
}

#[test]
fn ranks_that_do_not_agree_are_found_out() {
    let swapped = "group 1: receive of 20 bytes from rank 0 meets a send of 10 bytes: sizes, or their order, differ";
    let sizes = |rank| (rank, format!("joins as one of {} ranks, and another as one of {}", rank + 2, 3 - rank));
    let cases = [
        ("swapped", vec![(1, swapped.into())]),
        ("unreceived", vec![(0, "group 2: send of 10 bytes to rank 1, which has ended its communicator".into())]),
        ("unsent", vec![(1, "group 2: receive of 10 bytes from rank 0, which has ended its communicator".into())]),
        // Whoever comes second says it.
        ("sizes", vec![sizes(0), sizes(1)]),
    ];
    let jobs = cases.each_ref().map(|(scenario, _)| Job::new(scenario, 2).start());
    for (job, (scenario, expected)) in jobs.into_iter().zip(cases) {
        let ended = job.end();
        let found = ended.lines("violation");
        let mut expected = expected.into_iter().map(|(rank, what)| [format!("rank {rank}: violation: {what}")]);
        assert!(expected.any(|only| found == only), "{scenario}: {found:?} {:?}", ended.said);
        assert!(ended.said.iter().any(|said| said != "whole"), "{scenario}: {:?}", ended.said);
    }
}

#[test]
fn where_no_library_is_loaded_the_error_says_so_and_none_is_loaded() {
    let ended = Job::new("unloaded", 1).findable().start().end();
    let said = one_line(&ended.said[0]);
    assert!(said.starts_with("this process has not loaded libnccl.so.2 ("), "{said}");
    assert!(said.ends_with("only a CUDA build of torch brings it; assemble=agent needs none"), "{said}");
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_is_sent() {
    let ended = Job::new("nonsense", 1).start().end();
    let expected = [
        "rank 2 is not below the number of ranks, 2",
        "a unique id has 128 bytes, not 3: rank 0 did not write it whole",
        "the device: no such device; assemble=agent needs no collective",
        "a transfer with rank 7 of a communicator of 1 ranks",
        "a transfer with rank 7 of a communicator of 1 ranks",
        "NCCL_COMM_ID is set, which lets communicators of FlexModel's meet the job's: unset it, or use assemble=agent",
    ];
    assert_eq!(ended.said[0].lines().collect::<Vec<_>>(), expected);
    assert_eq!(ended.lines("violation"), Vec::<String>::new());
}
