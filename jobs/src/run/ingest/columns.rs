//! From the keys of one record to a [`Row`], whatever format the record came in.

use lathe_model::data::rows::{Row, Turn};
use serde_json::{Map, Value};

use super::{
    errors::{RowCode, RowError, shown},
    spec::{Columns, Role},
};

/// Which keys stand for an instruction and its output where no columns are named, by precedence.
const PAIRS: [(&str, &str); 3] = [("instruction", "output"), ("prompt", "completion"), ("question", "answer")];

/// Refuses a mapping that names parts of rows of different shapes.
pub fn check(columns: &Columns) -> Result<(), String> {
    let has = |role| columns.contains_key(&role);
    let pair = [Role::Instruction, Role::Input, Role::Output, Role::System].into_iter().find(|role| has(*role));
    let shapes = [has(Role::Text).then_some(Role::Text), has(Role::Messages).then_some(Role::Messages), pair];
    let mut named = shapes.into_iter().flatten();
    match (named.next(), named.next()) {
        (Some(one), Some(other)) => Err(format!(
            "a row is one of text, messages, or instruction and output: `{}` and `{}` exclude each other",
            one.as_str(),
            other.as_str()
        )),
        _ => Ok(()),
    }
}

/// The keys that [`row`] may read, which a columnar file need not read beyond.
pub fn keys(columns: &Columns) -> Vec<&str> {
    let own = [Role::Instruction, Role::Input, Role::Output, Role::System, Role::Text, Role::Messages];
    let mut keys: Vec<&str> = own.iter().map(|role| key(columns, *role)).collect();
    if columns.is_empty() {
        keys.extend(PAIRS.iter().flat_map(|(instruction, output)| [*instruction, *output]));
    }
    keys
}

/// The row that a record's keys spell.
pub fn row(columns: &Columns, record: &Map<String, Value>) -> Result<Row, RowError> {
    shape(columns, record).map_err(|error| error.with_keys(record.keys().map(String::as_str)))
}

fn shape(columns: &Columns, record: &Map<String, Value>) -> Result<Row, RowError> {
    if columns.is_empty() {
        let has = |key: &str| record.get(key).is_some_and(|value| !value.is_null());
        if has("messages") {
            return messages("messages", record);
        }
        if let Some((instruction, output)) = PAIRS.iter().find(|(instruction, output)| has(instruction) && has(output)) {
            return pair(columns, instruction, output, record);
        }
        // Half of a pair is told what is missing, also beside a text: which of the two was meant is not
        // ours to guess.
        if let Some((instruction, output)) = PAIRS.iter().find(|(instruction, output)| has(instruction) || has(output)) {
            return pair(columns, instruction, output, record);
        }
        if has("text") {
            return document("text", record);
        }
        let message = "no known key: a row has `text`, `messages`, `instruction` and `output`, `prompt` and `completion`, or \
                       `question` and `answer`; for other keys give `columns`";
        return Err(RowError::new(RowCode::MissingField, None, message));
    }
    if columns.contains_key(&Role::Messages) {
        messages(key(columns, Role::Messages), record)
    } else if columns.contains_key(&Role::Text) {
        document(key(columns, Role::Text), record)
    } else {
        pair(columns, key(columns, Role::Instruction), key(columns, Role::Output), record)
    }
}

fn key(columns: &Columns, role: Role) -> &str {
    columns.get(&role).map_or(role.as_str(), String::as_str)
}

fn document(key: &str, record: &Map<String, Value>) -> Result<Row, RowError> {
    let text = required(key, record)?;
    if text.trim().is_empty() {
        return Err(RowError::new(RowCode::Empty, Some(key), format!("`{}` is empty", shown(key))));
    }
    Ok(Row::Text { text: text.to_owned() })
}

fn pair(columns: &Columns, instruction: &str, output: &str, record: &Map<String, Value>) -> Result<Row, RowError> {
    let input_key = key(columns, Role::Input);
    let (instruction_text, output_text) = (required(instruction, record)?, required(output, record)?);
    let input = optional(input_key, record)?.unwrap_or_default();
    let system = optional(key(columns, Role::System), record)?.filter(|text| !text.trim().is_empty());
    if output_text.trim().is_empty() {
        return Err(RowError::new(
            RowCode::Empty,
            Some(output),
            format!("`{}` is empty: there is nothing to learn", shown(output)),
        ));
    }
    if instruction_text.trim().is_empty() && input.trim().is_empty() {
        return Err(RowError::new(RowCode::Empty, Some(instruction), format!("`{}` is empty", shown(instruction))));
    }
    let turn = Turn { instruction: instruction_text.to_owned(), input: input.to_owned(), output: output_text.to_owned() };
    Ok(Row::Conversation { system: system.map(str::to_owned), turns: vec![turn] })
}

