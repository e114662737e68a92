//! What TLS costs beside the same without it, and how much it has to cost.
//!
//! Sealing a byte at the source and opening it at the destination takes processor time in addition to what
//! the move takes without TLS. Let a plain move take `t` seconds per GiB, and `c` processor seconds per GiB
//! of both sides together; let one processor need `s` seconds to seal a GiB and `o` to open it. Then `n`
//! processors that share all of this evenly, and never wait, need
//!
//! ```text
//! max(t, (min(c, n t) + s + o) / n)   seconds per GiB
//! ```
//!
//! Never less than `t`: what bounds the plain move, such as a network, bounds the other as well. And no plain
//! move uses more processor time than there is while it lasts: of a destination that is populated first, `c`
//! contains populating, which the time to move does not.

use crate::record::{Encrypted, Measurement, Setup};
use crate::statistics::{Distribution, pairwise};
use migration::transport::LaneEncryption;
use serde::Deserialize;

const MIB_IN_GIB: f64 = 1024.0;

/// A plain move.
#[derive(Clone, Copy, Debug)]
struct Plain {
    /// MiB a second.
    rate: f64,
    /// Processor seconds per GiB of both sides together.
    cpu: f64,
}

/// What one processor does, in MiB a second.
#[derive(Clone, Copy, Debug)]
struct Cipher {
    sealed: f64,
    opened: f64,
}

/// The rate in MiB a second at which so many processors can move at most, if they seal and open all bytes.
fn bound(plain: Plain, cipher: Cipher, processors: usize) -> f64 {
    let n = processors as f64;
    let time = MIB_IN_GIB / plain.rate;
    let sealing_and_opening = MIB_IN_GIB / cipher.sealed + MIB_IN_GIB / cipher.opened;
    MIB_IN_GIB / time.max((plain.cpu.min(n * time) + sealing_and_opening) / n)
}

/// A contender that encrypts beside the one that does the same without, in the same rounds.
pub struct Beside {
    /// Its number.
    pub which: usize,
    /// How its lanes were encrypted, if it said so.
    pub how: Option<LaneEncryption>,
    /// The shares, or differences, of these titles; nothing where something was not measured.
    pub shares: Vec<Option<Distribution>>,
}

/// The comparisons that a measurement has.
pub struct Comparison {
    /// What is compared.
    pub titles: Vec<&'static str>,
    /// Those that encrypt.
    pub all: Vec<Beside>,
}

/// Compares those that encrypt with those that do not; `None` if none encrypts.
pub fn beside(of: &Measurement) -> Option<Comparison> {
    let shown = |id: &str| of.head.show.iter().any(|shown| shown == id);
    let (rates, delays) = (shown("migration_mib_s"), shown("blackout_ms"));
    let several = of.head.contenders.iter().filter(|setup| setup.plain.is_some()).count() > 1;
    let mut titles = Vec::new();
    if rates {
        titles.extend(["share of plain", "its bound", "share of the bound"]);
        titles.extend(several.then_some("the first : this"));
    }
    if delays {
        titles.extend(["set-up, ms more", "blackout, ms more", "felt, ms more"]);
    }
    let mut all: Vec<Beside> = Vec::new();
    for (which, setup) in of.head.contenders.iter().enumerate() {
        let Some(plain) = &setup.plain else { continue };
        let same = |other: &Setup| other.group == setup.group && other.who == *plain;
        let Some(plain) = of.head.contenders.iter().position(same) else { continue };
        let mut shares = Vec::new();
        if rates {
            let rate = of.column(which, "migration_mib_s");
            let (plain_rate, bounds) = (of.column(plain, "migration_mib_s"), bounds(of, plain));
            shares.extend([
                pairwise(&rate, &plain_rate),
                pairwise(&bounds, &plain_rate),
                pairwise(&rate, &bounds),
            ]);
            shares.extend(several.then(|| {
                first_in(of, which).and_then(|first| pairwise(&of.column(first, "migration_mib_s"), &rate))
            }));
        }
        if delays {
            let more = |id| differences(&of.column(which, id), &of.column(plain, id));
            shares.extend(["setup_ms", "blackout_ms", "felt_ms"].map(more));
        }
        all.push(Beside { which, how: how(of, which), shares });
    }
    (!all.is_empty()).then_some(Comparison { titles, all })
}

