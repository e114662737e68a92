//! Takes the files under test from the crates that they belong to, and puts loom's types in the place of the
//! standard library's. Of each file that has rules to be broken on purpose, it also makes a twin for each
//! rule, in which one piece of the text is another.
//!
//! A rule that is no longer found in its file fails the build: whoever changes the code changes it here.

use std::path::Path;
use std::{env, fs};

/// A file of this repository, and the module that it becomes.
const FILES: [(&str, &str); 11] = [
    ("vmm/src/lock.rs", "lock"),
    ("vmm/src/awake.rs", "awake"),
    ("vmm/src/ended.rs", "ended"),
    ("vmm/src/vcpu/control.rs", "control"),
    ("vmm/src/virtio/service.rs", "service"),
    ("vmm/src/memory/write_log.rs", "write_log"),
    ("migration/src/monitor.rs", "monitor"),
    ("migration/src/pacer.rs", "pacer"),
    ("migration/src/destination/monitor.rs", "destination"),
    ("transport-tcp/src/streams.rs", "streams"),
    ("whimbrel/src/slot.rs", "slot"),
];

/// A module, the twin in which one of its rules is broken, what is written in the module, and in the twin.
const BROKEN: [[&str; 4]; 25] = [
    [
        "control",
        "control_looks_before_it_clears",
        "clear();\n        let mut inner = self.lock();\n        while inner.phase == Phase::Running && !inner.reset && inner.held.contains(&index) {\n            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);\n        }\n        inner.phase == Phase::Running && !inner.reset",
        "let mut inner = self.lock();\n        while inner.phase == Phase::Running && !inner.reset && inner.held.contains(&index) {\n            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);\n        }\n        let on = inner.phase == Phase::Running && !inner.reset;\n        drop(inner);\n        clear();\n        on",
    ],
    ["control", "control_pauses_who_is_held_in_silence", "if !inner.held.is_empty() {", "if false {"],
    [
        "control",
        "control_lets_go_in_silence",
        "if inner.held.remove(&index) {\n                self.changed.notify_all();\n            }",
        "inner.held.remove(&index);",
    ],
    ["control", "control_pauses_without_a_kick", "if inner.parked < vcpus {", "if vcpus == 0 {"],
    [
        "control",
        "control_parks_in_silence",
        "inner.parked += 1;\n        self.changed.notify_all();",
        "inner.parked += 1;",
    ],
    [
        "control",
        "control_pauses_only_until_the_first",
        "Phase::Paused && inner.parked < vcpus {",
        "Phase::Paused && inner.parked < 1 {",
    ],
    [
        "control",
        "control_resets_without_a_kick",
        "self.lock().reset = true;\n        self.changed.notify_all();\n        self.kick();",
        "self.lock().reset = true;\n        self.changed.notify_all();",
    ],
    ["service", "service_yields_in_silence", "self.doorbell.ring();\n                break;", "break;"],
    [
        "service",
        "service_resumes_in_silence",
        "self.lock().paused = false;\n        self.doorbell.ring();",
        "self.lock().paused = false;",
    ],
    ["service", "service_serves_in_a_pause", "while inner.active && !inner.paused {", "while inner.active {"],
    [
        "service",
        "service_rings_before_it_ends",
        "self.ending.store(true, Ordering::Release);\n        self.waiting.fetch_add(1, Ordering::AcqRel);\n        self.doorbell.ring();",
        "self.doorbell.ring();\n        self.ending.store(true, Ordering::Release);",
    ],
    ["write_log", "write_log_clears_relaxed", "Ordering::AcqRel", "Ordering::Relaxed"],
    [
        "write_log",
        "write_log_marks_relaxed",
        "(page % 64), Ordering::Release",
        "(page % 64), Ordering::Relaxed",
    ],
    ["monitor", "monitor_cancels_without_the_lock", "self.order(|_| {});", "self.ordered.notify_all();"],
    [
        "monitor",
        "monitor_looks_before_it_arms",
        "let mut slot = lock(&self.interrupter);\n        if self.stopped().is_some() {\n            interrupter.interrupt();\n        }\n",
        "if self.stopped().is_some() {\n            interrupter.interrupt();\n        }\n        let mut slot = lock(&self.interrupter);\n",
    ],
    [
        "monitor",
        "monitor_expires_without_the_lock",
        "self.expired.store(true, Ordering::Release);\n        drop(orders);",
        "drop(orders);\n        self.expired.store(true, Ordering::Release);",
    ],
    [
        "monitor",
        "monitor_is_taken_in_two_steps",
        "if self.taken.swap(true, Ordering::AcqRel) {",
        "let taken = self.taken.load(Ordering::Acquire);\n        self.taken.store(true, Ordering::Release);\n        if taken {",
    ],
    ["streams", "streams_let_in_after_the_fence", "inner.fenced = true;", ""],
    [
        "streams",
        "streams_are_not_waited_for",
        "threads.into_iter().map(|(_, thread)| thread.join()).collect();",
        "Vec::<Result<(), ()>>::new(); drop(threads);",
    ],
    [
        "streams",
        "streams_are_not_shut",
        "inner.handles.drain(..).for_each(|(_, stream)| stream.shut());",
        "inner.handles.clear();",
    ],
    [
        "awake",
        "awake_works_without_the_lock",
        "let awake = self.lock();\n        if *awake {",
        "let awake = &{ *self.lock() };\n        if *awake {",
    ],
    ["ended", "ended_in_silence", "self.changed.notify_all();", ""],
    ["slot", "slot_is_filled_in_silence", "drop(self.reception());\n        self.settled.notify_all();", ""],
    [
        "slot",
        "slot_is_filled_without_the_lock",
        "drop(self.reception());\n        self.settled.notify_all();",
        "self.settled.notify_all();",
    ],
    ["slot", "slot_takes_in_who_comes_late", "if reception.quit {", "if reception.closed {"],
];

fn main() {
    let root = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("../..");
    let out = env::var("OUT_DIR").expect("cargo sets it");
    let write = |name: &str, text: &str| {
        fs::write(Path::new(&out).join(name).with_extension("rs"), text)
            .expect("a file in the build's folder");
    };
    for (file, module) in FILES {
        let path = root.join(file);
        println!("cargo::rerun-if-changed={}", path.display());
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{file}: {error}"));
        let text = taken(&text);
        for [_, twin, right, wrong] in BROKEN.iter().filter(|[of, ..]| *of == module) {
            assert_eq!(text.matches(right).count(), 1, "{file} should have this once, to be broken: {right}");
            write(twin, &text.replace(right, wrong));
        }
        write(module, &text);
    }
}

/// A file's text without its tests and what features add, to be included, over loom.
fn taken(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let left_out = |line: &str| line.starts_with("//!") || line.starts_with("#[cfg_attr(feature");
    let lines = code.lines().filter(|line| !left_out(line));
    lines
        .flat_map(|line| [line, "\n"])
        .collect::<String>()
        .replace("std::sync::", "crate::sync::")
        .replace("std::thread::", "crate::sync::thread::")
}
