//! The dashboard over real sockets: who is let in, and what the API says.

mod changes;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use flexmodel_run::{
    format::{HEADER_SPACE, JobId, Location, Part, RunInfo, What},
    joining::Told,
    stats, testing,
};
use serde_json::{Value, json};
use wire::record::RecordMeta;

use super::{hooks::Later, *};
use crate::server::changes::{Changed, Hooks, Op};

const TOKEN: &str = "0123456789abcdef";
const ROUTES: [&str; 15] = [
    "/",
    "/app.css",
    "/app.js",
    "/charts.js",
    "/dom.js",
    "/format.js",
    "/module.js",
    "/picture.js",
    "/tree.js",
    "/favicon.svg",
    "/api/run",
    "/api/modules",
    "/api/series?module=m",
    "/api/hooks",
    "/events",
];

/// A dashboard of its own, on a thread that ends with the process.
struct Site {
    address: SocketAddr,
    live: Arc<Live>,
    dir: tempfile::TempDir,
}

/// Of a job whose hooks are always what they were.
fn served(live: Arc<Live>, run_dir: PathBuf, token: &str) -> Served {
    Served { live, run_dir, token: token.into(), changer: Some(Box::new(Unmoved)), read_only: false }
}

struct Unmoved;

impl Changer for Unmoved {
    fn hooks(&self, _: Option<u32>) -> Later<Hooks> {
        Box::pin(async move { Ok(Hooks { job: 0, revision: 0, clauses: Vec::new(), ranks: 1, pending: None }) })
    }

    fn change(&self, _: Option<u32>, _: Op) -> Later<Changed> {
        Box::pin(async { Ok(Changed { revision: 1, step: None, ranks: 1, notes: Vec::new() }) })
    }
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v).next()
    }

    /// The one line of a JSON route that gives no answer.
    fn error(&self) -> String {
        let body: Value = serde_json::from_str(&self.body).unwrap();
        body["error"].as_str().unwrap().to_owned()
    }

    fn json(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        serde_json::from_str(&self.body).unwrap()
    }
}

impl Site {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Served)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let live =
            Live::new(RunInfo { command: vec!["python".into(), "train.py".into()], world: 2, ..RunInfo::default() });
        let std = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        std.set_nonblocking(true).unwrap();
        let address = std.local_addr().unwrap();
        let mut shown = served(live.clone(), dir.path().to_owned(), TOKEN);
        change(&mut shown);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = TcpListener::from_std(std).unwrap();
                serve(listener, shown).await.unwrap();
            });
        });
        Self { address, live, dir }
    }

    /// Sends lines as they are and reads to the end of the answer, or to `enough`.
    fn raw(&self, request: &str, enough: &str) -> Answer {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let (mut all, mut chunk) = (Vec::new(), [0; 4096]);
        loop {
            let n = stream.read(&mut chunk).unwrap();
            all.extend_from_slice(&chunk[..n]);
            if n == 0 || (!enough.is_empty() && String::from_utf8_lossy(&all).contains(enough)) {
                break;
            }
        }
        let text = String::from_utf8_lossy(&all).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        Answer { status, head: head.into(), body: body.into() }
    }

    fn host(&self) -> String {
        format!("127.0.0.1:{}", self.address.port())
    }

    /// GET with these header lines beside `Host`.
    fn ask(&self, path: &str, headers: &str) -> Answer {
        self.raw(&format!("GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{headers}\r\n", self.host()), "")
    }

    fn get(&self, path: &str) -> Answer {
        self.ask(path, &bearer(TOKEN))
    }

    /// Captures `[rows, 4]` of `layers.0.mlp` at `step` on two ranks.
    fn capture(&self, step: u64) {
        self.capture_under(0, step);
    }

    /// The same, under a revision of the hooks.
    fn capture_under(&self, revision: u64, step: u64) {
        let mut file = vec![0u8; HEADER_SPACE as usize];
        for rank in 0..2 {
            let meta = testing::on_rank(testing::meta("layers.0.mlp", step, 1), rank, 2, testing::batch());
            let what = What::from_meta(RecordMeta { revision, ..meta });
            let bytes: Vec<u8> = (0..4u8).flat_map(|i| f32::from(4 * rank as u8 + i).to_le_bytes()).collect();
            let at = Location {
                shard: format!("shard-{step:05}"),
                offset: file.len() as u64,
                len: 16,
                crc: crc32c::crc32c(&bytes),
            };
            file.extend_from_slice(&bytes);
            let stats = stats::compute(what.dtype, &bytes);
            fs::write(self.dir.path().join(format!("shard-{step:05}.open")), &file).unwrap();
            self.live.told(&Told::part(Part { what, at: Some(at), stats, same: None }));
        }
    }
}

