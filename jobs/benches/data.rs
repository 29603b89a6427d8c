//! Lathe's side of `make bench PART="ingest tokenizer"`: the work of ingestion's and the tokenizer's workers, in
//! this process. Answers a line with a line; `tests/bench` asks. Every answer is in seconds.
//!
//! | asked | timed |
//! |---|---|
//! | `ingest FILE` | from the file to a dataset's folder |
//! | `tokens FILE` | the same, and from there to token shards, as a training's `preparing` makes them |
//! | `train FILE VOCABULARY` | the training of a tokenizer on the file's dataset, which is made before |
//! | `encode FILE` | the encoding of the file's texts, which are read before |

use std::{
    error::Error,
    fs,
    io::{BufRead, Write},
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
    time::Instant,
};

use lathe_jobs::run::ingest::{self, FilesSource, InputFile, Source};
use lathe_model::{
    config::{Method, Objective},
    data::shards::{self, Shard},
    tokenizer::{self, Tokenizer},
};
use serde_json::Value;

type Fallible<T> = Result<T, Box<dyn Error>>;

struct Bench {
    folder: tempfile::TempDir,
    /// Where the last trained tokenizer lies; the peer reads it too.
    tokenizer: PathBuf,
}

impl Bench {
    fn answer(&self, question: &str) -> Fallible<f64> {
        let words: Vec<&str> = question.split_whitespace().collect();
        match words[..] {
            ["ingest", file] => self.ingest(file.as_ref()),
            ["tokens", file] => self.tokens(file.as_ref()),
            ["train", file, vocabulary] => self.train(file.as_ref(), vocabulary.parse()?),
            ["encode", file] => self.encode(file.as_ref()),
            _ => Err(format!("{question:?} is no question").into()),
        }
    }

    fn dataset(&self) -> PathBuf {
        self.folder.path().join("dataset")
    }

    /// A folder that is empty again.
    fn emptied(&self, name: &str) -> Fallible<PathBuf> {
        let folder = self.folder.path().join(name);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(folder),
        }
    }

    fn ingest(&self, file: &Path) -> Fallible<f64> {
        let output = self.emptied("dataset")?;
        let name = file.file_name().and_then(|name| name.to_str()).ok_or("a file has a name")?.to_owned();
        let input = InputFile { id: "file-bench".into(), name, path: file.to_owned() };
        let files = FilesSource {
            files: vec![input],
            format: Default::default(),
            columns: Default::default(),
            documents: Default::default(),
            on_bad_row: Default::default(),
        };
        let spec = ingest::IngestSpec {
            source: Source::Files(files),
            output,
            max_bytes: 8 << 30,
            max_ratio: 100,
            max_line_bytes: 8 << 20,
        };
        let begun = Instant::now();
        ingest::run(spec, &mut |_| {}, &AtomicBool::new(false)).map_err(|failure| failure.message)?;
        Ok(begun.elapsed().as_secs_f64())
    }

    fn tokens(&self, file: &Path) -> Fallible<f64> {
        let (tokenizer, cache) = (Tokenizer::load(&self.tokenizer)?, self.emptied("shards")?);
        let read = self.ingest(file)?;
        let method = Method::Pretrain { objective: Objective::CausalLm };
        let source = shards::Source {
            dataset: &self.dataset(),
            dataset_sha256: "bench",
            tokenizer: &tokenizer,
            tokenizer_sha256: tokenizer.sha256(),
            method: &method,
            context: 1024,
            threads: std::thread::available_parallelism()?.get(),
        };
        let begun = Instant::now();
        Shard::prepare(&cache, source).map_err(|failure| failure.message)?;
        Ok(read + begun.elapsed().as_secs_f64())
    }

    fn train(&self, file: &Path, vocabulary: i64) -> Fallible<f64> {
        self.ingest(file)?;
        fs::create_dir_all(&self.tokenizer)?;
        let begun = Instant::now();
        tokenizer::train(&self.dataset(), vocabulary, &self.tokenizer)?;
        Ok(begun.elapsed().as_secs_f64())
    }

    fn encode(&self, file: &Path) -> Fallible<f64> {
        let tokenizer = Tokenizer::load(&self.tokenizer)?;
        let mut texts = Vec::new();
        for line in fs::read_to_string(file)?.lines() {
            let row: Value = serde_json::from_str(line)?;
            texts.push(row["text"].as_str().ok_or("a row has a text")?.to_owned());
        }
        let begun = Instant::now();
        let tokens = tokenizer.encode_batch(&texts);
        let seconds = begun.elapsed().as_secs_f64();
        if tokens.len() != texts.len() {
            return Err("a text has no tokens".into());
        }
        Ok(seconds)
    }
}

fn main() -> Fallible<()> {
    let tokenizer = PathBuf::from(std::env::args().nth(1).ok_or("the folder of the tokenizer is missing")?);
    let bench = Bench { folder: tempfile::tempdir()?, tokenizer };
    for question in std::io::stdin().lock().lines() {
        println!("{}", bench.answer(&question?)?);
        std::io::stdout().flush()?;
    }
    Ok(())
}
