//! Packets with descriptors.

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use socket2::{Domain, SockAddr, Socket, Type};
use std::fs::{File, Permissions};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

/// Longest message in bytes.
const MAX_MESSAGE: usize = 16 << 10;

/// Most descriptors with one.
pub const MAX_FILES: usize = 16;

/// How long a message may wait for the other end to read those before it.
const PATIENCE: Duration = Duration::from_secs(1);

/// Callers that wait to be accepted.
const BACKLOG: i32 = 1024;

/// A connection.
#[derive(Debug)]
pub struct Line(Socket);

impl Line {
    /// Connects to a [`Door`].
    ///
    /// # Errors
    /// When nobody is there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        socket.connect(&SockAddr::unix(path)?)?;
        Line::new(socket)
    }

    fn new(socket: Socket) -> io::Result<Self> {
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Line(socket))
    }

    /// Sends a message, with descriptors.
    ///
    /// # Errors
    /// When the other end is gone, or does not read.
    pub fn send(&self, message: &impl Serialize, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MAX_MESSAGE || files.len() > MAX_FILES {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the message is too large"));
        }
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(files));
        }
        rustix::io::retry_on_intr(|| {
            sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)
        })?;
        Ok(())
    }

    /// Waits for a message; `None` when the other end is gone.
    ///
    /// # Errors
    /// When it is none. The connection is of no use then.
    pub fn receive<M: DeserializeOwned>(&self) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)
        })?;
        let mut files = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                files.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too large"));
        }
        Ok(Some((serde_json::from_slice(&bytes[..received.bytes])?, files)))
    }
}

/// Where lines are accepted, from this user and the superuser alone.
#[derive(Debug)]
pub struct Door(Socket);

impl Door {
    /// Listens at `path`. A socket that is there already is replaced: the caller sees to it that nobody
    /// serves it.
    ///
    /// # Errors
    /// Those of making a socket.
    pub fn open(path: &Path) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        // It has its mode before it has a name.
        File::from(socket.as_fd().try_clone_to_owned()?).set_permissions(Permissions::from_mode(0o600))?;
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        socket.bind(&SockAddr::unix(path)?)?;
        socket.listen(BACKLOG)?;
        Ok(Door(socket))
    }

    /// The next one.
    ///
    /// # Errors
    /// Those of accepting a connection, and when somebody else calls.
    pub fn accept(&self) -> io::Result<Line> {
        let (socket, _) = self.0.accept()?;
        let caller = rustix::net::sockopt::socket_peercred(&socket)?.uid;
        if !caller.is_root() && caller != rustix::process::geteuid() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Line::new(socket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn lines() -> (Line, Line) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gate.sock");
        let door = Door::open(&path).unwrap();
        // One that nobody serves is replaced.
        drop(door);
        let door = Door::open(&path).unwrap();
        let here = Line::connect(&path).unwrap();
        (here, door.accept().unwrap())
    }

    #[test]
    fn messages_come_one_by_one_with_their_descriptors() {
        let (here, there) = lines();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        here.send(&"first", &[]).unwrap();
        here.send(&"second", &[theirs.as_fd()]).unwrap();
        drop((theirs, here));
        let (message, files) = there.receive::<String>().unwrap().unwrap();
        assert_eq!((message.as_str(), files.len()), ("first", 0));
        let (message, mut files) = there.receive::<String>().unwrap().unwrap();
        assert_eq!((message.as_str(), files.len()), ("second", 1));
        UnixStream::from(files.remove(0)).write_all(b"x").unwrap();
        ours.read_exact(&mut [0]).unwrap();
        assert!(there.receive::<String>().unwrap().is_none(), "the end comes after all messages");
    }

    #[test]
    fn what_is_no_message_is_told() {
        let (here, there) = lines();
        here.send(&7, &[]).unwrap();
        assert!(there.receive::<String>().is_err());
        here.0.send(&[b'x'; MAX_MESSAGE + 1]).unwrap();
        assert_eq!(there.receive::<String>().unwrap_err().kind(), io::ErrorKind::InvalidData);
        let long = "x".repeat(MAX_MESSAGE);
        assert_eq!(here.send(&long, &[]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