fn bearer(token: &str) -> String {
    format!("Authorization: Bearer {token}\r\n")
}

/// GUARD-1.
#[test]
fn every_route_wants_the_token() {
    let site = Site::new();
    let wrong =
        [String::new(), bearer("0123456789abcdeX"), bearer("0123"), bearer(""), format!("Authorization: {TOKEN}\r\n")];
    for route in ROUTES.into_iter().chain([
        "/api/tensor?module=m&kind=forward&path=out&step=0",
        "/api/records?module=m",
        "/api/token",
        "/none",
    ]) {
        for headers in &wrong {
            let answer = site.ask(route, headers);
            assert_eq!(answer.status, 401, "{route} with {headers:?}");
            assert!(answer.body.contains("flexmodel printed"), "{}", answer.body);
        }
    }
    let cookie = format!("Cookie: flexmodel_1={TOKEN}; flexmodel_{}=no\r\n", site.address.port());
    assert_eq!(site.ask("/", &cookie).status, 401);
    assert_eq!(site.ask("/?token=no", "").status, 401);
    for route in ROUTES.into_iter().filter(|r| *r != "/events") {
        assert_eq!(site.get(route).status, 200, "{route}");
    }
}

#[test]
fn a_token_in_the_address_becomes_a_cookie_and_leaves_the_address() {
    let site = Site::new();
    let answer = site.ask(&format!("/?a=1&token={TOKEN}&b=2"), "");
    assert_eq!((answer.status, answer.header("location")), (303, Some("/?a=1&b=2")));
    let cookie = answer.header("set-cookie").unwrap();
    assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"), "{cookie}");
    let pair = cookie.split(';').next().unwrap();
    assert_eq!(site.ask("/api/run", &format!("Cookie: other=1; {pair}\r\n")).status, 200);
    let series = site.ask(&format!("/api/series?module=a%2F%20b%26c&token={TOKEN}"), "");
    assert_eq!(series.header("location"), Some("/api/series?module=a%2F+b%26c"));
}

/// GUARD-1. Browsers take a backslash for a slash and leave tabs and line ends out.
#[test]
fn no_address_leads_to_another_site() {
    let site = Site::new();
    let evil = [
        "//evil.example/",
        "///evil.example/",
        "/\\evil.example/",
        "/\\/evil.example",
        "/%5cevil.example/",
        "/%2fevil.example/",
        "/%09/evil.example/",
        "/.//evil.example/",
        "/;//evil.example",
        "/api/run//evil.example",
        "/@evil.example",
        "http://evil.example/",
        "http://evil.example//evil.example/",
        "http://evil.example/api/run",
        "https://evil.example/\\evil.example",
    ];
    for address in evil {
        for more in ["", "&next=//evil.example", "&%0d%0aLocation:%20//evil.example"] {
            let answer = site.ask(&format!("{address}?token={TOKEN}{more}"), "");
            if let Some(to) = answer.header("location") {
                let (path, query) = to.split_once('?').unwrap_or((to, ""));
                assert!(ROUTES.contains(&path), "{address} leads to {to}");
                assert!(!query.contains(['/', '\\', ':']), "{address}{more} leads to {to}");
            } else {
                assert_eq!(answer.status, 400, "{address}: {}", answer.head);
            }
            assert_eq!(answer.head.to_lowercase().matches("location:").count(), usize::from(answer.status == 303));
        }
    }
    assert_eq!(site.ask(&format!("/none?a=1&token={TOKEN}"), "").header("location"), Some("/"));
}

/// A body that is promised and comes slowly, or never, holds nothing up.
#[test]
fn bodies_are_not_waited_for() {
    let site = Site::new();
    for method in ["GET", "POST"] {
        for headers in [String::new(), bearer(TOKEN)] {
            let head = format!("{method} / HTTP/1.1\r\nHost: {}\r\nContent-Length: 1000000\r\n", site.host());
            let answer = site.raw(&format!("{head}{headers}\r\nx"), "");
            assert!([200, 401, 405].contains(&answer.status), "{}", answer.head);
        }
    }
}

