//! `whimbrel host`: the service of a host, and the commands that it carries out.

use super::args::{DrainArgs, ServiceArgs, StartArgs};
use super::{Exit, say};
use anyhow::Context;
use hyper::Method;
use listenfd::ListenFd;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::time::Duration;
use whimbrel::host::config::HostConfig;
use whimbrel::host::server::Started;
use whimbrel::host::service::Service;
use whimbrel::host::units;

/// Longer than the service waits for a machine.
const START: Duration = Duration::from_secs(330);

pub fn host(args: &ServiceArgs) -> anyhow::Result<Exit> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let config = args.config.as_deref().map(HostConfig::read).transpose()?.unwrap_or_default();
    let service = Service::start(&args.host.run_dir(), &config, &args.listen)?;
    let listen: Vec<_> = service.listen().iter().map(ToString::to_string).collect();
    eprintln!("whimbrel: guests are taken in on {}", listen.join(", "));
    if let Some(page) = service.page() {
        eprintln!("whimbrel: the page is at http://{page}/");
    }
    if let Some(api) = service.api() {
        eprintln!("whimbrel: the API is at https://{api}/, for whoever shows a certificate");
    }
    // Without systemd nobody is told.
    let status = sd_notify::NotifyState::Status("guests are taken in");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready, status]);
    signals.forever().next();
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    service.end();
    Ok(Exit::Done)
}

/// How long the helper stays when nobody asks it for anything.
const IDLE: Duration = Duration::from_secs(30);

/// `whimbrel units`: the helper that makes units of machines. systemd starts it.
pub fn units() -> anyhow::Result<Exit> {
    let listener = ListenFd::from_env().take_unix_listener(0)?;
    let listener = listener.context("this is started by systemd, by whimbrel-units.socket")?;
    units::serve(&listener, IDLE)?;
    Ok(Exit::Done)
}

pub fn drain(args: &DrainArgs) -> anyhow::Result<Exit> {
    let method = if args.off { Method::DELETE } else { Method::PUT };
    args.host.client()?.call::<()>(method, "/v1/host/drain", &())?;
    Ok(Exit::Done)
}

pub fn start(args: &StartArgs) -> anyhow::Result<Exit> {
    let client = args.host.client()?;
    let path = format!("/v1/machines/{}/start", encoded(&args.name));
    let started: Started = client.call_within(START, Method::POST, &path, &())?;
    if args.json {
        say(serde_json::to_string(&started)?)?;
    }
    Ok(Exit::Done)
}

/// A name as a part of a path, or of a query.
pub fn encoded(name: &str) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(byte);
    name.bytes().map(|b| if plain(&b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}
