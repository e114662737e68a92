//! Accepting connections until nobody wants any more.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A thread that accepts connections. Dropping it ends the thread.
pub(crate) struct Accepting {
    address: SocketAddr,
    closed: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Accepting {
    /// Gives each connection to `welcome`, and at last the error after which there can be no more.
    pub fn start(
        listener: TcpListener,
        mut welcome: impl FnMut(io::Result<(TcpStream, SocketAddr)>) + Send + 'static,
    ) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let closed = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&closed);
        let thread = thread::Builder::new().name("listen".into()).spawn(move || {
            loop {
                let accepted = listener.accept();
                // The one that wakes this thread is nobody's caller.
                if seen.load(Ordering::Acquire) {
                    return;
                }
                match accepted {
                    // The caller was gone before it was accepted, or we are out of descriptors for now.
                    Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                    Err(e)
                        if matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) =>
                    {
                        thread::sleep(Duration::from_millis(100));
                    }
                    Err(e) => return welcome(Err(e)),
                    Ok(caller) => welcome(Ok(caller)),
                }
            }
        })?;
        Ok(Accepting { address, closed, thread: Some(thread) })
    }

    /// The address, with the port that was chosen.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Accepting {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Release);
        // Wakes the thread; if that fails it has ended already.
        let ip = match self.address.ip() {
            ip if ip.is_unspecified() && ip.is_ipv4() => Ipv4Addr::LOCALHOST.into(),
            ip if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        let woken = TcpStream::connect_timeout(&(ip, self.address.port()).into(), Duration::from_secs(1));
        if let (Ok(_), Some(thread)) = (woken, self.thread.take()) {
            let _ = thread.join();
        }
    }
}
