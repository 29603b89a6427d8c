//! Text to words, as GPT-2 cuts it.
//!
//! The pattern is `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+` (Radford et al. 2019), cut by hand:
//! the library tries its alternatives at every place with a general matcher. Where digits stand apart, each number is a word, and the
//! text between two of them is cut by itself.

use unicode_general_category::{GeneralCategory, get_general_category};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Letter,
    Number,
    Space,
    Other,
}

impl Class {
    /// Numbers that stand apart are those of the standard library, as in the library's own pre-tokenizer; the general categories are of a
    /// Unicode version that the library's regular expressions agree with on every character.
    fn of(character: char, digits_apart: bool) -> Class {
        match character {
            'a'..='z' | 'A'..='Z' => Class::Letter,
            '0'..='9' => Class::Number,
            ' ' | '\t'..='\r' => Class::Space,
            '\0'..='\x7f' => Class::Other,
            _ if character.is_whitespace() => Class::Space,
            _ if digits_apart && character.is_numeric() => Class::Number,
            _ => match get_general_category(character) {
                GeneralCategory::UppercaseLetter
                | GeneralCategory::LowercaseLetter
                | GeneralCategory::TitlecaseLetter
                | GeneralCategory::ModifierLetter
                | GeneralCategory::OtherLetter => Class::Letter,
                GeneralCategory::DecimalNumber | GeneralCategory::LetterNumber | GeneralCategory::OtherNumber => Class::Number,
                _ => Class::Other,
            },
        }
    }
}

/// The words of a text: all of it, in order.
pub struct Words<'a> {
    rest: &'a str,
    digits_apart: bool,
}

impl<'a> Words<'a> {
    pub fn of(text: &'a str, digits_apart: bool) -> Words<'a> {
        Words { rest: text, digits_apart }
    }

    fn class(&self, character: char) -> Class {
        Class::of(character, self.digits_apart)
    }

    /// Bytes of the next word; `None` at the end.
    fn next_length(&self) -> Option<usize> {
        let first = self.rest.chars().next()?;
        match self.class(first) {
            Class::Space if first == ' ' => Some(self.after_a_blank()),
            Class::Space => Some(self.spaces()),
            Class::Number if self.digits_apart => Some(first.len_utf8()),
            Class::Other => Some(self.contraction().unwrap_or_else(|| self.run(0, Class::Other))),
            class => Some(self.run(0, class)),
        }
    }

    /// From a blank on: it belongs to the word after it, unless that is no word or a number that stands apart.
    fn after_a_blank(&self) -> usize {
        match self.rest[1..].chars().next().map(|next| self.class(next)) {
            None | Some(Class::Space) => self.spaces(),
            Some(Class::Number) if self.digits_apart => self.spaces(),
            Some(class) => self.run(1, class),
        }
    }

    /// Bytes up to the end of the characters of one class that begin at `from`.
    fn run(&self, from: usize, class: Class) -> usize {
        let characters = self.rest[from..].char_indices();
        from + characters.skip_while(|&(_, c)| self.class(c) == class).map(|(at, _)| at).next().unwrap_or(self.rest.len() - from)
    }

    /// From white space on: all of it, but the last where something follows that may take it.
    fn spaces(&self) -> usize {
        let end = self.run(0, Class::Space);
        let follows = match self.rest[end..].chars().next() {
            None => false,
            Some(next) => !(self.digits_apart && self.class(next) == Class::Number),
        };
        let last = self.rest[..end].chars().next_back().map_or(0, char::len_utf8);
        if follows && last < end { end - last } else { end }
    }

    fn contraction(&self) -> Option<usize> {
        let endings = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"];
        endings.iter().find(|ending| self.rest.starts_with(**ending)).map(|ending| ending.len())
    }
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let (word, rest) = self.rest.split_at(self.next_length()?);
        self.rest = rest;
        Some(word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &str, digits_apart: bool) -> Vec<&str> {
        Words::of(text, digits_apart).collect()
    }

    #[test]
    fn words_keep_the_blank_before_them() {
        assert_eq!(cut("Hello  world's end", false), ["Hello", " ", " world", "'s", " end"]);
        assert_eq!(cut("a\n\n b\t", false), ["a", "\n\n", " b", "\t"]);
        assert_eq!(cut(" !'s 'll", false), [" !'", "s", " '", "ll"]);
        assert_eq!(cut("  ", false), ["  "]);
        assert!(cut("", false).is_empty());
    }

    #[test]
    fn numbers_stand_together_or_apart() {
        assert_eq!(cut("in 1984  12", false), ["in", " 1984", " ", " 12"]);
        assert_eq!(cut("in 1984  12", true), ["in", " ", "1", "9", "8", "4", "  ", "1", "2"]);
        assert_eq!(cut("½ Ⅷ٣", true), ["½", " ", "Ⅷ", "٣"]);
    }
}
