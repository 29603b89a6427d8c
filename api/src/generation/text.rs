//! Token ids to text: characters that are cut across tokens, and stop strings that are cut across
//! both.
//!
//! Nothing of a stop string is ever given out, neither as text nor as a token's name among the log
//! probabilities: a token goes out with the text in which its last character stands, so one that
//! reaches into a stop string never does.

use std::{collections::VecDeque, sync::Arc};

use lathe_model::{
    engine::{Sampled, stop::StopStrings},
    tokenizer::{Detokenizer, Tokenizer},
};

use super::{Piece, wire::FinishReason};

/// A token and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Spoken {
    pub token: Sampled,
    /// Characters before it in its text.
    pub offset: usize,
}

/// The tokens of a whole text with their places.
pub fn placed(tokenizer: &Tokenizer, tokens: Vec<Sampled>) -> Vec<Spoken> {
    let (mut detokenizer, mut offset) = (Detokenizer::new(), 0);
    let place = |token: Sampled| {
        let before = offset;
        offset += detokenizer.push(tokenizer, token.token).chars().count();
        Spoken { token, offset: before }
    };
    tokens.into_iter().map(place).collect()
}

/// A token whose text has not wholly gone out.
struct Held {
    spoken: Spoken,
    /// Characters up to its end; `None` while it ends within a character.
    end: Option<usize>,
}

/// The text of one choice as it grows.
pub struct Text {
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    stop: StopStrings,
    held: VecDeque<Held>,
    /// Characters that the tokens have made, and those of them that have gone out.
    made: usize,
    given: usize,
    completion_tokens: usize,
}

impl Text {
    pub fn new(tokenizer: Arc<Tokenizer>, stop: Vec<String>) -> Text {
        Text {
            tokenizer,
            detokenizer: Detokenizer::new(),
            stop: StopStrings::new(stop),
            held: VecDeque::new(),
            made: 0,
            given: 0,
            completion_tokens: 0,
        }
    }

    /// The pieces that the token releases, and whether a stop string ended the choice.
    pub fn push(&mut self, token: Sampled) -> (Vec<Piece>, bool) {
        self.completion_tokens += 1;
        let offset = self.made;
        let characters = self.detokenizer.push(&self.tokenizer, token.token);
        self.grow(&characters);
        let end = (!self.detokenizer.is_within_character()).then_some(self.made);
        self.held.push_back(Held { spoken: Spoken { token, offset }, end });
        let text = self.stop.push(&characters);
        let mut pieces: Vec<Piece> = self.release(text).into_iter().collect();
        let stopped = self.stop.stopped();
        if stopped {
            pieces.push(Piece::Finished { reason: FinishReason::Stop, completion_tokens: self.completion_tokens });
        }
        (pieces, stopped)
    }

    /// What is left when no token follows.
    pub fn finish(&mut self, mut reason: FinishReason) -> Vec<Piece> {
        let rest = self.detokenizer.finish();
        self.grow(&rest);
        let mut text = self.stop.push(&rest);
        if self.stop.stopped() {
            reason = FinishReason::Stop;
        } else {
            text.push_str(&self.stop.finish());
        }
        let piece = self.release(text);
        piece.into_iter().chain([Piece::Finished { reason, completion_tokens: self.completion_tokens }]).collect()
    }

    fn grow(&mut self, characters: &str) {
        if characters.is_empty() {
            return;
        }
        self.made += characters.chars().count();
        for held in self.held.iter_mut().rev().take_while(|held| held.end.is_none()) {
            held.end = Some(self.made);
        }
    }

