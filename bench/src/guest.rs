//! The guest that is moved: the content of its memory, and what it does while it moves.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The content of a guest's memory before it moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Content {
    /// Next to nothing: most pages do not exist.
    Untouched,
    /// Zeros, in pages that exist.
    Zero,
    /// Eight bytes repeated over a page, and others over the next page: the best case for a compressor.
    Repeating,
    /// Random bytes, which nothing compresses.
    Random,
}

/// A guest to move.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Guest {
    /// Memory in bytes.
    pub memory: u64,
    /// The content of its memory.
    pub content: Content,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Bytes that it keeps rewriting; 0 for an idle guest.
    pub working_set: u64,
    /// Pages that it rewrites each second; 0 for as many as it can.
    pub rate: u64,
    /// Timer interrupts a second on each vCPU; `None` for its default.
    pub timer_hz: Option<u32>,
}

impl Guest {
    /// An idle guest with one vCPU.
    pub fn idle(memory: u64, content: Content) -> Self {
        Guest { memory, content, vcpus: 1, working_set: 0, rate: 0, timer_hz: None }
    }

    /// Its options on the command line of `whimbrel run`.
    pub fn options(&self) -> Vec<String> {
        let (fill, content) = match self.content {
            Content::Untouched => (0, "random"),
            Content::Zero => (self.memory, "zero"),
            Content::Repeating => (self.memory, "repeating"),
            Content::Random => (self.memory, "random"),
        };
        let options = [
            ("--memory", self.memory),
            ("--vcpus", self.vcpus.into()),
            ("--working-set", self.working_set),
            ("--rate", self.rate),
            ("--fill", fill),
        ];
        let timer = self.timer_hz.map(|hz| ("--timer-hz", hz.into()));
        let options = options.into_iter().chain(timer);
        let options = options.flat_map(|(name, value)| [name.to_string(), value.to_string()]);
        options.chain(["--fill-with", content].map(String::from)).collect()
    }
}

/// A number of bytes in the largest unit that gives a whole number.
pub fn size(bytes: u64) -> String {
    [(30, "GiB"), (20, "MiB"), (10, "KiB")]
        .into_iter()
        .find(|(shift, _)| bytes != 0 && bytes.trailing_zeros() >= *shift)
        .map_or(format!("{bytes} B"), |(shift, unit)| format!("{} {unit}", bytes >> shift))
}

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let content = match self.content {
            Content::Untouched => "untouched",
            Content::Zero => "zero",
            Content::Repeating => "repeating",
            Content::Random => "random",
        };
        let plural = if self.vcpus == 1 { "" } else { "s" };
        write!(f, "{} {content}, {} vCPU{plural}, ", size(self.memory), self.vcpus)?;
        match (self.working_set, self.rate) {
            (0, _) => write!(f, "idle"),
            (working_set, 0) => write!(f, "rewrites {}", size(working_set)),
            (working_set, rate) => write!(f, "rewrites {rate} pages/s of {}", size(working_set)),
        }?;
        self.timer_hz.map_or(Ok(()), |hz| write!(f, ", timer at {hz} Hz"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_described() {
        let idle = Guest::idle(8 << 30, Content::Untouched);
        assert_eq!(idle.to_string(), "8 GiB untouched, 1 vCPU, idle");
        let busy =
            Guest { vcpus: 2, working_set: 64 << 20, rate: 0, ..Guest::idle(1536 << 20, Content::Random) };
        assert_eq!(busy.to_string(), "1536 MiB random, 2 vCPUs, rewrites 64 MiB");
        let paced = Guest { rate: 2621, ..busy };
        assert!(paced.to_string().ends_with("rewrites 2621 pages/s of 64 MiB"));
        let calm = Guest { timer_hz: Some(100), ..idle };
        assert!(calm.to_string().ends_with("idle, timer at 100 Hz"));
        assert!(calm.options().windows(2).any(|pair| pair == ["--timer-hz", "100"]));
        assert_eq!((size(0), size(1500)), ("0 B".into(), "1500 B".into()));
    }

    #[test]
    fn only_content_fills_memory() {
        let fill = |content| {
            let options = Guest::idle(1 << 30, content).options();
            let value =
                |name| options.iter().position(|o| o == name).map(|at| options[at + 1].clone()).unwrap();
            (value("--fill"), value("--fill-with"))
        };
        assert_eq!(fill(Content::Untouched).0, "0");
        assert_eq!(fill(Content::Zero), ("1073741824".into(), "zero".into()));
        assert_eq!(fill(Content::Random), ("1073741824".into(), "random".into()));
    }
}
