//! A page to look at a host with: its machines, the moves under way, and what has been.
//!
//! It is plain files, which the program has in it, and asks the host's API for all that it shows. It changes
//! nothing, and what it is served from can change nothing either: [`port`] answers only what is read.

pub(super) mod port;

use crate::api::server::Refusal;
use axum::Router;
use axum::extract::Request;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, HeaderName, HeaderValue, ORIGIN,
    REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use std::net::IpAddr;

/// Path, type and content of each file.
const FILES: [(&str, &str, &str); 8] = [
    ("/", "text/html; charset=utf-8", include_str!("index.html")),
    ("/style.css", "text/css; charset=utf-8", include_str!("style.css")),
    ("/icon.svg", "image/svg+xml", include_str!("icon.svg")),
    ("/main.js", SCRIPT, include_str!("main.js")),
    ("/views.js", SCRIPT, include_str!("views.js")),
    ("/past.js", SCRIPT, include_str!("past.js")),
    ("/charts.js", SCRIPT, include_str!("charts.js")),
    ("/tools.js", SCRIPT, include_str!("tools.js")),
];

const SCRIPT: &str = "text/javascript; charset=utf-8";

/// What a browser is told with every answer: to load nothing from elsewhere, to run nothing that is written
/// into the page, and to keep none of it.
const HEADERS: [(HeaderName, &str); 6] = [
    (
        CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (REFERRER_POLICY, "no-referrer"),
    (CACHE_CONTROL, "no-store"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
];

/// The page's files.
pub(super) fn files<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES.into_iter().fold(Router::new(), |router, (path, kind, content)| {
        router.route(path, get(async move || headed(([(CONTENT_TYPE, kind)], content).into_response())))
    })
}

fn headed(mut answer: Response) -> Response {
    for (name, value) in HEADERS {
        answer.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    answer
}

/// The same for all that is answered.
pub(super) async fn with_headers(answer: Response) -> Response {
    headed(answer)
}

/// Answers whoever asks for this computer by a name that nobody else can give it. A page of another site can
/// have a name of its own lead here, and its scripts then read what is answered; its requests carry that
/// name.
async fn near(request: Request, next: Next) -> Response {
    let host = request.headers().get(HOST).and_then(|host| host.to_str().ok());
    let answer = if host.is_some_and(is_near) {
        next.run(request).await
    } else {
        let text = "ask for this page by the name localhost, or an address such as 127.0.0.1";
        Refusal::new(StatusCode::FORBIDDEN, text).into_response()
    };
    headed(answer)
}

/// Refuses what a page of another site may have a browser do where the service's socket has been made
/// reachable for one. Programs name no origin.
pub(super) async fn no_foreign_change(request: Request, next: Next) -> Response {
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    if reads || !request.headers().contains_key(ORIGIN) {
        return next.run(request).await;
    }
    Refusal::new(StatusCode::FORBIDDEN, "a browser may read here, and change nothing").into_response()
}

/// Whether this is `localhost` or a loopback address, with a port or without. A tunnel to the page may have
/// any port.
fn is_near(host: &str) -> bool {
    let Ok(authority) = host.parse::<Uri>().map(|uri| uri.host().map(String::from)) else { return false };
    let Some(name) = authority else { return false };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok_and(crate::security::is_near)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_computer_are_near() {
        for near in [
            "localhost",
            "LOCALHOST:8080",
            "127.0.0.1",
            "127.0.0.1:8080",
            "127.9.9.9:1",
            "[::1]:8080",
            "[::1]",
            "[::ffff:127.0.0.1]:80",
        ] {
            assert!(is_near(near), "{near}");
        }
        for far in [
            "",
            "evil.example",
            "localhost.evil.example:8080",
            "127.0.0.1.evil.example",
            "10.1.0.2:8080",
            "[2001:db8::1]:8080",
            "0.0.0.0:8080",
            "user@evil.example",
            "localhost@evil.example:80",
        ] {
            assert!(!is_near(far), "{far}");
        }
    }

    #[test]
    fn the_page_names_only_files_that_are_there() {
        let named = |text: &str, before: &str| -> Vec<String> {
            text.split(before).skip(1).filter_map(|rest| rest.split('"').next().map(String::from)).collect()
        };
        let paths: Vec<_> = FILES.iter().map(|(path, ..)| path.trim_start_matches('/')).collect();
        let index = FILES[0].2;
        let mut all = [named(index, "src=\""), named(index, "href=\"")].concat();
        for (path, kind, text) in FILES {
            if kind == SCRIPT {
                all.extend(named(text, "from \"./"));
                assert!(!text.contains("innerHTML"), "{path} makes elements of text");
            }
        }
        let (links, files): (Vec<_>, Vec<_>) = all.into_iter().partition(|name| name.starts_with('#'));
        assert!(files.len() > 6, "{files:?}");
        for file in files {
            assert!(paths.contains(&file.as_str()), "{file} is not served");
        }
        for link in links {
            assert!(index.contains(&format!("id=\"{}\"", &link[1..])), "{link} leads nowhere");
        }
    }
}
