//! A program for the small guest (`ci/guest/build`): sends every datagram that reaches UDP port 7 back to its
//! sender.

use std::net::UdpSocket;

fn main() -> std::io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:7")?;
    let mut buffer = [0; 2048];
    loop {
        // A datagram that cannot be sent now is lost, as UDP allows. The next one may work.
        if let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..len], from);
        }
    }
}
