//! Completions and chat over HTTP, on models whose every word is known.

use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream::BoxStream};
use lathe_api::state::ApiConfig;
use lathe_tests::{PATIENCE, TestApp, within};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::{
    api::{Api, answer},
    handmade::{Handmade, SCRIPT, endless, ids, scripted},
    training::text,
};

pub const COMPLETIONS: &str = "/v1/completions";
pub const CHAT: &str = "/v1/chat/completions";

/// With the changes of `more`.
pub fn with(body: &Value, more: Value) -> Value {
    let mut body = body.clone();
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    body
}

/// A stream of events as it arrives.
pub struct Live {
    bytes: BoxStream<'static, reqwest::Result<Vec<u8>>>,
    buffer: String,
    /// Comments seen so far.
    pub comments: usize,
}

impl Live {
    pub async fn open(request: reqwest::RequestBuilder) -> Live {
        let response = request.send().await.expect("an answer");
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let bytes = response.bytes_stream().map(|chunk| chunk.map(|bytes| bytes.to_vec())).boxed();
        Live { bytes, buffer: String::new(), comments: 0 }
    }

    /// The next event; the text `[DONE]` as a JSON string.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            while let Some(end) = self.buffer.find('\n') {
                let line: String = self.buffer.drain(..=end).collect();
                match line.trim_end() {
                    "" => {}
                    comment if comment.starts_with(':') => self.comments += 1,
                    line => {
                        let data = line.strip_prefix("data: ").unwrap_or_else(|| panic!("not an event: {line}"));
                        return Some(serde_json::from_str(data).unwrap_or_else(|_| Value::from(data)));
                    }
                }
            }
            let bytes = self.bytes.next().await?.expect("the connection holds");
            self.buffer += std::str::from_utf8(&bytes).expect("events are text");
        }
    }

    pub async fn rest(mut self) -> Vec<Value> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}

pub async fn open(app: &TestApp, path: &str, body: &Value) -> Live {
    Live::open(app.request(Method::POST, path).json(&with(body, json!({"stream": true})))).await
}

/// The chunks of a stream that must end well.
async fn streamed(app: &TestApp, path: &str, body: &Value) -> Vec<Value> {
    let mut events = open(app, path, body).await.rest().await;
    assert_eq!(events.pop(), Some("[DONE]".into()));
    events
}

/// Text of a choice in a completion's or a chat's chunks or whole answers.
fn said(objects: &[Value], index: u64) -> String {
    let choices = objects.iter().flat_map(|object| object["choices"].as_array().expect("choices"));
    let texts = choices.filter(|choice| choice["index"] == index).map(|choice| {
        let texts = [&choice["text"], &choice["delta"]["content"], &choice["message"]["content"]];
        texts.into_iter().filter_map(Value::as_str).collect::<String>()
    });
    texts.collect()
}

/// Names of tokens in the log probabilities of either shape.
fn token_names(objects: &[Value]) -> Vec<String> {
    let mut names = Vec::new();
    for logprobs in
        objects.iter().flat_map(|object| object["choices"].as_array().expect("choices")).map(|choice| &choice["logprobs"])
    {
        names.extend(logprobs["tokens"].as_array().into_iter().flatten().map(|name| text(name).to_owned()));
        names.extend(logprobs["content"].as_array().into_iter().flatten().map(|entry| text(&entry["token"]).to_owned()));
    }
    names
}

async fn stack(model: Handmade) -> (TestApp, String) {
    let app = TestApp::start().await;
    let model = model.register(&app).await;
    (app, model)
}

/// A prompt of one token, so that a scripted model answers with its whole script.
fn prompt_of(model: &str) -> Value {
    json!({"model": model, "prompt": "x", "temperature": 0, "max_tokens": 64})
}

