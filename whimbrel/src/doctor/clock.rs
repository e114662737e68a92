//! How far the clocks of two hosts are apart.
//!
//! The other host's API tells its time. When exactly it looked at its clock is not known, but it was between
//! the question and the answer: so the difference is known to half of the time between those.

use super::{Finding, good, limited};
use crate::api::Error;
use crate::api::client::Caller;
use crate::api::reach::Reach;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant, SystemTime};

/// How often the other host is asked: the answer that came soonest says the most.
const TIMES: usize = 8;

/// How long it may take in all.
const PATIENCE: Duration = Duration::from_secs(20);

/// Clocks that are synchronised differ by less.
const MUCH: Duration = Duration::from_millis(100);

/// How far the other host's clock is ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Microseconds; less than 0 if it is behind.
    pub ahead_us: i64,
    /// It may be so many microseconds more or less.
    pub within_us: i64,
}

/// Asks what is served there.
///
/// # Errors
/// Those of asking, and a host that does not tell its time.
pub fn compare(reach: &Reach) -> Result<Difference, Error> {
    let failed = |error: &dyn std::fmt::Display| Error::Http(error.to_string());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| failed(&error))?.block_on(async {
        let asked = tokio::time::timeout(PATIENCE, ask(reach));
        asked.await.unwrap_or(Err(Error::Silent(PATIENCE)))
    })
}

async fn ask(reach: &Reach) -> Result<Difference, Error> {
    #[derive(Deserialize)]
    struct Told {
        #[serde(default)]
        time: String,
    }
    let mut best: Option<Difference> = None;
    let mut caller = Caller::of(reach).await?;
    for _ in 0..TIMES {
        let (began, asked) = (Instant::now(), SystemTime::now());
        let told: Told = caller.get("/v1/host").await?;
        let within = began.elapsed() / 2;
        let theirs = humantime::parse_rfc3339(&told.time);
        let theirs =
            theirs.map_err(|_| Error::Http("it does not tell its time: its version is older".into()))?;
        let ours = asked + within;
        let ahead_us = match theirs.duration_since(ours) {
            Ok(ahead) => microseconds(ahead),
            Err(behind) => -microseconds(behind.duration()),
        };
        // Both are told in whole microseconds.
        let now = Difference { ahead_us, within_us: microseconds(within) + 1 };
        if best.is_none_or(|best| now.within_us < best.within_us) {
            best = Some(now);
        }
    }
    best.ok_or_else(|| Error::Http("it was not asked".into()))
}

fn microseconds(time: Duration) -> i64 {
    i64::try_from(time.as_micros()).unwrap_or(i64::MAX)
}

/// What the difference means, or why it is not known.
pub(super) fn finding(difference: &Result<Difference, String>) -> Finding {
    let what = "clocks";
    let ms = |us: i64| us as f64 / 1e3;
    let Difference { ahead_us, within_us } = match difference {
        Ok(difference) => *difference,
        Err(why) => {
            let mend = "let the other host serve its API by `[api]` in its configuration, and name the address by --at";
            return limited(what, format!("how far they are apart is not known: {why}"), Some(mend.into()));
        }
    };
    let where_to = if ahead_us < 0 { "behind" } else { "ahead" };
    let found = format!(
        "the other host's is {:.1} ms {where_to}, give or take {:.1} ms",
        ms(ahead_us.saturating_abs()),
        ms(within_us)
    );
    // It is certainly more.
    if ahead_us.saturating_abs().saturating_sub(within_us) > microseconds(MUCH) {
        let mend = "synchronise both hosts, as by chrony: a guest's clock goes by its host's when it arrives";
        return limited(what, found, Some(mend.into()));
    }
    good(what, found)
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;
    use crate::api::server::serve_router;
    use axum::routing::get;
    use axum::{Json, Router};

    #[test]
    fn a_difference_is_known_to_half_of_the_time_that_an_answer_takes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("host.sock");
        let hour = Duration::from_secs(3600);
        for (ahead, behind, expected, level) in [
            (Duration::ZERO, Duration::ZERO, 0, Level::Good),
            (hour, Duration::ZERO, 3_600_000_000, Level::Limited),
            (Duration::ZERO, hour, -3_600_000_000, Level::Limited),
        ] {
            let tell = async move || {
                let time = SystemTime::now() + ahead - behind;
                Json(serde_json::json!({ "time": humantime::format_rfc3339_micros(time).to_string() }))
            };
            let _served = serve_router(&path, Router::new().route("/v1/host", get(tell))).unwrap();
            let told = compare(&Reach::Socket(path.clone())).unwrap();
            assert!((told.ahead_us - expected).abs() <= told.within_us, "{told:?} in place of {expected}");
            if level == Level::Limited {
                assert_eq!(finding(&Ok(told)).level, level, "{told:?}");
            }
        }
    }

    #[test]
    fn what_is_certain_is_told() {
        let level = |ahead_us, within_us| finding(&Ok(Difference { ahead_us, within_us })).level;
        assert_eq!(level(99_000, 10), Level::Good);
        assert_eq!(level(-101_000, 10), Level::Limited);
        assert_eq!(level(150_000, 60_000), Level::Good, "it may be 90 ms");
        let told = finding(&Ok(Difference { ahead_us: -1_500, within_us: 250 })).found;
        assert_eq!(told, "the other host's is 1.5 ms behind, give or take 0.2 ms");
        assert_eq!(finding(&Err("why".into())).level, Level::Limited);
    }
}
