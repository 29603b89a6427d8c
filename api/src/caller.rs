//! The caller of a request, and the callers of a moment ago.
//!
//! A looked-up key is remembered for [`REMEMBERED`], which bounds how long a revoked key goes on working
//! in another process.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use lathe_jobs::audit::{Actor, Deed, Entry};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How long a looked-up key is trusted without asking again.
pub const REMEMBERED: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Everything of its project, and the installation: projects, keys, runners, metrics.
    Admin,
    /// Everything of its project.
    Project,
}

impl Scope {
    pub fn as_str(self) -> &'static str {
        match self {
            Scope::Admin => "admin",
            Scope::Project => "project",
        }
    }
}

/// The caller, with the project that all it does is confined to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Project {
    pub project_id: String,
    pub key_id: String,
    pub scope: Scope,
}

impl Project {
    /// For the audit log: what this caller did to something of its project.
    pub fn did<'a>(&'a self, deed: Deed, resource_id: &'a str) -> Entry<'a> {
        Entry { project_id: &self.project_id, actor: Actor::Key(&self.key_id), deed, resource_id }
    }
}

/// Keys that were looked up a moment ago, by hash.
#[derive(Debug, Default)]
pub struct KeyCache(Mutex<HashMap<String, (Instant, Project)>>);

impl KeyCache {
    pub fn get(&self, hash: &str) -> Option<Project> {
        let cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        cache.get(hash).filter(|(seen, _)| seen.elapsed() < REMEMBERED).map(|(_, caller)| caller.clone())
    }

    pub fn put(&self, hash: String, caller: Project) {
        let mut cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        cache.retain(|_, (seen, _)| seen.elapsed() < REMEMBERED);
        cache.insert(hash, (Instant::now(), caller));
    }

    /// Forgets a key that was just revoked here.
    pub fn forget(&self, key_id: &str) {
        let mut cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        cache.retain(|_, (_, caller)| caller.key_id != key_id);
    }
}