/// The comparisons, for programs.
pub fn summary(of: &Measurement) -> Vec<Encrypted> {
    let Some(Comparison { titles, all }) = beside(of) else { return Vec::new() };
    let named = |Beside { which, shares, .. }: Beside| {
        let shares = titles.iter().zip(shares).filter_map(|(title, share)| Some((title.to_string(), share?)));
        Encrypted { contender: which, shares: shares.collect() }
    };
    all.into_iter().map(named).collect()
}

/// The first contender of the same group that encrypts, which is ours, if it is another one.
fn first_in(of: &Measurement, which: usize) -> Option<usize> {
    let setups = &of.head.contenders;
    let first = setups.iter().position(|it| it.plain.is_some() && it.group == setups[which].group)?;
    (first != which).then_some(first)
}

/// The bound of each round, of the plain contender's run and the processors in that round.
fn bounds(of: &Measurement, plain: usize) -> Vec<Option<f64>> {
    let group = &of.head.contenders[plain].group;
    let column = |which, id| of.column(which, id);
    let ciphers = (0..of.head.contenders.len()).filter(|which| of.head.contenders[*which].group == *group);
    let cipher = |id| ciphers.clone().map(|which| column(which, id)).find(|c| c.iter().any(Option::is_some));
    let (Some(sealed), Some(opened)) = (cipher("sealed_mib_s"), cipher("opened_mib_s")) else {
        return Vec::new();
    };
    let rate = column(plain, "migration_mib_s");
    let cpu = ["source_cpu_s_per_gib", "target_cpu_s_per_gib"].map(|id| column(plain, id));
    let of_round = |round: usize| {
        let plain = Plain { rate: rate[round]?, cpu: cpu[0][round]? + cpu[1][round]? };
        let cipher = Cipher { sealed: sealed[round]?, opened: opened[round]? };
        Some(bound(plain, cipher, of.head.facts.cpus))
    };
    (0..rate.len()).map(of_round).collect()
}

/// What one is more than the other in the same round.
fn differences(one: &[Option<f64>], other: &[Option<f64>]) -> Option<Distribution> {
    Distribution::of(one.iter().zip(other).filter_map(|(one, other)| Some((*one)? - (*other)?)))
}

