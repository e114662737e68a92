//! For the small guest (`ci/guest`): sends every datagram that comes to UDP port 7 back to where it came from.

use std::net::UdpSocket;

fn main() -> std::io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:7")?;
    let mut buffer = [0; 2048];
    loop {
        // Fails for one that cannot be delivered now; there will be others.
        if let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..len], from);
        }
    }
}
