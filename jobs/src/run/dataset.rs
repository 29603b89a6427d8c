//! An ingestion around its worker: files and datasets become paths, bad rows become rows.

use std::{fs, path::Path};

use lathe_model::{
    failure,
    protocol::{FailureCode, Task},
};
use sqlx::{Connection, PgPool};

use super::{
    PrepareError, dataset_folder, fetched, gone,
    ingest::{BadRow, FilesSource, IngestSpec, InputFile, MAX_KEPT_ERRORS, Source, TemplateSource},
};
use crate::{
    context::Context,
    housekeeping,
    lease::{self, Claimed, LeaseError},
    spec::DatasetSource,
    state::Kind,
    waiting::{self, answered},
};

/// Where the worker builds the dataset's folder.
const FOLDER: &str = "dataset";

pub async fn task(context: &Context, source: DatasetSource, staging: &Path) -> Result<Task, PrepareError> {
    let source = match source {
        DatasetSource::Files { files, format, columns, documents, on_bad_row } => {
            let mut inputs = Vec::with_capacity(files.len());
            for id in files {
                inputs.push(input_file(context, id).await?);
            }
            Source::Files(FilesSource { files: inputs, format, columns, documents, on_bad_row })
        }
        DatasetSource::Template { rows, seed, exclude, templates } => {
            let mut folders = Vec::with_capacity(exclude.len());
            for id in exclude {
                folders.push(dataset_folder(context, Some(&id)).await?.folder);
            }
            Source::Template(TemplateSource { rows, seed, templates, exclude: folders })
        }
    };
    let disk = housekeeping::disk_state(&context.artifacts, context.config.disk_low_bytes);
    let max_bytes = disk.map_or(u64::MAX, |disk| disk.free_bytes.saturating_sub(context.config.disk_low_bytes));
    let max_ratio = context.config.decompression_ratio;
    let spec = IngestSpec { source, output: staging.join(FOLDER), max_bytes, max_ratio, max_line_bytes: 8 << 20 };
    let spec = serde_json::to_value(spec).map_err(|error| failure::new(FailureCode::Internal, error.to_string()))?;
    Ok(Task::Ingest(spec))
}

async fn input_file(context: &Context, id: String) -> Result<InputFile, PrepareError> {
    let row = sqlx::query!("SELECT filename, artifact FROM files WHERE id = $1 AND deleted_at IS NULL", id)
        .fetch_optional(&context.db)
        .await?
        .ok_or_else(|| gone("file", &id))?;
    Ok(InputFile { id, name: row.filename, path: fetched(context, &row.artifact).await? })
}

/// Writes the bad rows that an ingestion found into its dataset's rows, also when it failed for them.
/// They explain an outcome and do not decide it: what cannot be written is logged.
pub async fn note_bad_rows(db: &PgPool, claimed: &Claimed, staging: &Path) {
    if claimed.kind != Kind::Ingest {
        return;
    }
    let file = staging.join(FOLDER).join("errors.jsonl");
    let read = waiting::blocking(move || fs::read_to_string(file)).await;
    let Ok(Ok(lines)) = read else { return };
    let limit = usize::try_from(MAX_KEPT_ERRORS).unwrap_or(usize::MAX);
    let bad: Vec<BadRow> = lines.lines().take(limit).filter_map(|line| serde_json::from_str(line).ok()).collect();
    if let Err(error) = answered(write(db, claimed, &bad)).await {
        tracing::error!(job.id = claimed.lease.job_id, %error, "the bad rows of a dataset could not be written");
    }
}

async fn write(db: &PgPool, claimed: &Claimed, bad: &[BadRow]) -> Result<(), LeaseError> {
    let mut conn = db.acquire().await?;
    let mut tx = conn.begin().await?;
    lease::fence(&mut tx, &claimed.lease).await?;
    let Some(dataset) =
        sqlx::query_scalar!("SELECT id FROM datasets WHERE job_id = $1", claimed.lease.job_id).fetch_optional(&mut *tx).await?
    else {
        return Ok(());
    };
    sqlx::query!("DELETE FROM dataset_errors WHERE dataset_id = $1", dataset).execute(&mut *tx).await?;
    // An array of arrays must be rectangular, so each row's keys travel as JSON.
    let keys: Vec<serde_json::Value> = bad.iter().map(|row| row.keys.clone().into()).collect();
    let fields: Vec<Option<String>> = bad.iter().map(|row| row.field.clone()).collect();
    sqlx::query!(
        "INSERT INTO dataset_errors (dataset_id, n, file, line, code, field, message, keys)
         SELECT $1, n, file, line, code, field, message, ARRAY(SELECT jsonb_array_elements_text(keys))
         FROM unnest($2::text[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::jsonb[])
             WITH ORDINALITY AS bad (file, line, code, field, message, keys, n)",
        dataset,
        &bad.iter().map(|row| row.file.clone()).collect::<Vec<_>>(),
        &bad.iter().map(|row| i64::try_from(row.line).unwrap_or(i64::MAX)).collect::<Vec<_>>(),
        &bad.iter().map(|row| row.code.as_str().to_owned()).collect::<Vec<_>>(),
        &fields as &[Option<String>],
        &bad.iter().map(|row| row.message.clone()).collect::<Vec<_>>(),
        &keys,
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(())
}