/// How the lanes of the contender's last run were encrypted.
fn how(of: &Measurement, which: usize) -> Option<LaneEncryption> {
    let run = of.completed().filter(|run| run.contender == which).last()?;
    LaneEncryption::deserialize(run.said.get("lanes")?.get(0)?.get("encryption")?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures;
    use crate::record::tests::measurement;

    fn share(rate: f64, cpu: f64, cipher: f64, processors: usize) -> f64 {
        bound(Plain { rate, cpu }, Cipher { sealed: cipher, opened: cipher }, processors) / rate
    }

    #[test]
    fn processors_that_are_all_busy_seal_and_open_in_addition() {
        // A GiB takes half a second of both processors; sealing and opening it takes as much again.
        assert_eq!(share(2048.0, 1.0, 2048.0, 2), 0.5);
        // Sealing is twice as slow as opening: 1 + 0.5 + 0.25 processor seconds of two processors.
        let cipher = Cipher { sealed: 2048.0, opened: 4096.0 };
        assert_eq!(bound(Plain { rate: 2048.0, cpu: 1.0 }, cipher, 2), 1024.0 / 0.875);
    }

    #[test]
    fn processors_to_spare_encrypt_for_nothing() {
        // A network lets a GiB pass in a second; that takes 0.2 processor seconds, and 0.5 more with TLS.
        assert_eq!(share(1024.0, 0.2, 4096.0, 2), 1.0);
        assert_eq!(share(1024.0, 0.2, 4096.0, 1), 1.0);
        // But not where one processor has to do 1.2 seconds' work.
        assert_eq!(share(1024.0, 0.2, 2048.0, 1), 1.0 / 1.2);
    }

    #[test]
    fn populating_before_the_move_does_not_make_the_bound_lower() {
        // Two processors cannot have worked for more than a second in half a second.
        assert_eq!(share(2048.0, 1.7, 2048.0, 2), 0.5);
    }

    /// Two rounds: the plain one, the one with TLS, and what a processor seals and opens.
    fn measured() -> Measurement {
        let columns: [(&str, &str, &[f64]); 3] =
            [("g", "us", &[2048.0, 1024.0]), ("g", "us, TLS", &[768.0, 460.8]), ("g", "AES", &[])];
        let mut m = measurement("migration_mib_s", &columns);
        m.head.facts.cpus = 2;
        m.head.contenders[1].plain = Some("us".into());
        for run in &mut m.runs {
            let busy = 2.0 * 1024.0 / run.figures["migration_mib_s"];
            let each = ["source_cpu_s_per_gib", "target_cpu_s_per_gib"].map(|id| (id, Some(busy / 2.0)));
            run.figures.extend(figures::named(each));
        }
        for round in 0..2 {
            let mut run = m.runs[0].clone();
            (run.round, run.contender) = (round, 2);
            run.figures = figures::named(["sealed_mib_s", "opened_mib_s"].map(|id| (id, Some(2048.0))));
            m.runs.push(run);
        }
        m
    }

    #[test]
    fn shares_are_taken_within_a_round() {
        let mut m = measured();
        m.runs[1].said = serde_json::json!({ "lanes": [{ "encryption": "tls-in-kernel" }] });
        let Comparison { titles, all } = beside(&m).unwrap();
        let [Beside { which: 1, how: None, shares }] = &all[..] else { panic!("the last run did not say") };
        assert_eq!((titles.len(), shares.len()), (3, 3));
        let of = |at: usize| shares[at].as_ref().map(|share| (share.min, share.max));
        // Half of plain is possible in the first round, two thirds in the second.
        assert_eq!((of(0), of(1)), (Some((0.375, 0.45)), Some((0.5, 2.0 / 3.0))));
        let reached = of(2).unwrap();
        assert!((reached.0 - 0.675).abs() < 1e-9 && (reached.1 - 0.75).abs() < 1e-9, "{reached:?}");
        m.runs[3].said = m.runs[1].said.take();
        assert_eq!(beside(&m).unwrap().all[0].how, Some(LaneEncryption::TlsInKernel));
    }

    #[test]
    fn without_the_processors_rate_there_is_no_bound_and_without_tls_nothing() {
        let mut m = measured();
        m.runs.retain(|run| run.contender != 2);
        let shares = &beside(&m).unwrap().all[0].shares;
        assert!(shares[0].is_some() && shares[1].is_none() && shares[2].is_none());
        m.head.contenders[1].plain = None;
        assert!(beside(&m).is_none());
    }

    #[test]
    fn those_that_encrypt_are_compared_with_the_first_of_them() {
        let mut m = measured();
        let rows = |m: &Measurement| -> Vec<Vec<String>> {
            summary(m).into_iter().map(|it| it.shares.into_keys().collect()).collect()
        };
        assert_eq!(rows(&m), [["its bound", "share of plain", "share of the bound"]]);
        // The last contender moves a guest as well, half as fast.
        m.head.contenders[2].plain = Some("us".into());
        for run in &mut m.runs[4..] {
            let ours = [768.0, 460.8][run.round as usize];
            run.figures.insert("migration_mib_s".into(), ours / 2.0);
        }
        let compared = summary(&m);
        assert_eq!((compared[0].contender, compared[1].contender), (1, 2));
        assert!(!compared[0].shares.contains_key("the first : this"));
        let ratio = &compared[1].shares["the first : this"];
        assert_eq!((ratio.min, ratio.max), (2.0, 2.0));
    }

    #[test]
    fn delays_are_told_by_their_difference() {
        let columns: [(&str, &str, &[f64]); 2] =
            [("g", "us", &[10.0, 20.0]), ("g", "us, TLS", &[12.0, 21.0])];
        let mut m = measurement("setup_ms", &columns);
        m.head.show.push("blackout_ms".into());
        m.head.contenders[1].plain = Some("us".into());
        let Comparison { titles, all } = beside(&m).unwrap();
        let more = all[0].shares[0].as_ref().unwrap();
        assert_eq!((titles[0], more.min, more.max), ("set-up, ms more", 1.0, 2.0));
        assert_eq!(all[0].shares[1], None, "the blackout was not measured");
    }
}
