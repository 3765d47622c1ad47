//! Hooks of a running job, changed over HTTP.

use super::*;

/// Who sends this with POST, and how it is answered.
fn post(site: &Site, path: &str, headers: &str, body: &str) -> Answer {
    let head = format!("POST {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n", site.host());
    site.raw(&format!("{head}{headers}Content-Length: {}\r\n\r\n{body}", body.len()), "")
}

const JSON: &str = "Content-Type: application/json\r\n";
const ADD: &str = r#"{"op":"add","clauses":"a"}"#;

/// GUARD-4 and GUARD-6.
#[test]
fn a_change_wants_the_token_as_bearer_and_json() {
    let site = Site::new();
    let cookie = format!("Cookie: flexmodel_{}={TOKEN}\r\n", site.address.port());
    let ok = format!("{}{JSON}", bearer(TOKEN));
    assert_eq!(post(&site, "/api/hooks", &ok, ADD).json()["revision"], 1);
    assert_eq!(post(&site, "/api/hooks", &format!("{ok}{cookie}"), ADD).status, 200);
    let charset = format!("{}Content-Type: Application/JSON; charset=utf-8\r\n", bearer(TOKEN));
    assert_eq!(post(&site, "/api/hooks", &charset, ADD).status, 200);
    let with_token = format!("/api/hooks?token={TOKEN}");
    for (path, headers) in [
        ("/api/hooks", JSON.to_owned()),
        ("/api/hooks", format!("{cookie}{JSON}")),
        (&with_token, format!("{cookie}{JSON}")),
        ("/api/hooks", format!("{cookie}{}{JSON}", bearer("no"))),
        ("/api/hooks", format!("Authorization: {TOKEN}\r\n{JSON}")),
    ] {
        let answer = post(&site, path, &headers, ADD);
        assert_eq!((answer.status, answer.header("set-cookie")), (401, None), "{path} {headers}");
        assert!(answer.error().contains("token"), "{}", answer.body);
    }
    for kind in ["", "Content-Type: text/plain\r\n", "Content-Type: application/x-www-form-urlencoded\r\n"] {
        let answer = post(&site, "/api/hooks", &format!("{}{kind}", bearer(TOKEN)), ADD);
        assert_eq!((answer.status, answer.error().contains("application/json")), (400, true), "{kind}");
    }
    for line in
        ["Sec-Fetch-Site: same-site", "Sec-Fetch-Site: cross-site", "Origin: http://127.0.0.1:1", "Origin: null"]
    {
        let answer = post(&site, "/api/hooks", &format!("{ok}{line}\r\n"), ADD);
        assert_eq!((answer.status, answer.error().is_empty()), (403, false), "{line}");
    }
    let ours = format!("{ok}Origin: http://{}\r\nSec-Fetch-Site: same-origin\r\n", site.host());
    assert_eq!(post(&site, "/api/hooks", &ours, ADD).status, 200);
    assert_eq!(post(&site, "/api/hooks", &ok, "{}").status, 400);
    for path in ["/", "/api/run", "/api/token", "/api/hooks/", "/none"] {
        assert_eq!(post(&site, path, &ok, ADD).status, 405, "{path}");
    }
    let asked_first = format!("OPTIONS /api/hooks HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{ok}\r\n", site.host());
    assert_eq!(site.raw(&asked_first, "").status, 405);
}

/// A change whose body is promised and does not come is answered, where it is refused, and ends with its connection.
#[test]
fn the_body_of_a_change_that_is_refused_is_not_waited_for() {
    let site = Site::new();
    let head = format!("POST /api/hooks HTTP/1.1\r\nHost: {}\r\nContent-Length: 1000000\r\n{JSON}", site.host());
    assert_eq!(site.raw(&format!("{head}\r\nx"), "").status, 401);
    let too_long = format!("{head}{}\r\n{}", bearer(TOKEN), "x".repeat(hooks::MAX_BODY + 1));
    assert_eq!(site.raw(&too_long, "}").status, 400);
}

/// A job whose ranks take their time.
struct Slow(Arc<[Semaphore; 2]>);

impl Changer for Slow {
    fn hooks(&self, job: Option<u32>) -> Later<Hooks> {
        Unmoved.hooks(job)
    }

    fn change(&self, job: Option<u32>, op: Op) -> Later<Changed> {
        let steps = self.0.clone();
        Box::pin(async move {
            steps[0].add_permits(1);
            tokio::time::sleep(Duration::from_millis(50)).await;
            steps[1].add_permits(1);
            Unmoved.change(job, op).await
        })
    }
}

#[test]
fn a_change_that_is_begun_is_carried_to_its_end_also_where_nobody_waits() {
    let steps = Arc::new([Semaphore::new(0), Semaphore::new(0)]);
    let site = Site::with(|served| served.changer = Some(Box::new(Slow(steps.clone()))));
    let mut stream = TcpStream::connect(site.address).unwrap();
    let head = format!("POST /api/hooks HTTP/1.1\r\nHost: {}\r\n{}{JSON}", site.host(), bearer(TOKEN));
    stream.write_all(format!("{head}Content-Length: {}\r\n\r\n{ADD}", ADD.len()).as_bytes()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let reached = |step: &Semaphore| {
        let reached = async { tokio::time::timeout(Duration::from_secs(20), step.acquire()).await.is_ok() };
        runtime.block_on(reached)
    };
    assert!(reached(&steps[0]), "it began");
    drop(stream);
    assert!(reached(&steps[1]), "it ended");
}

/// GUARD-7.
#[test]
fn only_a_page_of_ours_is_told_the_token() {
    let site = Site::new();
    let cookie = format!("Cookie: flexmodel_{}={TOKEN}\r\n", site.address.port());
    let answer = site.ask("/api/token", &format!("{cookie}Sec-Fetch-Site: same-origin\r\n"));
    assert_eq!((answer.json()["token"].as_str(), answer.header("cache-control")), (Some(TOKEN), Some("no-store")));
    for line in ["", "Sec-Fetch-Site: none\r\n", "Sec-Fetch-Site: same-site\r\n", "Sec-Fetch-Site: cross-site\r\n"] {
        let answer = site.ask("/api/token", &format!("{cookie}{line}"));
        assert_eq!((answer.status, answer.body.contains(TOKEN)), (403, false), "{line}");
    }
    assert_eq!(site.ask("/api/token", "Sec-Fetch-Site: same-origin\r\n").status, 401);
}
