//! Identifiers that sort by the time at which they were made.
//!
//! A prefix that names the resource, then 26 characters of Crockford's base 32: 48 bits of
//! milliseconds since 1970 and 80 random bits, the layout of a ULID. Ids are unique without asking
//! the database; their order is a convenience of listings and never decides anything, since clocks of
//! different machines differ.

use std::time::{SystemTime, UNIX_EPOCH};

const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/// `ids::new("ds")` → `ds_01J…`.
pub fn new(prefix: &str) -> String {
    format!("{prefix}_{}", body())
}

/// For the prefixes that clients of OpenAI's API know with a dash: `file-`, `ftjob-`, `model-`.
pub fn new_dashed(prefix: &str) -> String {
    format!("{prefix}-{}", body())
}

/// A secret of 256 random bits in hex: lease tokens, and the bearer tokens of engines.
pub fn secret() -> String {
    hex::encode(rand::random::<[u8; 32]>())
}

fn body() -> String {
    let milliseconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_millis());
    let random = u128::from_le_bytes(rand::random::<[u8; 16]>()) & ((1 << 80) - 1);
    let value = ((milliseconds & ((1 << 48) - 1)) << 80) | random;
    (0..26).rev().map(|digit| char::from(ALPHABET[((value >> (digit * 5)) & 31) as usize])).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    #[test]
    fn ids_are_distinct_and_of_one_length() {
        let made: HashSet<String> = (0..10_000).map(|_| super::new("job")).collect();
        assert_eq!(made.len(), 10_000);
        assert!(made.iter().all(|id| id.len() == "job_".len() + 26 && id.starts_with("job_")));
        assert!(super::new_dashed("ftjob").starts_with("ftjob-"));
    }

    #[test]
    fn a_later_millisecond_sorts_later() {
        let first = super::new("job");
        let started = std::time::Instant::now();
        while started.elapsed().as_millis() < 2 {
            std::hint::spin_loop();
        }
        assert!(super::new("job") > first);
    }
}