#[test]
fn a_head_without_end_is_refused() {
    let site = Site::new();
    let head = format!("GET / HTTP/1.1\r\nHost: {}\r\nX: {}", site.host(), "x".repeat(1 << 20));
    let mut stream = TcpStream::connect(site.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // It is closed before all of it is taken.
    let _ = stream.write_all(head.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
}

#[test]
fn a_link_on_another_site_enters_by_a_page_of_ours() {
    let site = Site::new();
    let answer = site.ask(&format!("/?token={TOKEN}"), "Sec-Fetch-Site: cross-site\r\n");
    assert_eq!(answer.status, 200);
    assert!(answer.body.contains("refresh") && answer.header("set-cookie").is_some());
    assert!(!answer.body.contains(TOKEN));
}

/// GUARD-2.
#[test]
fn other_names_of_this_machine_are_refused() {
    let site = Site::new();
    let port = site.address.port();
    let ask = |hosts: &str| {
        site.raw(&format!("GET /api/run HTTP/1.1\r\n{hosts}Connection: close\r\n{}\r\n", bearer(TOKEN)), "")
    };
    for good in [format!("localhost:{port}"), format!("[::1]:{port}"), format!("LOCALHOST:{port}")] {
        assert_eq!(ask(&format!("Host: {good}\r\n")).status, 200, "{good}");
    }
    for bad in [
        "evil.example".into(),
        format!("evil.example:{port}"),
        "127.0.0.1".into(),
        "127.0.0.1:1".into(),
        format!("127.0.0.1.evil.example:{port}"),
    ] {
        let answer = ask(&format!("Host: {bad}\r\n"));
        assert_eq!(answer.status, 421, "{bad}");
        assert!(answer.body.contains("ssh -L"), "{}", answer.body);
    }
    assert_ne!(ask("").status, 200);
    assert_ne!(ask(&format!("Host: 127.0.0.1:{port}\r\nHost: evil.example\r\n")).status, 200);
}

/// GUARD-3.
#[test]
fn pages_of_other_sites_are_refused_even_with_the_token() {
    let site = Site::new();
    let port = site.address.port();
    let with = |path: &str, line: &str| site.ask(path, &format!("{}{line}\r\n", bearer(TOKEN))).status;
    assert_eq!(with("/api/run", &format!("Origin: http://127.0.0.1:{port}")), 200);
    for origin in
        ["null".into(), "http://evil.example".into(), format!("https://127.0.0.1:{port}"), "http://127.0.0.1:1".into()]
    {
        assert_eq!(with("/api/run", &format!("Origin: {origin}")), 403, "{origin}");
    }
    for site in ["cross-site", "same-site"] {
        assert_eq!(with("/api/run", &format!("Sec-Fetch-Site: {site}")), 403, "{site}");
        assert_eq!(with("/", &format!("Sec-Fetch-Site: {site}")), 200, "{site}");
    }
    assert_eq!(with("/api/run", "Sec-Fetch-Site: same-origin"), 200);
}

/// GUARD-4 and GUARD-5.
#[test]
fn only_reading_is_answered_and_every_answer_is_locked_down() {
    let site = Site::new();
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"] {
        let request = format!(
            "{method} /api/run HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: 0\r\n{}\r\n",
            site.host(),
            bearer(TOKEN)
        );
        assert_eq!(site.raw(&request, "").status, 405, "{method}");
    }
    for answer in [site.get("/"), site.get("/none"), site.ask("/", ""), site.get("/api/series"), site.get("/app.js")] {
        assert!(answer.header("content-security-policy").unwrap().starts_with("default-src 'self'"));
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
        assert_eq!(answer.header("cache-control"), Some("no-store"));
        assert_eq!(answer.header("access-control-allow-origin"), None);
    }
}

#[test]
fn nothing_listens_beyond_loopback_or_without_a_token() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let live = Live::new(RunInfo::default());
        let open = TcpListener::bind("0.0.0.0:0").await.unwrap();
        let error = serve(open, served(live.clone(), PathBuf::new(), TOKEN)).await.unwrap_err();
        assert!(error.to_string().contains("127.0.0.1"), "{error}");
        let loopback = TcpListener::bind("127.0.0.1:0").await.unwrap();
        assert!(serve(loopback, served(live, PathBuf::new(), "")).await.is_err());
    });
}

