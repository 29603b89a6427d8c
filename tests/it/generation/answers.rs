//! What an answer says: whole and streamed, its length, its stops, its sampling, its prompt's forms.

use serde_json::{Value, json};

use super::{CHAT, COMPLETIONS, prompt_of, said, stack, streamed, token_names, with};
use crate::{
    handmade::{SCRIPT, endless, scripted},
    training::text,
};

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
