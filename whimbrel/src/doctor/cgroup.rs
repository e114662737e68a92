//! The memory that this process's cgroup allows. Free memory of the host beyond that is of no use.

use super::{Finding, Level, good};
use std::fs;
use std::path::{Path, PathBuf};

/// Where cgroup v2 is mounted on every current distribution.
const ROOT: &str = "/sys/fs/cgroup";

/// Examines the limits for a machine of `memory` bytes; nothing where there is no limit.
pub(super) fn examine(memory: u64) -> Option<Finding> {
    let membership = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own_path(&membership)?;
    tightest(Path::new(ROOT), path).map(|(folder, left)| finding(&folder, left, memory))
}

/// The process's cgroup: version 2 has the line `0::PATH`.
fn own_path(membership: &str) -> Option<&str> {
    membership.lines().find_map(|line| line.strip_prefix("0::/"))
}

/// The ancestor (or the cgroup itself) that leaves least, and how many bytes that is.
fn tightest(root: &Path, path: &str) -> Option<(PathBuf, u64)> {
    let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    root.join(path)
        .ancestors()
        .take_while(|folder| folder.starts_with(root))
        .filter_map(|folder| {
            // "max", which is no number, means no limit.
            let limit = number(folder.join("memory.max"))?;
            let used = number(folder.join("memory.current")).unwrap_or(0);
            Some((folder.to_path_buf(), limit.saturating_sub(used)))
        })
        .min_by_key(|(_, left)| *left)
}

fn finding(folder: &Path, left: u64, memory: u64) -> Finding {
    let what = "memory cgroup";
    if left >= memory {
        return good(what, format!("{} MiB left for {} MiB", left >> 20, memory >> 20));
    }
    Finding {
        what,
        level: Level::Broken,
        found: format!("{} MiB left in {}, {} MiB wanted", left >> 20, folder.display(), memory >> 20),
        mend: Some(format!("raise {}", folder.join("memory.max").display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_ancestor_counts() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("slice/unit");
        fs::create_dir_all(&inner).unwrap();
        assert_eq!(tightest(root.path(), "slice/unit"), None);
        fs::write(inner.join("memory.max"), "max\n").unwrap();
        assert_eq!(tightest(root.path(), "slice/unit"), None);
        fs::write(root.path().join("slice/memory.max"), "1073741824\n").unwrap();
        fs::write(root.path().join("slice/memory.current"), "73741824\n").unwrap();
        assert_eq!(tightest(root.path(), "slice/unit"), Some((root.path().join("slice"), 1_000_000_000)));
        assert_eq!(finding(root.path(), 5 << 20, 6 << 20).level, Level::Broken);
        assert_eq!(finding(root.path(), 6 << 20, 6 << 20).level, Level::Good);
    }

    #[test]
    fn only_version_2_is_read() {
        assert_eq!(own_path("0::/a/b\n"), Some("a/b"));
        assert_eq!(own_path("4:memory:/x\n0::/\n"), Some(""));
        assert_eq!(own_path("4:memory:/x\n"), None);
    }
}
