//! The stock `openai` Python SDK against a whole stack; the script is `tests/openai_sdk.py`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use lathe_tests::TestApp;

use crate::training;

/// Its wheels are kept in the cache folder under this version.
const OPENAI: &str = "3.57.0";

#[tokio::test]
async fn the_stock_openai_sdk_is_content() {
    let app = TestApp::start().await;
    let base = training::pretrained(&app).await;
    let (url, key) = (app.url.clone(), app.key.clone());
    let ran = tokio::task::spawn_blocking(move || {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("openai_sdk.py");
        let mut python = Command::new("python3");
        python.arg(script).env("PYTHONPATH", sdk());
        python.env("LATHE_URL", url).env("LATHE_KEY", key).env("LATHE_BASE_MODEL", base);
        python.output().expect("python3 runs")
    });
    let output = ran.await.expect("the script ran");
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{}", app.log_text());
}

/// The folder with the SDK, fetched once.
fn sdk() -> PathBuf {
    let cache = std::env::var_os("LATHE_CACHE").map(PathBuf::from).or_else(|| Some(std::env::home_dir()?.join(".cache/lathe")));
    let cache = cache.expect("a home or LATHE_CACHE");
    let folder = cache.join(format!("openai-{OPENAI}"));
    if folder.is_dir() {
        return folder;
    }
    std::fs::create_dir_all(&cache).expect("the cache can be written");
    let staged = tempfile::tempdir_in(&cache).expect("the cache can be written");
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:", "--target"]);
    let fetched = pip.arg(staged.path()).arg(format!("openai=={OPENAI}")).output().expect("pip runs");
    assert!(fetched.status.success(), "openai {OPENAI} cannot be fetched: {}", String::from_utf8_lossy(&fetched.stderr));
    let staged = staged.keep();
    // Another test process may have been first.
    if std::fs::rename(&staged, &folder).is_err() {
        let _ = std::fs::remove_dir_all(&staged);
    }
    folder
}
