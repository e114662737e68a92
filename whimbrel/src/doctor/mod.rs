//! What this host can do for a virtual machine of a given size, what it lacks, and how to provide that.

mod cgroup;
pub mod clock;
pub mod pair;
mod rdma;

use migration::memory::making_huge_pages_hides_memory;
use serde::Serialize;
use std::fs;
use transport_tcp::tls::{self, KernelError};
use vmm::host::Host;
use vmm::memory::host::available;
use vmm::memory::thp;
use vmm::sandbox;
use vmm::virtio::block;

/// How a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// As it should be.
    Good,
    /// It works, but slower or with less than it could.
    Limited,
    /// Machines cannot run or be moved.
    Broken,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub what: &'static str,
    /// What it means.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// The command or change that mends it.
    pub mend: Option<String>,
}

/// Examines this host for a machine of `memory` bytes.
pub fn examine(memory: u64) -> Vec<Finding> {
    let mut findings = vec![kvm(), ram(memory)];
    findings.extend(cgroup::examine(memory));
    findings.extend([
        seccomp(),
        landlock(),
        io_uring(),
        socket_buffers(),
        ktls(tls::in_kernel()),
        shmem_huge_pages(),
        cpus(),
    ]);
    findings.extend(rdma::examine(memory));
    findings
}

fn good(what: &'static str, found: String) -> Finding {
    Finding { what, level: Level::Good, found, mend: None }
}

fn limited(what: &'static str, found: String, mend: Option<String>) -> Finding {
    Finding { what, level: Level::Limited, found, mend }
}

fn kvm() -> Finding {
    match Host::open() {
        Ok(host) => good("KVM", format!("/dev/kvm works, up to {} vCPUs", host.most_vcpus())),
        Err(error) => Finding {
            what: "KVM",
            level: Level::Broken,
            found: error.to_string(),
            mend: Some(
                "modprobe kvm_intel || modprobe kvm_amd; usermod -aG kvm $USER; enable virtualisation in the firmware"
                    .into(),
            ),
        },
    }
}

fn ram(memory: u64) -> Finding {
    let mib = |bytes: u64| bytes >> 20;
    match available() {
        Some(free) if free >= memory => {
            good("memory", format!("{} MiB available for {} MiB", mib(free), mib(memory)))
        }
        Some(free) => Finding {
            what: "memory",
            level: Level::Broken,
            found: format!("{} MiB available, {} MiB wanted", mib(free), mib(memory)),
            mend: Some("free memory, or choose a smaller machine".into()),
        },
        None => Finding {
            what: "memory",
            level: Level::Limited,
            found: "/proc/meminfo does not say what is available".into(),
            mend: Some("mount -t proc proc /proc".into()),
        },
    }
}

fn seccomp() -> Finding {
    match sandbox::available() {
        Ok(()) => good("seccomp", "system calls can be filtered".into()),
        Err(error) => Finding {
            what: "seccomp",
            level: Level::Limited,
            found: format!("system calls cannot be filtered ({error}): machines run only with --seccomp off"),
            mend: Some("a kernel with CONFIG_SECCOMP_FILTER".into()),
        },
    }
}

fn landlock() -> Finding {
    match sandbox::landlock() {
        Ok(version) => good(
            "Landlock",
            format!("version {version}: a machine's process can open only the files it needs"),
        ),
        Err(error) => limited(
            "Landlock",
            format!("missing ({error}): a machine's process can open all files of its user"),
            Some("a kernel with CONFIG_SECURITY_LANDLOCK, and landlock in its parameter lsm=".into()),
        ),
    }
}

