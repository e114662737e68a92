//! How large a guest may be that a host takes in, what it may have, and what it may be called.
//!
//! All of it comes from a peer. So it is compared with the host's limits before anything is built.

use crate::description::Description;
use crate::error::Error;
use crate::machine::check_name;
use crate::virtio::DeviceConfig;
use std::fmt;
use std::str::FromStr;

/// vCPUs that a guest may have for each processor of the host, unless the host's operator says otherwise.
const VCPUS_PER_PROCESSOR: u32 = 8;

/// The most that a guest may have which arrives. Nothing limits what is `None`, but for what the host has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory. What the machine keeps to boot from may be as much beside it. The host must have all
    /// of it available in any case.
    pub memory: Option<u64>,
    /// vCPUs. Without a limit of its own a host takes eight for each of its processors.
    pub vcpus: Option<u32>,
    /// Disks.
    pub disks: Option<usize>,
    /// Network interfaces.
    pub nics: Option<usize>,
    /// Entropy devices.
    pub rngs: Option<usize>,
    /// Consoles, the serial port aside.
    pub consoles: Option<usize>,
    /// What it may be called; anything if there is no pattern.
    pub names: Vec<NamePattern>,
}

impl Limits {
    /// Refuses what exceeds a limit. All limits that are exceeded are told in one sentence.
    pub(crate) fn check(&self, guest: &Description) -> Result<(), Error> {
        let mut exceeded = self.exceeded(guest.name(), guest.memory(), guest.vcpus());
        let count = |is: fn(&DeviceConfig) -> bool| guest.devices().iter().filter(|d| is(d)).count() as u64;
        let devices = [
            ("disks", count(|d| matches!(d, DeviceConfig::Block(_))), self.disks),
            ("network interfaces", count(|d| matches!(d, DeviceConfig::Net(_))), self.nics),
            ("entropy devices", count(|d| matches!(d, DeviceConfig::Rng)), self.rngs),
            ("consoles", count(|d| matches!(d, DeviceConfig::Console)), self.consoles),
        ];
        for (what, has, most) in devices {
            match most {
                Some(most) if has > most as u64 => {
                    exceeded.push(format!("it has {has} {what}, of which at most {most} are allowed"));
                }
                _ => {}
            }
        }
        refuse(exceeded)
    }

    /// The same of a machine that is not built yet, by what there is to be known of it: its name, bytes of
    /// memory, and vCPUs.
    ///
    /// # Errors
    /// [`Error::Limits`].
    pub fn check_plan(&self, name: &str, memory: u64, vcpus: u32) -> Result<(), Error> {
        refuse(self.exceeded(name, memory, vcpus))
    }

    fn exceeded(&self, name: &str, memory: u64, vcpus: u32) -> Vec<String> {
        let mut exceeded = Vec::new();
        match self.memory {
            Some(most) if memory > most => exceeded.push(format!(
                "it has {} of memory, of which at most {} are allowed",
                mib(memory, u64::div_ceil),
                mib(most, |bytes, unit| bytes / unit)
            )),
            _ => {}
        }
        let most = self.most_vcpus();
        if vcpus > most {
            exceeded.push(format!("it has {vcpus} vCPUs, of which at most {most} are allowed"));
        }
        if !self.names.is_empty() && !self.names.iter().any(|pattern| pattern.stands_for(name)) {
            let names: Vec<_> = self.names.iter().map(ToString::to_string).collect();
            exceeded.push(format!("its name is {name}, and only {} may come", names.join(", ")));
        }
        exceeded
    }

    fn most_vcpus(&self) -> u32 {
        self.vcpus.unwrap_or_else(|| {
            let processors = std::thread::available_parallelism().map_or(1, usize::from);
            u32::try_from(processors).unwrap_or(u32::MAX).saturating_mul(VCPUS_PER_PROCESSOR)
        })
    }
}

fn refuse(exceeded: Vec<String>) -> Result<(), Error> {
    if exceeded.is_empty() { Ok(()) } else { Err(Error::Limits { exceeded: exceeded.join("; ") }) }
}

fn mib(bytes: u64, divide: fn(u64, u64) -> u64) -> String {
    format!("{} MiB", divide(bytes, 1 << 20))
}

/// Names of machines: one as it is written, in which each `*` stands for any text, also for none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamePattern(String);

/// Why a text is no [`NamePattern`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} stands for no machine's name: write a name such as web1, or a part of one with *, such as web*"
)]
pub struct NamePatternError(String);

impl FromStr for NamePattern {
    type Err = NamePatternError;

    fn from_str(text: &str) -> Result<Self, NamePatternError> {
        check_name(text).map_err(|_| NamePatternError(text.into()))?;
        Ok(NamePattern(text.into()))
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl NamePattern {
    /// Whether this is one of the names.
    pub fn stands_for(&self, name: &str) -> bool {
        let Some((start, rest)) = self.0.split_once('*') else { return self.0 == name };
        let Some(mut name) = name.strip_prefix(start) else { return false };
        // The last part ends the name. Of the others, the first place where one fits is as good as any.
        let (middle, end) = rest.rsplit_once('*').unwrap_or(("", rest));
        for part in middle.split('*') {
            let Some((_, after)) = name.split_once(part) else { return false };
            name = after;
        }
        name.ends_with(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_text() {
        let stands = |pattern: &str, name: &str| pattern.parse::<NamePattern>().unwrap().stands_for(name);
        for (pattern, name) in [
            ("web1", "web1"),
            ("web*", "web"),
            ("web*", "web12"),
            ("*", "anything at all"),
            ("*-db", "eu-db"),
            ("a*b*c", "abc"),
            ("a*b*c", "axbxbxc"),
            ("*b*", "abc"),
            ("**", "x"),
            ("é*", "été"),
        ] {
            assert!(stands(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("web1", "web10"),
            ("web1", "Web1"),
            ("web*", "aweb1"),
            ("*-db", "eu-db2"),
            ("a*b*c", "acb"),
            // Nothing counts twice.
            ("ab*ba", "aba"),
            ("a*b*b", "ab"),
        ] {
            assert!(!stands(pattern, name), "{pattern} {name}");
        }
        for wrong in ["", "a\nb"] {
            assert!(wrong.parse::<NamePattern>().unwrap_err().to_string().contains("web*"));
        }
    }
}
