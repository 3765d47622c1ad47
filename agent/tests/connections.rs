//! Others that connect and say nothing take no descriptors from ranks, from files, or from who has the token.

mod rank;

use std::{
    io::{Read, Write},
    net::TcpStream,
    os::unix::{net::UnixStream, process::CommandExt},
    process::Command,
};

use rank::*;

/// Descriptors that the agent has.
const LIMIT: u64 = 256;
/// Connections that want to keep them all.
const MANY: usize = 1100;

/// An agent with few descriptors, and as many as may be for this process.
fn agent(folder: &std::path::Path) -> Agent {
    set_limit(None).unwrap();
    Agent::prepared(folder, &[], |command: &mut Command| {
        // SAFETY: setrlimit is a system call and touches no memory of ours.
        unsafe { command.pre_exec(|| set_limit(Some(LIMIT))) };
    })
}

/// The limit on descriptors: this one, or the hard one.
fn set_limit(wanted: Option<u64>) -> std::io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: room for the answer, and a valid limit.
    let done = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        if let Some(wanted) = wanted {
            limit.rlim_max = wanted;
        }
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &limit)
    };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

fn open_descriptors(agent: &Agent) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", agent.child.id())).unwrap().count()
}

/// What stays open, and what is written to it at first.
#[track_caller]
fn idlers(agent: &Agent, first: &str) -> Vec<TcpStream> {
    let (host, _) = agent.page();
    (0..MANY)
        .map(|_| {
            let mut stream = TcpStream::connect(host).unwrap();
            // It may have been closed for a later one.
            let _ = stream.write_all(first.as_bytes());
            stream
        })
        .collect()
}

#[test]
fn idle_connections_to_the_page_cost_no_capture_and_no_page() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path());
    let (host, _) = agent.page();
    let firsts = [
        String::new(),
        format!("GET / HTTP/1.1\r\nHost: {host}\r\nX: "),
        format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000\r\n\r\nx"),
    ];
    let mut idle = Vec::new();
    for (number, first) in firsts.iter().enumerate() {
        idle.push(idlers(&agent, first));
        let mut rank = Rank::attached(&agent, number as u32, 1, 1 << 20);
        for step in 0..50 {
            rank.ship(&format!("layers.{number}"), step, 4);
        }
        rank.drained();
        let (status, body) = agent.ask("/");
        assert!(status == 200 && body.contains("<html"), "{first:?}: {body}");
        let open = open_descriptors(&agent);
        assert!(open < LIMIT as usize / 2, "{first:?}: {open} descriptors are open");
    }
    assert_eq!(agent.parts(), 50 * firsts.len());
    let out = agent.out.clone();
    let text = agent.finish();
    assert_eq!((total(&out, "dropped"), total(&out, "parts")), (0, 50 * firsts.len() as u64), "{text}");
    verify(&out);
}

#[test]
fn who_watches_is_not_cut_by_who_comes_later() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path());
    let (host, token) = agent.page();
    let mut stream = TcpStream::connect(host).unwrap();
    stream.set_read_timeout(Some(HANG)).unwrap();
    let head = format!("GET /events HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    let mut text = String::new();
    let mut read_to = |end: &str| {
        let mut chunk = [0; 4096];
        while !text.contains(end) {
            let n = stream.read(&mut chunk).unwrap();
            assert!(n > 0, "the stream was cut: {text}");
            text += &String::from_utf8_lossy(&chunk[..n]);
        }
    };
    read_to("\"clock\"");
    let _idle = idlers(&agent, "");
    let mut rank = Rank::attached(&agent, 0, 1, 1 << 20);
    rank.ship("layers.0", 77, 4);
    read_to("\"step\":77");
}

#[test]
fn silent_processes_of_the_same_user_keep_no_rank_out() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path());
    let silent: Vec<UnixStream> = (0..MANY)
        .map(|_| {
            let mut stream = UnixStream::connect(&agent.socket).unwrap();
            // The start of a message.
            let _ = stream.write_all(&[9, 0]);
            stream
        })
        .collect();
    let mut rank = Rank::attached(&agent, 0, 1, 1 << 20);
    rank.ship("layers.0", 0, 4);
    rank.drained();
    let open = open_descriptors(&agent);
    assert!(open < LIMIT as usize / 2, "{open} descriptors are open");
    drop(silent);
    let out = agent.out.clone();
    let text = agent.finish();
    assert_eq!((total(&out, "dropped"), total(&out, "parts")), (0, 1));
    assert_eq!(text.matches("said nothing").count(), 1, "{text}");
}
