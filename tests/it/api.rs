//! The API alone, served in the test's own process on a port of its own, over a database that lives
//! as long as the test. No runner is there, so what a job would do stays queued.

use lathe_api::{
    auth::{self, DEFAULT_PROJECT, Scope},
    server,
    state::{ApiConfig, AppState},
};
use lathe_jobs::artifacts::Artifacts;
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::Value;
use sqlx::PgPool;

pub struct Api {
    pub base: String,
    /// Of the project `default`, with scope admin.
    pub key: String,
    /// Of another project, with scope project.
    pub other: String,
    pub state: AppState,
    pub client: reqwest::Client,
    pub artifacts: tempfile::TempDir,
}

impl Api {
    pub async fn start(db: PgPool) -> Api {
        Api::start_with(db, ApiConfig { disk_low_bytes: 0, ..ApiConfig::default() }).await
    }

    pub async fn start_with(db: PgPool, config: ApiConfig) -> Api {
        let mut conn = db.acquire().await.expect("the test's database");
        let key = "the-test-key".to_owned();
        auth::bootstrap(&mut conn, &key).await.expect("a fresh schema");
        sqlx::query("INSERT INTO projects (id, name) VALUES ('proj_other', 'other')")
            .execute(&mut *conn)
            .await
            .expect("a fresh schema");
        let other =
            auth::create_key(&mut conn, "proj_other", None, Scope::Project).await.expect("a project that is there").secret;
        drop(conn);
        let artifacts = tempfile::tempdir().expect("a temporary folder");
        let state = AppState::new(db, Artifacts::open(artifacts.path()).expect("a writable folder"), config);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let base = format!("http://{}", listener.local_addr().expect("it is bound"));
        tokio::spawn(server::serve(listener, state.clone()));
        Api { base, key, other, state, client: reqwest::Client::new(), artifacts }
    }

    /// A request with the key of the project `default`.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.base)).bearer_auth(&self.key)
    }

    pub async fn get(&self, path: &str) -> (StatusCode, Value) {
        answer(self.request(Method::GET, path)).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        answer(self.request(Method::POST, path).json(body)).await
    }

    pub async fn delete(&self, path: &str) -> (StatusCode, Value) {
        answer(self.request(Method::DELETE, path)).await
    }

    /// Uploads a file with the purpose `fine-tune`; its object.
    pub async fn upload(&self, filename: &str, content: &[u8]) -> Value {
        let (status, file) = answer(self.request(Method::POST, "/v1/files").multipart(form(filename, content))).await;
        assert_eq!(status, 200, "{file}");
        file
    }

    /// Files that lie under a folder of the artifact store.
    pub fn stored(&self, folder: &str) -> usize {
        std::fs::read_dir(self.artifacts.path().join(folder)).map_or(0, Iterator::count)
    }

    /// One of each resource in the project `default`, by the names that paths give them.
    pub async fn resources(&self) -> Vec<(&'static str, String)> {
        let file = self.upload("rows.jsonl", b"{\"text\": \"hello\"}\n").await["id"].as_str().expect("an id").to_owned();
        let begun = serde_json::json!({"filename": "a.txt", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/plain"});
        let upload = self.post("/v1/uploads", &begun).await.1["id"].as_str().expect("an id").to_owned();
        sqlx::raw_sql(sqlx::AssertSqlSafe(RESOURCES.replace("PROJECT", DEFAULT_PROJECT)))
            .execute(&self.state.db)
            .await
            .expect("rows that fit the schema");
        let key: String = sqlx::query_scalar("SELECT id FROM api_keys WHERE project_id = $1")
            .bind(DEFAULT_PROJECT)
            .fetch_one(&self.state.db)
            .await
            .expect("the key");
        vec![
            ("file_id", file),
            ("upload_id", upload),
            ("dataset_id", "ds_test".to_owned()),
            ("tokenizer_id", "tok_test".to_owned()),
            ("job_id", "ftjob-test".to_owned()),
            ("fine_tuning_job_id", "ftjob-test".to_owned()),
            ("model", "model-test".to_owned()),
            ("model_id", "model-test".to_owned()),
            ("project_id", DEFAULT_PROJECT.to_owned()),
            ("key_id", key),
        ]
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.state.shutdown.cancel();
    }
}

const RESOURCES: &str = r#"
INSERT INTO jobs (id, project_id, kind, state, pool, spec, base_model_id, queued_at) VALUES
    ('job_ds', 'PROJECT', 'ingest', 'queued', 'light', '{"kind": "ingest"}', NULL, now()),
    ('job_tok', 'PROJECT', 'tokenizer', 'queued', 'light', '{"kind": "tokenizer"}', NULL, now()),
    ('ftjob-test', 'PROJECT', 'train', 'queued', 'device', '{"kind": "train", "method": {"type": "instruction", "template": "ins"}}', 'model-base', now());
INSERT INTO datasets (id, project_id, name, state, job_id, source) VALUES ('ds_test', 'PROJECT', 'test', 'queued', 'job_ds', '{}');
INSERT INTO tokenizers (id, project_id, name, state, job_id, type) VALUES ('tok_test', 'PROJECT', 'test', 'queued', 'job_tok', 'bpe');
INSERT INTO models (id, project_id, name, state, job_id, config, code_version) VALUES ('model-test', 'PROJECT', 'test', 'queued', 'ftjob-test',
    '{"architecture": "gpt", "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "width": 8, "mlp_width": 32, "context": 16, "vocabulary": 272,
      "positions": "learned", "norm": "layer", "norm_eps": 1e-5, "activation": "gelu", "bias": true, "tie_embeddings": true, "dropout": 0,
      "rope_theta": 10000}', '0');
"#;

pub fn form(filename: &str, content: &[u8]) -> reqwest::multipart::Form {
    let part = reqwest::multipart::Part::bytes(content.to_vec()).file_name(filename.to_owned());
    reqwest::multipart::Form::new().text("purpose", "fine-tune").part("file", part)
}

/// Sends; status and JSON body (null where it is not JSON).
pub async fn answer(request: RequestBuilder) -> (StatusCode, Value) {
    let response = request.send().await.expect("an answer");
    let status = response.status();
    let body = response.bytes().await.expect("a whole answer");
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

/// That a refusal has OpenAI's shape; its `param`.
#[track_caller]
pub fn refused(case: &str, (status, body): &(StatusCode, Value), allowed: &[u16]) -> Option<String> {
    assert!(allowed.contains(&status.as_u16()), "{case}: {status} instead of {allowed:?}: {body}");
    let error = &body["error"];
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{case}: {body}");
    assert!(error["type"].is_string(), "{case}: {body}");
    assert!(error["code"].is_string() || error["code"].is_null(), "{case}: {body}");
    assert!(error.as_object().is_some_and(|error| error.contains_key("param")), "{case}: {body}");
    error["param"].as_str().map(str::to_owned)
}
