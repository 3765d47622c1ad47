//! Who may ask: the one who has the token, from a page of ours, under a name of this machine.
//!
//! - GUARD-1: every route wants the token, as `Authorization: Bearer`, as our cookie, or once as `?token=`, which sets
//!   the cookie and leads on to the address without it (so that it stays out of history and screenshots). That address
//!   is a route of ours and a query that is written anew: nothing of what was asked for leads a browser elsewhere.
//! - GUARD-2: `Host` must name loopback and our port; else a page elsewhere could point its own name at 127.0.0.1
//!   (DNS rebinding) and read everything.
//! - GUARD-3: `Origin`, and `Sec-Fetch-Site` for everything but opening the page, must be ours where they are sent. A
//!   cookie of `SameSite=Strict` is still sent to every port of this machine, and other ports belong to others.
//! - GUARD-4: GET and HEAD only, and POST on the one route that changes hooks ([`hooks::ROUTE`]).
//! - GUARD-5: every answer forbids caching, framing, sniffing and everything that is not from here.
//! - GUARD-6: a change wants the token as `Authorization: Bearer`, and JSON. The cookie, or the address, is not enough: a
//!   browser sends the cookie for a page of another port of this machine too, but neither that header nor JSON without asking
//!   first (OPTIONS), which GUARD-4 refuses.
//! - GUARD-7: the token is told to a page of ours alone ([`hooks::TOKEN_ROUTE`]): the browser has to say `Sec-Fetch-Site:
//!   same-origin`, which it says of no link, no bookmark and no other page.

use std::sync::Arc;

use axum::{
    Extension,
    extract::{MatchedPath, Request, State},
    http::{
        HeaderMap, HeaderValue, Method, StatusCode, Uri,
        header::{self, HeaderName},
    },
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::{api::Refusal, connections::Visitor, hooks};

const POLICY: &str = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// What a request is held against.
pub struct Guard {
    token: String,
    hosts: Vec<String>,
    cookie: String,
    port: u16,
}

impl Guard {
    /// For a server on loopback's `port`.
    pub fn new(token: String, port: u16) -> Self {
        let names = ["127.0.0.1", "localhost", "[::1]"];
        let mut hosts: Vec<String> = names.iter().map(|name| format!("{name}:{port}")).collect();
        if port == 80 {
            hosts.extend(names.map(str::to_owned));
        }
        // Cookies know no ports: two dashboards on one machine need two names.
        Self { token, hosts, cookie: format!("flexmodel_{port}"), port }
    }

    fn host_ok(&self, headers: &HeaderMap) -> bool {
        let mut hosts = headers.get_all(header::HOST).iter();
        let ours = |h: &HeaderValue| self.hosts.iter().any(|ok| h.as_bytes().eq_ignore_ascii_case(ok.as_bytes()));
        hosts.next().is_some_and(ours) && hosts.next().is_none()
    }

    fn origin_ok(&self, headers: &HeaderMap) -> bool {
        let ours = |origin: &HeaderValue| {
            let host = origin.as_bytes().strip_prefix(b"http://");
            host.is_some_and(|h| self.hosts.iter().any(|ok| h.eq_ignore_ascii_case(ok.as_bytes())))
        };
        headers.get_all(header::ORIGIN).iter().all(ours)
    }

    /// Whether it is the token that comes as `Bearer`; `None`: nothing does.
    fn bearer_ok(&self, headers: &HeaderMap) -> Option<bool> {
        let bearer = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
        let (_, token) = bearer?.split_once(' ').filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))?;
        Some(same(token.trim().as_bytes(), self.token.as_bytes()))
    }

    fn token_ok(&self, headers: &HeaderMap) -> bool {
        if let Some(ok) = self.bearer_ok(headers) {
            return ok;
        }
        let cookies = headers.get_all(header::COOKIE).iter().filter_map(|v| v.to_str().ok());
        let values = cookies.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='));
        values.filter(|(name, _)| *name == self.cookie).any(|(_, v)| same(v.as_bytes(), self.token.as_bytes()))
    }

    /// The token of the query, and the address without it: of `route`, the one of ours that is meant, if it is one.
    fn query_token(uri: &Uri, route: Option<&str>) -> Option<(String, String)> {
        let query: Vec<(String, String)> = serde_urlencoded::from_str(uri.query()?).ok()?;
        let (tokens, rest): (Vec<_>, Vec<_>) = query.into_iter().partition(|(name, _)| name == "token");
        let (_, token) = tokens.into_iter().next()?;
        let mut address = route.unwrap_or("/").to_owned();
        if let Ok(query) = serde_urlencoded::to_string(rest)
            && !query.is_empty()
            && route.is_some()
        {
            address.push('?');
            address += &query;
        }
        Some((token, address))
    }
}

