//! Guests first.
//!
//! A migration takes whatever processors it finds: as many threads as there are lanes, which are never short
//! of work. A guest that works in small pieces and sleeps in between then waits for its turn behind all of
//! them, and goes at half its pace for as long as the pre-copy lasts. So lanes stand back while a guest runs.
//! Where processors are idle that costs nothing; where they are not, the migration takes longer, and guests
//! hardly notice it. On two processors, with both sides on them, a guest that rewrites 1 % of its memory a
//! second is slowed by 0 to 2 % instead of 49 to 54 %, and the move takes as long as before; see
//! `docs/measurements.md`.
//!
//! Only lanes do so. What the destination receives is what the source sends, and in the blackout, when
//! nobody must stand back, its threads are the same ones as before.

/// How far lanes stand back, in steps of `nice`: a tenth of a guest's share.
const STEPS: libc::c_int = 10;

/// Puts the current thread behind those that run guests, for good: only a privileged one could take it back.
pub(crate) fn lower() {
    // SAFETY: the call takes no pointers. On Linux it is about the calling thread only. It cannot fail:
    // anybody may lower a priority, and the lowest there is stays the lowest.
    unsafe { libc::nice(STEPS) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nice() -> libc::c_int {
        // SAFETY: the call takes no pointers.
        unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
    }

    #[test]
    fn one_thread_is_lowered_and_no_other() {
        let before = nice();
        let thread = std::thread::spawn(|| {
            lower();
            nice()
        });
        assert_eq!(thread.join().unwrap(), (before + STEPS).min(19));
        assert_eq!(nice(), before);
    }
}
