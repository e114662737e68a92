//! What is compared: us and the peers, each with the guest it moves.

use crate::figures::{self, Figures};
use crate::guest::{Content, Guest};
use crate::moves::{Move, Moved};
use crate::peers::{iperf3, qemu};
use crate::record::Setup;
use serde_json::Value;
use std::path::PathBuf;

/// One thing that is compared.
#[derive(Clone, Debug)]
pub enum Contender {
    /// Whimbrel.
    Whimbrel(Move),
    /// `iperf3 -Z`, which sends as many bytes as the guest has.
    Iperf3 { guest: Guest, populate: bool },
    /// A paused QEMU guest of the same size and content.
    Qemu { script: PathBuf, guest: Guest, populate: bool, multifd: u16 },
}

impl Contender {
    /// The guest that it moves, or stands beside, and whether the destination is populated first.
    pub fn guest(&self) -> (&Guest, bool) {
        match self {
            Contender::Whimbrel(plan) => (&plan.guest, plan.populate),
            Contender::Iperf3 { guest, populate } | Contender::Qemu { guest, populate, .. } => {
                (guest, *populate)
            }
        }
    }

    /// How it is called by `who`, its own name without the guest.
    pub fn setup(&self, who: String) -> Setup {
        let (guest, populate) = self.guest();
        let group = format!("{guest}{}", if populate { ", destination populated" } else { "" });
        Setup { group, who, guest: Some(guest.clone()), populate }
    }

    /// Runs it once.
    ///
    /// # Errors
    /// When it fails.
    pub fn run(&self) -> anyhow::Result<(Figures, Value)> {
        Ok(match self {
            Contender::Whimbrel(plan) => {
                let moved = plan.carry_out()?;
                (figures::of_move(&moved, plan.populate), Moved::value(&moved))
            }
            Contender::Iperf3 { guest, .. } => {
                let said = iperf3::run(guest.memory)?;
                (iperf3::figures(&said), said)
            }
            Contender::Qemu { script, guest, populate, multifd } => {
                let said = qemu::run(script, guest, *multifd, *populate)?;
                (qemu::figures(&said), said)
            }
        })
    }

    /// Memory in bytes that a run needs at once: both sides of a migration, and what their processes need beside.
    pub fn needs(&self) -> u64 {
        2 * self.guest().0.memory + (512 << 20)
    }
}

/// Peers that are measured beside us.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    /// `iperf3 -Z`.
    pub iperf3: bool,
    /// The script that moves a QEMU guest.
    pub qemu_script: Option<PathBuf>,
    /// Its multifd channels; empty for the usual ones.
    pub multifd: Vec<u16>,
}

impl Peers {
    /// The peers that can be measured beside a guest.
    ///
    /// QEMU's guest is paused and filled from outside, with random bytes or zeros, and iperf3's bytes are anything:
    /// they can stand beside idle guests of such content only.
    pub fn beside(&self, guest: &Guest, populate: bool) -> Vec<(String, Contender)> {
        let mut all = Vec::new();
        if guest.working_set != 0 || !matches!(guest.content, Content::Random | Content::Zero) {
            return all;
        }
        if self.iperf3 && guest.content == Content::Random {
            all.push(("iperf3 -Z".into(), Contender::Iperf3 { guest: guest.clone(), populate }));
        }
        if let Some(script) = &self.qemu_script {
            let usual = [if populate { 2 } else { 4 }];
            for multifd in if self.multifd.is_empty() { &usual[..] } else { &self.multifd } {
                let (script, guest) = (script.clone(), guest.clone());
                let contender = Contender::Qemu { script, guest, populate, multifd: *multifd };
                all.push((format!("QEMU, multifd {multifd}"), contender));
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_stand_beside_what_they_can_be_compared_with() {
        let peers = Peers { iperf3: true, qemu_script: Some("peer".into()), multifd: Vec::new() };
        let full = Guest::idle(1 << 30, Content::Random);
        let names = |guest: &Guest, populate| -> Vec<String> {
            peers.beside(guest, populate).into_iter().map(|(name, _)| name).collect()
        };
        assert_eq!(names(&full, true), ["iperf3 -Z", "QEMU, multifd 2"]);
        assert_eq!(names(&full, false), ["iperf3 -Z", "QEMU, multifd 4"]);
        assert!(names(&Guest { working_set: 1 << 20, ..full.clone() }, false).is_empty());
        assert!(names(&Guest { content: Content::Untouched, ..full.clone() }, false).is_empty());
        assert_eq!(names(&Guest { content: Content::Zero, ..full.clone() }, false), ["QEMU, multifd 4"]);
        let (who, contender) = peers.beside(&full, true).remove(1);
        assert_eq!(contender.setup(who).group, "1 GiB random, 1 vCPU, idle, destination populated");
    }
}
