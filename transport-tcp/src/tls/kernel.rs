//! TLS by the kernel (kTLS): after a handshake by rustls the socket is given the keys, and from then on it
//! encrypts what is written and decrypts what is read. So `sendfile` of guest memory goes through it without
//! a copy by this process.
//!
//! Only bytes of the program go through it so simply. What TLS itself has to say is read by a system call
//! that asks for it; nothing but the end of a connection is expected there. Tickets are switched off at the
//! accepting end, and keys are never changed: the source replaces a connection before its keys have encrypted
//! too much (see `source`).

use super::stream::trouble;
use crate::Untrusted;
use crate::channel::{Decrypted, Peer, Protected, SharedSocket};
use rustls::crypto::cipher::Iv;
use rustls::{AlertDescription, ConnectionTrafficSecrets, ExtractedSecrets};
use socket2::Socket;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::time::Duration;
use zeroize::Zeroizing;

/// Types of records.
const ALERT: u8 = 21;
const DATA: u8 = 23;

/// Why the kernel does not encrypt.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The module is not there, or is not loaded and this process may not load it.
    #[error("the kernel has no TLS, or its module is not loaded")]
    Missing,
    /// It was tried, and did not work.
    #[error("TLS in the kernel was tried, and failed: {0}")]
    Unfit(String),
}

/// Whether this kernel can encrypt. The first call tries it, with a connection over loopback.
///
/// # Errors
/// [`KernelError`] says why not.
pub fn in_kernel() -> Result<(), KernelError> {
    static TRIED: OnceLock<Result<(), KernelError>> = OnceLock::new();
    TRIED.get_or_init(attempt).clone()
}

/// Sends a byte through a connection whose ends have both been given keys.
fn attempt() -> Result<(), KernelError> {
    let unfit = |error: io::Error| KernelError::Unfit(error.to_string());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(unfit)?;
    let address = listener.local_addr().map_err(unfit)?;
    let near = TcpStream::connect_timeout(&address, Duration::from_secs(1)).map_err(unfit)?;
    let (far, _) = listener.accept().map_err(unfit)?;
    let (mut near, mut far) = (Socket::from(near), Socket::from(far));
    for end in [&near, &far] {
        attach(end).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT) => KernelError::Missing,
            _ => unfit(error),
        })?;
        end.set_read_timeout(Some(Duration::from_secs(1))).map_err(unfit)?;
        for direction in [libc::TLS_TX, libc::TLS_RX] {
            let key = Key { cipher: libc::TLS_CIPHER_AES_GCM_128, salt: 4, key: &[7; 16], iv: &[9; 12] };
            key.give(end, direction, 0).map_err(unfit)?;
        }
    }
    let mut byte = [0];
    near.write_all(b"?").and_then(|()| far.read_exact(&mut byte)).map_err(unfit)?;
    if byte == *b"?" { Ok(()) } else { Err(KernelError::Unfit("a byte arrived as another one".into())) }
}

fn set(socket: &Socket, level: libc::c_int, option: libc::c_int, value: &[u8]) -> io::Result<()> {
    // SAFETY: pointer and length are those of `value`, which the kernel only reads.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Prepares a connected socket for keys. Until it has one it works as before.
fn attach(socket: &Socket) -> io::Result<()> {
    set(socket, libc::IPPROTO_TCP, libc::TCP_ULP, b"tls\0")
}

/// A key of one direction, as the kernel takes it.
struct Key<'a> {
    cipher: u16,
    key: &'a [u8],
    iv: &'a [u8],
    /// How many bytes of the IV the kernel calls salt, and takes after the key.
    salt: usize,
}

