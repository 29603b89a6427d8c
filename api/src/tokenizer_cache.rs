//! Tokenizers that requests have used, loaded once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use lathe_jobs::{artifacts::Artifacts, waiting};
use lathe_model::tokenizer::Tokenizer;

use crate::problem::ApiError;

/// Tokenizers kept in memory; the least recently used goes first.
const KEPT: usize = 16;

/// Loaded tokenizers by artifact key. An artifact never changes, so nothing here goes stale.
#[derive(Default)]
pub struct TokenizerCache(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    clock: u64,
    tokenizers: HashMap<String, (u64, Arc<Tokenizer>)>,
}

impl TokenizerCache {
    /// The tokenizer of the artifact at `key`, which may be a model's; `None` where there is no such artifact.
    /// Loaded outside the lock, so a slow load delays nobody else.
    pub async fn load(&self, artifacts: &Artifacts, key: &str) -> Result<Option<Arc<Tokenizer>>, ApiError> {
        if let Some(tokenizer) = self.touch(key) {
            return Ok(Some(tokenizer));
        }
        let Some(folder) = artifacts.fetch_files(key, &Tokenizer::FILES).await? else { return Ok(None) };
        let loaded = waiting::blocking(move || Tokenizer::load(&folder)).await.map_err(ApiError::internal)?;
        Ok(Some(self.keep(key, Arc::new(loaded.map_err(ApiError::internal)?))))
    }

    fn keep(&self, key: &str, tokenizer: Arc<Tokenizer>) -> Arc<Tokenizer> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.clock += 1;
        let clock = kept.clock;
        kept.tokenizers.insert(key.to_owned(), (clock, tokenizer.clone()));
        if kept.tokenizers.len() > KEPT {
            let oldest = kept.tokenizers.iter().min_by_key(|(_, (used, _))| *used).map(|(key, _)| key.clone());
            oldest.and_then(|oldest| kept.tokenizers.remove(&oldest));
        }
        tokenizer
    }

    fn touch(&self, key: &str) -> Option<Arc<Tokenizer>> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.clock += 1;
        let clock = kept.clock;
        let (used, tokenizer) = kept.tokenizers.get_mut(key)?;
        *used = clock;
        Some(tokenizer.clone())
    }
}