#[tokio::test]
async fn whole_and_streamed_answers_agree() {
    let (app, model) = stack(scripted("The wörld is round.").with_template()).await;
    let completion = prompt_of(&model);
    // A chat's prompt is its text between two reserved tokens.
    let chat =
        json!({"model": model, "messages": [{"role": "user", "content": ""}], "temperature": 0, "max_completion_tokens": 64});
    for (path, body, prompt_tokens, expected) in
        [(COMPLETIONS, completion, 1, "The wörld is round."), (CHAT, chat, 2, "he wörld is round.")]
    {
        let whole = app.post_json(path, &body).await.ok();
        assert_eq!(said(std::slice::from_ref(&whole), 0), expected);
        assert_eq!(whole["choices"][0]["finish_reason"], "stop");
        let completion_tokens = expected.len();
        let usage = json!({"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens});
        assert_eq!(whole["usage"], usage);

        let chunks = streamed(&app, path, &body).await;
        assert_eq!(said(&chunks, 0), expected);
        assert!(chunks.len() > 10, "it comes in pieces");
        assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()), "no usage was asked for");
        assert!(chunks.iter().all(|chunk| chunk["id"] == chunks[0]["id"] && chunk["model"] == *model));
        let reasons: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]["finish_reason"]).collect();
        assert_eq!(reasons.last(), Some(&&json!("stop")));
        assert!(reasons[..reasons.len() - 1].iter().all(|reason| reason.is_null()));

        let chunks = streamed(&app, path, &with(&body, json!({"stream_options": {"include_usage": true}}))).await;
        let (last, others) = chunks.split_last().expect("chunks");
        assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &usage));
        assert!(others.iter().all(|chunk| chunk.get("usage") == Some(&Value::Null)), "{others:?}");
    }
    let opening =
        &streamed(&app, CHAT, &json!({"model": model, "messages": [{"role": "user", "content": "a"}], "temperature": 0})).await
            [0];
    assert_eq!(opening["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
}

#[tokio::test]
async fn the_length_ends_an_answer() {
    let (app, model) = stack(scripted("abcdefgh").with_template()).await;
    let chat = json!({"model": model, "messages": [{"role": "user", "content": ""}], "temperature": 0});
    for limit in ["max_tokens", "max_completion_tokens"] {
        let answer = app.post_json(CHAT, &with(&chat, json!({ limit: 3 }))).await.ok();
        assert_eq!(
            (&answer["choices"][0]["message"]["content"], &answer["choices"][0]["finish_reason"]),
            (&json!("bcd"), &json!("length"))
        );
        assert_eq!(answer["usage"]["completion_tokens"], 3);
        app.post_json(CHAT, &with(&chat, json!({ limit: 0 }))).await.refused(400);
    }
    let both = app.post_json(CHAT, &with(&chat, json!({"max_tokens": 3, "max_completion_tokens": 3}))).await;
    assert_eq!(both.refused(422)["param"], "max_tokens");
    // OpenAI's default for completions.
    let endless = endless(64).register(&app).await;
    let answer = app.post_json(COMPLETIONS, &json!({"model": endless, "prompt": "x"})).await.ok();
    assert_eq!((&answer["usage"]["completion_tokens"], &answer["choices"][0]["finish_reason"]), (&json!(16), &json!("length")));
    // The context's end is the last length.
    let answer = app.post_json(COMPLETIONS, &json!({"model": endless, "prompt": "x", "max_tokens": 1000})).await.ok();
    assert_eq!(answer["usage"]["completion_tokens"], 63);
}

#[tokio::test]
async fn nothing_of_a_stop_string_is_ever_sent() {
    let (app, model) = stack(scripted("Hello wörld→é🙂 and on").with_template()).await;
    let cases = [
        (json!("wör"), "Hello "),
        (json!("→é"), "Hello wörld"),
        (json!(["🙂 a", "é"]), "Hello wörld→"),
        (json!(["rld→é🙂", "ld"]), "Hello wör"),
        // The one that is whole first wins, though another began before it.
        (json!(["lo w", "llo wör", "zzz"]), "Hel"),
        // Its bytes begin like those of characters that are there.
        (json!(["→è", "ö→"]), "Hello wörld→é🙂 and on"),
        (json!("H"), ""),
    ];
    let chat = json!({"model": model, "messages": [{"role": "user", "content": ""}], "temperature": 0, "logprobs": true, "top_logprobs": 1});
    let completion = with(&prompt_of(&model), json!({"logprobs": 1}));
    for (stop, expected) in cases {
        for (path, body, expected) in [(COMPLETIONS, &completion, expected), (CHAT, &chat, expected.get(1..).unwrap_or_default())]
        {
            // Chat answers from the second letter on, and so never says the first.
            if path == CHAT && stop == "H" {
                continue;
            }
            let body = with(body, json!({ "stop": stop }));
            let whole = [app.post_json(path, &body).await.ok()];
            let chunks = streamed(&app, path, &body).await;
            for objects in [&whole[..], &chunks[..]] {
                assert_eq!(said(objects, 0), expected, "{stop}");
                assert_eq!(token_names(objects).len(), expected.len(), "{stop}: {:?}", token_names(objects));
            }
            assert_eq!(whole[0]["choices"][0]["finish_reason"], "stop");
        }
    }
    for stop in [json!(""), json!(["a", "b", "c", "d", "e"]), json!([""]), json!(7)] {
        let refused = app.post_json(COMPLETIONS, &with(&completion, json!({ "stop": stop }))).await.refused(400);
        assert!(text(&refused["param"]).starts_with("stop"), "{refused}");
    }
}

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

#[tokio::test]
async fn sampling_does_what_its_settings_say() {
    let (app, model) = stack(endless(128)).await;
    let base = json!({"model": model, "prompt": "x", "max_tokens": 24, "temperature": 1.0, "seed": 7});
    let ask = async |more: Value| app.post_json(COMPLETIONS, &with(&base, more)).await.ok();
    let first = said(&[ask(json!({})).await], 0);
    assert_eq!(said(&[ask(json!({})).await], 0), first, "the same seed");
    assert_ne!(said(&[ask(json!({"seed": 8})).await], 0), first, "another seed");
    // A choice's stream depends on the seed alone, not on its neighbours.
    let three = ask(json!({"n": 3})).await;
    for choice in 0..3 {
        assert_eq!(said(std::slice::from_ref(&three), choice), said(&[ask(json!({"seed": 7 + choice})).await], 0));
    }
    assert_eq!((&three["usage"]["completion_tokens"], &three["usage"]["prompt_tokens"]), (&json!(72), &json!(1)));
    let greedy = said(&[ask(json!({"temperature": 0})).await], 0);
    assert_ne!(greedy, first);
    for same in [
        json!({"temperature": 0, "seed": 99}),
        json!({"top_k": 1}),
        json!({"top_p": 0.0}),
        json!({"temperature": 2.0, "top_k": 1}),
    ] {
        assert_eq!(said(&[ask(same.clone()).await], 0), greedy, "{same}");
    }
    // top_k: what is said is always among the k likeliest.
    let five = ask(json!({"top_k": 5, "temperature": 2.0, "logprobs": 5})).await;
    let logprobs = &five["choices"][0]["logprobs"];
    let names = logprobs["tokens"].as_array().expect("a list").iter().zip(logprobs["top_logprobs"].as_array().expect("a list"));
    assert!(names.into_iter().all(|(name, top)| top.as_object().expect("a map").contains_key(text(name))), "{logprobs}");
    for (field, bad) in [
        ("temperature", json!(-0.1)),
        ("temperature", json!(2.1)),
        ("top_p", json!(1.1)),
        ("top_p", json!(-1)),
        ("top_k", json!(-1)),
        ("n", json!(0)),
        ("n", json!(17)),
        ("max_tokens", json!(-1)),
        ("logprobs", json!(6)),
        ("seed", json!(1.5)),
        ("best_of", json!(2)),
        ("stream_options", json!({"include_usage": 1})),
    ] {
        let refused = app.post_json(COMPLETIONS, &with(&base, json!({ field: bad }))).await.refused(400);
        assert!(text(&refused["param"]).starts_with(field), "{field} {bad}: {refused}");
    }
    for (more, param) in
        [(json!({"max_tokens": 0}), "max_tokens"), (json!({"stream_options": {"include_usage": true}}), "stream_options")]
    {
        assert_eq!(app.post_json(COMPLETIONS, &with(&base, more)).await.refused(422)["param"], param);
    }
}

#[tokio::test]
async fn prompts_come_in_four_forms_and_within_the_context() {
    let model = scripted("0123456789").with_template();
    let tokenizer = model.tokenizer();
    let (app, model) = stack(model).await;
    let base = json!({"model": model, "temperature": 0, "max_tokens": 1});
    let ask = async |prompt: Value| app.post_json(COMPLETIONS, &with(&base, json!({ "prompt": prompt }))).await;
    // A scripted answer counts the prompt's tokens.
    assert_eq!(said(&[ask(json!("abc")).await.ok()], 0), "2");
    assert_eq!(said(&[ask(json!([40, 41, 42, 43])).await.ok()], 0), "3");
    assert_eq!(said(&[ask(json!("")).await.ok()], 0), "0", "an empty prompt begins behind an end");
    for several in [json!(["abc", "é", ""]), json!([[40, 41, 42], [40, 41], [1]])] {
        let answer = ask(several).await.ok();
        let texts: Vec<String> = (0..3).map(|index| said(std::slice::from_ref(&answer), index)).collect();
        assert_eq!((texts, &answer["usage"]["prompt_tokens"]), (vec!["2".into(), "1".into(), "0".into()], &json!(6)));
    }
    let answer = app.post_json(COMPLETIONS, &with(&base, json!({"prompt": ["a", "ab"], "n": 2, "echo": true}))).await.ok();
    let texts: Vec<String> = (0..4).map(|index| said(std::slice::from_ref(&answer), index)).collect();
    assert_eq!(texts, ["a0", "a0", "ab1", "ab1"]);
    for (prompt, param) in [
        (json!([]), "prompt"),
        (json!([[]]), "prompt"),
        (json!(["a", 1]), "prompt"),
        (json!([-1]), "prompt"),
        (json!(null), "prompt"),
    ] {
        let refused = ask(prompt.clone()).await.refused(400);
        assert!(text(&refused["param"]).starts_with(param), "{prompt}: {refused}");
    }
    assert_eq!(ask(json!([40, 272])).await.refused(422)["param"], "prompt[1]");
    assert_eq!(ask(json!([[40], [40, 41, 999]])).await.refused(422)["param"], "prompt[1][2]");

    // The names of reserved tokens are text like any other.
    let reserved = "[INS][EOS]";
    assert_eq!(ask(json!(reserved)).await.ok()["usage"]["prompt_tokens"], reserved.len());
    let chat = json!({"model": model, "temperature": 0, "max_tokens": 1, "messages": [{"role": "user", "content": reserved}]});
    assert_eq!(app.post_json(CHAT, &chat).await.ok()["usage"]["prompt_tokens"], reserved.len() + 2);
    assert_eq!(tokenizer.encode(reserved).len(), reserved.len());

    // Too long by one, and just right.
    let long = "x".repeat(SCRIPT);
    let refused = ask(json!(long)).await.refused(400);
    assert_eq!((&refused["code"], &refused["param"]), (&json!("context_length_exceeded"), &json!("prompt")));
    assert!(text(&refused["message"]).contains(&SCRIPT.to_string()), "{refused}");
    assert_eq!(ask(json!(["a", long])).await.refused(400)["param"], "prompt[1]");
    ask(json!("x".repeat(SCRIPT - 1))).await.ok();
    app.post_json(COMPLETIONS, &with(&base, json!({"prompt": long, "echo": true, "max_tokens": 0}))).await.ok();
    let chat = with(&chat, json!({"messages": [{"role": "user", "content": "x".repeat(SCRIPT - 2)}], "stream": true}));
    let refused = app.post_json(CHAT, &chat).await.refused(400);
    assert_eq!((&refused["code"], &refused["param"]), (&json!("context_length_exceeded"), &json!("messages")));

    let bare = scripted("a").register(&app).await;
    let refused = app.post_json(CHAT, &json!({"model": bare, "messages": [{"role": "user", "content": "a"}]})).await.refused(400);
    assert_eq!((&refused["code"], &refused["param"]), (&json!("no_chat_template"), &json!("model")));
}

/// Answers of 32 clients to requests of their own, with their log probabilities: one at a time, then
/// all at once.
async fn alone_and_together(app: &TestApp, model: &str) -> [Vec<Value>; 2] {
    let request = |index: usize| {
        let prompt: String = (0..1 + index * 5 % 29).map(|at| char::from(b'a' + ((index * 31 + at * 17) % 26) as u8)).collect();
        json!({"model": model, "prompt": prompt, "max_tokens": 20 + index % 9, "logprobs": 5, "seed": index, "temperature": index % 2})
    };
    let mut alone = Vec::new();
    for index in 0..32 {
        alone.push(app.post_json(COMPLETIONS, &request(index)).await.ok());
    }
    let asked = (0..32).map(async |index| app.post_json(COMPLETIONS, &request(index)).await.ok());
    [alone, futures_util::future::join_all(asked).await]
}

#[tokio::test]
async fn thirty_two_answers_at_once_equal_the_same_one_by_one() {
    let (app, model) = stack(endless(128)).await;
    let [alone, together] = alone_and_together(&app, &model).await;
    let mut compared = 0;
    for (index, (alone, together)) in alone.iter().zip(&together).enumerate() {
        let [a, b] = [alone, together].map(|answer| &answer["choices"][0]["logprobs"]);
        let tokens = a["tokens"].as_array().expect("a list").len();
        for at in 0..tokens {
            let [score, other] = [a, b].map(|logprobs| logprobs["token_logprobs"][at].as_f64().expect("a number"));
            if a["tokens"][at] != b["tokens"][at] {
                // Greedy, the likeliest two must be as good as equal; drawn, the number fell on a border.
                assert!(index % 2 == 1 || (score - other).abs() < 1e-4, "{index}: {a} {b}");
                break;
            }
            assert!((score - other).abs() < 1e-4, "{index}: {score} {other}");
            compared += 1;
        }
    }
    assert!(compared > 700, "{compared} tokens were compared");
}

#[tokio::test]
async fn deterministic_decoding_is_equal_to_the_bit() {
    let app = TestApp::builder().argument("--deterministic-decode").start().await;
    let model = endless(128).register(&app).await;
    let [alone, together] = alone_and_together(&app, &model).await;
    for (alone, together) in alone.iter().zip(&together) {
        assert_eq!(alone["choices"], together["choices"]);
    }
}

/// What the engine says of itself, once there is one: a stream is open before its model is loaded.
async fn engine_load(app: &TestApp) -> Value {
    let db = PgPool::connect(&app.database_url()).await.expect("the stack's database");
    let began = Instant::now();
    let (address, secret): (String, String) = loop {
        let ready = sqlx::query_as("SELECT address, secret FROM replicas WHERE state = 'ready'").fetch_optional(&db);
        if let Some(replica) = ready.await.expect("the table is there") {
            break replica;
        }
        assert!(began.elapsed() < PATIENCE, "no engine is ready");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    db.close().await;
    assert_eq!(app.client.get(format!("http://{address}/load")).send().await.expect("an answer").status(), 401);
    app.send(app.client.get(format!("http://{address}/load")).bearer_auth(secret)).await.ok()
}

#[tokio::test]
async fn thirty_two_streams_progress_together_and_stop_when_their_clients_go() {
    let (app, model) = stack(endless(8192)).await;
    let body = json!({"model": model, "prompt": "x", "max_tokens": 8000});
    let mut streams = futures_util::future::join_all((0..32).map(|_| open(&app, COMPLETIONS, &body))).await;
    for round in 0..20 {
        // Nobody has to end for another to go on.
        let pieces = futures_util::future::join_all(streams.iter_mut().map(Live::next)).await;
        assert!(pieces.iter().flatten().all(|piece| piece["choices"][0]["finish_reason"].is_null()), "in round {round}");
    }
    let load = engine_load(&app).await;
    assert_eq!(load["open"], 32);
    streams.truncate(1);
    let began = Instant::now();
    while engine_load(&app).await["open"] != 1 {
        assert!(began.elapsed() < Duration::from_secs(10), "sequences without a client go on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // A client that waits for the whole answer counts no less.
    let waiting = tokio::spawn(app.request(Method::POST, COMPLETIONS).json(&body).send());
    while engine_load(&app).await["open"] != 2 {
        assert!(began.elapsed() < Duration::from_secs(20), "the request does not arrive");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    waiting.abort();
    drop(streams);
    while engine_load(&app).await["open"] != 0 {
        assert!(began.elapsed() < Duration::from_secs(30), "sequences without a client go on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let load = engine_load(&app).await;
    assert!(load["generated_tokens"].as_u64() < Some(33 * 8000 / 2), "they were stopped, not finished: {load}");
    // What has stopped computes nothing more.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(engine_load(&app).await["steps"], load["steps"]);
}

#[tokio::test]
async fn a_full_queue_refuses_and_lets_in_who_comes_when_there_is_room() {
    let (app, model) = stack(endless(8192)).await;
    let body = json!({"model": model, "prompt": "x", "max_tokens": 8000, "n": 16});
    // 32 run and 256 wait: eighteen requests of sixteen sequences.
    let mut full = futures_util::future::join_all((0..18).map(|_| open(&app, COMPLETIONS, &body))).await;
    engine_load(&app).await;
    let began = Instant::now();
    while engine_load(&app).await["open"] != 288 {
        assert!(began.elapsed() < Duration::from_secs(20), "the queue is not full");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let one = with(&body, json!({"n": 1, "max_tokens": 1}));
    let answer = app.post_json(COMPLETIONS, &one).await;
    assert!(answer.headers.contains_key("retry-after"));
    assert_eq!(answer.refused(429)["type"], "rate_limit_error");
    full.clear();
    while app.post_json(COMPLETIONS, &one).await.status != StatusCode::OK {
        assert!(began.elapsed() < Duration::from_secs(40), "there is no room");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The last event of a stream that breaks off.
pub async fn broken(stream: Live) -> Value {
    let events = stream.rest().await;
    assert!(!events.contains(&"[DONE]".into()), "a broken answer is not done");
    let last = events.last().expect("an error event");
    assert_eq!(last["error"]["type"], "server_error", "{last}");
    assert!(events[..events.len() - 1].iter().all(|event| event.get("error").is_none()));
    last["error"].clone()
}

#[tokio::test]
async fn a_deleted_model_ends_its_streams_with_an_error() {
    let (app, model) = stack(endless(16_384)).await;
    let body = json!({"model": model, "prompt": "x", "max_tokens": 16_000, "n": 2});
    let mut stream = open(&app, COMPLETIONS, &body).await;
    stream.next().await.expect("it has begun");
    let whole = app.post_json(COMPLETIONS, &body);
    let deletion = async {
        while engine_load(&app).await["open"] != 4 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        app.delete(&format!("/v1/models/{model}")).await.ok();
    };
    let (refused, ()) = tokio::join!(whole, deletion);
    assert_eq!(broken(stream).await["code"], "model_unloaded");
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(refused.refused(503)["code"], "model_unloaded");
    assert_eq!(app.post_json(COMPLETIONS, &body).await.refused(404)["code"], "model_not_found");
    within(Duration::from_secs(10), "its engine goes", || app.processes(lathe_tests::Kind::Engine).is_empty().then_some(()));
}

#[tokio::test]
async fn an_answer_has_a_deadline() {
    let app = TestApp::builder().argument("--generation-seconds").argument("1").start().await;
    let model = endless(16_384).register(&app).await;
    let body = json!({"model": model, "prompt": "x", "max_tokens": 16_000, "n": 8});
    let answer = app.post_json(COMPLETIONS, &body).await;
    assert_eq!(answer.headers["x-should-retry"], "false");
    let refused = answer.refused(504);
    assert_eq!(refused["code"], "generation_deadline");
    assert!(text(&refused["message"]).contains("1 seconds"), "{refused}");
    assert_eq!(broken(open(&app, COMPLETIONS, &body).await).await["code"], "generation_deadline");
    let began = Instant::now();
    while engine_load(&app).await["open"] != 0 {
        assert!(began.elapsed() < Duration::from_secs(10), "late answers are still computed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn loading_is_waited_for_and_then_refused(db: PgPool) {
    let config = ApiConfig {
        loading_patience: Duration::from_millis(1500),
        stream_comments: Duration::from_millis(100),
        disk_low_bytes: 0,
        ..ApiConfig::default()
    };
    // No runner is there, so nothing is ever loaded.
    let api = Api::start_with(db, config).await;
    let model = scripted("a").register_in(&api.state.db, api.artifacts.path()).await;
    let body = json!({"model": model, "prompt": "x"});
    let response = api.request(Method::POST, COMPLETIONS).json(&body).send().await.expect("an answer");
    assert!(response.headers().contains_key("retry-after"));
    assert_eq!(response.status(), 503);
    assert_eq!(response.json::<Value>().await.expect("a refusal")["error"]["code"], "model_loading");
    let mut stream = Live::open(api.request(Method::POST, COMPLETIONS).json(&with(&body, json!({"stream": true})))).await;
    let error = stream.next().await.expect("an event");
    assert_eq!(error["error"]["code"], "model_loading");
    assert!(stream.comments > 0, "the connection was kept alive");
    assert_eq!(stream.next().await, None, "nothing follows an error");
    let queued: i64 = sqlx::query_scalar("SELECT count(*) FROM replicas WHERE state = 'queued'")
        .fetch_one(&api.state.db)
        .await
        .expect("a count");
    assert_eq!(queued, 1, "one replica is asked for, whoever asks");

    // Whoever waits for a model that is deleted hears so, and asks for no replica of what is gone.
    let waiting = tokio::spawn(answer(api.request(Method::POST, COMPLETIONS).json(&body)));
    let (status, _) = api.delete(&format!("/v1/models/{model}")).await;
    assert_eq!(status, 200);
    let (status, body) = waiting.await.expect("no panic");
    assert_eq!((status.as_u16(), &body["error"]["code"]), (404, &json!("model_not_found")));
}
