//! Log probabilities, as evaluation harnesses rely on them.

use serde_json::{Value, json};

use super::{CHAT, COMPLETIONS, said, stack, streamed, with};
use crate::{
    handmade::{endless, ids},
    training::text,
};

#[tokio::test]
async fn scores_are_exact_and_in_both_shapes() {
    let model = endless(128).with_template();
    let tokenizer = model.tokenizer();
    let (app, model) = stack(model).await;
    let prompt = ids(&tokenizer, "aé🙂b".as_bytes());
    let greedy = json!({"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 12, "logprobs": 3, "echo": true});
    let answer = app.post_json(COMPLETIONS, &greedy).await.ok();
    let logprobs = answer["choices"][0]["logprobs"].clone();
    let list = |name: &str| logprobs[name].as_array().expect("a list").clone();
    let (tokens, scores, tops, offsets) = (list("tokens"), list("token_logprobs"), list("top_logprobs"), list("text_offset"));
    assert!([&scores, &tops, &offsets].iter().all(|list| list.len() == tokens.len()) && tokens.len() == prompt.len() + 12);
    assert_eq!((&scores[0], &tops[0]), (&Value::Null, &Value::Null));
    assert_eq!(tokens[..3], [json!("a"), json!(r"bytes:\xc3"), json!(r"bytes:\xa9")]);
    // Characters, not bytes: é has two tokens, 🙂 four.
    assert_eq!(offsets[..8], [0, 1, 1, 2, 2, 2, 2, 3].map(Value::from));
    assert!(text(&answer["choices"][0]["text"]).starts_with("aé🙂b"));
    for (token, (score, top)) in tokens.iter().zip(scores.iter().zip(&tops)).skip(1) {
        let top = top.as_object().expect("a map");
        assert_eq!(top.len(), 3, "{token}: {top:?}");
        let best = top.values().filter_map(Value::as_f64).fold(f64::NEG_INFINITY, f64::max);
        let score = score.as_f64().expect("a number");
        assert!(score <= best + 1e-6 && score <= 0.0);
        if let Some(listed) = top.get(text(token)) {
            assert_eq!(listed.as_f64(), Some(score));
        }
    }
    for (token, top) in tokens.iter().zip(&tops).skip(prompt.len()) {
        assert!(top.as_object().expect("a map").contains_key(text(token)), "greedy takes the likeliest: {top}");
    }
    // The answer scored as a prompt has the same scores: what an evaluation harness relies on.
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| name_bytes(text(token))).collect();
    let scoring =
        json!({"model": model, "prompt": [ids(&tokenizer, &bytes), prompt], "max_tokens": 0, "echo": true, "logprobs": 3});
    let scored = app.post_json(COMPLETIONS, &scoring).await.ok();
    let again = scored["choices"][0]["logprobs"]["token_logprobs"].as_array().expect("a list");
    assert_eq!(again.len(), scores.len());
    for (again, score) in again.iter().zip(&scores).skip(1) {
        assert!((again.as_f64().expect("a number") - score.as_f64().expect("a number")).abs() < 1e-4);
    }
    assert_eq!(scored["choices"][1]["logprobs"]["tokens"].as_array().map(Vec::len), Some(prompt.len()));
    assert_eq!((&scored["usage"]["completion_tokens"], &scored["choices"][0]["finish_reason"]), (&json!(0), &json!("length")));
    // Streamed, the pieces add up to the same lists.
    let chunks = streamed(&app, COMPLETIONS, &greedy).await;
    let joined = |name: &str| -> Vec<Value> {
        let lists = chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"][name].as_array());
        lists.flatten().cloned().collect()
    };
    assert_eq!((said(&chunks, 0).as_str(), joined("tokens")), (text(&answer["choices"][0]["text"]), tokens));
    assert_eq!(joined("text_offset"), offsets);

    // Chat's shape: every token with its bytes, the alternatives best first.
    let chat = json!({"model": model, "messages": [{"role": "user", "content": "é"}], "temperature": 0, "max_tokens": 8, "logprobs": true, "top_logprobs": 4});
    let answer = app.post_json(CHAT, &chat).await.ok();
    let content = answer["choices"][0]["logprobs"]["content"].as_array().expect("a list").clone();
    assert_eq!(content.len(), 8);
    for entry in &content {
        let top = entry["top_logprobs"].as_array().expect("a list");
        assert_eq!((top.len(), &top[0]["bytes"], &top[0]["logprob"]), (4, &entry["bytes"], &entry["logprob"]));
        let falling: Vec<f64> = top.iter().filter_map(|one| one["logprob"].as_f64()).collect();
        assert!(falling.is_sorted_by(|a, b| a >= b) && falling.len() == 4);
    }
    let plain = app.post_json(CHAT, &with(&chat, json!({"logprobs": false, "top_logprobs": null}))).await.ok();
    assert_eq!(
        (&plain["choices"][0]["logprobs"], &plain["choices"][0]["message"]["content"]),
        (&Value::Null, &answer["choices"][0]["message"]["content"])
    );
    assert_eq!(app.post_json(CHAT, &with(&chat, json!({"logprobs": false}))).await.refused(422)["param"], "top_logprobs");
}

/// The bytes that a token's name in a completion's lists stands for.
fn name_bytes(name: &str) -> Vec<u8> {
    match name.strip_prefix("bytes:") {
        None => name.as_bytes().to_vec(),
        Some(bytes) => bytes.split("\\x").skip(1).map(|hex| u8::from_str_radix(hex, 16).expect("two digits")).collect(),
    }
}
