//! `iperf3 -Z` over loopback: what one stream with zero copy reaches.
//!
//! It sends one block of a file again and again and receives into one buffer of 128 KiB, so its data
//! stays in the caches: a migration has to read and write all of memory for the same bytes.

use super::free_port;
use anyhow::{Context, bail};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

/// Ends the server, whatever happens.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // With `-1` it has ended by itself, unless the client failed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends `bytes`; returns what iperf3 says of it.
///
/// # Errors
/// When iperf3 is not there or fails.
pub fn run(bytes: u64) -> anyhow::Result<Value> {
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
        .args(["--client", "127.0.0.1", "--port", &port, "--zerocopy", "--json", "--bytes"])
        .arg(bytes.to_string())
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

/// MiB a second as the receiver counted them.
pub fn rate(said: &Value) -> Option<f64> {
    Some(said["sum_received"]["bits_per_second"].as_f64()? / 8.0 / f64::from(1 << 20))
}

/// CPU seconds of both sides for each GiB.
pub fn cpu(said: &Value) -> (Option<f64>, Option<f64>) {
    let used = &said["cpu_utilization_percent"];
    let per_gib = |percent: Option<f64>, sum: &Value| {
        let (seconds, bytes) = (sum["seconds"].as_f64()?, sum["bytes"].as_f64()?);
        Some(percent? / 100.0 * seconds / (bytes / f64::from(1 << 30)))
    };
    (
        per_gib(used["host_total"].as_f64(), &said["sum_sent"]),
        per_gib(used["remote_total"].as_f64(), &said["sum_received"]),
    )
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
        assert_eq!(rate(&said), Some(1024.0));
        assert_eq!(cpu(&said), (Some(0.5), Some(1.0)));
        assert_eq!(rate(&json!({})), None);
        assert_eq!(cpu(&json!({})), (None, None));
    }
}