fn required<'a>(key: &str, record: &'a Map<String, Value>) -> Result<&'a str, RowError> {
    optional(key, record)?.ok_or_else(|| RowError::new(RowCode::MissingField, Some(key), format!("`{}` is missing", shown(key))))
}

fn optional<'a>(key: &str, record: &'a Map<String, Value>) -> Result<Option<&'a str>, RowError> {
    match record.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => {
            Err(RowError::new(RowCode::WrongType, Some(key), format!("`{}` is {}, and must be a text", shown(key), kind(other))))
        }
    }
}

/// What a value is, with its article.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// A chat: perhaps a system message, then user and assistant in turn, the assistant last.
fn messages(key: &str, record: &Map<String, Value>) -> Result<Row, RowError> {
    let at = |index: usize, part: &str| format!("{}[{index}]{part}", shown(key));
    let list = match record.get(key) {
        Some(Value::Array(list)) => list,
        None | Some(Value::Null) => {
            return Err(RowError::new(RowCode::MissingField, Some(key), format!("`{}` is missing", shown(key))));
        }
        Some(other) => {
            let message = format!("`{}` is {}, and must be an array of messages", shown(key), kind(other));
            return Err(RowError::new(RowCode::WrongType, Some(key), message));
        }
    };
    let (mut system, mut turns, mut asked) = (None, Vec::new(), None::<String>);
    for (index, message) in list.iter().enumerate() {
        let bad = |part: &str, message: String| RowError::new(RowCode::BadMessages, Some(&at(index, part)), message);
        let (role, text) = message_parts(message).map_err(|(part, what)| bad(part, format!("message {}: {what}", index + 1)))?;
        match role {
            "system" | "developer" if index == 0 => system = Some(text).filter(|text| !text.trim().is_empty()),
            "system" | "developer" => {
                return Err(bad(".role", format!("message {}: a system message must come first", index + 1)));
            }
            "user" if asked.is_none() => asked = Some(text),
            "user" => return Err(bad(".role", format!("message {}: two user messages without an answer between", index + 1))),
            "assistant" => {
                let instruction = asked.take().ok_or_else(|| {
                    bad(".role", format!("message {}: an assistant message must follow a user message", index + 1))
                })?;
                if text.trim().is_empty() {
                    return Err(bad(
                        ".content",
                        format!("message {}: the answer is empty: there is nothing to learn", index + 1),
                    ));
                }
                turns.push(Turn { instruction, input: String::new(), output: text });
            }
            other => {
                let what = format!("message {}: role `{}` is not one of system, user, assistant", index + 1, shown(other));
                return Err(bad(".role", what));
            }
        }
    }
    if turns.is_empty() || asked.is_some() {
        let message = format!("`{}` must end with an assistant message", shown(key));
        return Err(RowError::new(RowCode::BadMessages, Some(key), message));
    }
    Ok(Row::Conversation { system, turns })
}

/// Role and text of a message, or the part that is wrong and why.
fn message_parts(message: &Value) -> Result<(&str, String), (&'static str, String)> {
    let Value::Object(message) = message else { return Err(("", format!("is {}, and must be an object", kind(message)))) };
    for unsupported in ["tool_calls", "function_call"] {
        if message.get(unsupported).is_some_and(|value| !value.is_null()) {
            return Err(("", format!("`{unsupported}` is not supported")));
        }
    }
    if message.get("weight").is_some_and(|weight| weight.as_f64() != Some(1.0) && !weight.is_null()) {
        return Err((".weight", "only weight 1 is supported".to_owned()));
    }
    let role = match message.get("role") {
        Some(Value::String(role)) => role.as_str(),
        _ => return Err((".role", "has no `role`".to_owned())),
    };
    let text = match message.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => parts.iter().map(text_part).collect::<Result<String, _>>()?,
        None | Some(Value::Null) => return Err((".content", "has no `content`".to_owned())),
        Some(other) => {
            return Err((".content", format!("`content` is {}, and must be a text or a list of text parts", kind(other))));
        }
    };
    Ok((role, text))
}

fn text_part(part: &Value) -> Result<&str, (&'static str, String)> {
    match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
        (Some("text"), Some(text)) => Ok(text),
        _ => Err((".content", "only parts of type `text` are supported".to_owned())),
    }
}
