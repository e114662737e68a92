//! A panic in code that the engine calls becomes a failure of the migration.
//!
//! A machine, a link or a transport is somebody else's code. If its panic unwound through the engine between
//! the pause of the guest and `Commit`, nobody would resume the guest. So the engine catches it, and the
//! state machine does what it does after any other failure of that step. A program built with `panic =
//! "abort"` ends instead.

use crate::failure::{Code, Failure};
use std::any::Any;
use std::panic::{self, AssertUnwindSafe};

/// Does `work`, a step of this name.
///
/// # Errors
/// Those of `work`; [`Code::OTHER`] with the text of the panic if it panics.
pub(crate) fn catch<T>(step: &str, work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    // Asserted: after a failure the engine only tells the peer, resumes the machine and drops the rest, and
    // each of these calls is caught as well.
    panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| {
        let text = format_args!("panic in the step {step:?}: {}", text(payload.as_ref()));
        Err(Failure::new(Code::OTHER, text))
    })
}

fn text(payload: &(dyn Any + Send)) -> &str {
    let literal = payload.downcast_ref::<&str>().copied();
    literal.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no reason was given")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_failure_that_says_where_and_why() {
        let number = 7;
        let failed = catch("save state", || -> Result<(), Failure> { panic!("device {number} is odd") });
        let failure = failed.unwrap_err();
        assert_eq!(failure.code, Code::OTHER);
        assert_eq!(failure.message, "panic in the step \"save state\": device 7 is odd");
        assert_eq!(catch("nothing", || Ok(5)), Ok(5));
    }
}
