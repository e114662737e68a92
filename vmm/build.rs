//! Builds the embedded guest (`guest/`) into one ELF file that the program carries.
//!
//! The guest must use neither vector registers, which KVM's instruction emulation lacks, nor memory below
//! the stack pointer. The bare-metal target promises both. Where its core library is not installed, the
//! host's target does with those features turned off. The compiler then warns that a later release will
//! refuse this; the warning is kept out of the build's output, and the error, when it comes, names the
//! target to install.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

const BARE_METAL: &str = "x86_64-unknown-none";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=guest");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=DOCS_RS");
    let output = PathBuf::from(env::var("OUT_DIR")?).join("guest.elf");
    // docs.rs compiles the crate for its documentation only, with a nightly compiler and no bare-metal
    // target.
    if env::var_os("DOCS_RS").is_some() {
        return Ok(std::fs::write(output, [])?);
    }
    let rustc = env::var("RUSTC")?;
    let folder = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("guest");
    let mut command = Command::new(&rustc);
    command.args(["--edition", "2024", "--crate-name", "guest", "--crate-type", "bin"]);
    if bare_metal_core(&rustc)? {
        command.args(["--target", BARE_METAL, "-C", "linker-flavor=gcc", "-C", "linker=cc"]);
    } else {
        command.args(["-C", "target-feature=-sse2,-sse", "-C", "no-redzone=yes"]);
    }
    for option in
        ["opt-level=2", "panic=abort", "relocation-model=static", "code-model=small", "strip=symbols"]
    {
        command.args(["-C", option]);
    }
    for option in
        ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,--gc-sections"]
    {
        command.arg("-C").arg(format!("link-arg={option}"));
    }
    command.arg("-C").arg(format!("link-arg=-Wl,-T{}", folder.join("link.ld").display()));
    command.args(["-C", "default-linker-libraries=no", "-o"]).arg(&output).arg(folder.join("main.rs"));
    let built = command.output()?;
    if !built.status.success() {
        return Err(format!(
            "the embedded guest does not build (`rustup target add {BARE_METAL}` may help):\n{}",
            String::from_utf8_lossy(&built.stderr)
        )
        .into());
    }
    Ok(())
}

/// Whether the bare-metal target's core library is installed.
fn bare_metal_core(rustc: &str) -> Result<bool, Box<dyn Error>> {
    let printed = Command::new(rustc).args(["--print", "sysroot"]).output()?;
    let sysroot = String::from_utf8(printed.stdout)?;
    Ok(Path::new(sysroot.trim()).join("lib/rustlib").join(BARE_METAL).join("lib").is_dir())
}