impl<'a> Key<'a> {
    /// `None` for a cipher that is unknown here.
    fn of(secrets: &'a ConnectionTrafficSecrets) -> Option<Self> {
        let (cipher, salt, key, iv): (_, _, _, &Iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (libc::TLS_CIPHER_AES_GCM_128, 4, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (libc::TLS_CIPHER_AES_GCM_256, 4, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
                (libc::TLS_CIPHER_CHACHA20_POLY1305, 0, key, iv)
            }
            _ => return None,
        };
        Some(Key { cipher, key: key.as_ref(), iv: iv.as_ref(), salt })
    }

    /// Gives it to the socket for a direction, of which the next record has this number.
    fn give(&self, socket: &Socket, direction: libc::c_int, record: u64) -> io::Result<()> {
        // struct tls12_crypto_info_…: its parts lie next to each other in all of them.
        let (salt, iv) = self.iv.split_at(self.salt);
        let info = Zeroizing::new(
            [
                &libc::TLS_1_3_VERSION.to_ne_bytes()[..],
                &self.cipher.to_ne_bytes(),
                iv,
                self.key,
                salt,
                &record.to_be_bytes(),
            ]
            .concat(),
        );
        set(socket, libc::SOL_TLS, direction, &info)
    }
}

/// Whether a socket is ready to be given keys.
pub(super) fn prepare(socket: &Socket) -> bool {
    in_kernel().is_ok() && attach(socket).is_ok()
}

/// A connection that the kernel protects.
pub(super) struct KernelStream {
    socket: SharedSocket,
    peer: Peer,
}

impl KernelStream {
    /// Gives a socket that is [prepared](prepare) its keys. Nothing of what they encrypt has been read or
    /// written yet.
    pub(super) fn new(socket: SharedSocket, secrets: &ExtractedSecrets, peer: Peer) -> io::Result<Self> {
        for (direction, (record, secrets)) in [(libc::TLS_TX, &secrets.tx), (libc::TLS_RX, &secrets.rx)] {
            let key = Key::of(secrets).ok_or(io::ErrorKind::Unsupported)?;
            key.give(&socket, direction, *record)?;
        }
        // Nobody here pads records. To a kernel that is told so (since Linux 6.0) it is no bother if one is
        // padded all the same; it can decrypt the others straight to where they are wanted.
        let _ = set(&socket, libc::SOL_TLS, libc::TLS_RX_EXPECT_NO_PAD, &1i32.to_ne_bytes());
        Ok(KernelStream { socket, peer })
    }
}

/// Reads bytes of one record; tells their number and the record's type. The end has no type.
fn receive(socket: &Socket, bytes: &mut [u8]) -> io::Result<(usize, Option<u8>)> {
    /// Room for one message of one byte, aligned as its head has to be.
    type Control = [u64; 4];
    let mut control: Control = [0; 4];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: an all-zero msghdr is a valid empty one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of::<Control>() as _;
    // SAFETY: the one iovec is `bytes`, which this function has for itself, and the control buffer is a local
    // of the length that is given. Both outlive the call.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, 0) };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has filled the header's fields in, and the control buffer as far as they say.
    let head = unsafe { libc::CMSG_FIRSTHDR(&message) };
    let kind = (!head.is_null()).then(|| {
        // SAFETY: not null, so it is in the control buffer, which is aligned for it and has room for a byte
        // behind it.
        let (head, kind) = unsafe { (&*head, *libc::CMSG_DATA(head)) };
        let typed = head.cmsg_level == libc::SOL_TLS && head.cmsg_type == libc::TLS_GET_RECORD_TYPE;
        if typed { kind } else { DATA }
    });
    Ok((got as usize, kind))
}

impl Read for KernelStream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            match receive(&self.socket, bytes) {
                Ok((count, None | Some(DATA))) => return Ok(count),
                Ok((_, Some(kind))) if kind != ALERT => {
                    let what = "wants to change keys or to resume sessions, which is not done here";
                    return Err(io::Error::new(io::ErrorKind::InvalidData, Untrusted(what.into())));
                }
                // A level, which says nothing more, and what it is about.
                Ok((count, _)) => match AlertDescription::from(bytes[..count].get(1).copied().unwrap_or(0)) {
                    AlertDescription::CloseNotify => return Ok(0),
                    alert => return Err(trouble(&rustls::Error::AlertReceived(alert))),
                },
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(meaning(error)),
            }
        }
    }
}

/// What an error of a socket means whose keys the kernel has.
fn meaning(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EBADMSG) => trouble(&rustls::Error::DecryptError),
        Some(libc::EMSGSIZE | libc::EINVAL) => {
            io::Error::new(io::ErrorKind::InvalidData, Untrusted("does not speak TLS as it should".into()))
        }
        _ => error,
    }
}

impl Write for KernelStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Protected for KernelStream {
    fn socket(&self) -> &SharedSocket {
        &self.socket
    }

    fn peer(&self) -> &Peer {
        &self.peer
    }

    fn in_kernel(&self) -> bool {
        true
    }

    fn decrypted(&mut self) -> Option<&mut dyn Decrypted> {
        None
    }

