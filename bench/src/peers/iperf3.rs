//! `iperf3 -Z` over loopback: TCP streams with zero copy.
//!
//! It sends one block of a file again and again and receives into one buffer of 128 KiB, so its data stays in
//! the caches. A migration has to read and write all of memory for the same number of bytes.

use super::free_port;
use crate::figures::{self, Figures};
use anyhow::{Context, bail};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

/// The server. Dropping it ends the process.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // With --one-off it has ended by itself, unless the client failed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends `bytes` over `streams` streams and returns iperf3's result.
///
/// # Errors
/// When iperf3 is not installed or fails.
pub fn run(bytes: u64, streams: u16) -> anyhow::Result<Value> {
    let port = free_port()?.to_string();
    let mut server = Command::new("iperf3")
        .args(["--server", "--one-off", "--forceflush", "--bind", "127.0.0.1", "--port", &port])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map(Server)
        .context("cannot run iperf3; install it, or leave --iperf3 out")?;
    let stdout = server.0.stdout.take().context("iperf3 has no output")?;
    let mut lines = BufReader::new(stdout);
    let mut line = String::new();
    while !line.contains("listening") {
        line.clear();
        if lines.read_line(&mut line)? == 0 {
            bail!("iperf3's server ended at once");
        }
    }
    let client = Command::new("iperf3")
        .args(["--client", "127.0.0.1", "--port", &port, "--zerocopy", "--json"])
        .args(["--parallel", &streams.to_string(), "--bytes", &bytes.to_string()])
        .stdin(Stdio::null())
        .output()
        .context("cannot run iperf3")?;
    let mut rest = Vec::new();
    lines.read_to_end(&mut rest)?;
    let said: Value = serde_json::from_slice(&client.stdout).context("iperf3 printed no JSON")?;
    if let Some(error) = said["error"].as_str() {
        bail!("iperf3: {error}");
    }
    Ok(said["end"].clone())
}

/// MiB a second as the receiver counts them, and CPU seconds of both sides per GiB.
pub fn figures(said: &Value) -> Figures {
    let rate = |sum: &Value| Some(sum["bits_per_second"].as_f64()? / 8.0 / f64::from(1 << 20));
    let used = &said["cpu_utilization_percent"];
    let per_gib = |percent: &Value, sum: &Value| {
        let (seconds, bytes) = (sum["seconds"].as_f64()?, sum["bytes"].as_f64()?);
        Some(percent.as_f64()? / 100.0 * seconds / (bytes / f64::from(1 << 30)))
    };
    let (sent, received) = (&said["sum_sent"], &said["sum_received"]);
    figures::named([
        ("stream_mib_s", rate(received)),
        ("source_cpu_s_per_gib", per_gib(&used["host_total"], sent)),
        ("target_cpu_s_per_gib", per_gib(&used["remote_total"], received)),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rate_and_cpu_are_read() {
        let said = json!({
            "sum_sent": { "seconds": 2.0, "bytes": 2147483648u64 },
            "sum_received": { "seconds": 2.0, "bytes": 2147483648u64, "bits_per_second": 8589934592.0 },
            "cpu_utilization_percent": { "host_total": 50.0, "remote_total": 100.0 },
        });
        let figures = figures(&said);
        assert_eq!(figures["stream_mib_s"], 1024.0);
        assert_eq!((figures["source_cpu_s_per_gib"], figures["target_cpu_s_per_gib"]), (0.5, 1.0));
        assert!(super::figures(&json!({})).is_empty());
    }
}
