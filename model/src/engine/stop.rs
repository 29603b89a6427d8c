//! Stop strings, found in text that arrives in pieces.

/// Cuts a stream of text before the first stop string. What could still become one is held back, so
/// no part of a stop string is ever given out; everything else is given out at once.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    /// The longest end of the text so far that begins a stop string.
    held: String,
    stopped: bool,
}

impl StopStrings {
    /// Empty strings are ignored: they would stop everything.
    pub fn new(stops: impl IntoIterator<Item = String>) -> StopStrings {
        StopStrings { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), ..StopStrings::default() }
    }

    /// Text that may be given out after this piece. After a stop there is never any.
    pub fn push(&mut self, piece: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held += piece;
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(start) = found {
            self.stopped = true;
            self.held.truncate(start);
            return std::mem::take(&mut self.held);
        }
        let keep = self.held.len() - self.beginning_of_a_stop();
        let rest = self.held.split_off(keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// Whether a stop string was found; generation should end.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// What was held back when no text follows.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Length of the longest end of `held` that is a beginning of a stop string.
    fn beginning_of_a_stop(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0).saturating_sub(1).min(self.held.len());
        let ends = (1..=longest).rev().filter(|&length| self.held.is_char_boundary(self.held.len() - length));
        ends.into_iter()
            .find(|&length| self.stops.iter().any(|stop| stop.starts_with(&self.held[self.held.len() - length..])))
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stops(stops: &[&str]) -> StopStrings {
        StopStrings::new(stops.iter().map(|stop| stop.to_string()))
    }

    #[test]
    fn a_stop_across_pieces_is_never_shown() {
        let mut stop = stops(&["\n\nQ:"]);
        let pieces: Vec<String> = ["yes", "\n", "\n", "Q", ": more"].iter().map(|piece| stop.push(piece)).collect();
        assert_eq!(pieces, ["yes", "", "", "", ""]);
        assert!(stop.stopped());
        assert_eq!(stop.finish(), "");
    }

    #[test]
    fn a_beginning_that_comes_to_nothing_is_given_out() {
        let mut stop = stops(&["###"]);
        assert_eq!(stop.push("a#"), "a");
        assert_eq!(stop.push("#b"), "##b");
        assert_eq!(stop.push("#"), "");
        assert_eq!(stop.finish(), "#");
        assert!(!stop.stopped());
    }

    #[test]
    fn the_earliest_stop_wins_and_empty_ones_do_nothing() {
        let mut stop = stops(&["", "c", "bcd"]);
        assert_eq!(stop.push("ab"), "a");
        assert_eq!(stop.push("cd"), "");
        assert!(stop.stopped());
        let mut none = stops(&[""]);
        assert_eq!(none.push("abc"), "abc");
    }

    #[test]
    fn multi_byte_text() {
        let mut stop = stops(&["→é"]);
        assert_eq!(stop.push("a→"), "a");
        assert_eq!(stop.push("è→"), "→è");
        assert_eq!(stop.push("é!"), "");
        assert!(stop.stopped());
    }

    proptest! {
        #[test]
        fn pieces_cut_where_the_whole_text_does(text in "[ab]{0,40}", stop_strings in prop::collection::vec("[ab]{0,4}", 0..3), size in 1usize..6) {
            let mut stop = StopStrings::new(stop_strings.clone());
            let mut shown: String = text.as_bytes().chunks(size).map(|piece| stop.push(std::str::from_utf8(piece).unwrap())).collect();
            shown += &stop.finish();
            // The stop whose end comes first ends the text; with pieces of one character exactly so.
            let cut = stop_strings.iter().filter(|stop| !stop.is_empty()).filter_map(|stop| text.find(stop.as_str())).min();
            prop_assert_eq!(stop.stopped(), cut.is_some());
            match cut {
                None => prop_assert_eq!(shown, text),
                Some(_) => prop_assert!(text.starts_with(&shown) && stop_strings.iter().any(|stop| !stop.is_empty() && text[shown.len()..].starts_with(stop.as_str()))),
            }
        }
    }
}