#[test]
fn the_page_is_complete_and_asks_nobody_else() {
    let site = Site::new();
    for route in ROUTES.into_iter().filter(|r| !r.starts_with("/api") && *r != "/events") {
        let text = site.get(route).body.replace("http://www.w3.org/2000/svg", "");
        assert!(!text.contains("http:") && !text.contains("https:"), "{route} names another site");
        for import in text.lines().filter_map(|l| l.split_once(" from \"./")).filter_map(|(_, f)| f.split('"').next()) {
            assert!(ROUTES.contains(&format!("/{import}").as_str()), "{route} imports {import}, which is not served");
        }
    }
}

#[test]
fn the_api_tells_of_the_run_its_modules_and_series() {
    let site = Site::new();
    site.capture(0);
    site.capture(1);
    site.live.attached(0, 77);
    site.live.notice("read me");
    let run = site.get("/api/run").json();
    assert_eq!((run["state"].as_str(), run["totals"]["records"].as_u64()), (Some("live"), Some(2)));
    assert_eq!((run["notices"][0].as_str(), run["ranks"][0]["pid"].as_u64()), (Some("read me"), Some(77)));
    assert_eq!(run["dir"].as_str(), site.dir.path().to_str());
    let modules = site.get("/api/modules").json();
    assert_eq!(modules["series"][0]["module"], "layers.0.mlp");
    assert_eq!(modules["series"][0]["count"], 2);
    let series = site.get("/api/series?module=layers.0.mlp&kind=forward&path=out&train=true").json();
    assert_eq!(series["series"][0]["points"]["step"], serde_json::json!([0, 1]));
    assert_eq!(series["series"][0]["points"]["absmax"], serde_json::json!([7.0, 7.0]));
    for other in ["kind=backward", "path=in", "train=false", "model=1"] {
        let none = site.get(&format!("/api/series?module=layers.0.mlp&{other}")).json();
        assert_eq!(none["series"], serde_json::json!([]), "{other}");
    }
    let records = site.get("/api/records?module=layers.0.mlp&limit=1").json();
    assert_eq!((records["records"].as_array().unwrap().len(), records["records"][0]["step"].as_u64()), (1, Some(1)));
    assert_eq!(records["records"][0]["layout"][0], "dp: shard of dim 0, 2 ranks");
}

#[test]
fn a_tensor_is_shown_whole_or_by_rank() {
    let site = Site::new();
    site.capture(3);
    let at = "/api/tensor?module=layers.0.mlp&kind=forward&path=out&step=3";
    let whole = site.get(at).json();
    assert_eq!((&whole["shape"], &whole["dtype"]), (&serde_json::json!([2, 4]), &serde_json::json!("float32")));
    assert_eq!(whole["heat"]["mean"], serde_json::json!([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]));
    assert_eq!(
        (whole["stats"]["max"].as_f64(), whole["histogram"]["bins"].as_array().map(Vec::len)),
        (Some(7.0), Some(64))
    );
    let part = site.get(&format!("{at}&rank=1")).json();
    assert_eq!((&part["shape"], part["stats"]["min"].as_f64()), (&serde_json::json!([1, 4]), Some(4.0)));
    let answer = site.get(&format!("{at}&rank=9"));
    assert_eq!(answer.status, 404);
    assert!(answer.body.contains("ranks 0, 1"), "{}", answer.body);
}

#[test]
fn hooks_that_changed_are_told_and_each_record_says_of_which_it_is() {
    let site = Site::new();
    let revision_of = |step: u64| {
        let look = site.get(&format!("/api/tensor?module=layers.0.mlp&kind=forward&path=out&step={step}")).json();
        look.get("revision").cloned()
    };
    let listed = || {
        let records = site.get("/api/records?module=layers.0.mlp").json()["records"].as_array().unwrap().clone();
        records.iter().map(|record| record.get("revision").cloned()).collect::<Vec<_>>()
    };
    site.capture(0);
    assert_eq!(
        (revision_of(0), listed(), site.get("/api/run").json()["revisions"].clone()),
        (None, vec![None], json!([]))
    );
    site.live.revision(&testing::revision(JobId::default(), 3, 1, &["layers.*.mlp"]));
    site.capture_under(3, 1);
    assert_eq!((revision_of(0), revision_of(1)), (Some(0.into()), Some(3.into())));
    assert_eq!(listed(), [Some(3.into()), Some(0.into())]);
    let told = &site.get("/api/run").json()["revisions"][0];
    assert_eq!((&told["revision"], &told["begins"]), (&json!(3), &json!(1)));
    assert_eq!(told["words"], "revision 3 from step 1 on: layers.*.mlp");
}

