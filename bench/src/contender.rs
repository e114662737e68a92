//! What is compared: Whimbrel and its peers, each with the guest that it moves.

use crate::cipher;
use crate::figures::Figures;
use crate::guest::{Content, Guest};
use crate::moves::Move;
use crate::peers::perftest::Perftest;
use crate::peers::{cloud_hypervisor, iperf3, qemu, qemu_program};
use crate::record::{self, Setup};
use crate::transport::client::{self, Probe};
use serde_json::Value;
use std::path::PathBuf;
use std::time::Duration;

/// A program that is compared.
#[derive(Clone, Debug)]
pub enum Contender {
    /// Whimbrel.
    Whimbrel(Move),
    /// `iperf3 -Z`, with the bytes that it sends and its streams.
    Iperf3 { bytes: u64, streams: u16 },
    /// A paused QEMU guest of the same size and content.
    Qemu { by: Qemu, guest: Guest, populate: bool, multifd: u16 },
    /// A guest of Cloud Hypervisor, which runs our own guest program.
    CloudHypervisor { binary: PathBuf, guest: Guest, populate: bool, connections: u16, tls: bool },
    /// A transport without a guest.
    Transport(Probe),
    /// `ib_write_bw` or `ib_write_lat`, with the server at this address.
    Perftest { to: String, test: Perftest },
    /// A copy of memory without any transport.
    Copy { memory: u64, time: Duration },
    /// One processor that seals and opens what TLS sends, for this long.
    Cipher { time: Duration },
}

impl Contender {
    /// Runs it once.
    ///
    /// # Errors
    /// When it fails.
    pub fn run(&self) -> anyhow::Result<(Figures, Value)> {
        Ok(match self {
            Contender::Whimbrel(plan) => {
                let moved = plan.run()?;
                (moved.figures(plan.populate), moved.value())
            }
            Contender::Iperf3 { bytes, streams } => {
                let said = iperf3::run(*bytes, *streams)?;
                (iperf3::figures(&said), said)
            }
            Contender::Qemu { by, guest, populate, multifd } => {
                let said = match by {
                    Qemu::Script(script) => qemu::run(script, guest, *multifd, *populate)?,
                    Qemu::Program { path, tls } => qemu_program::run(path, guest, *multifd, *populate, *tls)?,
                };
                (qemu::figures(&said), said)
            }
            Contender::CloudHypervisor { binary, guest, populate, connections, tls } => {
                let said = cloud_hypervisor::run(binary, guest, *connections, *populate, *tls)?;
                (cloud_hypervisor::figures(&said), said)
            }
            Contender::Transport(probe) => (probe.run()?, record::value(probe)),
            Contender::Perftest { to, test } => (client::perftest(to, test)?, record::value(test)),
            Contender::Copy { memory, time } => (client::copy(*memory, *time)?, Value::Null),
            Contender::Cipher { time } => (cipher::run(*time)?, Value::Null),
        })
    }

    /// Whether all its processes end with the run, so that their processor time is known.
    pub fn ends_with_the_run(&self) -> bool {
        !matches!(self, Contender::Transport(_) | Contender::Perftest { .. })
    }

    /// Memory in bytes that a run needs at once: both sides of a migration, and some more for their
    /// processes.
    pub fn needs(&self) -> u64 {
        let both = match self {
            Contender::Whimbrel(plan) => plan.guest.memory,
            Contender::Qemu { guest, .. } | Contender::CloudHypervisor { guest, .. } => guest.memory,
            Contender::Iperf3 { bytes, .. } => *bytes,
            Contender::Transport(Probe { terms, .. }) => terms.memory,
            Contender::Perftest { test, .. } => test.size * u64::from(test.queue_pairs),
            Contender::Copy { memory, .. } => *memory,
            Contender::Cipher { .. } => 0,
        };
        2 * both + (512 << 20)
    }

    /// Bytes of shared memory that a run fills before it moves them; 0 if it fills none.
    pub fn fills(&self) -> u64 {
        match self {
            Contender::Whimbrel(Move { guest, .. }) if guest.content != Content::Untouched => guest.memory,
            Contender::CloudHypervisor { guest, .. } if guest.content != Content::Untouched => guest.memory,
            // Its zeros are a hole in a file.
            Contender::Qemu { guest, .. } if guest.content == Content::Random => guest.memory,
            _ => 0,
        }
    }
}

/// Who moves QEMU's guest.
#[derive(Clone, Debug)]
pub enum Qemu {
    /// A script.
    Script(PathBuf),
    /// This program does, with this program of QEMU.
    Program { path: PathBuf, tls: bool },
}

/// The setup of a contender of this name that moves a guest.
pub fn setup(guest: &Guest, populate: bool, who: impl Into<String>) -> Setup {
    let group = format!("{guest}{}", if populate { ", destination populated" } else { "" });
    Setup { group, who: who.into(), guest: Some(guest.clone()), populate, plain: None }
}

/// The setup of the same contender through TLS, which is measured beside the plain one.
pub fn through_tls(plain: &Setup) -> Setup {
    Setup { who: format!("{}, TLS", plain.who), plain: Some(plain.who.clone()), ..plain.clone() }
}