fn io_uring() -> Finding {
    match block::io_uring() {
        Ok(()) => good("io_uring", "disks carry out several requests at a time".into()),
        Err(error) => Finding {
            what: "io_uring",
            level: Level::Limited,
            found: format!("refused ({error}): each queue of a disk carries out one request at a time"),
            mend: Some(
                "sysctl -w kernel.io_uring_disabled=0; in a container, allow its three system calls".into(),
            ),
        },
    }
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The kernel caps what a program may ask for; below a megabyte a fast link with some distance
/// cannot be kept full by one stream.
fn socket_buffers() -> Finding {
    const WANTED: u64 = 1 << 20;
    let path = "/proc/sys/net/core/wmem_max";
    match number(path) {
        Some(max) if max >= WANTED => good("socket buffers", format!("up to {} KiB", max >> 10)),
        Some(max) => Finding {
            what: "socket buffers",
            level: Level::Limited,
            found: format!("at most {} KiB may be set; the kernel's own tuning is used instead", max >> 10),
            mend: Some("sysctl -w net.core.wmem_max=4194304 net.core.rmem_max=4194304".into()),
        },
        None => Finding {
            what: "socket buffers",
            level: Level::Limited,
            found: format!("{path} cannot be read"),
            mend: None,
        },
    }
}

/// Tried, as each machine's process tries it.
fn ktls(tried: Result<(), KernelError>) -> Finding {
    let what = "TLS in the kernel";
    match tried {
        Ok(()) => good(what, "memory over TCP is encrypted without a copy by the source".into()),
        Err(why) => {
            let missing = matches!(why, KernelError::Missing);
            let mend = missing.then(|| "modprobe tls; echo tls > /etc/modules-load.d/tls.conf".into());
            limited(what, format!("{why}: memory over TCP is encrypted in user space"), mend)
        }
    }
}

/// What the host's setting gives to guest memory, which is always advised; and, where that is nothing at
/// first, whether huge pages can be made of it later, which is tried.
fn shmem_huge_pages() -> Finding {
    const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let setting = fs::read_to_string(SETTING).unwrap_or_default();
    let chosen = setting.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
    // Whatever the setting is.
    if let (Some(setting), true) = (chosen, making_huge_pages_hides_memory()) {
        let found = format!("{setting}: guest memory gets none ({})", vmm::memory::Error::HidesMemory);
        return limited("huge pages for guests", found, Some("run Linux 6.4 or later".into()));
    }
    huge_pages(chosen, || thp::try_collapse().map_err(|error| error.to_string()), SETTING)
}

fn huge_pages(setting: Option<&str>, collapse: impl FnOnce() -> Result<(), String>, path: &str) -> Finding {
    let what = "huge pages for guests";
    let Some(setting) = setting else {
        return limited(what, "this kernel has no transparent huge pages for shared memory".into(), None);
    };
    let at_once = match setting {
        "advise" => "guest memory gets them when it is first touched or populated",
        "always" | "within_size" | "force" => {
            "guest memory gets them when it is first touched, populated or received"
        }
        _ => {
            let later = match collapse() {
                Ok(()) => "populated memory gets them at once, other memory in the background".into(),
                Err(why) => format!("guest memory gets none ({why})"),
            };
            return limited(what, format!("{setting}: {later}"), Some(format!("echo advise > {path}")));
        }
    };
    good(what, format!("{setting}: {at_once}"))
}

fn cpus() -> Finding {
    match std::thread::available_parallelism() {
        Ok(n) => good("processors", format!("{n} may be used; each TCP stream can keep one busy")),
        Err(error) => {
            Finding { what: "processors", level: Level::Limited, found: error.to_string(), mend: None }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_tls_can_be_given_it() {
        let finding = ktls(Err(KernelError::Missing));
        assert!(finding.level == Level::Limited && finding.found.contains("user space"), "{finding:?}");
        assert!(finding.mend.unwrap().starts_with("modprobe tls"));
        assert!(ktls(Err(KernelError::Unfit("x".into()))).mend.is_none());
        assert_eq!(ktls(Ok(())).level, Level::Good);
    }

    #[test]
    fn each_setting_for_huge_pages_is_told_by_what_it_gives() {
        let can = || Ok(());
        for setting in ["advise", "always", "within_size", "force"] {
            let finding = huge_pages(Some(setting), || unreachable!(), "/path");
            assert!(finding.level == Level::Good && finding.mend.is_none(), "{finding:?}");
            assert!(finding.found.starts_with(setting), "{finding:?}");
        }
        for setting in ["never", "deny"] {
            let finding = huge_pages(Some(setting), can, "/path");
            assert_eq!(
                (finding.level, finding.mend.as_deref()),
                (Level::Limited, Some("echo advise > /path"))
            );
            assert!(finding.found.contains("in the background"), "{finding:?}");
            let finding = huge_pages(Some(setting), || Err("no way".into()), "/path");
            assert!(finding.found.contains("none (no way)"), "{finding:?}");
        }
        assert_eq!(huge_pages(None, can, "/path").mend, None);
    }
}
