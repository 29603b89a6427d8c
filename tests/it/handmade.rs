//! Models made by hand and put straight into the registry: no training, and what they say is known.

use std::path::Path;

use lathe_api::auth::DEFAULT_PROJECT;
use lathe_model::{
    data::rows::{Row, Writer},
    random,
    tokenizer::{self, MIN_VOCABULARY, Tokenizer},
};
use lathe_tests::TestApp;
use serde_json::{Value, json};
use sqlx::PgPool;

/// A model to be: its shape, tensors by name, and its tokenizer, in which every byte is a token.
pub struct Handmade {
    config: Value,
    tensors: Vec<(String, Vec<usize>, Vec<f32>)>,
    template: Option<&'static str>,
    folder: tempfile::TempDir,
}

/// Positions of a [`scripted`] model.
pub const SCRIPT: usize = 96;

/// The token of each byte.
pub fn ids(tokenizer: &Tokenizer, text: &[u8]) -> Vec<u32> {
    let id = |byte: &u8| (0..MIN_VOCABULARY as u32).find(|&id| tokenizer.token_bytes(id) == [*byte]).expect("a token");
    text.iter().map(id).collect()
}

/// What follows position p is byte p of the script, whatever stands before; then the end.
pub fn scripted(script: &str) -> Handmade {
    let mut model = Handmade::new(SCRIPT, json!({"positions": "learned", "layers": 1, "heads": 1, "kv_heads": 1}), SCRIPT);
    let tokenizer = model.tokenizer();
    // Positions are the unit vectors, and every head row points at the positions that its token follows.
    let unit = |row: usize| (0..SCRIPT).map(move |column| f32::from(u8::from(row == column)));
    let positions = (0..SCRIPT).flat_map(unit).collect();
    let mut head = vec![0f32; MIN_VOCABULARY as usize * SCRIPT];
    let said = ids(&tokenizer, script.as_bytes()).into_iter().chain(std::iter::repeat(tokenizer.roles().eos));
    for (position, token) in said.take(SCRIPT).enumerate() {
        head[token as usize * SCRIPT + position] = 1.0;
    }
    model.set("positions.weight", positions);
    model.set("head.weight", head);
    model
}

/// Random weights, wide enough that its choices are far from uniform. It never ends by itself.
pub fn endless(context: usize) -> Handmade {
    let mut model = Handmade::new(context, json!({"positions": "rotary", "layers": 2, "heads": 4, "kv_heads": 2}), 32);
    let eos = model.tokenizer().roles().eos as usize;
    for (name, shape, values) in &mut model.tensors {
        if shape.len() == 2 {
            random::normal(5, name, 0.24, 0, values);
        }
        match name.as_str() {
            // The last channel is always one, and speaks against the end.
            "norm.weight" => values[31] = 0.0,
            "norm.bias" => values[31] = 1.0,
            "head.weight" => {
                values.iter_mut().skip(31).step_by(32).for_each(|value| *value = 0.0);
                values[eos * 32 + 31] = -1e3;
            }
            _ => {}
        }
    }
    model
}

impl Handmade {
    fn new(context: usize, shape: Value, width: usize) -> Handmade {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let rows = folder.path().join("rows");
        let mut writer = Writer::create(&rows).expect("it is writable");
        writer.push(&Row::Text { text: "x".into() }).expect("a row");
        writer.finish().expect("it is writable");
        tokenizer::train(&rows, MIN_VOCABULARY, &folder.path().join("model")).expect("256 bytes");
        let number = |name: &str| shape[name].as_u64().expect("a number") as usize;
        let (layers, heads, kv_heads, vocabulary) =
            (number("layers"), number("heads"), number("kv_heads"), MIN_VOCABULARY as usize);
        let head_dim = width / heads;
        let config = json!({"architecture": "gpt", "layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
            "width": width, "mlp_width": width, "context": context, "vocabulary": vocabulary, "positions": shape["positions"],
            "norm": "layer", "norm_eps": 1e-5, "activation": "gelu", "bias": true, "tie_embeddings": false, "dropout": 0.0, "rope_theta": 10000.0});
        let mut model = Handmade { config, tensors: Vec::new(), template: None, folder };
        model.matrix("embedding", vocabulary, width);
        model.matrix("head", vocabulary, width);
        model.norm("norm", width);
        if shape["positions"] == "learned" {
            model.matrix("positions", context, width);
        }
        for layer in 0..layers {
            let name = |leaf: &str| format!("layers.{layer}.{leaf}");
            model.norm(&name("attention_norm"), width);
            model.norm(&name("mlp_norm"), width);
            let maps = [("q", heads * head_dim), ("k", kv_heads * head_dim), ("v", kv_heads * head_dim), ("output", width)];
            for (leaf, rows) in maps {
                model.linear(&name(&format!("attention.{leaf}")), rows, width);
            }
            model.linear(&name("mlp.up"), width, width);
            model.linear(&name("mlp.down"), width, width);
        }
        model
    }

