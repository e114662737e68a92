//! A program for the small guest (`ci/guest/build`): a web server on port 80 that keeps its connections open.
//! It answers a request for `/n` with `page n`.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

fn main() -> std::io::Result<()> {
    for stream in TcpListener::bind("0.0.0.0:80")?.incoming().flatten() {
        // The client notices a broken connection by itself.
        thread::spawn(move || serve(&stream));
    }
    Ok(())
}

/// Answers one request after the other until the client has no more.
fn serve(mut stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut lines = BufReader::new(stream).lines();
    while let Some(request) = lines.next().transpose()? {
        let page = request.split_whitespace().nth(1).unwrap_or("/").trim_start_matches('/').to_string();
        // Skip the rest of the head. These requests have no body.
        for line in lines.by_ref() {
            if line?.is_empty() {
                break;
            }
        }
        let body = format!("page {page}\n");
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
    }
    Ok(())
}
