//! HTTP as any client sends it, byte by byte.

use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Sends a request as it is; returns the status and the body.
///
/// # Panics
/// When nobody answers, or not by HTTP.
pub fn exchange(socket: &Path, request: &[u8]) -> (u16, String) {
    let (status, _, body) = answer(socket, request);
    (status, body)
}

/// The same with the answer's head.
///
/// # Panics
/// As above.
pub fn answer(socket: &Path, request: &[u8]) -> (u16, String, String) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // The server may refuse, and hang up, before it has read all.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("no HTTP: {answer:?}")), head.to_string(), body.to_string())
}

/// A request as it travels.
pub fn request(method: &str, path: &str, kind: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    let kind = if kind.is_empty() { String::new() } else { format!("Content-Type: {kind}\r\n") };
    let head = format!("{method} {path} HTTP/1.1\r\nHost: vm\r\nConnection: close\r\n{kind}");
    format!("{head}Content-Length: {length}\r\n\r\n{body}").into_bytes()
}

/// Makes a request; returns the status and the body, which is JSON, or none with status 204.
///
/// # Panics
/// When the answer is another one.
pub fn call(socket: &Path, method: &str, path: &str, body: &str) -> (u16, Value) {
    let kind = if body.is_empty() { "" } else { "application/json" };
    let (status, body) = exchange(socket, &request(method, path, kind, body));
    assert_eq!(status == 204, body.is_empty(), "{method} {path}: {status}, {body:?}");
    if body.is_empty() {
        return (status, Value::Null);
    }
    (status, serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body:?}")))
}