    fn explain(&mut self, error: io::Error) -> io::Error {
        // By EIO a call that does not ask for records of TLS itself says that there is one.
        if error.raw_os_error() != Some(libc::EIO) {
            return meaning(error);
        }
        self.read(&mut [0; 64]).err().unwrap_or(io::ErrorKind::UnexpectedEof.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::crypto::cipher::AeadKey;

    /// A connection with these keys in both directions.
    fn end(connected: TcpStream, secrets: impl Fn() -> ConnectionTrafficSecrets) -> KernelStream {
        let socket = SharedSocket::from(Socket::from(connected));
        assert!(prepare(&socket));
        let secrets = ExtractedSecrets { tx: (3, secrets()), rx: (3, secrets()) };
        let peer = Peer { name: "x".into(), certificate: Vec::new(), cipher: String::new() };
        KernelStream::new(socket, &secrets, peer).unwrap()
    }

    /// Both ends of a connection.
    fn pair(secrets: impl Fn() -> ConnectionTrafficSecrets) -> [KernelStream; 2] {
        in_kernel().unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        [near, listener.accept().unwrap().0].map(|connected| end(connected, &secrets))
    }

    fn aes_256() -> ConnectionTrafficSecrets {
        ConnectionTrafficSecrets::Aes256Gcm { key: AeadKey::from([5; 32]), iv: Iv::from([6; 12]) }
    }

    /// Sends a record of some type.
    fn send_record(stream: &KernelStream, kind: u8, content: &[u8]) {
        let mut control = [0u64; 4];
        let mut part = libc::iovec { iov_base: content.as_ptr().cast_mut().cast(), iov_len: content.len() };
        // SAFETY: an all-zero msghdr is a valid empty one.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: arithmetic only.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(1) } as _;
        // SAFETY: the control buffer is aligned for a head, and has room for it and a byte.
        unsafe {
            let head = &mut *libc::CMSG_FIRSTHDR(&message);
            head.cmsg_level = libc::SOL_TLS;
            head.cmsg_type = libc::TLS_SET_RECORD_TYPE;
            head.cmsg_len = libc::CMSG_LEN(1) as _;
            *libc::CMSG_DATA(head) = kind;
        }
        // SAFETY: the kernel only reads both buffers, which outlive the call.
        let sent = unsafe { libc::sendmsg(stream.socket.as_raw_fd(), &message, 0) };
        assert_eq!(sent, content.len() as isize, "{}", io::Error::last_os_error());
    }

    #[test]
    fn a_kernel_that_cannot_is_told_from_one_that_is_not_asked() {
        match in_kernel() {
            Ok(()) => assert!(fs_has_tls()),
            Err(KernelError::Missing) => assert!(!fs_has_tls()),
            Err(other) => panic!("{other}"),
        }
    }

    fn fs_has_tls() -> bool {
        let list = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_ulp").unwrap_or_default();
        list.split_whitespace().any(|name| name == "tls")
    }

    #[test]
    #[ignore = "needs TLS in the kernel: ci/rdma runs it in the lab"]
    fn each_cipher_carries_bytes() {
        let iv = || Iv::from([6; 12]);
        let ciphers: [fn(AeadKey, Iv) -> ConnectionTrafficSecrets; 2] = [
            |key, iv| ConnectionTrafficSecrets::Aes256Gcm { key, iv },
            |key, iv| ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv },
        ];
        for cipher in ciphers {
            let [mut near, mut far] = pair(|| cipher(AeadKey::from([5; 32]), iv()));
            for length in [1, 100_000] {
                let sent: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(length).collect();
                let mut got = vec![0; length];
                near.write_all(&sent).unwrap();
                far.read_exact(&mut got).unwrap();
                assert!(got == sent, "{length} bytes");
            }
        }
    }

    #[test]
    #[ignore = "needs TLS in the kernel: ci/rdma runs it in the lab"]
    fn what_tls_has_to_say_is_understood() {
        let end = [1, u8::from(AlertDescription::CloseNotify)];
        let changed = [2, u8::from(AlertDescription::BadRecordMac)];
        let plain = |stream: &KernelStream| (&*stream.socket).read(&mut [0; 8]).unwrap_err();
        for (kind, content, told) in
            [(ALERT, end, None), (ALERT, changed, Some("BadRecordMac")), (22, [24, 0], Some("change keys"))]
        {
            // To whoever asks, behind what was sent before; and to whoever has not asked, and then does.
            let [mut near, mut far] = pair(aes_256);
            near.write_all(b"x").unwrap();
            send_record(&near, kind, &content);
            assert_eq!(far.read(&mut [0; 8]).unwrap(), 1);
            let met = plain(&far);
            let meant = far.explain(met);
            match told {
                None => assert_eq!(meant.kind(), io::ErrorKind::UnexpectedEof),
                Some(told) => assert!(meant.to_string().contains(told), "{meant}"),
            }
            send_record(&near, kind, &content);
            match (far.read(&mut [0; 8]), told) {
                (Ok(0), None) => {}
                (Err(error), Some(told)) => assert!(error.to_string().contains(told), "{error}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    #[ignore = "needs TLS in the kernel: ci/rdma runs it in the lab"]
    fn what_was_changed_on_the_way_is_no_content() {
        in_kernel().unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut line = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut far = end(listener.accept().unwrap().0, aes_256);
        let forged = [&[DATA, 3, 3, 0, 40][..], &[1; 40]].concat();
        line.write_all(&forged).unwrap();
        let error = far.read(&mut [0; 64]).unwrap_err();
        assert!(error.to_string().contains("changed on the way"), "{error}");
    }
}
