//! Tokenizers that requests have used, loaded once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use lathe_model::tokenizer::Tokenizer;

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
    /// The tokenizer at `key`; loaded outside the lock, so a slow load delays nobody else.
    pub fn get_or_load<E>(&self, key: &str, load: impl FnOnce() -> Result<Tokenizer, E>) -> Result<Arc<Tokenizer>, E> {
        if let Some(tokenizer) = self.touch(key) {
            return Ok(tokenizer);
        }
        let tokenizer = Arc::new(load()?);
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.clock += 1;
        let clock = kept.clock;
        kept.tokenizers.insert(key.to_owned(), (clock, tokenizer.clone()));
        if kept.tokenizers.len() > KEPT {
            let oldest = kept.tokenizers.iter().min_by_key(|(_, (used, _))| *used).map(|(key, _)| key.clone());
            oldest.and_then(|oldest| kept.tokenizers.remove(&oldest));
        }
        Ok(tokenizer)
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
