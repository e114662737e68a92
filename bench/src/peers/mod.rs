//! Other programs that are measured in the same run.

mod certificates;
pub mod cloud_hypervisor;
pub mod iperf3;
pub mod perftest;
pub mod qemu;
pub mod qemu_program;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

/// A loopback port that was free a moment ago, for programs that cannot choose a free port themselves.
fn free_port() -> std::io::Result<u16> {
    let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    Ok(listener.local_addr()?.port())
}
