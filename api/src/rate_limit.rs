//! How many requests a key may send in a minute, in OpenAI's headers and refusals.
//!
//! A key that has sent nothing for a minute may send a whole minute's requests at once; they come back one
//! after the other at a steady rate (the generic cell rate algorithm, ITU-T I.371). Kept in memory: each api
//! process counts by itself, and a restart forgives. Off unless `--requests-per-minute` is given. Probes and the
//! document are never counted, nor is a request without a valid key.

use std::{
    collections::HashMap,
    num::NonZeroU32,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue},
    middleware::Next,
    response::{IntoResponse, Response},
};

use crate::{auth::Project, problem::ApiError, state::AppState};

const MINUTE: Duration = Duration::from_secs(60);

pub const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit-requests");
pub const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining-requests");
pub const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset-requests");

/// Keys above this number are looked through for such as have their whole minute again.
const MANY: usize = 1024;

/// When each key will have its whole minute's requests again.
#[derive(Debug, Default)]
pub struct RateLimits(Mutex<HashMap<String, Instant>>);

/// Where a key stands after a request.
#[derive(Debug, PartialEq)]
struct Standing {
    remaining: u32,
    /// Until it has its whole minute's requests again.
    reset: Duration,
    /// Of a request that is one too many: until there is room for it.
    wait: Option<Duration>,
}

impl RateLimits {
    /// Counts a request, unless it is one too many.
    fn count(&self, key: &str, limit: NonZeroU32, now: Instant) -> Standing {
        let one = MINUTE / limit.get();
        let mut whole_at = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if whole_at.len() > MANY {
            whole_at.retain(|_, at| *at > now);
        }
        let owed = whole_at.get(key).map_or(Duration::ZERO, |at| at.saturating_duration_since(now));
        let after = owed + one;
        if after > MINUTE {
            return Standing { remaining: 0, reset: owed, wait: Some(after - MINUTE) };
        }
        whole_at.insert(key.to_owned(), now + after);
        Standing { remaining: ((MINUTE - after).as_nanos() / one.as_nanos()) as u32, reset: after, wait: None }
    }
}

/// Middleware, within `auth`'s: 429 for a request too many; what is left is in the headers of every answer.
pub async fn limit(State(state): State<AppState>, caller: Project, request: Request, next: Next) -> Response {
    let Some(limit) = state.config.requests_per_minute else { return next.run(request).await };
    let standing = state.rates.count(&caller.key_id, limit, Instant::now());
    let mut response = match standing.wait {
        None => next.run(request).await,
        Some(wait) => {
            let message = format!("This key may send {limit} requests in a minute. Send this one again in {}.", seconds(wait));
            ApiError::rate_limited(wait.as_secs_f64().ceil() as u32, message).into_response()
        }
    };
    tell(response.headers_mut(), limit, &standing);
    response
}

fn tell(headers: &mut HeaderMap, limit: NonZeroU32, standing: &Standing) {
    headers.insert(LIMIT, limit.get().into());
    headers.insert(REMAINING, standing.remaining.into());
    if let Ok(reset) = HeaderValue::from_str(&seconds(standing.reset)) {
        headers.insert(RESET, reset);
    }
}

/// As OpenAI writes durations: `1.5s`.
fn seconds(duration: Duration) -> String {
    format!("{}s", (duration.as_secs_f64() * 1e3).ceil() / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minutes_requests_at_once_and_then_one_by_one() {
        let (limits, limit, begun) = (RateLimits::default(), NonZeroU32::new(60).unwrap(), Instant::now());
        let count = |key: &str, after: f64| limits.count(key, limit, begun + Duration::from_secs_f64(after));
        for left in (0..60).rev() {
            let standing = count("a", 0.0);
            assert_eq!((standing.remaining, standing.wait), (left, None));
        }
        assert_eq!(
            count("a", 0.25),
            Standing { remaining: 0, reset: Duration::from_secs_f64(59.75), wait: Some(Duration::from_secs_f64(0.75)) }
        );
        assert_eq!(count("b", 0.25).remaining, 59);
        assert_eq!(count("a", 1.0).wait, None);
        assert!(count("a", 1.0).wait.is_some(), "a refusal costs nothing, and gives nothing");
        let standing = count("a", 31.0);
        assert_eq!((standing.remaining, standing.wait), (29, None));
        assert_eq!(count("a", 500.0).remaining, 59);
    }

    #[test]
    fn keys_that_have_all_again_are_forgotten() {
        let (limits, limit, begun) = (RateLimits::default(), NonZeroU32::new(60).unwrap(), Instant::now());
        (0..=MANY).for_each(|key| _ = limits.count(&key.to_string(), limit, begun));
        limits.count("new", limit, begun + MINUTE);
        assert_eq!(limits.0.lock().unwrap().len(), 1);
    }

    #[test]
    fn durations_are_rounded_up() {
        assert_eq!(seconds(Duration::from_micros(1_500_100)), "1.501s");
        assert_eq!(seconds(Duration::from_secs(60)), "60s");
    }
}