    fn matrix(&mut self, name: &str, rows: usize, columns: usize) {
        self.tensors.push((format!("{name}.weight"), vec![rows, columns], vec![0.0; rows * columns]));
    }

    fn linear(&mut self, name: &str, rows: usize, columns: usize) {
        self.matrix(name, rows, columns);
        self.tensors.push((format!("{name}.bias"), vec![rows], vec![0.0; rows]));
    }

    fn norm(&mut self, name: &str, width: usize) {
        self.tensors.push((format!("{name}.weight"), vec![width], vec![1.0; width]));
        self.tensors.push((format!("{name}.bias"), vec![width], vec![0.0; width]));
    }

    fn set(&mut self, name: &str, values: Vec<f32>) {
        let tensor = self.tensors.iter_mut().find(|tensor| tensor.0 == name).expect("a tensor of this name");
        assert_eq!(tensor.2.len(), values.len());
        tensor.2 = values;
    }

    pub fn tokenizer(&self) -> Tokenizer {
        Tokenizer::load(&self.folder.path().join("model")).expect("it was just made")
    }

    /// The folder of a model of this width, which has no weights.
    pub fn of_width(mut self, width: usize) -> Handmade {
        let heads = self.config["heads"].as_u64().expect("a number") as usize;
        for (field, value) in [("width", width), ("mlp_width", width), ("head_dim", width / heads)] {
            self.config[field] = json!(value);
        }
        std::fs::write(self.folder().join("config.json"), json!({"model": self.config}).to_string()).expect("it is writable");
        self
    }

    pub fn folder(&self) -> std::path::PathBuf {
        self.folder.path().join("model")
    }

    /// Answers chat.
    pub fn with_template(mut self) -> Handmade {
        self.template = Some("ins");
        self
    }

    /// Puts it into the registry of a stack; its id.
    pub async fn register(self, app: &TestApp) -> String {
        let db = PgPool::connect(&app.database_url()).await.expect("the stack's database");
        let id = self.register_in(&db, &app.data_dir.join("artifacts")).await;
        db.close().await;
        id
    }

    /// Puts it into the registry of a database with these artifacts; its id.
    pub async fn register_in(self, db: &PgPool, artifacts: &Path) -> String {
        let id = lathe_jobs::ids::new("model").replace('_', "-");
        let artifact = format!("models/{id}");
        let folder = self.folder.path().join("model");
        std::fs::write(folder.join("weights.safetensors"), safetensors(&self.tensors)).expect("it is writable");
        std::fs::write(folder.join("config.json"), json!({"model": self.config}).to_string()).expect("it is writable");
        std::fs::create_dir_all(artifacts.join(&artifact)).expect("it is writable");
        for file in std::fs::read_dir(&folder).expect("it is there") {
            let file = file.expect("it is readable");
            std::fs::copy(file.path(), artifacts.join(&artifact).join(file.file_name())).expect("it is writable");
        }
        sqlx::query("INSERT INTO jobs (id, project_id, kind, state, pool, spec, finished_at) VALUES ($1, $2, 'train', 'succeeded', 'device', '{}', now())")
            .bind(format!("ftjob-{id}"))
            .bind(DEFAULT_PROJECT)
            .execute(db)
            .await
            .expect("a row that fits the schema");
        sqlx::query(
            "INSERT INTO models (id, project_id, name, state, job_id, config, template, artifact, code_version)
             VALUES ($1, $2, 'handmade', 'ready', $3, $4, $5, $6, '0')",
        )
        .bind(&id)
        .bind(DEFAULT_PROJECT)
        .bind(format!("ftjob-{id}"))
        .bind(&self.config)
        .bind(self.template)
        .bind(&artifact)
        .execute(db)
        .await
        .expect("a row that fits the schema");
        id
    }
}

/// The file's format: the header's length, the header, the numbers.
fn safetensors(tensors: &[(String, Vec<usize>, Vec<f32>)]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape, values) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        header.insert(name.clone(), json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}));
    }
    let mut header = Value::Object(header).to_string();
    // The numbers begin at a multiple of eight.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}
