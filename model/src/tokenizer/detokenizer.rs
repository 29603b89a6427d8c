//! Text from a stream of token ids, whatever way characters are cut into tokens.

use super::Tokenizer;

/// Gives out characters as soon as they are whole. What it has given out, put together with what
/// [`Detokenizer::finish`] returns, equals [`Tokenizer::decode`] of all ids.
#[derive(Debug, Default)]
pub struct Detokenizer {
    /// The beginning of a character of which more bytes may come; at most three bytes.
    pending: Vec<u8>,
}

impl Detokenizer {
    pub fn new() -> Detokenizer {
        Detokenizer::default()
    }

    /// The characters that this token completes, possibly none.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        self.push_bytes(tokenizer.token_bytes(id))
    }

    fn push_bytes(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let whole = self.pending.len() - incomplete_tail(&self.pending);
        let text = String::from_utf8_lossy(&self.pending[..whole]).into_owned();
        self.pending.drain(..whole);
        text
    }

    /// Whether the tokens so far end within a character.
    pub fn is_within_character(&self) -> bool {
        !self.pending.is_empty()
    }

    /// What is left when no token follows: U+FFFD for a character that was never completed.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

/// Bytes at the end that begin a character and could still be completed.
fn incomplete_tail(bytes: &[u8]) -> usize {
    let mut rest = bytes;
    loop {
        match std::str::from_utf8(rest) {
            Ok(_) => return 0,
            Err(error) => match error.error_len() {
                None => return rest.len() - error.valid_up_to(),
                Some(invalid) => rest = &rest[error.valid_up_to() + invalid..],
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_character_appears_when_its_last_byte_does() {
        let mut detokenizer = Detokenizer::new();
        let pieces: Vec<String> = "é🙂".as_bytes().iter().map(|&byte| detokenizer.push_bytes(&[byte])).collect();
        assert_eq!(pieces, ["", "é", "", "", "", "🙂"]);
        assert_eq!(detokenizer.finish(), "");
    }

    #[test]
    fn an_unfinished_character_is_replaced_once() {
        let mut detokenizer = Detokenizer::new();
        assert_eq!(detokenizer.push_bytes(&[b'a', 0xF0, 0x9F]), "a");
        assert_eq!(detokenizer.finish(), "\u{FFFD}");
        assert_eq!(detokenizer.finish(), "");
    }

    proptest! {
        #[test]
        fn pieces_put_together_equal_the_whole(bytes: Vec<u8>, cuts in prop::collection::vec(1usize..5, 0..64)) {
            let mut detokenizer = Detokenizer::new();
            let (mut text, mut rest) = (String::new(), &bytes[..]);
            for cut in cuts.into_iter().chain([bytes.len()]) {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                text += &detokenizer.push_bytes(piece);
                prop_assert!(detokenizer.pending.len() < 4);
                rest = after;
            }
            text += &detokenizer.finish();
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }
}