/// The middleware.
pub async fn check(
    State(guard): State<Arc<Guard>>,
    Extension(visitor): Extension<Visitor>,
    request: Request,
    next: Next,
) -> Response {
    let mut response = match admit(&guard, &visitor, &request) {
        Ok(()) => next.run(request).await,
        Err(answer) => answer,
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Lets a request through, or says what to answer instead.
// The answer is made once and sent; its size does not matter.
#[allow(clippy::result_large_err)]
fn admit(guard: &Guard, visitor: &Visitor, request: &Request) -> Result<(), Response> {
    let headers = request.headers();
    let refuse = |status: StatusCode, text: String| match request.uri().path().starts_with("/api/") {
        true => Err(Refusal(status, text).into_response()),
        false => Err((status, text + "\n").into_response()),
    };
    if !guard.host_ok(headers) {
        let port = guard.port;
        return refuse(
            StatusCode::MISDIRECTED_REQUEST,
            format!(
                "this dashboard answers to 127.0.0.1:{port} and localhost:{port} only; from another machine forward \
                 the same port: ssh -L {port}:127.0.0.1:{port} HOST"
            ),
        );
    }
    if !guard.origin_ok(headers) {
        return refuse(StatusCode::FORBIDDEN, "refused: the request comes from another site's page".into());
    }
    let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let changes = request.method() == Method::POST && route == Some(hooks::ROUTE);
    if request.method() != Method::GET && request.method() != Method::HEAD && !changes {
        let text = format!("this dashboard answers GET, and POST to {} alone", hooks::ROUTE);
        return refuse(StatusCode::METHOD_NOT_ALLOWED, text);
    }
    let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
    let elsewhere = !matches!(site, None | Some(b"same-origin" | b"none"));
    let full =
        || refuse(StatusCode::SERVICE_UNAVAILABLE, "too many pages are open on this dashboard; close one".into());
    if !changes && let Some((token, rest)) = Guard::query_token(request.uri(), route) {
        if !same(token.as_bytes(), guard.token.as_bytes()) {
            return refuse(StatusCode::UNAUTHORIZED, wrong_token());
        }
        return if visitor.let_in() { Err(enter(guard, &rest, elsewhere)) } else { full() };
    }
    if elsewhere && request.uri().path() != "/" {
        return refuse(StatusCode::FORBIDDEN, "refused: the request comes from another site's page".into());
    }
    if changes && guard.bearer_ok(headers).is_none() {
        let text =
            format!("a change wants the token as Authorization: Bearer; a page gets it from {}", hooks::TOKEN_ROUTE);
        return refuse(StatusCode::UNAUTHORIZED, text);
    }
    if !guard.token_ok(headers) {
        return refuse(StatusCode::UNAUTHORIZED, wrong_token());
    }
    if changes && !is_json(headers) {
        return refuse(StatusCode::BAD_REQUEST, "a change is JSON: send Content-Type: application/json".into());
    }
    if route == Some(hooks::TOKEN_ROUTE) && site.is_none_or(|site| site != b"same-origin") {
        return refuse(StatusCode::FORBIDDEN, "refused: only a page of this dashboard is told the token".into());
    }
    if visitor.let_in() { Ok(()) } else { full() }
}

/// Whether a request says that its body is JSON, and nothing else.
fn is_json(headers: &HeaderMap) -> bool {
    let mut types = headers.get_all(header::CONTENT_TYPE).iter();
    let kind = types.next().and_then(|value| value.to_str().ok()).and_then(|value| value.split(';').next());
    kind.is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json")) && types.next().is_none()
}

fn wrong_token() -> String {
    "no token, or not this run's: open the address that flexmodel printed when the run started, token included".into()
}

/// Sets the cookie and leads on to the address without the token.
fn enter(guard: &Guard, rest: &str, elsewhere: bool) -> Response {
    let cookie = format!("{}={}; HttpOnly; SameSite=Strict; Path=/", guard.cookie, guard.token);
    let (Ok(cookie), Ok(location)) = (HeaderValue::from_str(&cookie), HeaderValue::from_str(rest)) else {
        return (StatusCode::BAD_REQUEST, "this address cannot be followed\n").into_response();
    };
    if elsewhere {
        // After a link on another site's page, the browser would not send the cookie along a redirect; it does on a
        // step that begins on a page of ours.
        let page =
            "<!doctype html><meta http-equiv=\"refresh\" content=\"0;url=/\"><a href=\"/\">Open the dashboard</a>";
        let html = (header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
        return (StatusCode::OK, [html, (header::SET_COOKIE, cookie)], page).into_response();
    }
    (StatusCode::SEE_OTHER, [(header::LOCATION, location), (header::SET_COOKIE, cookie)]).into_response()
}

/// Compares without telling by its time how much was right; only the length may show.
fn same(a: &[u8], b: &[u8]) -> bool {
    let differ = a.iter().zip(b).fold(0u8, |all, (x, y)| all | (x ^ y));
    a.len() == b.len() && std::hint::black_box(differ) == 0
}