#[test]
fn what_cannot_be_shown_is_explained_in_a_sentence() {
    let site = Site::new();
    site.capture(0);
    for (query, status, words) in [
        ("module=layers.0.mlp&kind=forward&path=out&step=9", 404, ""),
        ("module=layers.0.mlp&kind=sideways&path=out&step=0", 400, "sideways"),
        ("module=layers.0.mlp&kind=forward&path=out", 400, "step"),
        ("module=layers.0.mlp&kind=forward&path=out&step=-1", 400, "step"),
    ] {
        let answer = site.get(&format!("/api/tensor?{query}"));
        assert_eq!(answer.status, status, "{query}: {}", answer.body);
        let error = serde_json::from_str::<Value>(&answer.body).unwrap();
        assert!(error["error"].as_str().unwrap().contains(words), "{}", answer.body);
    }
    fs::remove_file(site.dir.path().join("shard-00000.open")).unwrap();
    let gone = site.get("/api/tensor?module=layers.0.mlp&kind=forward&path=out&step=0");
    assert!(gone.status == 404 && gone.body.contains("shard-00000"), "{}", gone.body);
}

#[test]
fn events_tell_at_once_what_is_there() {
    let site = Site::new();
    site.capture(0);
    let request = format!("GET /events HTTP/1.1\r\nHost: {}\r\n{}\r\n", site.host(), bearer(TOKEN));
    let answer = site.raw(&request, "\n\n");
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("text/event-stream")));
    let data = answer.body.lines().find_map(|l| l.strip_prefix("data: ")).unwrap();
    let event: Value = serde_json::from_str(data).unwrap();
    assert_eq!((event["totals"]["records"].as_u64(), event["models"].as_bool()), (Some(1), Some(true)));
    assert_eq!(event["series"][0][1]["last"][0], 0);
}

#[test]
fn an_open_page_hears_of_the_end_before_the_agent_goes_on() {
    let site = Site::new();
    let mut stream = TcpStream::connect(site.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
        .write_all(format!("GET /events HTTP/1.1\r\nHost: {}\r\n{}\r\n", site.host(), bearer(TOKEN)).as_bytes())
        .unwrap();
    let mut chunk = [0; 65536];
    let mut text = String::new();
    while !text.contains("\n\n") || !text.contains("data: ") {
        let n = stream.read(&mut chunk).unwrap();
        text.push_str(&String::from_utf8_lossy(&chunk[..n]));
    }
    site.live.info(&RunInfo { finished_ns: Some(1), exit_code: Some(3), ..RunInfo::default() });
    // What came meanwhile is in the socket already: nothing is waited for here.
    stream.set_nonblocking(true).unwrap();
    let n = stream.read(&mut chunk).unwrap();
    let last = String::from_utf8_lossy(&chunk[..n]);
    assert!(last.contains("\"state\":\"finished\"") && last.contains("\"exit_code\":3"), "{last}");
}

#[test]
fn streams_are_bounded_and_come_free_again() {
    let site = Site::new();
    let request = format!("GET /events HTTP/1.1\r\nHost: {}\r\n{}\r\n", site.host(), bearer(TOKEN));
    let mut open = Vec::new();
    for _ in 0..MAX_STREAMS.min(Limits::now().known / 2) {
        let mut stream = TcpStream::connect(site.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        assert!(stream.read(&mut [0; 64]).unwrap() > 0);
        open.push(stream);
    }
    assert_eq!(site.ask("/events", &bearer(TOKEN)).status, 503);
    drop(open);
    let freed = (0..200).any(|_| {
        std::thread::sleep(Duration::from_millis(50));
        site.raw(&request, "\n\n").status == 200
    });
    assert!(freed, "no stream came free after all pages were closed");
}
