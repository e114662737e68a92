//! What somebody who talks to a guest notices of its moves.

use crate::bridges::{Bridges, GUEST};
use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The guest's echo.
const ECHO: (&str, u16) = (GUEST, 7);
/// From one datagram to the next.
pub const INTERVAL: Duration = Duration::from_millis(5);
/// How long an answer may take that is sure to come.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until the guest answers.
///
/// # Panics
/// When it does not.
pub fn wait_echo(bridges: &Bridges) {
    let ask = || {
        bridges.enter_client();
        let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
        socket.set_read_timeout(Some(Duration::from_millis(200))).expect("a time");
        let deadline = Instant::now() + PATIENCE;
        loop {
            // It may not be reachable yet.
            let _ = socket.send_to(b"hello", ECHO);
            if socket.recv_from(&mut [0; 16]).is_ok() {
                break;
            }
            assert!(Instant::now() < deadline, "the guest does not answer");
        }
    };
    thread::scope(|scope| scope.spawn(ask).join().expect("the guest answers"));
}

/// What became of datagrams that were sent every [`INTERVAL`].
#[derive(Clone, Debug, Default)]
pub struct Echoes {
    /// How many were sent.
    pub sent: u64,
    /// How long each took to come back.
    pub trips: Vec<Duration>,
    /// When each came back, and how long none had until then.
    pub gaps: Vec<(Instant, Duration)>,
}

impl Echoes {
    /// The longest time in which none came back, from one moment to another.
    pub fn longest_gap(&self, from: Instant, to: Instant) -> Duration {
        let within = self.gaps.iter().filter(|(at, gap)| *at >= from && *at - *gap <= to);
        within.map(|(_, gap)| *gap).max().unwrap_or_default()
    }
}

/// Times in order, for people.
pub struct Distribution(Vec<Duration>);

impl Distribution {
    /// Of these.
    pub fn of(times: impl IntoIterator<Item = Duration>) -> Self {
        let mut times: Vec<_> = times.into_iter().collect();
        times.sort_unstable();
        Distribution(times)
    }
}

impl fmt::Display for Distribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(last) = self.0.len().checked_sub(1) else { return f.write_str("none") };
        let at = |share: f64| self.0[(last as f64 * share).round() as usize].as_secs_f64() * 1e3;
        let (least, median, most) = (at(0.0), at(0.5), at(1.0));
        write!(f, "least {least:.1} ms, median {median:.1} ms, ")?;
        write!(f, "90 % {:.1} ms, 99 % {:.1} ms, most {most:.1} ms", at(0.9), at(0.99))
    }
}

/// Sends a datagram every [`INTERVAL`] until `done`, and notes what comes back.
///
/// # Panics
/// Where there are no sockets.
pub fn echo(bridges: &Bridges, done: &AtomicBool) -> Echoes {
    bridges.enter_client();
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    let mut echoes = Echoes::default();
    let mut sent: Vec<Instant> = Vec::new();
    let mut last = Instant::now();
    let mut next = last;
    while !done.load(Ordering::Relaxed) {
        let now = Instant::now();
        if now >= next {
            sent.push(now);
            // Where nothing takes it, it is lost.
            let _ = socket.send_to(&(sent.len() as u64 - 1).to_le_bytes(), ECHO);
            next += INTERVAL;
            continue;
        }
        socket.set_read_timeout(Some((next - now).max(Duration::from_micros(100)))).expect("a time");
        let mut number = [0; 8];
        if let Ok((8, _)) = socket.recv_from(&mut number) {
            let now = Instant::now();
            let number = u64::from_le_bytes(number) as usize;
            echoes.trips.push(now - sent[number]);
            echoes.gaps.push((now, now - last));
            last = now;
        }
    }
    echoes.sent = sent.len() as u64;
    echoes
}

