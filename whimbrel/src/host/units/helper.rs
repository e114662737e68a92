//! The helper: makes scopes of processes of whoever asks, and nothing else.

use super::{Answer, Request, SLICE, has_unit, hear, name, say};
use crate::host::run_dir::RunDir;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fs;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long whoever connects may take to say what it wants.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long systemd may take to do what it has been told.
const CARRIED_OUT: Duration = Duration::from_secs(2);

/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(2);

/// Answers whoever connects, one after the other, until nobody has come for `idle`. systemd keeps the socket,
/// and starts the next helper when somebody comes.
///
/// # Errors
/// Those of waiting and accepting.
pub fn serve(listener: &UnixListener, idle: Duration) -> io::Result<()> {
    let idle = Timespec::try_from(idle).map_err(io::Error::other)?;
    loop {
        let mut come = [PollFd::new(listener, PollFlags::IN)];
        if rustix::io::retry_on_intr(|| poll(&mut come, Some(&idle)))? == 0 {
            return Ok(());
        }
        let (mut stream, _) = listener.accept()?;
        // Whoever does not say, or hear, what is to be done is not waited for.
        let _ = stream.set_read_timeout(Some(PATIENCE)).and_then(|()| attend(&mut stream));
    }
}

fn attend(stream: &mut UnixStream) -> io::Result<()> {
    let request: Request = hear(stream)?;
    let user = rustix::net::sockopt::socket_peercred(&*stream)?.uid.as_raw();
    say(stream, &make(user, &request).map_or_else(Answer::Refused, Answer::Unit))
}

/// Makes a scope of a process of this user.
fn make(user: u32, request: &Request) -> Result<String, String> {
    let Request { pid, name } = request;
    RunDir::check(name).map_err(|error| error.to_string())?;
    let gone = || format!("there is no process {pid}");
    let number = i32::try_from(*pid).ok().and_then(Pid::from_raw).ok_or_else(gone)?;
    // What follows is about this process if it lives at the end of it.
    let process = pidfd_open(number, PidfdFlags::empty()).map_err(|_| gone())?;
    if !users(*pid).ok_or_else(gone)?.iter().all(|owner| *owner == user) {
        return Err(format!("the process {pid} is another user's"));
    }
    if has_unit(*pid) {
        return Err(format!("the process {pid} has a unit"));
    }
    let ended = || {
        let mut end = [PollFd::new(&process, PollFlags::IN)];
        !matches!(poll(&mut end, Some(&Timespec::default())), Ok(0))
    };
    if ended() {
        return Err(gone());
    }
    // A process whose guest has moved away stays a little for those who wait for its report, and is the unit
    // of this name until it ends.
    let units = [name::of(name), name::beside(name, *pid)];
    let start = |unit: &String| start(unit, *pid, name).map(|()| unit.clone());
    let unit = start(&units[0]).or_else(|_| start(&units[1]))?;
    let deadline = Instant::now() + CARRIED_OUT;
    while !has_unit(*pid) {
        if ended() {
            return Err(gone());
        }
        if Instant::now() > deadline {
            return Err(format!("systemd does not put the process {pid} into {unit}"));
        }
        thread::sleep(LOOK);
    }
    Ok(unit)
}

/// Has systemd make the unit. `busctl` is a part of systemd; a library for its bus would be far larger than
/// all else that this helper does, and it may do what nothing else of Whimbrel may.
fn start(unit: &str, pid: u32, name: &str) -> Result<(), String> {
    let call = [
        "--quiet",
        "call",
        "org.freedesktop.systemd1",
        "/org/freedesktop/systemd1",
        "org.freedesktop.systemd1.Manager",
        "StartTransientUnit",
        "ssa(sv)a(sa(sv))",
    ];
    // What a guest is called must not become a line of the unit.
    let description = format!("The virtual machine {}", name.escape_default());
    let pid = pid.to_string();
    // Four properties, each with its type; no further units. What else holds is in `whimbrel-.scope.d`.
    #[rustfmt::skip]
    let arguments = [
        unit, "fail", "4",
        "Description", "s", &description,
        "Slice", "s", SLICE,
        "CollectMode", "s", "inactive-or-failed",
        "PIDs", "au", "1", &pid,
        "0",
    ];
    let ran = Command::new("busctl")
        .args(call)
        .arg("--")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot run busctl: {error}"))?;
    if ran.status.success() {
        return Ok(());
    }
    Err(format!("systemd: {}", String::from_utf8_lossy(&ran.stderr).trim()))
}

/// The real, effective, saved and file system user of a process. The owner of its folder in /proc would not
/// do: it is the superuser if nobody may look at the process's memory.
fn users(pid: u32) -> Option<Vec<u32>> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let users: Vec<_> = line.split_whitespace().map_while(|user| user.parse().ok()).collect();
    (users.len() == 4).then_some(users)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// None of these gets as far as systemd.
    #[test]
    fn only_ones_own_processes_get_units() {
        let me = rustix::process::getuid().as_raw();
        let request = |pid, name: &str| Request { pid, name: name.into() };
        let told = |user, request| make(user, &request).unwrap_err();
        assert!(told(me + 1, request(std::process::id(), "web1")).contains("another user's"));
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert!(told(me, request(child.id(), "web1")).contains("no process"));
        assert!(told(me, request(0, "web1")).contains("no process"));
        assert!(told(me, request(u32::MAX, "web1")).contains("no process"));
        assert!(make(me, &request(std::process::id(), "")).is_err());
    }

    #[test]
    fn a_helper_that_is_not_asked_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("units.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let helper = thread::spawn(move || serve(&listener, Duration::from_millis(300)));
        let units = super::super::Units(Some(path.clone()));
        let refused = units.enter(u32::MAX, "web1").unwrap_err().to_string();
        assert!(refused.contains("no process"), "{refused}");
        // One that says nothing, and one that says something else, keep nobody waiting.
        let _mute = UnixStream::connect(&path).unwrap();
        say(&mut UnixStream::connect(&path).unwrap(), &7).unwrap();
        helper.join().unwrap().unwrap();
        assert!(units.enter(u32::MAX, "web1").unwrap_err().to_string().contains("whimbrel-units.socket"));
        // Without one there is nothing to do.
        super::super::Units::default().enter(u32::MAX, "web1").unwrap();
    }
}