/// The peers that are measured in the same run.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    /// `iperf3 -Z`.
    pub iperf3: bool,
    /// The script that moves a QEMU guest.
    pub qemu_script: Option<PathBuf>,
    /// QEMU's program.
    pub qemu: Option<PathBuf>,
    /// QEMU's multifd channels; empty for the default.
    pub multifd: Vec<u16>,
    /// Cloud Hypervisor's program.
    pub cloud_hypervisor: Option<PathBuf>,
    /// Its connections.
    pub connections: Vec<u16>,
    /// Whether to measure them through TLS as well.
    pub tls: bool,
}

impl Peers {
    /// The peers that are comparable for a guest.
    ///
    /// QEMU's guest is paused and filled from outside with random bytes or zeros, and iperf3 sends arbitrary
    /// bytes. Both are comparable with idle guests of such content only. Cloud Hypervisor runs our guest,
    /// which is filled from outside while it runs; a guest that rewrites its memory at the same time would be
    /// damaged.
    pub fn beside(&self, guest: &Guest, populate: bool) -> Vec<(Setup, Contender)> {
        let mut all = Vec::new();
        if let Some(binary) = &self.cloud_hypervisor
            && guest.content != Content::Repeating
            && (guest.working_set == 0 || guest.content == Content::Untouched)
        {
            for connections in &self.connections {
                let plural = if *connections == 1 { "" } else { "s" };
                let setup =
                    setup(guest, populate, format!("Cloud Hypervisor, {connections} connection{plural}"));
                let peer = |tls| Contender::CloudHypervisor {
                    binary: binary.clone(),
                    guest: guest.clone(),
                    populate,
                    connections: *connections,
                    tls,
                };
                all.extend(self.with_tls(setup, peer));
            }
        }
        if guest.working_set != 0 || !matches!(guest.content, Content::Random | Content::Zero) {
            return all;
        }
        if self.iperf3 && guest.content == Content::Random {
            let contender = Contender::Iperf3 { bytes: guest.memory, streams: 1 };
            all.push((setup(guest, populate, "iperf3 -Z"), contender));
        }
        if self.qemu_script.is_some() || self.qemu.is_some() {
            let usual = [if populate { 2 } else { 4 }];
            for multifd in if self.multifd.is_empty() { &usual[..] } else { &self.multifd } {
                let setup = setup(guest, populate, format!("QEMU, multifd {multifd}"));
                let peer = |by| Contender::Qemu { by, guest: guest.clone(), populate, multifd: *multifd };
                if let Some(script) = &self.qemu_script {
                    all.push((setup.clone(), peer(Qemu::Script(script.clone()))));
                }
                if let Some(path) = &self.qemu {
                    all.extend(self.with_tls(setup, |tls| peer(Qemu::Program { path: path.clone(), tls })));
                }
            }
        }
        all
    }

    /// A peer, and the same through TLS if that is wanted.
    fn with_tls(&self, plain: Setup, peer: impl Fn(bool) -> Contender) -> Vec<(Setup, Contender)> {
        let tls = through_tls(&plain);
        let mut both = vec![(plain, peer(false))];
        both.extend(self.tls.then(|| (tls, peer(true))));
        both
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_measured_where_they_are_comparable() {
        let peers = Peers { iperf3: true, qemu_script: Some("peer".into()), ..Peers::default() };
        let full = Guest::idle(1 << 30, Content::Random);
        let names = |guest: &Guest, populate| -> Vec<String> {
            peers.beside(guest, populate).into_iter().map(|(setup, _)| setup.who).collect()
        };
        assert_eq!(names(&full, true), ["iperf3 -Z", "QEMU, multifd 2"]);
        assert_eq!(names(&full, false), ["iperf3 -Z", "QEMU, multifd 4"]);
        assert!(names(&Guest { working_set: 1 << 20, ..full.clone() }, false).is_empty());
        assert!(names(&Guest { content: Content::Untouched, ..full.clone() }, false).is_empty());
        assert_eq!(names(&Guest { content: Content::Zero, ..full.clone() }, false), ["QEMU, multifd 4"]);
        let ch = Peers { cloud_hypervisor: Some("peer".into()), connections: vec![1, 4], ..Peers::default() };
        let beside = |guest: &Guest| -> Vec<String> {
            ch.beside(guest, false).into_iter().map(|(setup, _)| setup.who).collect()
        };
        let both = ["Cloud Hypervisor, 1 connection", "Cloud Hypervisor, 4 connections"];
        let busy = Guest { working_set: 1 << 20, ..full.clone() };
        assert_eq!(beside(&full), both);
        assert_eq!(beside(&Guest { content: Content::Untouched, ..busy.clone() }), both);
        assert!(beside(&busy).is_empty());
        let encrypting = Peers { iperf3: true, qemu: Some("peer".into()), tls: true, ..ch };
        let all = encrypting.beside(&full, true);
        let plain: Vec<_> =
            all.iter().map(|(setup, _)| (setup.who.as_str(), setup.plain.as_deref())).collect();
        let [one, four] = both;
        let tls = |who: &str| format!("{who}, TLS");
        let (one_tls, four_tls, qemu) = (tls(one), tls(four), "QEMU, multifd 2");
        let expected = [
            (one, None),
            (&one_tls, Some(one)),
            (four, None),
            (&four_tls, Some(four)),
            ("iperf3 -Z", None),
            (qemu, None),
            ("QEMU, multifd 2, TLS", Some(qemu)),
        ];
        assert_eq!(plain, expected);
        let (setup, _) = peers.beside(&full, true).remove(1);
        assert_eq!(setup.group, "1 GiB random, 1 vCPU, idle, destination populated");
    }
}
