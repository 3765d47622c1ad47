//! The page's files, embedded in the binary.

use std::sync::Arc;

use axum::{Router, http::header, routing::get};

use super::Shared;

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JS: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// Route, type, content.
const FILES: [(&str, &str, &str); 10] = [
    ("/", HTML, include_str!("assets/index.html")),
    ("/app.css", CSS, include_str!("assets/app.css")),
    ("/app.js", JS, include_str!("assets/app.js")),
    ("/charts.js", JS, include_str!("assets/charts.js")),
    ("/dom.js", JS, include_str!("assets/dom.js")),
    ("/format.js", JS, include_str!("assets/format.js")),
    ("/module.js", JS, include_str!("assets/module.js")),
    ("/picture.js", JS, include_str!("assets/picture.js")),
    ("/tree.js", JS, include_str!("assets/tree.js")),
    ("/favicon.svg", SVG, include_str!("assets/favicon.svg")),
];

/// A route for each file.
pub fn routes() -> Router<Arc<Shared>> {
    FILES.into_iter().fold(Router::new(), |router, (path, kind, text)| {
        router.route(path, get(move || async move { ([(header::CONTENT_TYPE, kind)], text) }))
    })
}
