//! The control link: one ordered, reliable stream of frames between the two engines.

pub use crate::message::MAX_FRAME;

use crate::failure::{Code, Failure};
use crate::transport::{Secret, Token};
use std::time::Duration;

/// Why a link can carry no more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The peer closed it.
    #[error("the peer closed the control connection")]
    Closed,
    /// It broke.
    #[error("the control connection broke: {0}")]
    Io(#[from] std::io::Error),
    /// The peer announced a frame over [`MAX_FRAME`].
    #[error("the peer announced a control message of {0} bytes, which is over the limit")]
    TooLong(u64),
}

impl From<LinkError> for Failure {
    fn from(error: LinkError) -> Self {
        let code = match error {
            LinkError::TooLong(_) => Code::PROTOCOL,
            LinkError::Closed | LinkError::Io(_) => Code::LINK,
        };
        Failure::new(code, error)
    }
}

/// A control link, used by one thread.
pub trait ControlLink: Send {
    /// The session's token. Both ends of a link have the same one: the source made it, and its end of the
    /// link told the destination's.
    fn token(&self) -> Token;

    /// The session's secret, by which connections of a data plane are known to belong to it. Both ends have
    /// the same one, which the destination chose. A link of an embedder's own, whose data connections nobody
    /// else can reach, may have [`Secret::NONE`].
    fn secret(&self) -> Secret;

    /// Sends one frame, waiting at most the link's own send time-out.
    ///
    /// # Errors
    /// [`LinkError`]; part of the frame may have left, and the link is of no more use.
    fn send(&mut self, frame: &[u8]) -> Result<(), LinkError>;

    /// The next frame, or `None` when `wait` has passed without a whole one. A frame of which a
    /// part has arrived is kept for the next call.
    ///
    /// # Errors
    /// [`LinkError`]; the link is of no more use.
    fn receive(&mut self, wait: Duration) -> Result<Option<Vec<u8>>, LinkError>;
}
