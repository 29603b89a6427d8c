//! The stock `openai` Python SDK against a whole stack; the script is `tests/clients/openai_python.py`.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use lathe_tests::TestApp;

use crate::training;

#[tokio::test]
async fn the_stock_openai_sdk_is_content() {
    let app = TestApp::builder().argument("--requests-per-minute=600").start().await;
    let base = training::pretrained(&app).await;
    let (url, key) = (app.url.clone(), app.key.clone());
    let ran = tokio::task::spawn_blocking(move || {
        let mut script = python("openai_python.py");
        script.env("PYTHONPATH", packages());
        script.env("LATHE_URL", url).env("LATHE_KEY", key).env("LATHE_BASE_MODEL", base);
        script.output().expect("python3 runs")
    });
    let output = ran.await.expect("the script ran");
    assert!(output.status.success(), "{}\n{}", said(&output), app.log_text());
}

fn python(script: &str) -> Command {
    let mut python = Command::new("python3");
    python.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("clients").join(script));
    python
}

/// The folder with the SDK and what it needs, fetched once.
fn packages() -> PathBuf {
    let fetched = python("tools.py").arg("python").output().expect("python3 runs");
    assert!(fetched.status.success(), "{}", said(&fetched));
    PathBuf::from(String::from_utf8_lossy(&fetched.stdout).trim())
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}