/// Sends random bytes to the guest until `done`, at most `rate` a second, and compares what comes back, all
/// over one connection; returns how many did.
///
/// # Panics
/// When the connection breaks, or a byte is wrong or missing.
pub fn transfer(bridges: &Bridges, rate: u64, done: &AtomicBool) -> u64 {
    const PIECE: usize = 4 << 10;
    bridges.enter_client();
    let mut sender = TcpStream::connect(ECHO).expect("the guest takes a connection");
    let mut receiver = sender.try_clone().expect("a second handle");
    receiver.set_read_timeout(Some(PATIENCE)).expect("a time");
    // A guest that is gone takes nothing, and nobody says so.
    sender.set_write_timeout(Some(PATIENCE)).expect("a time");
    let seed = fastrand::u64(..);
    let send = || {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut piece = vec![0; PIECE];
        let (began, mut sent) = (Instant::now(), 0);
        while !done.load(Ordering::Relaxed) {
            random.fill(&mut piece);
            sender.write_all(&piece).expect("the connection stays");
            sent += PIECE as u64;
            let due = began + Duration::from_secs_f64(sent as f64 / rate as f64);
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        sender.shutdown(Shutdown::Write).expect("the connection stays");
        sent
    };
    thread::scope(|scope| {
        let sending = scope.spawn(send);
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut expected, mut got, mut received) = (vec![0; PIECE], vec![0; PIECE], 0);
        loop {
            match receiver.read_exact(&mut got) {
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
                result => result.expect("the connection stays"),
            }
            random.fill(&mut expected);
            assert!(got == expected, "a wrong byte among the {PIECE} after {received}");
            received += PIECE as u64;
        }
        assert_eq!(received, sending.join().expect("everything is sent"));
        received
    })
}

/// A browser that loads one page after the other, ten a second at most, and keeps its connection: `curl`.
pub struct Browser {
    folder: tempfile::TempDir,
    curl: Child,
}

impl Browser {
    /// Begins with page 1.
    ///
    /// # Panics
    /// When there is no curl.
    pub fn begin() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let file = |name| std::fs::File::create(folder.path().join(name)).expect("a file");
        let mut command = Command::new("ip");
        command.args(["netns", "exec", "client", "curl", "--silent", "--show-error", "--no-buffer"]);
        // What is said of each page goes where nothing is buffered.
        let said = "%{stderr}%{num_connects} %{http_code} %{time_total}\n";
        command.args(["--fail-early", "--rate", "10/s", "--write-out", said]);
        command.arg(format!("http://{GUEST}/[1-1000000]")).stdin(Stdio::null());
        let curl = command.stdout(file("pages")).stderr(file("said")).spawn().expect("iproute2 and curl");
        Browser { folder, curl }
    }

    /// Ends; how long each page took.
    ///
    /// # Panics
    /// When a page was missing or wrong, or the connection was not the first one.
    pub fn end(mut self) -> Vec<Duration> {
        let ended = self.curl.try_wait().expect("a child can be waited for");
        let said = read(self.folder.path(), "said");
        assert!(ended.is_none(), "curl ended: {said}");
        self.curl.kill().and_then(|()| self.curl.wait()).expect("a child can be killed");
        let (pages, said) = (read(self.folder.path(), "pages"), read(self.folder.path(), "said"));
        let times: Vec<_> = said
            .lines()
            .zip(1..)
            .map(|(line, number)| {
                let connects = u8::from(number == 1);
                let time = line.strip_prefix(&format!("{connects} 200 ")).and_then(|time| time.parse().ok());
                Duration::from_secs_f64(time.unwrap_or_else(|| panic!("page {number}: {line}")))
            })
            .collect();
        for (line, number) in pages.lines().zip(1..=times.len()) {
            assert_eq!(line, format!("page {number}"));
        }
        assert!(pages.lines().count() >= times.len(), "{pages}");
        times
    }
}

fn read(folder: &Path, name: &str) -> String {
    std::fs::read_to_string(folder.join(name)).expect("a file")
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.curl.kill();
        let _ = self.curl.wait();
    }
}

/// Types a line every 100 ms over one connection until `done`, and waits for each to come back; how long that
/// took.
///
/// # Panics
/// When the connection breaks, or a line is another.
pub fn session(bridges: &Bridges, done: &AtomicBool) -> Vec<Duration> {
    bridges.enter_client();
    let mut connection = TcpStream::connect(ECHO).expect("the guest takes a connection");
    connection.set_nodelay(true).expect("an option");
    connection.set_read_timeout(Some(PATIENCE)).expect("a time");
    let mut trips = Vec::new();
    while !done.load(Ordering::Relaxed) {
        let line = format!("line {:8}\n", trips.len());
        let began = Instant::now();
        connection.write_all(line.as_bytes()).expect("the connection stays");
        let mut answer = vec![0; line.len()];
        connection.read_exact(&mut answer).expect("the connection stays");
        assert_eq!(answer, line.as_bytes());
        trips.push(began.elapsed());
        thread::sleep(Duration::from_millis(100));
    }
    trips
}
