//! The examples do what they say, and their machines keep to the contract.

use migration::conformance::machine::MachineFixture;
use std::path::Path;
use std::process::Command;

#[allow(dead_code)] // its own `main`, for one
#[path = "../examples/cache.rs"]
mod cache;
#[allow(dead_code)]
#[path = "../examples/tiny_vmm.rs"]
mod tiny_vmm;

/// Runs an example, which cargo has built beside this test, and returns what it has printed.
fn run(name: &str) -> String {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().and_then(Path::parent).unwrap().join("examples").join(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name).with_extension("rs");
    let changed = |path: &Path| path.metadata().and_then(|file| file.modified());
    let newest = changed(&program).is_ok_and(|built| built >= changed(&source).unwrap());
    // Cargo builds examples beside tests unless it is told which targets to build.
    assert!(newest, "{} is not built; run `cargo test` without `--test` or `--tests`", program.display());
    let ran = Command::new(&program).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success(), "{name}: {}: {out}{err}", ran.status);
    out.into_owned()
}

#[test]
fn a_tiny_vmm_moves_its_guest_and_checks_it() {
    let said = run("tiny_vmm");
    assert!(said.starts_with("moved 32 MiB in ") && said.contains("the guest went on from"), "{said}");
}

#[test]
fn a_process_moves_its_cache_and_checks_it() {
    let said = run("cache");
    assert!(said.starts_with("moved 1024 MiB in ") && said.contains("all entries are the newest"), "{said}");
}

/// What the documentation says of it.
#[test]
fn the_tiny_vmm_is_tiny() {
    let source = include_str!("../examples/tiny_vmm.rs");
    assert!(source.lines().count() <= 250, "it has {} lines", source.lines().count());
    assert_eq!(source.matches("unsafe {").count(), 1, "KVM asks for one unsafe call");
}

struct Tiny;

impl MachineFixture for Tiny {
    type Machine = tiny_vmm::Tiny;
    type Host = tiny_vmm::TinyHost;

    fn machine(&self) -> tiny_vmm::Tiny {
        tiny_vmm::Tiny::boot().unwrap()
    }

    fn host(&self) -> tiny_vmm::TinyHost {
        tiny_vmm::TinyHost
    }
}

mod a_tiny_vmm_passes {
    migration::machine_conformance_suite!(super::Tiny);
}

struct Cache;

impl MachineFixture for Cache {
    type Machine = cache::Cache;
    type Host = cache::CacheHost;

    fn machine(&self) -> cache::Cache {
        cache::Cache::filled(8 << 20).unwrap()
    }

    fn host(&self) -> cache::CacheHost {
        cache::CacheHost
    }
}

mod a_cache_passes {
    migration::machine_conformance_suite!(super::Cache);
}