    fn release(&mut self, text: String) -> Option<Piece> {
        if text.is_empty() {
            return None;
        }
        self.given += text.chars().count();
        let whole = self.held.iter().take_while(|held| held.end.is_some_and(|end| end <= self.given)).count();
        Some(Piece::Text { text, tokens: self.held.drain(..whole).map(|held| held.spoken).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tokenizer of bytes alone, in which every byte is a token.
    fn bytes() -> (tempfile::TempDir, Arc<Tokenizer>) {
        use lathe_model::data::rows::{Row, Writer};
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut writer = Writer::create(&folder.path().join("rows")).expect("it is writable");
        writer.push(&Row::Text { text: "x".into() }).expect("a row");
        writer.finish().expect("it is writable");
        let vocabulary = lathe_model::tokenizer::MIN_VOCABULARY;
        let tokenizer = lathe_model::tokenizer::train(&folder.path().join("rows"), vocabulary, &folder.path().join("out"));
        (folder, Arc::new(tokenizer.expect("256 bytes")))
    }

    /// What goes out for a text whose every byte is a token: pieces, names of tokens, the reason.
    fn speak(text: &[u8], stop: &[&str]) -> (Vec<String>, Vec<u8>, FinishReason) {
        let (_folder, tokenizer) = bytes();
        let id = |byte: u8| (0..272).find(|&id| tokenizer.token_bytes(id) == [byte]).expect("every byte is a token");
        let mut speech = Text::new(tokenizer.clone(), stop.iter().map(ToString::to_string).collect());
        let mut pieces = Vec::new();
        let mut stopped = false;
        for &byte in text {
            let (more, ended) = speech.push(Sampled { token: id(byte), logprob: None, top: Vec::new() });
            pieces.extend(more);
            stopped = ended;
            if stopped {
                break;
            }
        }
        if !stopped {
            pieces.extend(speech.finish(FinishReason::Length));
        }
        let (mut texts, mut names, mut reasons) = (Vec::new(), Vec::new(), Vec::new());
        for piece in pieces {
            match piece {
                Piece::Scored(_) => unreachable!("no prompt is scored here"),
                Piece::Text { text, tokens } => {
                    texts.push(text);
                    names.extend(tokens.iter().flat_map(|spoken| tokenizer.token_bytes(spoken.token.token).to_vec()));
                }
                Piece::Finished { reason, .. } => reasons.push(reason),
            }
        }
        assert_eq!(reasons.len(), 1, "it ends once");
        (texts, names, reasons[0])
    }

    #[test]
    fn tokens_go_out_with_their_characters() {
        let (texts, names, reason) = speak("aé🙂".as_bytes(), &[]);
        assert_eq!(texts, ["a", "é", "🙂"]);
        assert_eq!((names.as_slice(), reason), ("aé🙂".as_bytes(), FinishReason::Length));
    }

    #[test]
    fn a_stop_is_in_neither_text_nor_tokens() {
        // The stop begins with bytes that begin another character too.
        let (texts, names, reason) = speak("ab→é→è and more".as_bytes(), &["→è", "zz"]);
        assert_eq!(texts.concat(), "ab→é");
        assert_eq!((names.as_slice(), reason), ("ab→é".as_bytes(), FinishReason::Stop));
        let (texts, names, _) = speak("é".as_bytes(), &["é"]);
        assert!(texts.is_empty() && names.is_empty());
    }

    #[test]
    fn overlapping_stops_end_at_the_earliest() {
        assert_eq!(speak(b"one two three", &["two three", "o th"]).0.concat(), "one tw");
        assert_eq!(speak(b"aaab", &["aab"]).0.concat(), "a");
    }

    #[test]
    fn what_was_held_for_nothing_goes_out_in_the_end() {
        let (texts, names, reason) = speak(b"a##", &["###"]);
        assert_eq!((texts.concat().as_str(), names.as_slice(), reason), ("a##", b"a##".as_slice(), FinishReason::Length));
        // A character that is never completed, and a stop that is its replacement.
        assert_eq!(speak(&[b'a', 0xF0, 0x9F], &[]).0.concat(), "a\u{FFFD}");
        assert_eq!(speak(&[b'a', 0xF0, 0x9F], &["\u{FFFD}"]).2, FinishReason::Stop);
    }
}
