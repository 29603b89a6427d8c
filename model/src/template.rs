//! How a conversation becomes one sequence of token ids: the same for training and for serving.
//!
//! `ins`: INS instruction (then a newline and the input, if there is one) INS output EOS; turns
//! follow one another. A system text goes before the first instruction, a newline between them.
//! Reserved ids are spliced in between encoded texts, never written into them, so nothing that a
//! user writes can open or close a turn.

use std::ops::Range;

use sha2::{Digest, Sha256};

use crate::{
    config::Template,
    data::rows::{Row, Turn},
    tokenizer::Tokenizer,
};

/// What [`render`] and [`prompt`] do, in one line. It is hashed into every model's folder: change it
/// when, and only when, the ids that they give change.
const INS_DEFINITION: &str = "ins/1: INS (system LF)? instruction (LF input)? INS output EOS, turns concatenated";

impl Template {
    pub fn name(self) -> &'static str {
        match self {
            Template::Ins => "ins",
        }
    }

    /// Identifies the rendering; stored with the weights that were trained on it.
    pub fn sha256(self) -> String {
        match self {
            Template::Ins => hex::encode(Sha256::digest(INS_DEFINITION)),
        }
    }
}

/// A training sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    pub ids: Vec<u32>,
    /// Positions in `ids` that are targets, ascending: each output with its EOS.
    pub supervised: Vec<Range<usize>>,
}

/// A row as a training sequence. A text has nothing to supervise: its ids and EOS, without targets.
pub fn render(tokenizer: &Tokenizer, row: &Row) -> Rendered {
    let mut rendered = Rendered { ids: Vec::new(), supervised: Vec::new() };
    match row {
        Row::Text { text } => push_output(tokenizer, &mut rendered.ids, text),
        Row::Conversation { system, turns } => {
            let mut system = system.as_deref();
            for turn in turns {
                push_instruction(tokenizer, &mut rendered.ids, system.take(), &turn.instruction, &turn.input);
                let start = rendered.ids.len();
                push_output(tokenizer, &mut rendered.ids, &turn.output);
                rendered.supervised.push(start..rendered.ids.len());
            }
        }
    }
    rendered
}

/// The sequence that asks for the output of `instruction` after the turns of `history`. It ends with
/// the INS before the output.
pub fn prompt(tokenizer: &Tokenizer, system: Option<&str>, history: &[Turn], instruction: &str, input: &str) -> Vec<u32> {
    let mut ids = Vec::new();
    let mut system = system;
    for turn in history {
        push_instruction(tokenizer, &mut ids, system.take(), &turn.instruction, &turn.input);
        push_output(tokenizer, &mut ids, &turn.output);
    }
    push_instruction(tokenizer, &mut ids, system, instruction, input);
    ids
}

fn push_instruction(tokenizer: &Tokenizer, ids: &mut Vec<u32>, system: Option<&str>, instruction: &str, input: &str) {
    let parts = [system.unwrap_or_default(), instruction, input];
    let text = parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("\n");
    ids.push(tokenizer.roles().ins);
    ids.extend(tokenizer.encode(&text));
    ids.push(tokenizer.roles().ins);
}

fn push_output(tokenizer: &Tokenizer, ids: &mut Vec<u32>, output: &str) {
    ids.extend(tokenizer.encode(output));
    ids.push(tokenizer.roles().eos);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::rows::Writer;

    const EOS: u32 = 1;
    const INS: u32 = 3;

    /// Bytes alone: an ASCII character is its byte's place in GPT-2's alphabet, sorted, after 16
    /// reserved ids. Printable ones come first, from '!' on.
    fn bytes_only() -> (tempfile::TempDir, Tokenizer) {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(&folder.path().join("dataset")).unwrap();
        writer.push(&Row::Text { text: "x".into() }).unwrap();
        writer.finish().unwrap();
        let tokenizer = crate::tokenizer::train(&folder.path().join("dataset"), 272, &folder.path().join("tokenizer")).unwrap();
        (folder, tokenizer)
    }

    fn letter(character: char) -> u32 {
        16 + character as u32 - '!' as u32
    }

    /// Control characters and the space follow the 188 printable bytes, in their order.
    const NEWLINE: u32 = 16 + 188 + 10;

    fn turn(instruction: &str, input: &str, output: &str) -> Turn {
        Turn { instruction: instruction.into(), input: input.into(), output: output.into() }
    }

    #[test]
    fn a_turn_by_hand() {
        let (_folder, tokenizer) = bytes_only();
        let row = Row::Conversation { system: None, turns: vec![turn("ab", "", "c")] };
        let rendered = render(&tokenizer, &row);
        assert_eq!(rendered.ids, [INS, letter('a'), letter('b'), INS, letter('c'), EOS]);
        assert_eq!(rendered.supervised, vec![std::ops::Range { start: 4, end: 6 }]);
    }

    #[test]
    fn system_input_and_turns_by_hand() {
        let (_folder, tokenizer) = bytes_only();
        let row = Row::Conversation { system: Some("s".into()), turns: vec![turn("a", "i", "b"), turn("c", "", "")] };
        let rendered = render(&tokenizer, &row);
        let first = [INS, letter('s'), NEWLINE, letter('a'), NEWLINE, letter('i'), INS, letter('b'), EOS];
        assert_eq!(rendered.ids, [&first[..], &[INS, letter('c'), INS, EOS]].concat());
        assert_eq!(rendered.supervised, [7..9, 12..13]);
    }

    #[test]
    fn a_prompt_is_the_sequence_up_to_the_output() {
        let (_folder, tokenizer) = bytes_only();
        let turns = [turn("a [INS] b", "i", "b [EOS]"), turn("what?", "", "yes")];
        for system in [None, Some("be brief".to_owned())] {
            let rendered = render(&tokenizer, &Row::Conversation { system: system.clone(), turns: turns.to_vec() });
            for (index, turn) in turns.iter().enumerate() {
                let ids = prompt(&tokenizer, system.as_deref(), &turns[..index], &turn.instruction, &turn.input);
                assert_eq!(ids, rendered.ids[..rendered.supervised[index].start]);
                assert_eq!(ids.iter().filter(|&&id| id == INS).count(), 2 * (index + 1), "text opened a turn");
            }
        }
    }

    #[test]
    fn a_text_has_no_targets() {
        let (_folder, tokenizer) = bytes_only();
        let rendered = render(&tokenizer, &Row::Text { text: "a".into() });
        assert_eq!(rendered, Rendered { ids: vec![letter('a'), EOS], supervised: vec![] });
    }
}
