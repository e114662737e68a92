//! Connections by TLS 1.3 with certificates on both sides.
//!
//! A host has a certificate, its key, and the certificates of the authorities (CAs) that it trusts: PEM files
//! of any origin. Both ends of a connection show theirs. The end that connects has been told which host it is
//! to reach, and accepts a certificate for that host only. The end that accepts takes whoever the authorities
//! vouch for, or of these only the names that it has been given ([`Pattern`]).
//!
//! Where the kernel can encrypt ([`in_kernel`]) it is given the keys of lanes, so that memory goes through
//! them as it does through plain sockets. Control links, and lanes elsewhere, are encrypted by rustls.
//!
//! Sessions of TLS are not resumed, since that would ask nobody for a certificate.
//!
//! ```no_run
//! use whimbrel_transport_tcp::tls::{Files, Renewed};
//! use whimbrel_transport_tcp::{Connector, Listener};
//! # fn example() -> Result<(), whimbrel_transport_tcp::Error> {
//! let files = Files::in_folder("/etc/whimbrel/tls".as_ref());
//! // A destination, which notices when the files are renewed.
//! let renewed = Renewed::new(files.clone(), Vec::new());
//! let listener = Listener::bind_protected(1, ([0, 0, 0, 0], 4444).into(), move || renewed.protection())?;
//! // A source.
//! let connector = Connector::new(Renewed::new(files, Vec::new()).protection()?);
//! # Ok(())
//! # }
//! ```

mod accepted;
mod credentials;
mod explain;
mod files;
mod https;
mod kernel;
mod names;
mod stream;
#[cfg(test)]
mod tests;

pub use explain::fault;
pub use files::{Files, FilesError, Renewed};
pub use https::Https;
pub use kernel::{KernelError, in_kernel};
pub use names::{Pattern, PatternError, name_of};
