//! Ending the process when a thread panics without which its guest would hang.

/// Ends the process if the thread that has it panics. A device that nobody serves any more would leave a
/// guest that waits for ever, holds its disks, and counts as running. The locks go with the process; the
/// message of the panic itself has been printed.
pub(crate) struct EndOnPanic;

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let thread = std::thread::current();
            let name = thread.name().unwrap_or("without a name");
            eprintln!("whimbrel: the thread {name} has panicked; the machine ends, as its guest would hang");
            std::process::abort();
        }
    }
}
