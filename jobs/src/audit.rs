//! The audit log: what was created, changed by hand, deleted, cancelled and revoked, when, and by which key.
//!
//! An entry is written in the transaction of the deed, so neither is there without the other. It holds ids
//! and never what they name, and stays when that goes; [`prune`] ends it. Work that goes on by itself (a job
//! that succeeds, the model that it makes) is in the job's events and the lineage, not here.

use sqlx::{PgConnection, PgPool};

use crate::ids;

/// Who did it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Actor<'a> {
    /// The id of an API key.
    Key(&'a str),
    /// `lathe key`, by whoever reaches the database.
    Shell,
    /// Housekeeping: something expired.
    System,
}

impl<'a> Actor<'a> {
    fn columns(self) -> (&'static str, Option<&'a str>) {
        match self {
            Actor::Key(id) => ("api_key", Some(id)),
            Actor::Shell => ("shell", None),
            Actor::System => ("system", None),
        }
    }
}

/// What was done to what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    ProjectCreated,
    QuotasChanged,
    KeyCreated,
    KeyRevoked,
    FileCreated,
    FileDeleted,
    UploadCreated,
    UploadCancelled,
    DatasetCreated,
    DatasetDeleted,
    TokenizerCreated,
    TokenizerDeleted,
    TrainingJobCreated,
    TrainingJobPaused,
    TrainingJobResumed,
    TrainingJobCancelled,
    TrainingJobDeleted,
    ModelDeleted,
    LogFilterSet,
    LogFilterDeleted,
}

impl Deed {
    pub const ALL: [Deed; 20] = [
        Deed::ProjectCreated,
        Deed::QuotasChanged,
        Deed::KeyCreated,
        Deed::KeyRevoked,
        Deed::FileCreated,
        Deed::FileDeleted,
        Deed::UploadCreated,
        Deed::UploadCancelled,
        Deed::DatasetCreated,
        Deed::DatasetDeleted,
        Deed::TokenizerCreated,
        Deed::TokenizerDeleted,
        Deed::TrainingJobCreated,
        Deed::TrainingJobPaused,
        Deed::TrainingJobResumed,
        Deed::TrainingJobCancelled,
        Deed::TrainingJobDeleted,
        Deed::ModelDeleted,
        Deed::LogFilterSet,
        Deed::LogFilterDeleted,
    ];

    /// `file.created`.
    pub fn as_str(self) -> &'static str {
        match self {
            Deed::ProjectCreated => "project.created",
            Deed::QuotasChanged => "project.quotas_changed",
            Deed::KeyCreated => "api_key.created",
            Deed::KeyRevoked => "api_key.revoked",
            Deed::FileCreated => "file.created",
            Deed::FileDeleted => "file.deleted",
            Deed::UploadCreated => "upload.created",
            Deed::UploadCancelled => "upload.cancelled",
            Deed::DatasetCreated => "dataset.created",
            Deed::DatasetDeleted => "dataset.deleted",
            Deed::TokenizerCreated => "tokenizer.created",
            Deed::TokenizerDeleted => "tokenizer.deleted",
            Deed::TrainingJobCreated => "training_job.created",
            Deed::TrainingJobPaused => "training_job.paused",
            Deed::TrainingJobResumed => "training_job.resumed",
            Deed::TrainingJobCancelled => "training_job.cancelled",
            Deed::TrainingJobDeleted => "training_job.deleted",
            Deed::ModelDeleted => "model.deleted",
            Deed::LogFilterSet => "log_filter.set",
            Deed::LogFilterDeleted => "log_filter.deleted",
        }
    }

    /// Whether it can happen to a resource again. What cannot is written once, however often it is asked for.
    fn repeats(self) -> bool {
        match self {
            Deed::QuotasChanged
            | Deed::TrainingJobPaused
            | Deed::TrainingJobResumed
            | Deed::LogFilterSet
            | Deed::LogFilterDeleted => true,
            Deed::ProjectCreated
            | Deed::KeyCreated
            | Deed::KeyRevoked
            | Deed::FileCreated
            | Deed::FileDeleted
            | Deed::UploadCreated
            | Deed::UploadCancelled
            | Deed::DatasetCreated
            | Deed::DatasetDeleted
            | Deed::TokenizerCreated
            | Deed::TokenizerDeleted
            | Deed::TrainingJobCreated
            | Deed::TrainingJobCancelled
            | Deed::TrainingJobDeleted
            | Deed::ModelDeleted => false,
        }
    }
}

/// An entry to write.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// The resource's.
    pub project_id: &'a str,
    pub actor: Actor<'a>,
    pub deed: Deed,
    pub resource_id: &'a str,
}

/// Writes the entry in the caller's transaction, unless it is of what happens to a resource once, and did. Of the
/// others it is the caller who knows whether anything has changed.
pub async fn record(conn: &mut PgConnection, entry: Entry<'_>) -> Result<(), sqlx::Error> {
    let (actor, key_id) = entry.actor.columns();
    sqlx::query!(
        "INSERT INTO audit_log (id, type, resource_id, project_id, actor, key_id, repeats) VALUES ($1, $2, $3, $4, $5, $6, $7)
         ON CONFLICT (resource_id, type) WHERE NOT repeats DO NOTHING",
        ids::new("audit"),
        entry.deed.as_str(),
        entry.resource_id,
        entry.project_id,
        actor,
        key_id,
        entry.deed.repeats(),
    )
    .execute(conn)
    .await
    .map(drop)
}

/// Removes entries that are older than so many days.
pub async fn prune(db: &PgPool, days: u16) -> Result<(), sqlx::Error> {
    let pruned = sqlx::query!("DELETE FROM audit_log WHERE created_at < now() - make_interval(days => $1)", i32::from(days));
    pruned.execute(db).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[sqlx::test(migrations = "../migrations")]
    async fn entries_are_written_once_and_go_when_they_are_old(db: PgPool) {
        let mut conn = db.acquire().await.expect("the database is there");
        let entry =
            |resource_id| Entry { project_id: "proj_1", actor: Actor::Key("key_1"), deed: Deed::FileDeleted, resource_id };
        for resource_id in ["file-old", "file-new", "file-new"] {
            record(&mut conn, entry(resource_id)).await.expect("a new row");
        }
        let again = Entry { actor: Actor::System, ..entry("file-new") };
        record(&mut conn, again).await.expect("it is there already");
        sqlx::query("UPDATE audit_log SET created_at = now() - interval '31 days' WHERE resource_id = 'file-old'")
            .execute(&mut *conn)
            .await
            .expect("it is there");
        prune(&db, 30).await.expect("the database is there");
        let left: Vec<(String, Option<String>)> =
            sqlx::query_as("SELECT resource_id, key_id FROM audit_log").fetch_all(&db).await.expect("rows");
        assert_eq!(left, [("file-new".to_owned(), Some("key_1".to_owned()))]);
    }
}
