//! Which files a process may still open, by Landlock: those that it has not opened yet and may come to need.
//!
//! A kernel without Landlock restricts nothing, and an older one less: both are no error, since the other
//! restrictions hold all the same.

use super::{Error, Needs};
use landlock::{
    ABI, Access, AccessFs, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetError, Scope, make_bitflags,
};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

/// The newest version whose kinds of access are known here.
const KNOWN: ABI = ABI::V6;

/// What may be read at any time: what the kernel says of this host and this process; the libraries of RDMA
/// devices and of name resolution, which are loaded when they are needed, and their settings, which change.
const READ: &[&str] = &[
    "/proc",
    "/sys",
    "/etc",
    "/usr",
    "/lib",
    "/lib64",
    "/nix/store",
    "/gnu/store",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/NetworkManager",
    "/dev/random",
    "/dev/urandom",
];

/// What may be read and written at any time: devices of RDMA are opened when a migration begins.
const WRITE: &[&str] = &["/dev/null", "/dev/infiniband"];

/// Where taps are opened.
const TUN: &str = "/dev/net/tun";

const READING: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | ReadDir});
const WRITING: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev});
const MAKING: BitFlags<AccessFs> = make_bitflags!(AccessFs::{MakeReg | WriteFile | Truncate});
const SOCKETS: BitFlags<AccessFs> = make_bitflags!(AccessFs::{MakeSock | RemoveFile});

/// Restricts this thread, and those that it starts from now on, to what `needs` names and to what any machine
/// needs.
pub fn restrict(needs: &Needs) -> Result<(), Error> {
    let mut rules = ruleset()?;
    for path in READ {
        rules = allow(rules, Path::new(path), READING)?;
    }
    for path in &needs.read {
        rules = allow(rules, path, READING)?;
    }
    for path in WRITE {
        rules = allow(rules, Path::new(path), WRITING)?;
    }
    for path in &needs.write {
        rules = allow(rules, path, WRITING)?;
    }
    for folder in &needs.make {
        rules = allow(rules, folder, MAKING)?;
    }
    if needs.taps {
        rules = allow(rules, Path::new(TUN), WRITING)?;
    }
    for folder in &needs.sockets {
        rules = allow(rules, folder, SOCKETS)?;
    }
    // A terminal, or a file in its place, is opened a second time when a guest has it as its keyboard.
    if is_file(io::stdin()) {
        let place = PathBeneath::new(io::stdin(), READING | AccessFs::IoctlDev);
        // The clone stands for the same rules. What cannot be named in a rule is used as it is open already.
        let _ = rules.try_clone().map_err(Error::Limit)?.add_rule(place);
    }
    rules.restrict_self()?;
    Ok(())
}

/// Lets this thread, and those that it starts from now on, open nothing at all.
pub fn none() -> Result<(), Error> {
    ruleset()?.restrict_self()?;
    Ok(())
}

fn ruleset() -> Result<RulesetCreated, RulesetError> {
    Ruleset::default().handle_access(AccessFs::from_all(KNOWN))?.scope(Scope::from_all(KNOWN))?.create()
}

/// Allows what is at `path`, if there is anything.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        Ok(place) => rules.add_rule(PathBeneath::new(place, access)),
        // What is not there, or not for this user, is said when it is wanted.
        Err(_) => Ok(rules),
    }
}

/// Whether it is something with a place in the file system; pipes and sockets need no leave.
fn is_file(input: impl AsFd) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let file = input.as_fd().try_clone_to_owned().map(std::fs::File::from);
    file.and_then(|file| file.metadata()).is_ok_and(|metadata| {
        let kind = metadata.file_type();
        kind.is_file() || kind.is_char_device()
    })
}

/// The version of Landlock that this kernel has.
///
/// # Errors
/// The kernel's answer, if it has none.
pub fn available() -> io::Result<i64> {
    const VERSION: libc::c_ulong = 1;
    // SAFETY: with this flag the call takes no structure.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0usize, VERSION)
    };
    if version > 0 { Ok(version) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::net::UnixListener;

    #[test]
    fn only_what_is_needed_can_be_opened() {
        if let Err(error) = available() {
            return crate::virtio::net::wire::skip::skipped(format_args!("no Landlock: {error}"));
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["read", "write", "other"] {
            std::fs::write(path(name), name).unwrap();
        }
        std::fs::create_dir(path("sockets")).unwrap();
        std::fs::write(path("sockets/file"), "").unwrap();
        let needs = Needs {
            read: vec![path("read"), path("absent")],
            write: vec![path("write")],
            sockets: vec![path("sockets")],
            ..Needs::default()
        };
        let denied = |result: io::Result<File>| {
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        };
        // Only this thread is restricted.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                restrict(&needs).unwrap();
                File::open(path("read")).unwrap();
                denied(File::options().write(true).open(path("read")));
                File::options().read(true).write(true).open(path("write")).unwrap();
                denied(File::open(path("other")));
                denied(File::create(path("new")));
                drop(UnixListener::bind(path("sockets/api")).unwrap());
                std::fs::remove_file(path("sockets/api")).unwrap();
                denied(File::open(path("sockets/file")));
                File::open("/etc/hosts").unwrap();
                denied(File::options().append(true).open("/etc/hosts"));
                denied(File::open("/dev/net/tun"));
            });
            scope.spawn(|| {
                none().unwrap();
                denied(File::open("/etc/hosts"));
            });
        });
        File::open(path("other")).unwrap();
    }
}
