//! The log of what this process writes to guest memory, and the lane that sends it.

use crate::{explore, finds};

taken!(write_log);
taken!(write_log_clears_relaxed);
taken!(write_log_marks_relaxed);

macro_rules! scenarios {
    ($write_log:ident) => {
        pub mod $write_log {
            use super::super::$write_log::WriteLog;
            use crate::sync::atomic::{AtomicU64, Ordering};
            use loom::thread;
            use std::sync::Arc;
            use vm_memory::bitmap::Bitmap;

            /// A device writes to a page while a round sends it: what was sent is what is there, unless the
            /// next round will send it again. Pages of the same word are written by another device.
            pub fn sends(others: bool) {
                let log = Arc::new(WriteLog::new(2 << 12));
                let page = Arc::new(AtomicU64::new(0));
                let writer = thread::spawn({
                    let (log, page) = (log.clone(), page.clone());
                    move || {
                        page.store(1, Ordering::Relaxed);
                        log.mark_dirty(0, 1);
                    }
                });
                let other = others.then(|| {
                    let log = log.clone();
                    thread::spawn(move || log.mark_dirty(1 << 12, 1))
                });
                let mut sent = 0;
                for _ in 0..2 {
                    let mut words = [0];
                    log.merge_into(&mut words);
                    log.clear(0, &words);
                    if words[0] & 1 != 0 {
                        sent = page.load(Ordering::Relaxed);
                    }
                }
                writer.join().unwrap();
                other.into_iter().for_each(|other| other.join().unwrap());
                let again = log.dirty_at(0);
                assert!(again || sent == 1, "a page is neither sent as it is nor logged");
            }

            /// The first round sends every page, logged or not.
            pub fn sends_all() {
                let log = Arc::new(WriteLog::new(1 << 12));
                let page = Arc::new(AtomicU64::new(0));
                let writer = thread::spawn({
                    let (log, page) = (log.clone(), page.clone());
                    move || {
                        page.store(1, Ordering::Relaxed);
                        log.mark_dirty(0, 1);
                    }
                });
                log.clear(0, &[1]);
                let sent = page.load(Ordering::Relaxed);
                writer.join().unwrap();
                assert!(log.dirty_at(0) || sent == 1, "a page is neither sent as it is nor logged");
            }
        }
    };
}

mod over {
    scenarios!(write_log);
    scenarios!(write_log_clears_relaxed);
    scenarios!(write_log_marks_relaxed);
}

#[test]
fn a_page_is_sent_as_it_is_or_logged() {
    explore(3, || over::write_log::sends(false));
    explore(3, || over::write_log::sends(true));
    explore(3, over::write_log::sends_all);
}

#[test]
fn every_broken_rule_is_found() {
    finds(3, over::write_log_clears_relaxed::sends_all);
    finds(3, || over::write_log_marks_relaxed::sends(false));
}
